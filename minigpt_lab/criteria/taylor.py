"""What the loss would change by if a unit's weights were zero (LLM-Pruner's Taylor expansion)."""

from __future__ import annotations

from ..calibration import collect_gradients
from ..checks import Flag, checked
from .scores import criterion
from .units import check_option, per_feature, scored_layers, unit_scores

VARIANTS = ("vector", "element1", "element2", "mix")


@criterion("taylor")
@checked(gradient_checkpointing=Flag())
def taylor_scores(
    model,
    batches=None,
    statistics=None,
    *,
    sites,
    variant: str = "element1",
    reduce: str = "sum",
    scope: str = "coupled",
    gradient_checkpointing: bool = False,
):
    """Terms of ``L(w = 0) - L(w)``, reduced over the structures of a unit (arXiv 2305.11627, §3.2).

    With *g* the gradient of the mean loss over windows and *F* the mean of its squares:
    ``vector``: ``Σ_features |Σ g w|``. ``element1``: ``Σ |g w|``. ``element2``: ``Σ w² F``.
    ``mix``: ``Σ |g w - ½ w² F|``. As in the released code, features are rows of the projections
    that write a unit and columns of the one that reads it, and biases are left out.

    Gradients are accumulated window by window, so memory stays at one window's. Windows weigh the
    same; for windows of different lengths the paper, which has one length, says nothing.

    Parameters
    ----------
    variant : {"vector", "element1", "element2", "mix"}
    reduce : {"sum", "mean", "max", "prod", "last"}
        How the structures' scores become one; LLM-Pruner sums. As in its code, channel by channel,
        and a head is the sum of its channels; with grouped queries, those of a group's heads are
        added up first.
    scope : {"coupled", "consumer"}
        All weights of a unit, or the o/down columns only.
    gradient_checkpointing : bool
        Trade time for memory (gradient checkpointing).

    Raises
    ------
    ValueError
        If there are no batches, an option is unknown, or a gradient is not finite.
    """
    check_option("variant", variant, VARIANTS)
    if batches is None:
        raise ValueError("the taylor criterion needs batches: statistics hold no gradients")
    names = scored_layers(model, sites, scope)
    squares = variant in ("element2", "mix")
    found = collect_gradients(
        model, batches, names, squares=squares, gradient_checkpointing=gradient_checkpointing
    )

    def change(name, module, side):
        weight = module.weight.float()
        first = found.mean[name] * weight
        if variant == "vector":
            return per_feature(first, module, side).abs()
        if variant == "element1":
            return per_feature(first.abs(), module, side)
        second = weight.square() * found.square[name]
        terms = second if variant == "element2" else (first - second / 2).abs()
        return per_feature(terms, module, side)

    return unit_scores(model, sites, change, scope, reduce, by_channel=True)
