"""Fluctuation of a unit's features over tokens (FLAP)."""

from __future__ import annotations

import torch

from ..checks import Flag, OneOf, checked
from .scores import criterion
from .units import input_norms, known_statistics, unit_scores


@criterion("fluctuation")
@checked(metric=OneOf(("IFV", "WIFV", "WIFN")), standardise=Flag())
def fluctuation_scores(
    model, batches=None, statistics=None, *, sites, metric: str = "WIFV", standardise: bool = True
):
    """FLAP's metric (arXiv 2312.11983) of the features that o and down read, summed over a unit.

    For feature *j*::

        IFV   Var(X_j)
        WIFV  Var(X_j) · Σ_i W_ij²
        WIFN  mean_i |W_ij| · ‖X_j‖₂

    Features that hardly vary can be replaced by their mean (see `bias_compensated`).

    The variance here is exact: over all tokens, divided by their number. The released code updates
    it sample by sample, starting from the first, and divides by the number of samples.

    Parameters
    ----------
    metric : {"IFV", "WIFV", "WIFN"}
        The metric.
    standardise : bool
        Standardise the features' metric in every layer, ``(S - mean) / std`` (std with n - 1, as in
        the released code), so that layers and sites can be compared. The paper's adaptive structure
        does so, with the allocation ``"global-as-scored"``. As there, a unit's score is then the
        mean over its features instead of the sum, and attention's metric is squared before.

    Raises
    ------
    ValueError
        If there is no data or the metric is unknown.
    """
    statistics = known_statistics(model, batches, statistics)

    def fluctuation(linear):
        S = _metric(metric, linear, statistics)  # [input]
        if not standardise:
            return S
        if linear.site != "ffn":
            S = S.square()
        std = float(S.std()) if len(S) > 1 else 0.0
        return (S - S.mean()) / (std or 1.0)  # [input]

    return unit_scores(model, sites, fluctuation, scope="consumer", average=standardise)


def _metric(metric: str, linear, statistics) -> torch.Tensor:
    """The metric of every input feature ``[input]``, in float64."""
    W = linear.W  # [output, input]
    if metric == "WIFN":
        norms = linear.row(input_norms(statistics, linear.name))
        return linear.per_feature(W.abs() * norms).cpu().double() / len(W)
    variance = torch.from_numpy(statistics.variance(linear.name, "input"))
    if metric == "IFV":
        return variance
    return variance * linear.per_feature(W.square()).cpu()
