"""Exercises of notebooks 00 to 03: statistics, plans, sizes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import Statistics
from ..criteria import score
from ..domains import Part
from ..models import Anatomy, PruningPlan, model_size, token_parameters
from ..studies import activation_frame
from .checking import exercise
from .verdicts import Answer

# 00_start_here


def _channel(model: PreTrainedModel) -> tuple[int, dict[str, int]]:
    """Parameters of one FFN channel, and what a hasty count of them gives."""
    anatomy = Anatomy(model)
    second = anatomy.module(0, anatomy.family.consumes["ffn"])
    row = second.weight.numel() // anatomy.units("ffn")[0]
    cost = anatomy.unit_parameters("ffn", 0)
    mistakes = {"what one of the FFN's matrices loses; each loses a row or a column": row}
    if cost // row == 3:
        mistakes["what two matrices lose; a gated FFN has three"] = 2 * row
    if cost % row:
        mistakes["the weights alone; a channel's bias is removed too"] = cost - cost % row
    return cost, mistakes


@exercise("count")
def channel_cost(model: PreTrainedModel) -> Answer:
    """Parameters that are removed with one FFN channel."""
    cost, mistakes = _channel(model)
    whole = "all channels of a layer; one is removed"
    return Answer(cost, {**mistakes, whole: Anatomy(model).units("ffn")[0] * cost})


@exercise("share")
def stored_share(model: PreTrainedModel, mini: PreTrainedModel) -> Answer:
    """Share of the dense model's parameters that the small one stores."""
    size = model_size(mini, model)
    mistakes = {
        "the share removed; the share kept is asked for": 1 - size.stored / size.dense,
        "the share of the decoder layers; the embeddings are stored too": size.layer_ratio,
        "the dense size over the small one; turn it round": size.dense / size.stored,
    }
    return Answer(size.stored / size.dense, mistakes, tolerance=0.002)


@exercise("name")
def costlier_text(table: pd.DataFrame) -> Answer:
    """The text whose perplexity pruning raises by the larger factor."""
    perplexities = table.pivot(index="text", columns="variant", values="perplexity")
    rise = perplexities["shrunk"] / perplexities["dense"]
    hardest = "the text with the highest perplexity; compare each with its own dense level"
    mistakes = {hardest: perplexities["shrunk"].idxmax()}
    return Answer(rise.idxmax(), mistakes, options=list(rise.index))


# 01_activation_histograms


@exercise("share")
def unused_share(statistics: Mapping[str, Statistics], domain: str, epsilon: float) -> Answer:
    """Share of all FFN neurons whose mean |activation| is at or below ε on a domain."""
    frame = activation_frame(statistics)
    unused, own = frame["mean_abs"] <= epsilon, frame["domain"] == domain
    first = own & (frame["layer"] == 0)
    mistakes = {
        "the share above ε, of the neurons in use": 1 - unused[own].mean(),
        "the share over all domains; keep the rows of one": unused.mean(),
        "the share of the first layer alone; take all of them": unused[first].mean(),
        "how many they are; divide by the number of neurons": unused[own].sum(),
    }
    return Answer(unused[own].mean(), mistakes)


@exercise("set")
def unused_by_one(unused: pd.DataFrame, domain: str, other: str) -> Answer:
    """Neurons that one domain does not use and another does."""
    one, two = (set(unused.index[unused[name]]) for name in (domain, other))
    mistakes = {
        "the neurons unused by the other domain alone; turn it round": two - one,
        "the neurons unused by both; keep those of this domain alone": one & two,
        "the neurons unused by either; take those of the other domain away": one | two,
        "all neurons that the domain does not use; take the other's away": one,
        "the neurons unused by exactly one, whichever; keep this domain's": one ^ two,
    }
    return Answer(one - two, mistakes)


@exercise("share")
def chance_overlap(share: float) -> Answer:
    """Jaccard overlap that two random sets of this share of the neurons can expect."""
    both = share**2
    mistakes = {
        "the expected intersection; divide it by the expected union": both,
        "the share of each set; how much of it does the other one hold?": share,
        "the expected union; the intersection is to be divided by it": 2 * share - both,
        "the intersection over both sizes; the union counts what is in both once": share / 2,
    }
    return Answer(both / (2 * share - both), mistakes)


# 02_threshold_sweep


@exercise("number")
def epsilon_for_a_tenth(statistics: Statistics) -> Answer:
    """The absolute ε that prunes a tenth of all FFN channels."""
    frame = statistics.to_frame()
    neurons = frame[frame["side"] == "activation"]
    means, first = neurons["mean_abs"], neurons.loc[neurons["layer"] == 0, "mean_abs"]
    every = "taken over the inputs and outputs too; keep the rows of side 'activation'"
    mistakes = {
        "the ε that keeps a tenth": means.quantile(0.9),
        "a tenth of the largest mean; a tenth of the neurons is asked for": means.max() / 10,
        every: frame["mean_abs"].quantile(0.1),
        "the ε of the first layer; take all layers together": first.quantile(0.1),
    }
    return Answer(means.quantile(0.1), mistakes)


@exercise("plan")
def even_pruning(model: PreTrainedModel, statistics: Statistics, uneven: PruningPlan) -> Answer:
    """A plan as large as one by a single ε, with the same share of every layer instead."""
    magnitudes = score(model, "contextual", statistics=statistics, sites=("ffn",)).values["ffn"]
    target = uneven.predicted_size(model).stored

    def judge(plan: PruningPlan) -> str | None:
        try:
            stored = plan.predicted_size(model).stored
        except ValueError as error:
            return str(error)
        if any([*plan.removed.get("attention", []), plan.zero, plan.vocabulary]):
            return "it prunes heads, tokens or single weights too; prune FFN channels alone"
        shares = np.divide(plan.removed["ffn"], plan.units["ffn"])
        if np.ptp(shares) > 1.5 / max(plan.units["ffn"]):
            span = f"{min(shares):.0%} to {max(shares):.0%}"
            return f"layers lose {span} of their channels; take the same share of each"
        if abs(stored / target - 1) > 0.005:
            return f"it stores {stored / target:.1%} of the parameters of the plan by ε"
        for layer, (magnitude, units) in enumerate(zip(magnitudes, plan.keep["ffn"], strict=True)):
            if np.delete(magnitude, units).max(initial=0) > magnitude[units].min():
                return f"in layer {layer} a removed channel is more active than one that is kept"
        return None

    return Answer(judge)


@exercise("number")
def advantage_over_random(final: pd.DataFrame, component: str) -> Answer:
    """Loss of the random control over that of contextual pruning."""
    rows = final[final["component"] == component]
    loss = rows.groupby("method")["perplexity_ratio"].mean()  # of a control's seeds
    mistakes = {
        "the inverse; the random control's loss goes on top": loss["contextual"] / loss["random"],
        "the difference of the two losses; divide them": loss["random"] - loss["contextual"],
        "the random control's own loss; divide it by the contextual one": loss["random"],
    }
    if "magnitude" in loss:
        mistakes["the control with the smallest weights"] = loss["magnitude"] / loss["contextual"]
    return Answer(loss["random"] / loss["contextual"], mistakes)


# 03_contextual_pruning


@exercise("count")
def channels_alone(model: PreTrainedModel, plan: PruningPlan) -> Answer:
    """Parameters that are removed with the plan's FFN channels."""
    gone, size = sum(plan.removed["ffn"]), plan.predicted_size(model)
    cost, hasty = _channel(model)
    tokens = plan.vocabulary_size - len(plan.vocabulary or range(plan.vocabulary_size))
    mistakes = {
        "the number of channels; count the parameters of each": gone,
        **{what: gone * per_channel for what, per_channel in hasty.items()},
        "the parameters of the removed tokens": tokens * token_parameters(model),
        "all removed parameters; do not count tokens and heads": size.dense - size.stored,
        "the parameters of the channels that are kept": (sum(plan.units["ffn"]) - gone) * cost,
    }
    return Answer(gone * cost, mistakes)


@exercise("number")
def token_inflation(
    tokenizer: PreTrainedTokenizerBase, trimmed: PreTrainedTokenizerBase, passage: str
) -> Answer:
    """Tokens of a passage after trimming over those before."""
    before, after = (
        len(words(passage, add_special_tokens=False)["input_ids"]) for words in (tokenizer, trimmed)
    )
    mistakes = {
        "the inverse; tokens after trimming go on top": before / after,
        "how many tokens are added; divide the counts": after - before,
        "characters per token": len(passage) / after,
    }
    return Answer(after / before, mistakes, tolerance=0.005)


@exercise("number")
def price_outside(table: pd.DataFrame, inside: Part, outside: Part) -> Answer:
    """Bits per character that pruning costs outside the domain, beyond what it costs inside."""
    by_variant = {variant: rows.set_index("text") for variant, rows in table.groupby("variant")}
    columns = ["bits_per_character", "perplexity"]
    rises = by_variant["shrunk"][columns] - by_variant["dense"][columns]
    own, other = (rises.loc[str(part)] for part in (inside, outside))
    bits, perplexity = other - own
    mistakes = {
        "inside less outside; turn it round": -bits,
        "what it costs outside; take away what it costs inside": other["bits_per_character"],
        "what it costs inside": own["bits_per_character"],
        "taken from perplexities; use bits per character": perplexity,
    }
    return Answer(bits, mistakes, tolerance=0.02)
