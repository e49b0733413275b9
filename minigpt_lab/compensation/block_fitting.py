"""Fit one block of a layer, attention or the FFN, to the dense model's residual stream."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..calibration import Calls, LayerRunner
from ..checks import Flag, Instance, Integer, ListOf, Number, OneOf, check_fields
from ..models import SITES, Anatomy, product_dtype
from ..store import Shards

#: Loss below which two streams differ by rounding alone, of products in bfloat16 or in float32.
_ROUNDING = {torch.bfloat16: 1e-4, torch.float32: 1e-10}
#: Key of the losses before and after, in the results of a layer.
LOSSES = "reconstruction"


@dataclass(frozen=True)
class Reconstruction:
    """Settings of sub-module reconstruction.

    Parameters
    ----------
    epochs : int
        Passes of Adam over the calibration tokens, per block.
    learning_rate : float
        Of Adam at the start, as a share of each weight's root mean square: one number serves
        models whose weights differ in scale. It falls to 0 on a straight line.
    sites : sequence of str, optional
        Blocks to fit, of ``"ffn"`` and ``"attention"``; by default those of which something was
        removed.
    """

    epochs: int = 10
    learning_rate: float = 0.01
    sites: Sequence[str] | None = None

    def __post_init__(self):
        check_fields(
            self,
            epochs=Integer(1),
            learning_rate=Number(above=0),
            sites=ListOf(OneOf(SITES)) | None,
        )

    @classmethod
    def from_option(cls, option: bool | int | Reconstruction) -> Reconstruction | None:
        """Settings from ``reconstruct=``: None, the defaults, a number of epochs, or given."""
        if isinstance(option, Reconstruction):
            return option
        if isinstance(option, bool):
            return cls() if option else None
        return cls(epochs=option)

    def to_dict(self) -> dict[str, object]:
        """The settings as plain data."""
        return {**asdict(self), "sites": self.sites and [*self.sites]}

    def fits(self, site: str, pruned: bool) -> bool:
        """Whether a layer's block is to be fitted."""
        return pruned if self.sites is None else site in self.sites


#: Declaration of the argument ``reconstruct``.
RECONSTRUCT = Flag() | Integer(1) | Instance(Reconstruction)


class DenseStream:
    """The dense model's residual stream behind the blocks of one layer, layer after layer.

    Parameters
    ----------
    hidden : Shards
        Inputs of the first layer by window; a copy is kept.
    calls : list of list of dict
        From `catch_inputs`.

    Attributes
    ----------
    behind : dict
        Site to the residual stream behind it ``[batch, token, feature]``, by window.
    """

    def __init__(self, hidden: Shards, calls: Calls):
        self.calls = calls
        self.behind = {site: Shards(hidden.place, hidden.folder) for site in SITES}
        for window in hidden:
            self.behind["ffn"][window] = hidden[window]

    def advance(self, dense: Anatomy, layer: int) -> None:
        """Run the next layer, whose weights are still the dense model's."""
        runner = LayerRunner(dense, layer, self.behind["ffn"], self.calls)
        for window, _ in enumerate(runner.inputs("ffn")):
            self.behind["attention"][window] = runner.residual_stream(window, "attention")
        runner.finish()


def fit_block(
    anatomy: Anatomy,
    runner: LayerRunner,
    layer: int,
    site: str,
    targets: Shards,
    settings: Reconstruction,
) -> Iterator[int]:
    """Fit one block of a layer to the dense residual stream, in place, epoch by epoch.

    Parameters
    ----------
    runner : LayerRunner
        Of the layer; its kept inputs of the block's projections are dropped.
    layer, site : int, str
        The layer, and its block.
    targets : Shards
        The dense residual stream behind the block, by window.
    settings : Reconstruction
        Epochs and learning rate.

    Yields
    ------
    int
        Number of the epochs done, from 0; `stream_loss` then gives the loss.
    """
    # 1. The block's projections, as float32; attention's outputs are computed once for the FFN.
    modules = block_modules(anatomy, layer, site)
    if site == "ffn":
        runner.keep_attention()
    else:
        runner.forget(site)
    n_windows = len(runner.hidden)
    tokens = _tokens(targets)
    mean = sum(tokens) / n_windows
    order = torch.Generator().manual_seed(layer)
    with _trainable(runner, modules):
        scales = [float(each.weight.detach().square().mean().sqrt()) for each in modules]
        groups = [
            {"params": [*each.parameters()], "lr": settings.learning_rate * max(scale, 1e-6)}
            for each, scale in zip(modules, scales, strict=True)
        ]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        weights = [each.weight for each in modules]
        zeros = [(weight, weight == 0) for weight in weights if (weight == 0).any()]
        steps = settings.epochs * n_windows
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        yield 0
        for epoch in range(settings.epochs):
            # 2. One step of Adam for every window, in random order; zeros stay zero.
            for window in torch.randperm(n_windows, generator=order).tolist():
                with torch.enable_grad():
                    loss = _window_loss(runner, site, window, targets)
                    (runner.weights[window] * tokens[window] / mean * loss).backward()
                for parameter, zero in zeros:
                    parameter.grad.masked_fill_(zero, 0)
                optimizer.step()
                optimizer.zero_grad()
                decay.step()
            yield epoch + 1


def reconstruct_block(
    anatomy: Anatomy,
    runner: LayerRunner,
    layer: int,
    site: str,
    targets: Shards,
    settings: Reconstruction,
) -> list[float]:
    """`fit_block` to the end; a block that it does not improve keeps its weights, with a warning.

    Returns
    -------
    list of float
        Loss on all windows before and after.

    Raises
    ------
    ValueError
        If the loss is not finite before it.
    """
    modules = block_modules(anatomy, layer, site)
    weights = [each.weight for each in modules]
    dtypes = {product_dtype(weights[0].device), *(weight.dtype for weight in weights)}
    rounding = _ROUNDING[torch.float32 if dtypes == {torch.float32} else torch.bfloat16]
    before = [parameter.detach().clone() for each in modules for parameter in each.parameters()]
    losses = []
    for epoch in fit_block(anatomy, runner, layer, site, targets, settings):
        if epoch in (0, settings.epochs):
            losses.append(stream_loss(runner, site, targets))
        if not math.isfinite(losses[0]):
            raise ValueError(
                f"layer {layer}'s {site} gives outputs that are not finite: check the weights of "
                "the pruned and of the dense model"
            )
        if losses[0] < rounding:  # nothing is pruned up to here
            losses *= 2
            break
    if not losses[1] <= losses[0]:  # or NaN
        warnings.warn(
            f"reconstruction does not improve layer {layer}'s {site} (loss {losses[0]:.3g} to "
            f"{losses[1]:.3g}): its weights are kept; lower the learning rate",
            stacklevel=2,
        )
        parameters = (parameter for each in modules for parameter in each.parameters())
        for parameter, value in zip(parameters, before, strict=True):
            parameter.data = value
        losses[1] = losses[0]
    return [round(loss, 6) for loss in losses]


def block_modules(anatomy: Anatomy, layer: int, site: str) -> list[nn.Module]:
    """The projections of attention or of the FFN."""
    return [anatomy.module(layer, projection) for projection, _ in anatomy.coupled(site)]


def losses_of(layers: Sequence[dict[str, dict]]) -> dict[str, dict[str, list]]:
    """``{"loss": {site: [[before, after], …]}}`` by layer, None where a block was not fitted."""
    fitted = {site for each in layers for site, result in each.items() if LOSSES in result}
    losses = {site: [each.get(site, {}).get(LOSSES) for each in layers] for site in fitted}
    return {"loss": dict(sorted(losses.items()))}


def _window_loss(runner: LayerRunner, site: str, window: int, targets: Shards) -> torch.Tensor:
    """``mean_t ‖m_t + Block(norm(m_t)) - h_t‖² / ‖h_t‖²`` of one window."""
    h = targets[window].float()  # [batch, token, feature]
    device = h.device.type
    autocast = product_dtype(h.device) == torch.bfloat16
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        stream = runner.residual_stream(window, site)
    error = (stream.float() - h).square().sum(-1)  # [batch, token]
    return (error / h.square().sum(-1).clamp_min(1e-12)).mean()


def stream_loss(runner: LayerRunner, site: str, targets: Shards) -> float:
    """The loss that `fit_block` minimises, on all windows."""
    total, weight = 0.0, 0.0
    with torch.no_grad():
        for window, tokens in enumerate(_tokens(targets)):
            share = runner.weights[window] * tokens
            total += share * float(_window_loss(runner, site, window, targets))
            weight += share
    return total / weight


def _tokens(targets: Shards) -> list[int]:
    """Tokens of every window."""
    return [targets[window].shape[:-1].numel() for window in range(len(targets))]


@contextlib.contextmanager
def _trainable(runner: LayerRunner, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let some modules of the runner's layer have gradients, and all of it be float32 while inside.

    Its inputs and arguments are float32 too; types and flags are restored.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    before = [(p, p.dtype, p.requires_grad) for p in runner.layer.parameters()]
    kwargs = runner.kwargs
    try:
        for parameter, _, _ in before:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        runner.kwargs = tree_map(_as_float, kwargs)
        runner.dtype = torch.float32
        yield
    finally:
        runner.kwargs, runner.dtype = kwargs, None
        for parameter, dtype, requires_grad in before:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(requires_grad)


def _as_float(value):
    """Floating-point tensors as float32, all else as it is."""
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.float() if is_float else value
