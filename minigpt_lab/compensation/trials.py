"""Measurements of budgets on held-out tokens, each done once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional

from ..store import ResultCache, Shards, cache_key
from .budgets import Budget
from .supernetwork import Supernet


class Trials:
    """Measure budgets: the KL divergence from the dense predictions, and how it rises.

    The supernet is filled only when something must be measured that is not in the cache.

    Parameters
    ----------
    net : Supernet
        A supernet that is not filled yet.
    fill : callable
        Fills it.
    held_out : sequence of dict
        Batches of tokens on which budgets are measured.
    cache : ResultCache
        Earlier measurements.
    facts : dict
        Everything else than the budget that a measurement depends on; part of the cache's key.
    """

    def __init__(
        self,
        net: Supernet,
        fill: Callable[[], None],
        held_out: Sequence[dict[str, torch.Tensor]],
        cache: ResultCache,
        facts: dict,
    ):
        self.net, self.fill, self.held_out, self.cache = net, fill, held_out, cache
        self.key = cache_key(facts)
        self.n_tokens = sum(batch["input_ids"].numel() for batch in held_out)
        self.dense: Shards | None = None  # log-probabilities of the dense model

    def divergence(self, budget: Budget) -> float:
        """Mean KL divergence of a token's predictions from the dense ones, in nats."""

        def measure() -> dict[str, float]:
            self._set(budget)
            total = sum(float(self._loss(window)) for window in range(len(self.held_out)))
            _require_finite(total)
            return {"kl": total / self.n_tokens}

        return self.cache.get([self.key, budget], measure)["kl"]

    def rises(self, window: int, budget: Budget, below: Budget, above: Budget) -> np.ndarray:
        """Rise of the divergence from one level of each site to a higher one ``[site]``.

        Estimated on one window, with the model set to `budget`; see `Supernet.rises`.
        """

        def measure() -> dict[str, list[float]]:
            self._set(budget)
            # divided by the tokens only afterwards: in float16 small gradients would become 0
            rises = self.net.rises(lambda: self._loss(window), below, above)
            _require_finite(rises)
            return {"rises": (rises * len(self.held_out) / self.n_tokens).tolist()}

        key = [self.key, window, budget, below, above]
        return np.array(self.cache.get(key, measure)["rises"])

    def _set(self, budget: Budget) -> None:
        """Set the model to a budget; before the first one, fill the supernet."""
        if self.dense is None:
            # 1. Compute all levels.
            self.fill()
            # 2. Keep the dense model's predictions.
            self.net.set((0,) * len(budget))
            self.dense = Shards(self.net.offload)
            for window in range(len(self.held_out)):
                predictions = self._predictions(window)
                _require_finite(predictions)
                # float16 is finest near log p = 0: at likely tokens, which weigh most
                self.dense[window] = predictions.half()
        self.net.set(budget)

    def _loss(self, window: int) -> torch.Tensor:
        """KL divergence, summed over the tokens of a window."""
        dense = self.dense[window].float()
        predictions = self._predictions(window)
        return functional.kl_div(predictions, dense, reduction="sum", log_target=True)

    def _predictions(self, window: int) -> torch.Tensor:
        """Log-probabilities of the next token ``[window, token, vocabulary]``."""
        model = self.net.anatomy.model
        ids = self.held_out[window]["input_ids"].to(model.device)
        return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)


def _require_finite(values: float | np.ndarray | torch.Tensor) -> None:
    """Refuse measurements that are not finite."""
    if not torch.isfinite(torch.as_tensor(values)).all():
        raise ValueError(
            "the predictions are not finite: check the model's weights, and search in float32 or "
            "bfloat16"
        )
