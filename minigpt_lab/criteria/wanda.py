"""Weights times the norm of their inputs: Wanda, summed over units (Wanda-sp)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ..calibration import LayerRunner, catch_inputs, watch
from ..checks import Number, checked, restore_on_exit
from ..models import Anatomy, inference, weight_axis
from ..store import Shards
from .scores import criterion
from .units import ScoredLinear, input_norms, known_statistics, unit_scores


@criterion("wanda")
@checked(sequential=Number(0, below=1) | None)
def wanda_scores(model, batches=None, statistics=None, *, sites, sequential: float | None = None):
    """``Σ_j mean_i |W_ij| · ‖X_j‖₂`` over a unit's columns *j* of the projection that reads it.

    Wanda (arXiv 2306.11695) scores single weights by ``|W_ij| · ‖X_j‖₂``; the sum over a unit of
    o/down is the Wanda-sp of FLAP's released code (arXiv 2312.11983). There ``‖X_j‖₂²`` is divided
    by the number of samples, a constant that changes no order.

    Parameters
    ----------
    sequential : float, optional
        As in both released codes, let every layer read the outputs of the pruned layers before it:
        before layer *l* is scored, layers 0 … *l* - 1 lose this share of their units (rounded, at
        least one per scored site is kept), those with the lowest scores. Within a layer both sites
        are scored before either is pruned. Such scores are meant for a plan of that ratio. By
        default the dense model's activations are used for all layers, and the scores serve any
        ratio.

    Raises
    ------
    ValueError
        If there is no data, or `sequential` is no share or comes without batches.
    """
    if sequential is None:
        statistics = known_statistics(model, batches, statistics)
        norms = {name: input_norms(statistics, name) for name in statistics.layer_of}
    elif batches is None or statistics is not None:
        raise ValueError("sequential scores need batches: statistics are of the dense model")
    else:
        norms = _sequential_norms(model, batches, sites, sequential)
    return unit_scores(
        model, sites, lambda linear: _column_scores(linear, norms[linear.name]), scope="consumer"
    )


def _column_scores(linear: ScoredLinear, norms: np.ndarray) -> torch.Tensor:
    """``mean_i |W_ij| · ‖X_j‖₂`` of every column j ``[input]``."""
    W = linear.W  # [output, input]
    return linear.per_feature(W.abs() * linear.row(norms)) / len(W)


def _sequential_norms(model, batches, sites, ratio: float) -> dict[str, np.ndarray]:
    """``‖X_j‖₂`` of what o and down read in every layer when the layers before it are pruned."""
    anatomy, hidden, norms = Anatomy(model), Shards(), {}
    with restore_on_exit(model), inference(model):
        calls = catch_inputs(model, batches, hidden)
        for layer in range(len(anatomy.layers)):
            runner = LayerRunner(anatomy, layer, hidden, calls)
            readers = {site: anatomy.family.consumes[site] for site in sites}
            linears = [ScoredLinear(anatomy, layer, *each) for each in readers.items()]
            # 1. Norms of this layer, not yet pruned.
            norms |= _layer_norms(runner, linears)
            # 2. Prune it by zeroing columns.
            for linear in linears:
                features = anatomy.unit_features(readers[linear.site], layer)
                _zero_lowest(linear, norms[linear.name], features, ratio)
            # 3. Its outputs are the next layer's inputs.
            if layer + 1 < len(anatomy.layers):
                runner.finish()
    return norms


def _layer_norms(runner: LayerRunner, linears: Sequence[ScoredLinear]) -> dict[str, np.ndarray]:
    """``‖X_j‖₂`` for some linear layers of one decoder layer, over all windows."""
    squares: dict[str, np.ndarray] = {}

    def add(name: str, X: torch.Tensor) -> None:
        """Add a window's ``Σ_t X_tj²``, of X ``[…, input]``."""
        X = X.detach().float().flatten(0, -2)  # [token, input]
        squares[name] = squares.get(name, 0) + X.square().sum(0).cpu().double().numpy()

    with watch({linear.name: linear.module for linear in linears}, before=add):
        for window in range(len(runner.hidden)):
            runner.run(window)
    for name, total in squares.items():
        if not np.isfinite(total).all():
            raise ValueError(f"{name} has NaN or infinite values at its input")
    return {name: np.sqrt(total) for name, total in squares.items()}


def _zero_lowest(
    linear: ScoredLinear, norms: np.ndarray, features: np.ndarray, ratio: float
) -> None:
    """Zero the columns of the units with the lowest scores.

    Parameters
    ----------
    linear : ScoredLinear
        The projection that reads the units.
    norms : numpy.ndarray
        ``‖X_j‖₂`` ``[input]``.
    features : numpy.ndarray
        Columns of every unit ``[unit, feature]``.
    ratio : float
        Share of the units to zero.
    """
    scores = _column_scores(linear, norms).cpu().numpy()[features].sum(1)  # [unit]
    n_pruned = min(round(ratio * len(scores)), len(scores) - 1)
    columns = features[np.argsort(scores, kind="stable")[:n_pruned]].ravel()
    index = torch.as_tensor(columns, device=linear.module.weight.device)
    weight = linear.module.weight.detach()
    pruned = weight.index_fill(weight_axis(linear.module, "input"), index, 0)
    linear.module.weight = nn.Parameter(pruned, requires_grad=False)
