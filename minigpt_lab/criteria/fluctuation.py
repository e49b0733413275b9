"""How much a unit's features vary over tokens (FLAP), and the bias that replaces their mean."""

from __future__ import annotations

import torch

from ..checks import Flag, checked
from ..models import Anatomy, weight_axis
from .scores import criterion
from .units import by_input, check_option, input_norms, known_statistics, per_feature, unit_scores

METRICS = ("IFV", "WIFV", "WIFN")


@criterion("fluctuation")
@checked(standardise=Flag(), square_attention=Flag())
def fluctuation_scores(
    model,
    batches=None,
    statistics=None,
    *,
    sites,
    metric: str = "WIFV",
    standardise: bool = True,
    square_attention: bool = True,
):
    """FLAP's metric (arXiv 2312.11983) of the features that o and down read, summed over a unit.

    ``IFV``: ``Var(X_j)``. ``WIFV``: ``Var(X_j) · Σ_i W_ij²``. ``WIFN``: ``mean_i |W_ij| · ‖X_j‖₂``.
    What hardly varies can be replaced by its mean (see `bias_compensated`).

    The variance is the exact one over all tokens, divided by their number; the released code
    streams it over samples, of which the first is a mere start, and divides by theirs.

    Parameters
    ----------
    metric : {"IFV", "WIFV", "WIFN"}
    standardise : bool
        Standardise the features' metric in every layer, ``(S - mean) / std`` (std with n - 1, as in
        the released code), so that layers and sites can be compared, as the paper's adaptive
        structure does (the allocation ``"global-as-scored"``); a unit's score is then the mean of
        its features', as there.
    square_attention : bool
        Square the metric of attention before it is standardised, as the released code does. Has no
        effect otherwise.

    Raises
    ------
    ValueError
        If there is no data or the metric is unknown.
    """
    check_option("metric", metric, METRICS)
    found = known_statistics(model, batches, statistics, "fluctuation")
    anatomy = Anatomy(model)
    attention = {
        anatomy.name(layer, anatomy.family.consumes["attention"])
        for layer in range(len(anatomy.layers))
    }

    def features(name, module, side):
        weight = module.weight.float()
        if metric == "WIFN":
            rows = weight.shape[weight_axis(module, "output")]
            norms = by_input(input_norms(found, name), module)
            values = per_feature(weight.abs() * norms, module, side).cpu().double() / rows
        else:
            values = torch.from_numpy(found.variance(name, "input"))
            if metric == "WIFV":
                values = values * per_feature(weight.square(), module, side).cpu()
        if standardise:
            if square_attention and name in attention:
                values = values.square()
            spread = float(values.std()) if len(values) > 1 else 0.0
            values = (values - values.mean()) / (spread or 1.0)
        return values

    scores = unit_scores(model, sites, features, scope="consumer")
    if standardise:
        for site, layers in scores.items():
            consumer = anatomy.family.consumes[site]
            for layer, values in enumerate(layers):
                per_unit = anatomy.unit_features(consumer, layer).shape[1]
                layers[layer] = values / per_unit
    return scores
