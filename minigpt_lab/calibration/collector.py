"""Sums over tokens of what every linear layer of a model reads and writes, gathered by hooks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..checks import hooked, safe_contextmanager
from ..models import Anatomy, weight_axis

_BLOCK = 256  # rows of activations summed at once
Key = tuple[str, str]  # (module name, "input" or "output")


class Collector:
    """Sums over tokens on the model's device; hooks add to them without asking the device."""

    def __init__(self, model: PreTrainedModel):
        anatomy = Anatomy(model)
        self.modules = {name: module for _, name, module in anatomy.linears()}
        self.layer_of = {name: layer for layer, name, _ in anatomy.linears()}
        self.shared: dict[str, str] = {}
        # MPS has no float64; elsewhere it keeps millions of tokens exact
        dtype = torch.float32 if model.device.type == "mps" else torch.float64
        # made before the pass: scattered between activations they would keep that memory in use
        self.sums: dict[Key, torch.Tensor] = {
            (name, side): torch.zeros(
                3 if side == "input" or module.bias is None else 4,
                module.weight.shape[weight_axis(module, side)],
                dtype=dtype,
                device=module.weight.device,
            )
            for name, module in self.modules.items()
            for side in ("input", "output")
        }
        # summed is the distance from a value near the mean: the variance of large and nearly
        # constant activations is a difference that float32 sums would lose
        self.shifts: dict[Key, torch.Tensor] = {}
        self._last: tuple[torch.Tensor, str] | None = None

    @safe_contextmanager
    def hooks(self) -> Iterator[None]:
        """Add up all that passes while inside."""
        modules = self.modules.items()
        with hooked(*(partial(each.register_forward_hook, self._hook(n)) for n, each in modules)):
            yield

    def _hook(self, name: str):
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            # q, k and v read one tensor, gate and up another: count each tensor once
            if self._last is not None and args[0] is self._last[0]:
                self.shared[name] = self._last[1]
            else:
                self._last = (args[0], name)
                self._add((name, "input"), args[0], None)
            self._add((name, "output"), output, module.bias)

        return hook

    def _add(self, key: Key, x: torch.Tensor, bias: torch.Tensor | None) -> None:
        x = x.detach().reshape(-1, x.shape[-1])  # [tokens, neurons]
        if key not in self.shifts:
            self.shifts[key] = x.float().mean(0)
        shift = self.shifts[key]
        # a product with ones is the fastest sum; a block of rows stays in the processor's cache
        ones = torch.ones(_BLOCK, dtype=torch.float32, device=x.device)
        absolute, total, square, *unbiased = sums = torch.zeros(
            self.sums[key].shape, dtype=torch.float32, device=x.device
        )
        for block in x.split(_BLOCK):
            block, weights = block.float(), ones[: len(block)]
            absolute.addmv_((scratch := block.abs()).T, weights)
            torch.sub(block, shift, out=scratch)
            total.addmv_(scratch.T, weights)
            square.addmv_(scratch.square_().T, weights)
            if bias is not None:
                unbiased[0].addmv_((block - bias.detach().float()).abs_().T, weights)
        self.sums[key] += sums

    def tables(self, n_tokens: int) -> dict[Key, np.ndarray]:
        """All sums on the host, inputs that were shared filled in; the collector is empty then."""
        # copies: arrays that own their memory, whatever becomes of the tensors
        found = {key: table.cpu().double().numpy().copy() for key, table in self.sums.items()}
        self.sums.clear()
        for key, shift in self.shifts.items():
            shift, (_, total, square, *_) = shift.cpu().double().numpy(), found[key]
            square += shift * (2 * total + n_tokens * shift)
            total += n_tokens * shift
        for name, source in self.shared.items():
            found[name, "input"] = found[source, "input"]
        order = [(name, side) for name in self.modules for side in ("input", "output")]
        return {key: found[key] for key in order}
