"""Mean absolute activation on the domain (Mini-GPTs)."""

from __future__ import annotations

from .scores import criterion
from .units import known_statistics, unit_scores


@criterion("contextual")
def contextual_scores(model, batches=None, statistics=None, *, sites):
    """Mean absolute activation ``m_j = (1/N) Σ_t |a_tj|``, averaged over a unit's features.

    *a* is the input of the projection that reads the units (o/down), *t* a token. For FFN channels
    this is the activation statistic of Mini-GPTs (arXiv 2312.12682, §3). For attention, which the
    paper does not define, it is averaged over the features of a head or group.

    Raises
    ------
    ValueError
        If neither batches nor statistics are given.
    """
    statistics = known_statistics(model, batches, statistics)

    def mean_magnitude(linear):
        return statistics.mean(linear.name, "input", "absolute")  # m [input]

    return unit_scores(model, sites, mean_magnitude, scope="consumer", average=True)
