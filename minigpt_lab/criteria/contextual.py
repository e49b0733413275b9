"""Mini-GPTs' statistic per unit: mean absolute activation on the domain."""

from __future__ import annotations

from ..models import Anatomy
from .scores import criterion
from .units import known_statistics


@criterion("contextual")
def contextual_scores(model, batches=None, statistics=None, *, sites):
    """Mean |x| of a unit's features where the site's second projection reads them.

    For FFN channels this is the paper's activation statistic (Mini-GPTs, arXiv 2312.12682, §3); for
    attention it is the mean over the features of a head or group, which the paper does not define.

    Raises
    ------
    ValueError
        If neither batches nor statistics are given.
    """
    statistics = known_statistics(model, batches, statistics, "contextual")
    anatomy, found = Anatomy(model), {}
    for site in sites:
        consumer = anatomy.family.consumes[site]
        found[site] = []
        for layer in range(len(anatomy.layers)):
            mean_abs = statistics.mean(anatomy.name(layer, consumer), "input", "absolute")
            features = anatomy.unit_features(consumer, layer)
            found[site].append(mean_abs[features].mean(1))
    return found
