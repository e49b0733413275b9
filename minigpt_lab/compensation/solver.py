"""Settings of the optimal brain surgeon."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from ..calibration import DAMPING_MODES
from ..checks import Flag, Integer, Number, OneOf, check_fields, invalid, suggest
from ..models import dtype_name
from .saliencies import SALIENCIES


@dataclass(frozen=True)
class Solver:
    """Settings of the optimal brain surgeon; see `eliminate`.

    Parameters
    ----------
    saliency : {"exact", "slimgpt", "diag"}
        Estimate of the loss of removing one head: the exact one, SlimGPT's, or that of SlimGPT's
        ablation. For channels, which are single columns, all three agree.
    block_size : int or "dynamic"
        Channels removed between two updates of the weights. Heads are removed one at a time.
    damping, damping_mode : float, {"feature", "mean"}
        Share of its diagonal that is added to the second moment, see `damped_inverse`. SparseGPT
        and SlimGPT's code take 0.01 of the diagonal's mean (``damping_mode="mean"``). With a few
        thousand calibration tokens that overfits: to some degree on text of their domain, far more
        on other text.
    bias : {"refit", "add", "keep"}
        How the projection's bias compensates for the mean of the removed inputs: ``"refit"``
        updates a bias that exists, ``"add"`` also adds one where there is none, ``"keep"`` changes
        none.
    compensate : bool
        Whether weights and biases are updated at all.
    dtype : torch.dtype
        float32 or float64, for second moments and all that is computed from them.
    """

    saliency: str = "exact"
    block_size: str | int = "dynamic"
    damping: float = 0.3
    damping_mode: str = "feature"
    bias: str = "refit"
    compensate: bool = True
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        check_fields(
            self,
            saliency=OneOf(SALIENCIES),
            block_size=Integer(1) | OneOf(["dynamic"]),
            damping=Number(0),
            damping_mode=OneOf(DAMPING_MODES),
            bias=OneOf(["refit", "add", "keep"]),
            compensate=Flag(),
        )
        if self.dtype not in (torch.float32, torch.float64):
            raise invalid("dtype", self.dtype, "torch.float32 or torch.float64")

    @classmethod
    def from_options(cls, options: Mapping[str, Any], others: Iterable[str]) -> Solver:
        """Settings from a function's ``**options``.

        The error for an unknown option suggests the nearest of the settings and of `others`, the
        function's other arguments.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise ValueError(f"unknown option {name!r}; {suggest(name, [*known, *others])}")
        return cls(**options)

    def to_dict(self) -> dict[str, object]:
        """The settings as plain data."""
        return {**asdict(self), "dtype": dtype_name(self.dtype)}

    def updates_bias(self, module: nn.Module) -> bool:
        """Whether a projection's bias compensates for the mean of the removed inputs."""
        has_bias = self.bias == "add" or (self.bias == "refit" and module.bias is not None)
        return self.compensate and has_bias
