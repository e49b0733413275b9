"""Weight magnitude of a unit's coupled weights, without any data."""

from __future__ import annotations

from .scores import criterion
from .units import check_option, per_feature, unit_scores


@criterion("magnitude")
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
    """Sum of ``|w|^p`` over each channel's weights, reduced over the structures of a unit.

    ``coupled`` is the magnitude of LLM-Pruner's released code (arXiv 2305.11627; no p-th root,
    heads are the sum of their channels); ``consumer`` the Mag-sp of FLAP's (arXiv 2312.11983):
    ``Σ_j ‖W_:,j‖_p`` over the unit's columns of the projection that reads it. Biases are left out.

    Parameters
    ----------
    norm : {"l1", "l2"}
        p = 1 or 2.
    reduce : {"sum", "mean", "max", "prod", "last"}
        How the structures' scores become one; LLM-Pruner's magnitude takes the mean. Channel by
        channel, as for `taylor`.
    scope : {"coupled", "consumer"}
        All weights of a unit, or the o/down columns only.

    Raises
    ------
    ValueError
        If an option is unknown.
    """
    check_option("norm", norm, ("l1", "l2"))

    def powers(_name, module, side):
        weight = module.weight.float()
        total = per_feature(weight.abs() if norm == "l1" else weight.square(), module, side)
        return total.sqrt() if norm == "l2" and scope == "consumer" else total

    return unit_scores(model, sites, powers, scope, reduce, by_channel=True)
