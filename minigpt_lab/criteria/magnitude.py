"""Magnitude of a unit's coupled weights, without any data."""

from __future__ import annotations

from ..checks import OneOf, checked
from .scores import criterion
from .units import REDUCE, SCOPE, unit_scores


@criterion("magnitude")
@checked(norm=OneOf(("l1", "l2")), reduce=REDUCE, scope=SCOPE)
def magnitude_scores(
    model,
    batches=None,
    statistics=None,
    *,
    sites,
    norm: str = "l2",
    reduce: str = "sum",
    scope: str = "coupled",
):
    """``Σ |W_ij|^p`` over each channel's weights, reduced over the structures of a unit.

    With ``scope="coupled"`` this is the magnitude of LLM-Pruner's released code (arXiv 2305.11627):
    no p-th root is taken, and a head is the sum of its channels. With ``scope="consumer"`` it is
    the Mag-sp of FLAP's released code (arXiv 2312.11983): ``Σ_j ‖W_:,j‖_p`` over the unit's columns
    *j* of the projection that reads it. Biases are left out.

    Parameters
    ----------
    norm : {"l1", "l2"}
        p = 1 or 2.
    reduce : {"sum", "mean", "max", "prod", "last"}
        Reduction over the structures, channel by channel as for `taylor`; LLM-Pruner's magnitude
        takes the mean.
    scope : {"coupled", "consumer"}
        All weights of a unit, or the o/down columns only.

    Raises
    ------
    ValueError
        If an option is unknown.
    """

    def powers(linear):
        W = linear.W  # [output, input]
        total = linear.per_feature(W.abs() if norm == "l1" else W.square())  # [feature]
        return total.sqrt() if norm == "l2" and scope == "consumer" else total

    return unit_scores(model, sites, powers, scope=scope, reduce=reduce, by_channel=True)
