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

import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..architectures import dense_type
from ..calibration import LayerRunner, catch_inputs, tokens_hash
from ..checks import (
    Batches,
    Flag,
    Integer,
    ListOf,
    Location,
    Model,
    Number,
    OneOf,
    checked,
    refuse_unused,
)
from ..models import SITES, Anatomy, fingerprint, inference, is_offloaded, refuse_masked
from ..store import Shards
from .block_fitting import LOSSES, DenseStream, Reconstruction, losses_of, reconstruct_block
from .calibration_windows import GENERALITY, CalibrationWindows
from .obs import full_precision
from .workspace import Workspace


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
    if general is None:
        refuse_unused(reconstruct, "general=None", generality=generality)
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
                results[site] = {"kept": kept, "error": 0.0, LOSSES: losses}
            if layer + 1 < depth:
                runner.finish()
            workspace.finish_layer(anatomy, results)

    # 3. The last plan says that its model was fitted.
    if plans := getattr(fitted, "pruning_plans", []):
        note = {"reconstruction": settings.to_dict() | losses_of(workspace.finished)}
        fitted.pruning_plans = [*plans[:-1], replace(plans[-1], origin=plans[-1].origin | note)]
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
