"""Size of a pruned model, counted from its plan and the dense model's shapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .anatomy import Anatomy, weight_axis
from .sizes import Size, layer_parameters, token_parameters

if TYPE_CHECKING:
    from .plan import PruningPlan


def predicted_size(plan: PruningPlan, anatomy: Anatomy) -> Size:
    """`PruningPlan.predicted_size` for a plan that fits the model."""
    dense, layers_dense = anatomy.model.num_parameters(), layer_parameters(anatomy.model)
    kept = plan.kept_features(anatomy)
    # 1. Parameters of the linear layers inside the decoder: dense, stored and not zero.
    before = stored = nonzero = 0
    for _, name, module in anatomy.linears():
        rows, columns = (  # masks of the kept outputs and inputs
            kept.get((name, side), np.ones(module.weight.shape[weight_axis(module, side)], bool))
            for side in ("output", "input")
        )
        zero = plan.zero.get(name, {})
        before += module.weight.numel()
        stored += rows.sum() * columns.sum()
        nonzero_rows = _without(rows, zero.get("output", ()))
        nonzero += nonzero_rows.sum() * _without(columns, zero.get("input", ())).sum()
        shift = np.array(plan.shift.get(name, np.zeros(len(rows)))) != 0
        if module.bias is not None:
            before += len(rows)
            stored += rows.sum()
            nonzero += (_without(rows, zero.get("bias", ())) | (rows & shift)).sum()
        elif name in plan.shift:  # it gets a bias
            stored += rows.sum()
            nonzero += (rows & shift).sum()
    # 2. All other parameters of the model stay, but for the rows of removed tokens.
    removed = before - int(stored)
    layers_stored = layers_dense - removed
    if plan.vocabulary is not None:
        tokens = plan.vocabulary_size - len(plan.vocabulary)
        removed += tokens * token_parameters(anatomy.model)
    zeroed = int(stored - nonzero)
    return Size(
        stored=dense - removed,
        nonzero=dense - removed - zeroed,
        dense=dense,
        layers_stored=layers_stored,
        layers_dense=layers_dense,
        paper_nonzero=dense - _paper_zeros(plan, anatomy),
    )


def _paper_zeros(plan: PruningPlan, anatomy: Anatomy) -> int:
    """Number of weights that the code of Mini-GPTs would set to zero for a plan; it removes none.

    For a pruned activation it zeroes the row (and bias) of the linear layer before it; the column
    of the layer behind it still counts. That code does not know gated FFNs: here it is the row of
    the gate. Linear inputs and outputs under the threshold are zeroed themselves; tokens are zeroed
    in embedding and head, but not in the head's bias. For plans that were not made by thresholds,
    removed channels count as pruned activations, removed heads as pruned outputs of q, k and v.
    """
    modules = {name: module for _, name, module in anatomy.linears()}
    # 1. Masks of the features that are not zeroed: by the plan's neurons, then by its units.
    alive = {
        name: {
            side: np.ones(module.weight.shape[weight_axis(module, axis)], bool)
            for side, axis in (("input", "input"), ("output", "output"), ("bias", "output"))
        }
        for name, module in modules.items()
    }
    for name, sides in (plan.neurons or plan.zero).items():
        for side in sides.keys() & alive[name].keys():
            alive[name][side][sides[side]] = False
    for site, layer, units in _removed_units(plan, anatomy):
        for projection in anatomy.family.produces[site][: 1 if site == "ffn" else None]:
            block = "gate" if "gate" in projection.blocks else None
            rows = anatomy.unit_features(projection, layer, block=block)[units]
            for side in ("output", "bias"):
                alive[anatomy.name(layer, projection)][side][rows] = False
    # 2. Count: a weight is zero if its row or its column is.
    zeros = 0
    for name, module in modules.items():
        rows, columns, bias = (alive[name][side] for side in ("output", "input", "bias"))
        zeros += module.weight.numel() - rows.sum() * columns.sum()
        zeros += 0 if module.bias is None else (~bias).sum()
    # 3. Rows of removed tokens.
    if plan.vocabulary is not None:
        tables = [anatomy.model.get_input_embeddings()]
        if not anatomy.head_is_tied():
            tables.append(anatomy.model.get_output_embeddings())
        tokens = plan.vocabulary_size - len(plan.vocabulary)
        zeros += tokens * sum(table.weight.shape[1] for table in tables)
    return int(zeros)


def _removed_units(
    plan: PruningPlan, anatomy: Anatomy
) -> Iterator[tuple[str, int, Sequence[int] | np.ndarray]]:
    """Site, layer and units that the paper's code would prune as activations or heads."""
    if plan.neurons:  # a plan by thresholds: of its units, only activations are pruned as such
        for layer in range(len(anatomy.layers)):
            name = anatomy.name(layer, anatomy.family.consumes["ffn"])
            yield "ffn", layer, plan.neurons.get(name, {}).get("activation", [])
        return
    for site in plan.keep:
        for layer, kept in enumerate(plan.kept_mask(site)):
            yield site, layer, np.flatnonzero(~kept)


def _without(mask: np.ndarray, features: Sequence[int]) -> np.ndarray:
    """A mask with some features set to False."""
    mask = mask.copy()
    mask[np.array(features, np.int64)] = False
    return mask
