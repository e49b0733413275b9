"""SlimGPT (arXiv 2412.18110): prune layer by layer and update the remaining weights.

In every layer attention is pruned first, then the FFN; each is chosen and solved for as `eliminate`
describes, and then may be fitted to the dense model (see `reconstruction`). The next layer is
calibrated on the outputs of the pruned one.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..calibration import LayerRunner, catch_inputs, tokens_hash
from ..checks import (
    Batches,
    DictOf,
    Flag,
    Instance,
    Integer,
    InvalidArgument,
    ListOf,
    Location,
    Model,
    Number,
    OneOf,
    Text,
    checked,
    refuse_unused,
)
from ..criteria import chosen_sites
from ..models import (
    Anatomy,
    PruningPlan,
    dense_counts,
    fingerprint,
    inference,
    is_offloaded,
    refuse_masked,
    update_config,
)
from ..planning import (
    BY_DEPTH,
    RATIO,
    RATIOS,
    Allocation,
    allocation_name,
    check_keep_layers,
    one_target,
    removed_shares,
    unit_counts,
)
from ..store import Shards
from .block_fitting import (
    LOSSES,
    RECONSTRUCT,
    DenseStream,
    Reconstruction,
    losses_of,
    reconstruct_block,
)
from .budget_search import is_search, search_counts
from .calibration_windows import GENERALITY, CalibrationWindows
from .layer_counts import SearchedCounts, by_layer, require_counts, unscored_sites
from .obs import full_precision
from .projection import (
    aim_at_stream,
    apply_elimination,
    part_of,
    read_problem,
    require_plain_sums,
    solve,
)
from .solver import Solver
from .workspace import Workspace


@checked(
    model=Model(),
    batches=Batches(),
    ratio=RATIO,
    parameters=Integer() | None,
    ratio_of=OneOf(RATIOS),
    counts=Instance(SearchedCounts) | DictOf(Text(), ListOf(Integer(0))) | None,
    drop_blocks=Flag(),
    stream_share=Number(0, 1),
    reconstruct=RECONSTRUCT,
    general=Batches() | None,
    generality=Number(0, 1),
    inplace=Flag(),
    offload=OneOf(Shards.PLACES),
    out_dir=Location() | None,
    progress=Flag(),
)
@torch.inference_mode(False)  # weights made under it could not be trained or hashed later
@torch.no_grad()
def slimgpt(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    ratio: float | None = None,
    parameters: int | None = None,
    counts: Mapping[str, Sequence[int]] | None = None,
    sites: Sequence[str] = ("ffn", "attention"),
    units: str = "kv_group",
    allocation: str | Allocation | Sequence[float] = "log-increase",
    ratio_of: str = "units",
    keep_layers: tuple[int, int] = (0, 0),
    multiple_of: int | Mapping[str, int] = 1,
    drop_blocks: bool = False,
    stream_share: float = 0.0,
    reconstruct: bool | int | Reconstruction = False,
    general: Iterable[dict[str, torch.Tensor]] | None = None,
    generality: float = GENERALITY,
    inplace: bool = False,
    offload: str = "device",
    out_dir: str | os.PathLike | None = None,
    progress: bool = True,
    **solver,
) -> tuple[PreTrainedModel, PruningPlan]:
    """Prune a model in one pass over the calibration tokens, with compensation.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model; not changed unless `inplace`.
    batches : iterable of dict
        Calibration tokens; padding is left out.
    ratio : float, optional
        Share to remove; `ratio_of` says of what.
    parameters : int, optional
        Largest number of stored parameters, not counting biases that ``bias="add"`` adds.
    counts : mapping, optional
        Site to the number of units to remove from every layer, e.g. from `search_counts`; all
        units drop a layer's attention or FFN. Give exactly one of `ratio`, `parameters`, `counts`.
    sites : sequence of str
        ``"ffn"``, ``"attention"``.
    units : {"kv_group", "balanced_heads"}
        Units of attention; see `ATTENTION_UNITS`.
    allocation, ratio_of, keep_layers, multiple_of
        See `plan_from_scores`. The default is SlimGPT's incremental ratio. Where a
        layer has few heads, what rounding leaves undone goes on to the next layer; pruning more or
        fewer FFN channels of the layer balances the rounding to whole heads. ``"search"`` calls
        `search_counts`, which takes longer; `out_dir` then keeps its finished rounds too.
    drop_blocks : bool
        Whether a layer may lose its whole attention or FFN in that search.
    stream_share : float
        Share α of what the layers before have lost that a projection also makes up for, see
        `aim_at_stream`; 0 fits it to its own outputs alone, as SlimGPT does.
    reconstruct : bool, int or Reconstruction
        Fit every block after its closed form to the dense model's residual stream, see
        `reconstruct`: True, a number of epochs, or the settings.
    general : iterable of dict, optional
        Tokens of general text, mixed into the calibration so that less is forgotten.
    generality : float
        Share μ of the general text: second moments are ``(1 - μ) H_domain + μ H_general``, and
        losses of `reconstruct` likewise.
    inplace : bool
        Change the model itself instead of a copy. Required if its weights are offloaded; then only
        one layer at a time is on the device. An interrupted run leaves the model half pruned: load
        it anew to continue.
    offload : {"device", "cpu", "disk"}
        Place of the hidden states; see `Shards`.
    out_dir : str or path, optional
        Folder for a checkpoint after every layer: called again with the same arguments, a run
        continues at the layer that it had reached, with the same result. Pruned weights that
        `accelerate` offloads to disk go there too.
    progress : bool
        Show a progress bar.
    **solver
        Fields of `minigpt_lab.compensation.Solver`: ``saliency="exact"`` (or ``"slimgpt"``,
        ``"diag"``), ``block_size="dynamic"`` (or a number), ``damping=0.3``,
        ``damping_mode="feature"`` (or ``"mean"``), ``bias="refit"`` (or ``"add"``, ``"keep"``),
        ``compensate=True``, ``dtype=torch.float32``.

    Returns
    -------
    transformers.PreTrainedModel, PruningPlan
        The pruned model; the kept units, with the relative error of every layer's projections in
        ``origin["error"]``, and the losses before and after reconstruction in
        ``origin["reconstruction"]``.

    Raises
    ------
    ValueError
        If the target cannot be met or an option is out of range, a hidden state is not finite (its
        layer is named), `out_dir` holds a run with other arguments, the family has norms behind
        its projections and `stream_share` is not 0, or blocks are to be dropped without a search.
    """
    # 1. Settings, the size to reach, and the layers and sites that may be pruned.
    settings = Solver.from_options(solver, inspect.signature(slimgpt).parameters)
    reconstruction = Reconstruction.from_option(reconstruct)
    windows = CalibrationWindows(batches, general, generality, joined=reconstruction is not None)
    target = one_target(ratio=ratio, parameters=parameters, counts=counts)
    if isinstance(allocation, str):  # rankings need scores; there are none before a layer's turn
        OneOf(["search", *BY_DEPTH])("allocation", allocation)
    if general is None:
        refuse_unused(slimgpt, "general=None", generality=generality)
    if counts is not None:
        refuse_unused(slimgpt, "counts", drop_blocks=drop_blocks)
    searching = counts is None and is_search(allocation, drop_blocks)
    if inplace:
        refuse_masked(model)
    elif is_offloaded(model):
        raise ValueError(
            "the model's weights are offloaded: there is no room for a second copy of them; give "
            "inplace=True"
        )
    anatomy, model_hash = Anatomy(model), fingerprint(model)
    sites = chosen_sites(model, sites, units)
    totals = {site: anatomy.units(site) for site in sites}
    layer_sites = unscored_sites(anatomy, sites, keep_layers)

    # 2. Continue a run in `out_dir` only if model, tokens and settings are the same.
    workspace = Workspace(offload, out_dir)
    require = workspace.state.require
    tokens = tokens_hash(windows.batches())
    require({"model": model_hash, "tokens": tokens, **settings.to_dict()})
    require({"reconstruct": reconstruction and reconstruction.to_dict()})
    if stream_share:
        if not settings.compensate:
            raise InvalidArgument(
                f"stream_share is {stream_share} and compensate is False, which keeps all weights "
                "as they are; leave one of them out"
            )
        require_plain_sums(anatomy, "leave stream_share at 0")
    beyond = {  # what goes beyond SlimGPT; None: not asked for
        "generality": None if general is None else generality,
        "stream_share": stream_share or None,
    }
    require(beyond)

    # 3. Units to remove from every layer: searched for, spread by a rule, or given.
    origin = {"method": "slimgpt", **settings.to_dict()}
    origin["keep_layers"] = [*check_keep_layers(keep_layers)]
    origin |= {name: value for name, value in beyond.items() if value is not None}
    if searching:
        require({"search": {**target, "ratio_of": ratio_of}, "drop_blocks": drop_blocks or None})
        counts = search_counts(
            model,
            batches,
            ratio=ratio,
            parameters=parameters,
            sites=sites,
            units=units,
            ratio_of=ratio_of,
            keep_layers=keep_layers,
            multiple_of=multiple_of,
            general=general,
            generality=generality,
            drop_blocks=drop_blocks,
            offload=offload,
            out_dir=out_dir,
            progress=progress,
            **solver,
        )
    if isinstance(counts, SearchedCounts):
        origin |= counts.origin
    elif counts is None:
        rule = (allocation, ratio_of, multiple_of)
        numbers = unit_counts(model, layer_sites, ratio, parameters, *rule, even_out=True)
        counts = by_layer(layer_sites, numbers, totals)
        origin |= {**target, "allocation": allocation_name(allocation), "ratio_of": ratio_of}
    require_counts(model, counts, totals, layer_sites)
    require({"counts": counts})
    numbers = [counts[each.site][each.layer] for each in layer_sites]
    origin["removed"] = removed_shares(model, layer_sites, numbers)

    # 4. Prune layer after layer.
    dense, pruned = dense_counts(model), model if inplace else copy.deepcopy(model)
    run = _Run(settings, stream_share, reconstruction, windows, workspace)
    _prune_layers(Anatomy(pruned), counts, run, progress)

    # 5. The plan of what was kept.
    layers = workspace.finished
    keep = {site: [layer[site]["kept"] for layer in layers] for site in totals}
    origin["error"] = {site: [layer[site]["error"] for layer in layers] for site in totals}
    if reconstruction is not None:
        origin["reconstruction"] = reconstruction.to_dict() | losses_of(layers)
    rows = model.get_input_embeddings().weight.shape[0]
    plan = PruningPlan(model_hash, totals, keep, vocabulary_size=rows, origin=origin)
    pruned.config.minigpt_lab_dense = dense
    pruned.pruning_plans = [*getattr(model, "pruning_plans", []), plan]
    return pruned, plan


@dataclass(frozen=True)
class _Run:
    """What every layer of a run shares."""

    solver: Solver
    stream_share: float
    reconstruction: Reconstruction | None
    windows: CalibrationWindows
    workspace: Workspace


def _prune_layers(
    anatomy: Anatomy, counts: Mapping[str, Sequence[int]], run: _Run, progress: bool
) -> None:
    """Prune all layers in place, each on the outputs of the pruned layers before it."""
    workspace, depth = run.workspace, len(anatomy.layers)
    hidden, dense = workspace.hidden, None
    with inference(anatomy.model), full_precision():
        # 1. Inputs of the first layer, or of the first that an earlier run did not finish.
        calls = catch_inputs(anatomy.model, run.windows.batches(), hidden)
        if run.reconstruction is not None or run.stream_share:
            dense = DenseStream(hidden, calls)
        workspace.restore_hidden()
        # 2. Prune a layer, then run it over all windows: its outputs are the next layer's inputs.
        for layer in tqdm(range(depth), "SlimGPT", unit="layer", disable=not progress):
            module = anatomy.layers[layer]
            with (
                workspace.weights_of(module, layer),
                _explained_out_of_memory(module, layer, run.solver.dtype),
            ):
                if dense is not None:  # the layer's weights are still the dense model's
                    dense.advance(anatomy, layer)
                if layer < len(workspace.finished):
                    workspace.restore_layer(anatomy, layer)
                    continue
                runner = LayerRunner(anatomy, layer, hidden, calls, run.windows.weights)
                remove = {site: layers[layer] for site, layers in counts.items()}
                results = _prune_layer(anatomy, runner, layer, remove, run, dense)
                if layer + 1 < depth:
                    runner.finish()
                workspace.finish_layer(anatomy, results)
    update_config(anatomy)


def _prune_layer(
    anatomy: Anatomy,
    runner: LayerRunner,
    layer: int,
    remove: Mapping[str, int],
    run: _Run,
    dense: DenseStream | None,
) -> dict[str, dict]:
    """Prune the sites of one layer, in place, and reconstruct its blocks.

    Parameters
    ----------
    remove : mapping
        Site to the number of units to remove.
    dense : DenseStream, optional
        Behind the blocks of this layer, if anything is fitted to it.

    Returns
    -------
    dict
        Site to ``{"kept", "error"}``: the kept units, and the relative error of the projection's
        outputs; also ``"reconstruction"``, the losses before and after it.
    """
    results = {}
    for part in ("attention", "ffn"):  # as data flows
        site = next((site for site in remove if part_of(site) == part), part)
        kept, error = [*range(anatomy.units(site)[layer])], 0.0
        if remove.get(site):
            problem = read_problem(anatomy, runner, layer, site, run.solver)
            if run.stream_share:
                targets = dense.behind[part]
                problem = aim_at_stream(problem, runner, targets, run.stream_share, run.solver)
            elimination = solve(problem, remove[site], run.solver)
            apply_elimination(anatomy, runner, problem, elimination, run.solver)
            kept, error = elimination.kept, round(elimination.relative_loss, 6)
        settings = run.reconstruction
        fitted = settings is not None and kept and settings.fits(part, bool(remove.get(site)))
        if fitted or site in remove:
            results[site] = {"kept": kept, "error": error}
        if fitted:
            targets = dense.behind[part]
            losses = reconstruct_block(anatomy, runner, layer, part, targets, settings)
            results[site][LOSSES] = losses
    return results


@contextlib.contextmanager
def _explained_out_of_memory(module: nn.Module, layer: int, dtype: torch.dtype) -> Iterator[None]:
    """Say how much memory a layer takes if the device has too little."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        width = max(max(parameter.shape) for parameter in module.parameters())
        size = 4 * width**2 * dtype.itemsize / 2**30  # of H, its damped copy, factor and inverse
        raise torch.OutOfMemoryError(
            f"layer {layer} does not fit on {next(module.parameters()).device}: its widest second "
            f"moment takes up to {size:.2g} GiB beside its weights and the hidden states; offload "
            "the hidden states (offload='cpu' or 'disk'), use shorter windows, or let accelerate "
            "offload the other layers' weights"
        ) from error
