"""What budgets do to a model's predictions, measured once each."""

from __future__ import annotations

import json

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ..store import ResultCache, Shards, content_hash
from .budgets import Budget
from .supernetwork import Supernet, find_levels


class Trials:
    """Measures budgets on some tokens; levels are found only if one is not known already.

    Parameters
    ----------
    model, chosen
        What is measured, and the tokens ``[window, token]`` on which.
    recipe : dict
        What the measurements depend on, beside the budget.
    net : Supernet
        Filled when something is to be measured.
    build : tuple
        Arguments of `find_levels` after the supernet.
    dense : Shards
        Where the dense predictions wait.
    ledger : ResultCache
        Where measurements are kept.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        chosen: list[torch.Tensor],
        recipe: dict,
        net: Supernet,
        build: tuple,
        dense: Shards,
        ledger: ResultCache,
    ):
        self.model, self.chosen, self.net, self.build = model, chosen, net, build
        self.dense, self.ledger = dense, ledger
        self.recipe = content_hash([json.dumps(recipe, sort_keys=True)])
        self.tokens = sum(ids.numel() for ids in chosen)
        self.ready = False

    def divergence(self, budget: Budget) -> float:
        """Mean KL divergence of a token's predictions from the dense ones, in nats."""
        return self.ledger.get([self.recipe, budget], lambda: self._measured(budget))["kl"]

    def slopes(self, window: int, below: Budget, budget: Budget) -> np.ndarray:
        """What it would rise by from level to level, judged by one window ``[group]``."""
        recipe = [self.recipe, budget, below, window]
        found = self.ledger.get(recipe, lambda: self._sloped(budget, below, window))
        return np.array(found["rises"])

    def _supernet(self, budget: Budget) -> Supernet:
        if not self.ready:
            find_levels(self.model, self.net, *self.build)
            self.net.set_all((0,) * len(budget))
            for index in range(len(self.chosen)):
                # float16 is the finer the more likely a token is, and so the more it counts
                predictions = self._predictions(index)
                if not torch.isfinite(predictions).all():
                    raise ValueError(
                        "the model's own predictions are not finite: check its weights"
                    )
                self.dense[index] = predictions.half()
            self.ready = True
        self.net.set_all(budget)
        return self.net

    def _measured(self, budget: Budget) -> dict[str, float]:
        self._supernet(budget)
        total = sum(float(self._divergence(index)) for index in range(len(self.chosen)))
        _require_finite(total)
        return {"kl": total / self.tokens}

    def _sloped(self, budget: Budget, below: Budget, window: int) -> dict[str, list[float]]:
        # divided only afterwards: small slopes would be lost in float16
        _, rises = self._supernet(budget).slopes(lambda: self._divergence(window), below)
        _require_finite(rises)
        return {"rises": (rises * len(self.chosen) / self.tokens).tolist()}

    def _divergence(self, index: int) -> torch.Tensor:
        found, dense = self._predictions(index), self.dense[index].float()
        return functional.kl_div(found, dense, reduction="sum", log_target=True)

    def _predictions(self, index: int) -> torch.Tensor:
        ids = self.chosen[index].to(self.model.device)
        return self.model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)


def _require_finite(found: float | np.ndarray) -> None:
    if not np.isfinite(found).all():
        raise ValueError(
            "the pruned model's predictions are not finite: search in float32 or bfloat16"
        )
