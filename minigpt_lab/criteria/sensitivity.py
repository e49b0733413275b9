"""Magnitude times activation times gradient: MINI-LLM's feature map sensitivity."""

from __future__ import annotations

from ..calibration import collect_gradients, estimate_gradients
from ..checks import Flag, Integer, Number, OneOf, checked
from .scores import criterion
from .units import REDUCE, input_norms, known_statistics, scored_layers, unit_scores

#: MINI-LLM's setting, for `score` and for `plan_from_scores`: the first four and the last three
#: layers are not pruned.
MINI_LLM = {"score": {"gradient": "zeroth-order", "reduce": "max"}, "plan": {"keep_layers": (4, 3)}}


@criterion("sensitivity")
@checked(
    gradient=OneOf(("zeroth-order", "backprop", "none")),
    reduce=REDUCE,
    eps=Number(above=0),
    n_directions=Integer(1),
    per_sample=Flag(),
    seed=Integer(0),
)
def sensitivity_scores(
    model,
    batches=None,
    statistics=None,
    *,
    sites,
    gradient: str = "zeroth-order",
    reduce: str = "max",
    eps: float = 1e-3,
    n_directions: int = 1,
    per_sample: bool = True,
    seed: int = 0,
):
    """``Σ |W_ij| · ‖X_j‖₂ · |g_ij|`` over each structure of a unit; the maximum of these.

    The feature map sensitivity of MINI-LLM (arXiv 2407.11681, §3). The paper estimates *g* without
    backpropagation, from random perturbations *z* of the weights (SPSA): ``g = c z`` with a number
    *c*.

    The version of the paper at hand has its text, but not its equations. Choices made here: the
    norm of *X*, the sum over a structure's weights before the maximum, ε (10⁻³ is MeZO's), and that
    every window has directions of its own. If all windows shared a single direction, |g| would be
    |c|·|z|, and the score Wanda's times noise. See `gradient_cosine`.

    Parameters
    ----------
    gradient : {"zeroth-order", "backprop", "none"}
        Source of g. ``"none"`` omits the factor: Wanda's score of coupled structures.
    reduce : {"max", "sum", "mean", "prod", "last"}
        Reduction over the structures of a unit.
    eps, n_directions, per_sample, seed
        Options of the zeroth-order estimate, see `spsa.estimate_gradients`.

    Raises
    ------
    ValueError
        If a criterion's data is missing, an option is unknown, or a gradient is not finite.
    """
    if gradient != "none" and batches is None:
        raise ValueError(f"gradient={gradient!r} needs batches: statistics hold no gradients")
    statistics = known_statistics(model, batches, statistics)
    names = list(scored_layers(model, sites))
    if gradient == "backprop":
        g = collect_gradients(model, batches, names)
    elif gradient == "zeroth-order":
        directions = {"n_directions": n_directions, "per_sample": per_sample, "seed": seed}
        g = estimate_gradients(model, batches, names, eps=eps, **directions)

    def sensitivity(linear):
        S = linear.W.abs() * linear.row(input_norms(statistics, linear.name))  # [output, input]
        if gradient != "none":
            S = S * linear.oriented(g[linear.name]).abs()
        return linear.per_feature(S)

    return unit_scores(model, sites, sensitivity, reduce=reduce)
