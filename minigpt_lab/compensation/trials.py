"""Measurements of budgets on held-out tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from ..store import Shards
from .budgets import Budget
from .calibration_windows import CalibrationWindows
from .supernetwork import Supernet


class Trials:
    """Measure budgets: the KL divergence from the dense predictions, and how it rises.

    Parameters
    ----------
    net : Supernet
        A filled supernet.
    held_out : CalibrationWindows
        Tokens on which budgets are measured, with their weights.

    Raises
    ------
    ValueError
        If predictions are not finite, those of the dense model or later a budget's.
    """

    def __init__(self, net: Supernet, held_out: CalibrationWindows):
        self.net, self.held_out, self.weights = net, held_out.windows, held_out.weights
        self.n_tokens = sum(ids.numel() for ids in self.held_out)
        net.set((0,) * len(net.projections))
        self.dense = Shards(net.offload)  # log-probabilities of the dense model
        for window in range(len(self.held_out)):
            predictions = self._predictions(window)
            _require_finite(predictions)
            # float16 is finest near log p = 0: at likely tokens, which weigh most
            self.dense[window] = predictions.half()

    def divergence(self, budget: Budget) -> float:
        """Mean KL divergence of a token's predictions from the dense ones, in nats."""
        self.net.set(budget)
        losses = (float(self._loss(window)) for window in range(len(self.held_out)))
        total = sum(w * loss for w, loss in zip(self.weights, losses, strict=True))
        _require_finite(total)
        return total / self.n_tokens

    def rises(self, window: int, budget: Budget, below: Budget, above: Budget) -> np.ndarray:
        """Rise of the divergence from one level of each site to a higher one ``[site]``.

        Estimated on one window, with the model set to `budget`; see `Supernet.rises`.
        """
        self.net.set(budget)
        # divided by the tokens only afterwards: in float16 small gradients would become 0
        rises = self.net.rises(lambda: self._loss(window), below, above)
        _require_finite(rises)
        return rises * self.weights[window] * len(self.held_out) / self.n_tokens

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


def _require_finite(values: float | np.ndarray | torch.Tensor) -> None:
    """Refuse measurements that are not finite."""
    if not torch.isfinite(torch.as_tensor(values)).all():
        raise ValueError(
            "the predictions are not finite: check the model's weights, and search in float32 or "
            "bfloat16"
        )
