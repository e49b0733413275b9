"""Layout of features along a projection: the rows or columns of every channel, head and group.

The features of a layer form a grid ``[group, head, feature]``: key/value groups, the query heads of
each group, and the `head_dim` features of each head. Without grouped queries a group is one head;
an FFN of *n* channels is the grid ``[n, 1, 1]``, dropped attention ``[0, 0, head_dim]``. A unit is
one index along axis 0 (a channel, head or group) or axis 1 (the *i*-th query head of every group):
`Projection.axis`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..architectures import Projection

Grid = tuple[int, int, int]  # number of groups, heads per group, features per head


def resized(grid: Grid, axis: int, units: int) -> Grid:
    """The grid with another number of units along an axis."""
    groups, heads, features = grid
    return (units, heads, features) if axis == 0 else (groups, units, features)


def width(projection: Projection, grid: Grid) -> int:
    """Number of features along a projection."""
    return sum(math.prod(_block_shape(block, grid)) for block in projection.blocks)


def block_features(projection: Projection, grid: Grid) -> dict[str, np.ndarray]:
    """Indices ``[group, head, feature]`` of the features of every block of a projection.

    The blocks of a fused projection lie one after the other (GPT-2, Phi-3) or, interleaved, side
    by side in every head (BLOOM, GPT-NeoX)::

        q₀ q₁ q₂ q₃ | k₀ k₁ k₂ k₃ | v₀ v₁ v₂ v₃          q₀ k₀ v₀ | q₁ k₁ v₁ | q₂ k₂ v₂ | …
    """
    shapes = {block: _block_shape(block, grid) for block in projection.blocks}
    if projection.interleaved:
        ends = np.cumsum([math.prod(shape[1:]) for shape in shapes.values()])  # within a group
        index = np.arange(grid[0] * ends[-1]).reshape(grid[0], ends[-1])  # [group, feature]
    else:
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
        index = np.arange(ends[-1])  # [feature]
    parts = np.split(index, ends[:-1], axis=-1)
    return {
        block: part.reshape(shape)
        for (block, shape), part in zip(shapes.items(), parts, strict=True)
    }


def unit_features(projection: Projection, grid: Grid, block: str | None = None) -> np.ndarray:
    """Indices ``[unit, feature]`` of the features of every unit, of one block or of all."""
    axis, index = projection.axis, block_features(projection, grid)
    blocks = [each for each in projection.unit_blocks if block in (None, each)]
    by_unit = [np.moveaxis(index[each], axis, 0) for each in blocks]
    flat = [each.reshape(len(each), math.prod(each.shape[1:])) for each in by_unit]
    return np.concatenate(flat, axis=1)


def selected_features(
    projection: Projection, grid: Grid, units: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Old and new indices of the features of selected units.

    Parameters
    ----------
    projection : Projection
        The projection.
    grid : tuple of int
        Grid of the layer before the selection.
    units : sequence of int
        Old indices of the units in their new order; -1 is a new unit, to which nothing is copied.

    Returns
    -------
    old, new : numpy.ndarray
        Indices ``[n]``: feature ``old[i]`` becomes feature ``new[i]``.
    """
    axis, old_units = projection.axis, np.asarray(units, np.int64)
    new_units = np.flatnonzero(old_units >= 0)
    old_units = old_units[new_units]
    before = block_features(projection, grid)
    after = block_features(projection, resized(grid, axis, len(units)))
    old, new = [], []
    for block in projection.blocks:
        if block in projection.unit_blocks:
            old.append(before[block].take(old_units, axis).ravel())
            new.append(after[block].take(new_units, axis).ravel())
        else:  # every group keeps its key and value, however many of its query heads are selected
            old.append(before[block].ravel())
            new.append(after[block].ravel())
    return np.concatenate(old), np.concatenate(new)


def _block_shape(block: str, grid: Grid) -> Grid:
    """Grid of one block: only queries have several heads per group."""
    groups, heads, features = grid
    return groups, heads if block == "query" else 1, features
