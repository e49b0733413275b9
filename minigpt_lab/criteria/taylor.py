"""Taylor expansion of the loss without a unit (LLM-Pruner)."""

from __future__ import annotations

from ..calibration import collect_gradients
from ..checks import Flag, OneOf, checked
from .scores import criterion
from .units import REDUCE, scored_layers, unit_scores


@criterion("taylor")
@checked(
    variant=OneOf(("vector", "element1", "element2", "mix")),
    reduce=REDUCE,
    gradient_checkpointing=Flag(),
)
def taylor_scores(
    model,
    batches=None,
    statistics=None,
    *,
    sites,
    variant: str = "element1",
    reduce: str = "sum",
    gradient_checkpointing: bool = False,
):
    """Terms of ``L(W = 0) - L(W)``, reduced over the structures of a unit (arXiv 2305.11627, §3.2).

    With *g* the gradient of the mean loss over windows and *F* the mean square of the windows'
    gradients::

        vector    Σ_features |Σ g W|
        element1  Σ |g W|
        element2  Σ W² F
        mix       Σ |g W - ½ W² F|

    As in the released code, features are rows of the projections that write a unit and columns of
    the one that reads it, and biases are left out.

    Gradients are accumulated window by window, so they take the memory of one window. All windows
    weigh the same, whatever their length; the paper has windows of one length only.

    Parameters
    ----------
    variant : {"vector", "element1", "element2", "mix"}
        The terms of the expansion.
    reduce : {"sum", "mean", "max", "prod", "last"}
        Reduction over the structures of a unit; LLM-Pruner sums. As in its code structures are
        reduced channel by channel, and a head is the sum of its channels. With grouped queries, the
        channels of a group's query heads are added up first.
    gradient_checkpointing : bool
        Trade time for memory.

    Raises
    ------
    ValueError
        If there are no batches, an option is unknown, or a gradient is not finite.
    """
    if batches is None:
        raise ValueError("it needs batches: statistics hold no gradients")
    gradients = collect_gradients(
        model,
        batches,
        list(scored_layers(model, sites)),
        squares=variant in ("element2", "mix"),
        gradient_checkpointing=gradient_checkpointing,
    )

    def loss_change(linear):
        W = linear.W  # [output, input]
        first = linear.oriented(gradients.mean[linear.name]) * W  # g W
        if variant == "vector":
            return linear.per_feature(first).abs()
        if variant == "element1":
            return linear.per_feature(first.abs())
        second = W.square() * linear.oriented(gradients.square[linear.name])  # W² F
        return linear.per_feature(second if variant == "element2" else (first - second / 2).abs())

    return unit_scores(model, sites, loss_change, reduce=reduce, by_channel=True)
