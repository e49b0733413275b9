"""Sub-module reconstruction: fit what is kept of a layer to the dense model's residual stream.

The closed form of `eliminate` fits one projection to its own outputs. Reconstruction goes on from
there with all projections of attention or of the FFN at once, towards what the *dense* model has in
its residual stream ("A Free Lunch in LLM Compression", arXiv 2510.14444): with m the pruned model's
residual stream before the block and h the dense one's behind it,

    min_θ  Σ_t w_t ‖m_t + Block_θ(norm(m_t)) - h_t‖² / ‖h_t‖² ,

by Adam over a few epochs of the calibration tokens. Without the division by a token's own energy
the few tokens with massive activations would decide. One layer is in memory at a time, and the next
one reads the outputs of the fitted one.
"""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..architectures import dense_type
from ..calibration import Calls, LayerRunner, catch_inputs, tokens_hash
from ..checks import (
    Batches,
    Flag,
    Instance,
    Integer,
    ListOf,
    Location,
    Model,
    Number,
    OneOf,
    check_fields,
    checked,
)
from ..models import (
    SITES,
    Anatomy,
    fingerprint,
    inference,
    is_offloaded,
    product_dtype,
    refuse_masked,
)
from ..store import Shards
from .calibration_windows import GENERALITY, CalibrationWindows
from .obs import full_precision
from .workspace import Workspace

#: Loss below which two streams differ by the rounding of bfloat16 alone.
_ROUNDING = 1e-4
_LOSSES = "reconstruction"


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
    runner.forget(site)
    if site == "ffn":
        if not runner.attention_outputs:
            for _ in runner.inputs("ffn"):
                pass
        runner.forget("ffn")
    n_windows = len(runner.hidden)
    order = torch.Generator().manual_seed(layer)
    with _trainable(runner, modules):
        scales = [float(each.weight.detach().square().mean().sqrt()) for each in modules]
        groups = [
            {"params": [*each.parameters()], "lr": settings.learning_rate * max(scale, 1e-6)}
            for each, scale in zip(modules, scales, strict=True)
        ]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        steps = settings.epochs * n_windows
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        yield 0
        for epoch in range(settings.epochs):
            # 2. One step of Adam for every window, in random order.
            for window in torch.randperm(n_windows, generator=order).tolist():
                with torch.enable_grad():
                    loss = _window_loss(runner, site, window, targets)
                    (runner.weights[window] * loss).backward()
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
    """
    modules = block_modules(anatomy, layer, site)
    before = [parameter.detach().clone() for each in modules for parameter in each.parameters()]
    losses = []
    for epoch in fit_block(anatomy, runner, layer, site, targets, settings):
        if epoch in (0, settings.epochs):
            losses.append(stream_loss(runner, site, targets))
        if losses[0] < _ROUNDING:  # nothing is pruned up to here
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
    family = anatomy.family
    return [anatomy.module(layer, each) for each in (*family.produces[site], family.consumes[site])]


def losses_of(layers: Sequence[dict[str, dict]]) -> dict[str, list]:
    """``{"loss": {site: [[before, after], …]}}`` by layer, None where a block was not fitted."""
    fitted = {site for each in layers for site, result in each.items() if _LOSSES in result}
    losses = {site: [each.get(site, {}).get(_LOSSES) for each in layers] for site in fitted}
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
        for window in range(len(runner.hidden)):
            tokens = runner.weights[window] * targets[window].shape[:-1].numel()
            total += tokens * float(_window_loss(runner, site, window, targets))
            weight += tokens
    return total / weight


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


@checked(
    mini=Model(),
    model=Model(),
    batches=Batches(),
    epochs=Integer(1),
    learning_rate=Number(above=0),
    sites=ListOf(OneOf(SITES)) | None,
    general=Batches() | None,
    generality=Number(0, 1),
    offload=OneOf(Shards.PLACES),
    out_dir=Location() | None,
    progress=Flag(),
)
@torch.inference_mode(False)  # weights made under it could not be trained or hashed later
@torch.no_grad()
def reconstruct(
    mini: PreTrainedModel,
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    epochs: int = Reconstruction.epochs,
    learning_rate: float = Reconstruction.learning_rate,
    sites: Sequence[str] | None = None,
    general: Iterable[dict[str, torch.Tensor]] | None = None,
    generality: float = GENERALITY,
    offload: str = "device",
    out_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> PreTrainedModel:
    """Fit the blocks of a pruned model to the dense model's residual stream, layer by layer.

    With m the pruned model's residual stream before a block, h the dense one's behind it and t a
    token (arXiv 2510.14444), ``min_θ Σ_t ‖m_t + Block_θ(norm(m_t)) - h_t‖² / ‖h_t‖²`` by Adam.
    Only the calibration tokens are read, and no loss of the whole model is computed. `slimgpt` does
    this while it prunes (``reconstruct=True``); here it follows any pruning.

    Parameters
    ----------
    mini, model : transformers.PreTrainedModel
        The pruned model, and the model that it was made of: with the same layers, hidden size and
        vocabulary. Neither is changed.
    batches : iterable of dict
        Calibration tokens; padding is left out.
    epochs, learning_rate, sites
        See `Reconstruction`.
    general, generality
        Tokens of general text, and their share in the loss; see `slimgpt`.
    offload : {"device", "cpu", "disk"}
        Place of the hidden states; see `Shards`.
    out_dir : str or path, optional
        Folder for a checkpoint after every layer: called again with the same arguments, a run
        continues at the layer that it had reached.
    progress : bool
        Show a progress bar.

    Returns
    -------
    transformers.PreTrainedModel
        A fitted copy. A block that training does not improve keeps its weights, with a warning.

    Raises
    ------
    ValueError
        If the two models do not fit together, are the same object, are masked, or `out_dir` holds
        a run with other arguments.
    """
    # 1. Two models that fit together, the tokens, and a run in `out_dir` with the same of all.
    _require_pair(mini, model)
    settings = Reconstruction(epochs, learning_rate, sites)
    windows = CalibrationWindows(batches, general, generality, joined=True)
    workspace = Workspace(offload, out_dir)
    facts = {"model": fingerprint(mini), "dense": fingerprint(model), **settings.to_dict()}
    facts |= {"tokens": tokens_hash(windows.batches())}
    facts |= {"generality": None if general is None else generality}
    workspace.state.require(facts)

    # 2. Layer after layer, both residual streams side by side.
    fitted, dense_hidden = copy.deepcopy(mini), Shards(offload)
    anatomy, dense_anatomy, hidden = Anatomy(fitted), Anatomy(model), workspace.hidden
    with inference(fitted), inference(model), full_precision():
        dense_calls = catch_inputs(model, windows.batches(), dense_hidden)
        dense = DenseStream(dense_hidden, dense_calls)
        calls = catch_inputs(fitted, windows.batches(), hidden)
        workspace.restore_hidden()
        depth = len(anatomy.layers)
        for layer in tqdm(range(depth), "reconstruct", unit="layer", disable=not progress):
            dense.advance(dense_anatomy, layer)
            if layer < len(workspace.finished):
                workspace.restore_layer(anatomy, layer)
                continue
            runner = LayerRunner(anatomy, layer, hidden, calls, windows.weights)
            results = {}
            for site in ("attention", "ffn"):  # as data flows
                kept = [*range(anatomy.units(site)[layer])]
                pruned = _is_narrower(anatomy, dense_anatomy, layer, site)
                if not kept or not settings.fits(site, pruned):  # a dropped block has no weights
                    continue
                targets = dense.behind[site]
                losses = reconstruct_block(anatomy, runner, layer, site, targets, settings)
                results[site] = {"kept": kept, "error": 0.0, _LOSSES: losses}
            if layer + 1 < depth:
                runner.finish()
            workspace.finish_layer(anatomy, results)
    return fitted


def _is_narrower(anatomy: Anatomy, dense: Anatomy, layer: int, site: str) -> bool:
    """Whether a layer's block has fewer units than the dense model's."""
    sites = ("ffn",) if site == "ffn" else ("attention", "balanced_heads")
    return any(anatomy.units(each)[layer] < dense.units(each)[layer] for each in sites)


def _require_pair(mini: PreTrainedModel, model: PreTrainedModel) -> None:
    """Refuse two models of which one is not a pruned version of the other."""
    if mini is model:
        raise ValueError("mini and model are the same object; give the pruned and the dense model")
    for each in (mini, model):
        refuse_masked(each)
        if is_offloaded(each):
            raise ValueError(
                "the model's weights are offloaded: there is no room for a copy of them; use "
                "slimgpt(..., inplace=True, reconstruct=True)"
            )
    shapes = [
        (
            dense_type(each.config.model_type),
            len(Anatomy(each).layers),
            [*each.get_input_embeddings().weight.shape],
        )
        for each in (mini, model)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the pruned model has (type, layers, [tokens, features]) {shapes[0]}, the dense one "
            f"{shapes[1]}; give the model that it was pruned from (with its trimmed vocabulary)"
        )
