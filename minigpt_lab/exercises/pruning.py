"""Exercises of notebooks 00 to 03: statistics, plans, sizes."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import Statistics, collect_statistics, token_losses, watch
from ..criteria import score
from ..models import Anatomy, PruningPlan, fingerprint, masked, model_size, token_parameters
from .checking import exercise
from .functions import normal
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
    anatomy = Anatomy(model)
    row = min(mistakes.values())
    mistakes["all channels of a layer; one is removed"] = anatomy.units("ffn")[0] * cost
    mistakes["the number of matrices; count the weights of the channel in each"] = cost // row
    return Answer(cost, mistakes)


@exercise("share")
def stored_share(model: PreTrainedModel, mini: PreTrainedModel) -> Answer:
    """Share of the dense model's parameters that the small one stores."""
    size = model_size(mini, model)
    kept, channels = (sum(Anatomy(each).units("ffn")) for each in (mini, model))
    mistakes = {
        "the share of the FFN channels; attention and embeddings are stored whole": kept / channels,
        "the share removed; the share kept is asked for": 1 - size.stored / size.dense,
        "the share of the decoder layers; the embeddings are stored too": size.layer_ratio,
        "the dense size over the small one; turn it round": size.dense / size.stored,
    }
    return Answer(size.stored / size.dense, mistakes, tolerance=0.002)


@exercise("function")
def shrunk_ffn() -> Answer:
    """Weights of a gated FFN without the channels that are not kept."""

    def right(W_gate, W_up, W_down, keep):
        return W_gate[keep], W_up[keep], W_down[:, keep]

    def zeroed(W_gate, W_up, W_down, keep):
        mask = torch.zeros(len(W_gate))
        mask[keep] = 1
        return W_gate * mask[:, None], W_up * mask[:, None], W_down * mask

    def removed(W_gate, W_up, W_down, keep):
        gone = [channel for channel in range(len(W_gate)) if channel not in keep]
        return right(W_gate, W_up, W_down, gone)

    mistakes = {
        "W_down without rows; it reads the channels, each with a column": (
            lambda W_gate, W_up, W_down, keep: (W_gate[keep], W_up[keep], W_down[keep])
        ),
        "columns of all three; the first two write the channels, each with a row": (
            lambda W_gate, W_up, W_down, keep: (W_gate[:, keep], W_up[:, keep], W_down[:, keep])
        ),
        "W_gate as it was; it writes the channels too": (
            lambda W_gate, W_up, W_down, keep: (W_gate, W_up[keep], W_down[:, keep])
        ),
        "what is removed; keep lists what is kept": removed,
        "a mask: zeros for what is removed; leave the rows and columns out": zeroed,
    }
    weights = normal(7, 4), normal(7, 4, seed=1), normal(4, 7, seed=2)
    cases = {"three channels": (*weights, [0, 2, 3]), "one channel": (*weights, [1])}
    return Answer(right, mistakes, cases=cases)


# 01_activation_histograms


def _toy_model() -> PreTrainedModel:
    """A Llama of two layers with random weights, quick to run."""
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=2, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = 0.4 * normal(*parameter.shape, seed=seed)
    return model


@exercise("function")
def mean_magnitude() -> Answer:
    """Mean |value| of every input feature of a module, over the tokens of batches."""

    def seen(model, name, batches, output=False):
        """Values ``[token, feature]`` and mask ``[token]`` of each batch."""
        kept: list[torch.Tensor] = []
        module = {name: model.get_submodule(name)}
        with watch(module, after=lambda _, x, y: kept.append(y if output else x)), torch.no_grad():
            for batch in batches:
                model(**batch)
        masks = [batch["attention_mask"].flatten().bool() for batch in batches]
        return [(x.flatten(0, 1), mask) for x, mask in zip(kept, masks, strict=True)]

    def mean(pieces, magnitude=torch.abs):
        return magnitude(torch.cat([x[mask] for x, mask in pieces])).mean(0)

    def right(model, name, batches):
        found = collect_statistics(model, batches, precision="float32", progress=False)
        return torch.as_tensor(found.mean(name, "input", "absolute"))

    def of_batches(model, name, batches):
        return torch.stack([mean([piece]) for piece in seen(model, name, batches)]).mean(0)

    mistakes = {
        "the mean of the values; take |a| of each first": (
            lambda *inputs: mean(seen(*inputs), lambda x: x)
        ),
        "the absolute value of the mean; take |a| of each first": (
            lambda *inputs: mean(seen(*inputs), lambda x: x).abs()
        ),
        "the mean with padding; leave out tokens whose attention_mask is 0": (
            lambda *inputs: mean([(x, torch.ones_like(mask)) for x, mask in seen(*inputs)])
        ),
        "the mean of the batches' means; a batch of more tokens counts more": of_batches,
        "that of the module's outputs; a channel is an input of it": (
            lambda model, name, batches: mean(seen(model, name, batches, True))
        ),
        "the mean of squares; take |a|": lambda *inputs: mean(seen(*inputs), torch.square),
    }
    ids = torch.arange(21).reshape(3, 7) + 3
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    full = {"input_ids": ids[:1], "attention_mask": mask[:1]}
    padded = {"input_ids": ids[1:], "attention_mask": mask[1:]}
    place = _toy_model(), "model.layers.1.mlp.down_proj"
    cases = {"one batch": (*place, [full]), "two batches with padding": (*place, [full, padded])}
    return Answer(right, mistakes, cases=cases)


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


@exercise("function")
def perplexity_from_logits() -> Answer:
    """Perplexity of a text, from the logits at each of its tokens."""

    def losses(logits, ids):
        return token_losses(logits[:-1], ids[1:])

    mistakes = {
        "that of tokens already read; the logits at t predict token t + 1": (
            lambda logits, ids: token_losses(logits, ids).mean().exp()
        ),
        "with the shift the wrong way; the logits at t predict token t + 1": (
            lambda logits, ids: token_losses(logits[1:], ids[:-1]).mean().exp()
        ),
        "the mean loss; perplexity is e to it": lambda *inputs: losses(*inputs).mean(),
        "e to the summed loss; take the mean": lambda *inputs: losses(*inputs).sum().exp(),
        "e to the sum over all tokens' number; nothing predicts the first": (
            lambda logits, ids: (losses(logits, ids).sum() / len(ids)).exp()
        ),
        "2 to the mean loss; it is in nats, which go with e": (
            lambda *inputs: 2 ** losses(*inputs).mean()
        ),
        "1 over the mean probability; the mean is of logarithms": (
            lambda *inputs: 1 / (-losses(*inputs)).exp().mean()
        ),
    }
    ids = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    logits = 2 * normal(8, 11)
    cases = {"five tokens": (logits[:5], ids[:5]), "eight tokens": (logits, ids)}
    return Answer(lambda logits, ids: losses(logits, ids).mean().exp(), mistakes, cases=cases)


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


@exercise("function")
def masked_logits() -> Answer:
    """Logits of a model while one FFN channel is zero."""

    def right(model, ids, layer, channel):
        units = Anatomy(model).units("ffn")
        keep = [[unit for unit in range(n) if (i, unit) != (layer, channel)]
                for i, n in enumerate(units)]  # fmt: skip
        with masked(model, PruningPlan(fingerprint(model), {"ffn": units}, {"ffn": keep})):
            return dense(model, ids)

    def dense(model, ids, *_):
        with torch.no_grad():
            return model(ids).logits

    def zeroed(model, ids, layers, place):
        model = copy.deepcopy(model)
        for layer in layers:
            model.model.layers[layer].mlp.down_proj.weight.data[place] = 0
        return dense(model, ids)

    mistakes = {
        "that of the dense model; run it while the channel is zero": dense,
        "with a row of down_proj zeroed; a channel is a column of it": (
            lambda model, ids, layer, channel: zeroed(model, ids, [layer], channel)
        ),
        "with the channel zeroed in every layer; one is asked for": (
            lambda model, ids, layer, channel: zeroed(model, ids, [0, 1], (slice(None), channel))
        ),
        "with the channel of another layer zeroed; layers count from 0": (
            lambda model, ids, layer, channel: right(model, ids, 1 - layer, channel)
        ),
        "probabilities; logits are asked for": lambda *inputs: right(*inputs).softmax(-1),
    }
    ids = torch.tensor([[3, 14, 15, 9, 26]])
    cases = {"layer 0": (_toy_model(), ids, 0, 5), "layer 1": (_toy_model(), ids, 1, 2)}
    return Answer(right, mistakes, tolerance=1e-3, cases=cases)
