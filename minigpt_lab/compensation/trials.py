"""Measurements of budgets on held-out tokens, each done once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from ..store import ResultCache, Shards, cache_key
from .budgets import Budget
from .supernetwork import Supernet


class Trials:
    """Measure budgets: the KL divergence from the dense predictions, and its slopes.

    The supernet is filled only when something must be measured that is not in the cache.

    Parameters
    ----------
    net : Supernet
        A supernet that is not filled yet.
    base, windows : tuple of int, sequence of torch.Tensor
        Arguments of `Supernet.fill`.
    held_out : sequence of torch.Tensor
        Tokens on which budgets are measured ``[window, token]``.
    cache : ResultCache
        Earlier measurements.
    facts : dict
        Everything else than the budget that a measurement depends on; part of the cache's key.
    progress : bool
        Show a progress bar.
    """

    def __init__(
        self,
        net: Supernet,
        base: Budget,
        windows: Sequence[torch.Tensor],
        held_out: Sequence[torch.Tensor],
        cache: ResultCache,
        facts: dict,
        progress: bool,
    ):
        self.net, self.fill_with = net, (windows, base, progress)
        self.held_out, self.cache = held_out, cache
        self.key = cache_key(facts)
        self.n_tokens = sum(ids.numel() for ids in held_out)
        self.dense: Shards | None = None  # log-probabilities of the dense model

    def divergence(self, budget: Budget) -> float:
        """Mean KL divergence of a token's predictions from the dense ones, in nats."""
        return self.cache.get([self.key, budget], lambda: self._divergence(budget))["kl"]

    def slopes(self, window: int, below: Budget, budget: Budget) -> np.ndarray:
        """Rise of the divergence from each site's level in `below` to the next ``[site]``.

        Estimated on one window, with the model set to `budget`; see `Supernet.slopes`.
        """
        key = [self.key, budget, below, window]
        result = self.cache.get(key, lambda: self._slopes(window, below, budget))
        return np.array(result["rises"])

    def _divergence(self, budget: Budget) -> dict[str, float]:
        self._set(budget)
        total = sum(float(self._loss(window)) for window in range(len(self.held_out)))
        _require_finite(total)
        return {"kl": total / self.n_tokens}

    def _slopes(self, window: int, below: Budget, budget: Budget) -> dict[str, list[float]]:
        self._set(budget)
        # divided by the tokens only afterwards: in float16 small gradients would become 0
        rises = self.net.slopes(lambda: self._loss(window), below)
        _require_finite(rises)
        return {"rises": (rises * len(self.held_out) / self.n_tokens).tolist()}

    def _set(self, budget: Budget) -> None:
        """Set the model to a budget; before the first one, fill the supernet."""
        if self.dense is None:
            # 1. Compute all levels.
            self.net.fill(*self.fill_with)
            # 2. Keep the dense model's predictions (level 0 everywhere).
            self.net.set_all((0,) * len(budget))
            self.dense = Shards(self.net.offload)
            for window in range(len(self.held_out)):
                predictions = self._predictions(window)
                if not torch.isfinite(predictions).all():
                    raise ValueError(
                        "the model's own predictions are not finite: check its weights"
                    )
                # float16 is finest near log p = 0: at likely tokens, which weigh most
                self.dense[window] = predictions.half()
        self.net.set_all(budget)

    def _loss(self, window: int) -> torch.Tensor:
        """KL divergence, summed over the tokens of a window."""
        dense = self.dense[window].float()
        predictions = self._predictions(window)
        return functional.kl_div(predictions, dense, reduction="sum", log_target=True)

    def _predictions(self, window: int) -> torch.Tensor:
        """Log-probabilities of the next token ``[window, token, vocabulary]``."""
        model = self.net.anatomy.model
        ids = self.held_out[window].to(model.device)
        return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)


def _require_finite(values: float | np.ndarray) -> None:
    """Refuse measurements that are not finite."""
    if not np.isfinite(values).all():
        raise ValueError(
            "the pruned model's predictions are not finite: search in float32 or bfloat16"
        )
