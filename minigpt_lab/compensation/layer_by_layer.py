"""SlimGPT: prune layer by layer, the weights that stay making up for those that leave.

arXiv 2412.18110. In every layer heads leave by what the attention's output projection loses,
channels by what the FFN's second projection loses, each as `eliminate` chooses; the next layer is
calibrated on what this one has become. See `layerwise` for how one pass does.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from dataclasses import fields as dataclass_fields
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

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
    invalid,
    suggest,
)
from ..criteria import chosen_sites
from ..models import (
    Anatomy,
    PruningPlan,
    fingerprint,
    inference,
    is_offloaded,
    materialized,
    refuse_masked,
    update_config,
)
from ..planning import (
    BY_DEPTH,
    RANKINGS,
    Allocation,
    LayerSite,
    allocation_name,
    check_keep_layers,
    one_target,
    parameters_to_remove,
    prunable_sites,
    removed_shares,
    unit_counts,
)
from ..store import PLACES, Shards
from .budget_search import Search, search_counts, summary
from .layer import Solver, carry_out, problem, solve
from .obs import full_precision
from .resumption import Finished


@checked(
    model=Model(),
    batches=Batches(),
    inplace=Flag(),
    offload=OneOf(PLACES),
    out_dir=Location() | None,
    progress=Flag(),
)
@torch.inference_mode(False)  # what is made there could not be trained or hashed later
@torch.no_grad()
def slimgpt(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    ratio: float | None = None,
    parameters: int | None = None,
    *,
    sites: Sequence[str] = ("ffn", "attention"),
    units: str = "kv_group",
    allocation: str | Allocation | Sequence[float] = "log-increase",
    ratio_of: str = "units",
    keep_layers: tuple[int, int] = (0, 0),
    multiple_of: int | Mapping[str, int] = 1,
    counts: Mapping[str, Sequence[int]] | None = None,
    search: Mapping[str, float] | None = None,
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
        A supported causal language model; left as it is unless `inplace`.
    batches : iterable of dict
        Calibration tokens; padding is left out.
    ratio : float, optional
        Share to remove; of what, says `ratio_of`.
    parameters : int, optional
        Largest number of stored parameters, but for biases that ``bias="add"`` gives. Give exactly
        one of `ratio`, `parameters`, `counts`.
    sites : sequence of str
        ``"ffn"``, ``"attention"``.
    units : {"kv_group", "balanced_heads"}
        What leaves attention; see `ATTENTION_UNITS`.
    allocation, ratio_of, keep_layers, multiple_of
        See `plan_from_scores`. The default is SlimGPT's incremental ratio. FFN channels take up
        what whole heads leave too much or too little of a layer's share. ``"search"`` takes longer
        and finds a share for the heads and for the channels of every layer: see `search_counts`.
    counts : mapping, optional
        Site to the number of units that leave every layer, instead of a ratio and all that spreads
        one.
    search : mapping, optional
        Fields of `Search` for that: ``levels, share, rounds, steps, rate, seed``.
    inplace : bool
        Change the model itself: no second copy of its weights. Needed for one with offloaded
        weights; only a layer at a time is then on the device. Interrupted, it is half cut: load it
        anew to go on.
    offload : {"device", "cpu", "disk"}
        Where hidden states wait; see `Shards`.
    out_dir : str or path, optional
        Folder for what a search has measured and a checkpoint after every layer: called again with
        the same arguments, a run goes on at the layer that it had come to, and ends the same.
        Weights that `accelerate` offloads to disk go there too once they are cut.
    progress : bool
        Show a progress bar.
    **solver
        Fields of `minigpt_lab.compensation.Solver`: ``error="exact"`` (or ``"slimgpt"``,
        ``"diag"``), ``heads_per_round=1``, ``schedule="dynamic"``, ``damp=0.3``,
        ``damping="feature"`` (or ``"mean"``), ``bias="refit"`` (or ``"add"``, ``"keep"``),
        ``compensate=True``, ``dtype=torch.float32``.

    Returns
    -------
    transformers.PreTrainedModel, PruningPlan
        The shrunk model; which units stay, with the relative error of every layer's projections in
        ``origin["error"]``.

    Raises
    ------
    ValueError
        If the target cannot be met or an option is out of range, a hidden state is not finite (its
        layer is named), or `out_dir` holds a run of other arguments.
    """
    options = _made(Solver, solver, inspect.signature(slimgpt).parameters)
    before = fingerprint(model)
    if is_offloaded(model) and not inplace:
        raise ValueError(
            "the model's weights wait outside its device: there is no room for a second copy of "
            "them; give inplace=True"
        )
    if inplace:
        refuse_masked(model)
    mini = model if inplace else copy.deepcopy(model)
    anatomy = Anatomy(mini)
    sites = chosen_sites(model, sites, units)
    totals = {site: anatomy.units(site) for site in sites}
    zeros = {site: [np.zeros(n) for n in layers] for site, layers in totals.items()}
    keep_layers = check_keep_layers(keep_layers)
    groups = prunable_sites(anatomy, zeros, keep_layers)
    ratio, parameters = (
        (Number() | None)("ratio", ratio),
        (Integer() | None)("parameters", parameters),
    )
    one_target(ratio=ratio, parameters=parameters, counts=counts)
    if counts is not None:
        counts = _whole_counts(totals, groups, counts)
    _check_allocation(allocation)
    searches = isinstance(allocation, str) and allocation == "search" and counts is None
    if search is not None and not searches:
        raise ValueError('search has options but nothing is searched: add allocation="search"')
    searching = _made(Search, search or {})
    if searches or out_dir is not None:
        batches = list(batches)
    finished = None if out_dir is None else Finished(out_dir)
    if finished:
        text = {"model": before, "tokens": tokens_hash(batches)}
        finished.require({**text, **options.facts()})
    origin = {"method": "slimgpt", **options.facts(), "keep_layers": [*keep_layers]}
    if searches:
        to_leave = parameters_to_remove(model, groups, ratio, parameters, ratio_of)
        if finished:
            finished.require({"search": {**asdict(searching), "leave": to_leave}})
        found, history = search_counts(
            mini, batches, groups, to_leave, multiple_of, options, searching,
            offload=offload, out_dir=out_dir, progress=progress,
        )  # fmt: skip
        origin["search"] = {**asdict(searching), **summary(history)}
    elif counts is None:
        found = unit_counts(
            model, groups, ratio, parameters, allocation, ratio_of, multiple_of, even_out=True
        )
    else:
        found = [counts[group.site][group.layer] for group in groups]
    leave = {site: [0] * len(anatomy.layers) for site in sites}
    for group, count in zip(groups, found, strict=True):
        leave[group.site][group.layer] = count
    if counts is None:
        origin |= {"ratio": ratio} if parameters is None else {"parameters": parameters}
        origin |= {"allocation": allocation_name(allocation), "ratio_of": ratio_of}
    origin["removed"] = removed_shares(model, groups, found)
    if finished:
        finished.require({"counts": leave})
    hidden = Shards(offload)
    cuts: list[dict[str, dict]] = []
    with inference(mini), full_precision():
        calls = catch_inputs(mini, batches, hidden)
        if finished:
            finished.restore_hidden(hidden)
        layers = tqdm(anatomy.layers, "SlimGPT", unit="layer", disable=not progress)
        for index, layer in enumerate(layers):
            with materialized(layer, out_dir and Path(out_dir) / f"offloaded-{index}"):
                if finished and index < len(finished.layers):
                    cuts.append(finished.restore(anatomy, index))
                    continue
                one = LayerRunner(anatomy, index, hidden, calls)
                with _room(anatomy, index, options):
                    cut = _cut_layer(anatomy, one, index, totals, leave, options)
                    if index + 1 < len(anatomy.layers):
                        one.finish()
                if finished:
                    finished.add(anatomy, cut, hidden)
                cuts.append(cut)
    update_config(anatomy)
    uncut = {site: [{"kept": [*range(n)], "error": 0.0} for n in totals[site]] for site in sites}
    found = {site: [cut.get(site, uncut[site][i]) for i, cut in enumerate(cuts)] for site in sites}
    keep = {site: [cut["kept"] for cut in layers] for site, layers in found.items()}
    origin["error"] = {site: [cut["error"] for cut in layers] for site, layers in found.items()}
    rows = model.get_input_embeddings().weight.shape[0]
    plan = PruningPlan(before, totals, keep, vocabulary_size=rows, origin=origin)
    mini.pruning_plans = [*getattr(model, "pruning_plans", []), plan]
    return mini, plan


def _cut_layer(
    anatomy: Anatomy,
    one: LayerRunner,
    layer: int,
    totals: Mapping[str, Sequence[int]],
    leave: Mapping[str, Sequence[int]],
    options: Solver,
) -> dict[str, dict]:
    """Site to the units that stay in a layer, and its projection's relative error."""
    cuts = {}
    for site in sorted(leave, key="ffn".__eq__):  # in the order of the data flow
        if leave[site][layer]:
            given = problem(anatomy, one, layer, site, totals[site][layer], options)
            found = solve(given, site, leave[site][layer], options)
            carry_out(anatomy, one, layer, site, given, found, options)
            cuts[site] = {"kept": found.kept, "error": round(found.relative_loss, 6)}
    return cuts


@contextlib.contextmanager
def _room(anatomy: Anatomy, layer: int, options: Solver) -> Iterator[None]:
    """Say what a layer takes if the device has no room for it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        parameters = list(anatomy.layers[layer].parameters())
        stored = sum(parameter.nbytes for parameter in parameters)
        width = max(max(parameter.shape) for parameter in parameters)
        moment = width**2 * torch.empty(0, dtype=options.dtype).element_size()
        raise torch.OutOfMemoryError(
            f"layer {layer} does not fit on {parameters[0].device}: its weights take "
            f"{stored / 2**30:.2g} GiB and its widest second moment up to {4 * moment / 2**30:.2g} "
            "GiB, beside one window's activations and the hidden states of all; let the hidden "
            "states wait elsewhere (offload='cpu' or 'disk'), use shorter windows, or let "
            "accelerate offload the other layers' weights"
        ) from error


def _made(kind: type, fields: Mapping[str, object], others: Iterable[str] = ()):
    """A dataclass from keywords, of which none may be unknown; `others` may have been meant."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"{kind.__name__.lower()} is {fields!r}; expected options by their names")
    known = [field.name for field in dataclass_fields(kind)]
    for name in fields:
        if name not in known:
            raise ValueError(f"unknown option {name!r}; {suggest(name, [*known, *others])}")
    return kind(**fields)


def _check_allocation(allocation: str | Allocation | Sequence[float]) -> None:
    """Refuse names that are no way to spread a cut without scores."""
    if not isinstance(allocation, str):
        return
    known = ["search", *BY_DEPTH]
    if allocation in RANKINGS:
        raise ValueError(
            f"allocation {allocation!r} ranks scores, and slimgpt has none before it comes to a "
            f"layer; expected a share per layer, or one of {', '.join(known)}"
        )
    if allocation not in known:
        raise ValueError(f"unknown allocation {allocation!r}; {suggest(allocation, known)}")


def _whole_counts(
    totals: Mapping[str, Sequence[int]], groups: Sequence[LayerSite], counts: object
) -> dict[str, tuple[int, ...]]:
    """Counts as plain numbers, if they fit the model: at least one unit stays everywhere."""
    if not isinstance(counts, Mapping):
        raise invalid("counts", counts, "a site to a count per layer")
    counts = {site: ListOf(Integer(0))(f"counts[{site!r}]", n) for site, n in counts.items()}
    shape = {site: len(layers) for site, layers in counts.items()}
    if shape != {site: len(layers) for site, layers in totals.items()}:
        raise ValueError(
            f"counts has {shape}; expected {sorted(totals)} with {groups[0].depth} layers each"
        )
    free = {(group.site, group.layer) for group in groups}
    for site, layers in counts.items():
        for layer, (count, total) in enumerate(zip(layers, totals[site], strict=True)):
            if count >= total or (count and (site, layer) not in free):
                why = "at least one must stay" if count >= total else "keep_layers keeps it whole"
                raise ValueError(
                    f"{count} of {total} {site} units of layer {layer} are to leave; {why}"
                )
    return counts
