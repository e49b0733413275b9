"""Sums over tokens of what linear layers read and write."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn

from ..checks import safe_contextmanager
from ..models import weight_axis
from .forward import watch

_BLOCK = 256  # rows of activations summed at once on a CPU: they fit into its cache
Key = tuple[str, str]  # (module name, "input" or "output")

#: Rows of a table of `FeatureSums`: sums of |x|, x and x² over tokens, and of |x - bias| for
#: outputs of layers with a bias.
SUMS = ("absolute", "sum", "square", "unbiased")


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64 keeps sums of millions of tokens exact; MPS has none."""
    return torch.float32 if device.type == "mps" else torch.float64


class Moments:
    """First and second moments over tokens of what one linear layer reads.

    Sums are of ``x - c``, with *c* the mean of the first tokens: around the mean of large and
    nearly constant features nothing is then lost to rounding.

    Parameters
    ----------
    dtype, sums : torch.dtype
        Of the products, and of their sums.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, sums: torch.dtype | None = None):
        self.dtype, self.sums = dtype, sums or dtype
        self.count = 0
        self.weight = 0.0

    def add(self, states: torch.Tensor, weight: float = 1.0) -> None:
        """Add the tokens of ``[…, feature]``, each with a weight."""
        x = states.detach().flatten(0, -2).to(self.dtype)  # [token, feature]
        if not self.count:
            self.shift = x.mean(0)
            self.square = x.new_zeros(x.shape[1], x.shape[1], dtype=self.sums)
            self.sum = x.new_zeros(x.shape[1], dtype=self.sums)
        x = x - self.shift
        if self.sums == self.dtype:
            self.square.addmm_(x.T, x, alpha=weight)
        else:
            self.square += weight * (x.T @ x)
        self.sum += weight * x.sum(0)
        self.count += len(x)
        self.weight += weight * len(x)

    @property
    def mean(self) -> torch.Tensor:
        """``E[x]``."""
        return self.shift + self.sum / self.weight

    def covariance(self) -> torch.Tensor:
        """``E[(x - E[x]) (x - E[x])ᵀ]``; exactly 0 for features that only rounding moves."""
        offset = self.sum / self.weight
        C = (self.square / self.weight).addr_(offset, offset, alpha=-1)
        constant = C.diagonal() <= (2 * torch.finfo(torch.float32).eps * self.mean).square()
        return C.masked_fill_(constant | constant[:, None], 0)

    def second(self) -> torch.Tensor:
        """``E[x xᵀ] = E[(x - c) (x - c)ᵀ] + c E[x - c]ᵀ + E[x] cᵀ``."""
        c = self.shift.to(self.sums)
        H = (self.square / self.weight).addr_(c, self.sum / self.weight)
        return H.addr_(self.mean.to(self.sums), c)


@safe_contextmanager
def second_moments(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Moments]]:
    """Moments of all tokens that linear layers read while the block runs, by the layers' names.

    Layers that read one tensor (q, k and v) share them.
    """
    moments: dict[str, Moments] = {}
    last: tuple[torch.Tensor, str] | None = None

    def add(name: str, x: torch.Tensor) -> None:
        nonlocal last
        if last is not None and x is last[0]:
            moments[name] = moments[last[1]]
            return
        moments.setdefault(name, Moments(sums=sum_dtype(x.device))).add(x)
        last = x, name

    with watch(modules, before=add):
        yield moments


class FeatureSums:
    """Sums over tokens of every feature that linear layers read and write (see `SUMS`).

    Hooks add to tensors on the model's device and never wait for it.

    Parameters
    ----------
    modules : mapping
        Linear layers by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        self.modules = modules
        self.shared: dict[str, str] = {}
        # made before the pass: scattered between activations they would keep that memory in use
        self.sums: dict[Key, torch.Tensor] = {
            (name, side): torch.zeros(
                3 if side == "input" or module.bias is None else 4,
                module.weight.shape[weight_axis(module, side)],
                dtype=sum_dtype(module.weight.device),
                device=module.weight.device,
            )
            for name, module in modules.items()
            for side in ("input", "output")
        }
        # summed is the distance from a value near the mean: the variance of large and nearly
        # constant activations is a difference that float32 sums would lose
        self.shifts: dict[Key, torch.Tensor] = {}
        self.counts = dict.fromkeys(self.sums, 0)
        self._last: tuple[torch.Tensor, str] | None = None

    def watching(self):
        """Context in which the sums grow by all that passes."""
        return watch(self.modules, after=self._add_both)

    def _add_both(self, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        # q, k and v read one tensor, gate and up another: count each tensor once
        if self._last is not None and x is self._last[0]:
            self.shared[name] = self._last[1]
        else:
            self._last = x, name
            self._add((name, "input"), x, None)
        self._add((name, "output"), y, self.modules[name].bias)

    def _add(self, key: Key, x: torch.Tensor, bias: torch.Tensor | None) -> None:
        x = x.detach().flatten(0, -2)  # [token, feature]
        if key not in self.shifts:
            self.shifts[key] = x.float().mean(0)
        shift = self.shifts[key]
        # a product with ones is the fastest sum
        size = _BLOCK if x.device.type == "cpu" else len(x)
        ones = torch.ones(size, dtype=torch.float32, device=x.device)
        absolute, total, square, *unbiased = sums = torch.zeros(
            self.sums[key].shape, dtype=torch.float32, device=x.device
        )
        for block in x.split(size):
            block, weights = block.float(), ones[: len(block)]
            absolute.addmv_((scratch := block.abs()).T, weights)
            torch.sub(block, shift, out=scratch)
            total.addmv_(scratch.T, weights)
            square.addmv_(scratch.square_().T, weights)
            if bias is not None:
                unbiased[0].addmv_((block - bias.detach().float()).abs_().T, weights)
        self.sums[key] += sums
        self.counts[key] += len(x)

    def tables(self) -> dict[Key, np.ndarray]:
        """All sums ``[sum, feature]`` in float64 on the host; the tensors are released."""
        # copies: arrays that own their memory, whatever becomes of the tensors
        tables = {key: sums.cpu().double().numpy().copy() for key, sums in self.sums.items()}
        self.sums.clear()
        for key, shift in self.shifts.items():
            c, n = shift.cpu().double().numpy(), self.counts[key]
            _, total, square, *_ = tables[key]
            square += c * (2 * total + n * c)  # Σ x² = Σ (x - c)² + c (2 Σ (x - c) + n c)
            total += n * c
        for name, source in self.shared.items():
            tables[name, "input"] = tables[source, "input"]
        return tables
