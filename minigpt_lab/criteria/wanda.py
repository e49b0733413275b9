"""Weights times the norm of what they read: Wanda, summed up to units (Wanda-sp)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from ..calibration import for_each_layer
from ..checks import Number, checked, hooked, restore_on_exit, safe_contextmanager
from ..models import Anatomy, weight_axis
from .scores import criterion
from .units import by_input, input_norms, known_statistics, per_feature, unit_scores


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
        As in both released codes, let every layer read what the pruned layers before it write:
        before layer *l* is scored, this share of the units (of the sites scored, rounded, at least
        one stays) with the lowest scores is taken out of layers 0 … *l* - 1. Within a layer both
        sites are scored before either is cut. Such scores belong to that ratio. By default the
        dense model's activations are used for all layers, and any ratio can be planned.

    Raises
    ------
    ValueError
        If there is no data, or `sequential` is no share or comes without batches.
    """
    if sequential is not None:
        if batches is None or statistics is not None:
            raise ValueError("sequential scores need batches: statistics are of the dense model")
        norms = _sequential_norms(model, batches, sites, sequential)
    else:
        found = known_statistics(model, batches, statistics, "wanda")
        norms = {name: input_norms(found, name) for name in found.layer_of}

    def sensitivity(name, module, side):
        return _columns(module, side, norms[name])

    return unit_scores(model, sites, sensitivity, scope="consumer")


def _columns(module, side: str, norms: np.ndarray) -> torch.Tensor:
    rows = module.weight.shape[weight_axis(module, "output")]
    return per_feature(module.weight.float().abs() * by_input(norms, module), module, side) / rows


def _sequential_norms(model, batches, sites, ratio: float) -> dict[str, np.ndarray]:
    """Input norms of every consumer, each layer reading what the pruned layers before it write."""
    anatomy, norms = Anatomy(model), {}

    def visit(layer: int, forward) -> None:
        consumers = {site: anatomy.family.consumes[site] for site in sites}
        modules = {site: anatomy.module(layer, p) for site, p in consumers.items()}
        with _squares(modules) as squares:
            forward()
        for site, module in modules.items():
            name = anatomy.name(layer, consumers[site])
            if not np.isfinite(squares[site]).all():
                raise ValueError(f"{name} has NaN or infinite values at its input")
            found = norms[name] = np.sqrt(squares[site])
            columns = _columns(module, "input", found).cpu().numpy()
            unit_features = anatomy.unit_features(consumers[site], layer)
            scores = columns[unit_features].sum(1)
            count = min(round(ratio * len(scores)), len(scores) - 1)
            lowest = unit_features[np.argsort(scores, kind="stable")[:count]].ravel()
            index = torch.as_tensor(lowest, device=module.weight.device)
            axis = weight_axis(module, "input")
            zeroed = module.weight.detach().index_fill(axis, index, 0)
            module.weight = torch.nn.Parameter(zeroed, requires_grad=False)

    with restore_on_exit(model):  # its own weights come back, untouched
        for_each_layer(model, batches, visit)
    return norms


@safe_contextmanager
def _squares(modules: dict[str, torch.nn.Module]) -> Iterator[dict[str, np.ndarray]]:
    """Sums of squares of every input feature that the modules read while inside."""
    sums: dict[str, np.ndarray] = {}

    def hook(site: str):
        def add(_module, args: tuple) -> None:
            squares = args[0].detach().flatten(0, -2).float().square().sum(0)
            sums[site] = sums.get(site, 0) + squares.cpu().double().numpy()

        return add

    hooks = [partial(each.register_forward_pre_hook, hook(site)) for site, each in modules.items()]
    with hooked(*hooks):
        yield sums
