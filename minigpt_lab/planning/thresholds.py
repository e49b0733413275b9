"""From statistics to a plan: contextual pruning by thresholds and quantiles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import Statistics
from ..checks import Instance, ListOf, Model, Number, Tokenizer, checked, invalid
from ..criteria import attention_site
from ..models import (
    Anatomy,
    PruningPlan,
    close_over_merges,
    keep_all,
    merge_table,
    protected_tokens,
    require_byte_pairs,
)

EPSILON = Number(0) | None
COMPONENTS = ("linear_input", "linear_output", "activation", "embedding")


@checked(
    model=Model(),
    statistics=Instance(Statistics, "lab.collect_statistics gives it"),
    epsilon_embedding=EPSILON,
    tokenizer=Tokenizer() | None,
)
def contextual_plan(
    model: PreTrainedModel,
    statistics: Statistics,
    *,
    epsilon_linear: float | tuple[float | None, float | None] | None = None,
    epsilon_activation: float | None = None,
    epsilon_embedding: float | None = None,
    quantile: float | Mapping[str, float] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    token_counts: np.ndarray | None = None,
    units: str = "kv_group",
) -> PruningPlan:
    """Contextual pruning as in Mini-GPTs (arXiv 2312.12682): cut what a domain does not use.

    A neuron is cut if its mean absolute value is at or below ε. An FFN channel whose activation is
    cut leaves the model; so does any channel or head that the cut of linear inputs and outputs
    leaves without effect. What cannot leave is zeroed. The strongest unit of a layer always stays.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model that the statistics were collected on.
    statistics : Statistics
        Of one domain.
    epsilon_linear : float or (float, float), optional
        Threshold for inputs and outputs of linear layers, or one for each. An output counts as cut
        if the smaller of its mean |y| and mean |y - b| is at or below it; its bias goes only if
        mean |y| is (the reference code's unbiased rule). None leaves them alone, and so below.
    epsilon_activation : float, optional
        Threshold for outputs of the FFN's activation.
    epsilon_embedding : float, optional
        Threshold for a token's share of the domain's tokens; 0 cuts the tokens that never occur.
        Bytes, special tokens and all that a kept token is merged from stay.
    quantile : float or mapping, optional
        Cut the lowest share of each layer instead of by an absolute ε, which is not comparable
        between layers: a number for the activations, or a mapping with keys ``"linear"`` (or
        ``"linear_input"``, ``"linear_output"``) and ``"activation"``.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Needed with `epsilon_embedding` if the batches were not made by `tokenize`.
    token_counts : numpy.ndarray, optional
        Counts ``[vocabulary]`` over more text than the statistics saw, e.g. `count_tokens`.
    units : {"kv_group", "balanced_heads"}
        What may leave attention: whole key/value groups (heads, where every head has its own), or
        one query head of every group, keys and values staying, once it is without effect in all
        of them. The plan then has the site ``"balanced_heads"`` too.

    Returns
    -------
    PruningPlan

    Raises
    ------
    ValueError
        If a threshold is negative, NaN or no number, a quantile outside [0, 1), the statistics
        belong to another model, the kind of units is unknown, or the model has but one query head
        per group to remove in balance.
    """
    rules = _rules(epsilon_linear, epsilon_activation, quantile)
    pruned = ("ffn", attention_site(model, units))
    statistics.require(model)
    anatomy = Anatomy(model)
    cut = {
        component: _cut_neurons(anatomy, statistics, component, rule)
        for component, rule in rules.items()
    }
    zero = _zero_lists(statistics, cut, rules)
    keep, idle = keep_all(anatomy), _with_silent_values(anatomy, zero)
    for site in pruned:
        keep[site] = [
            _staying_units(anatomy, statistics, site, layer, total, idle, cut)
            for layer, total in enumerate(anatomy.units(site))
        ]
    vocabulary = None
    if epsilon_embedding is not None:
        counts = statistics.token_counts if token_counts is None else _counted(token_counts)
        vocabulary = _staying_tokens(model, statistics, tokenizer, counts, epsilon_embedding)
    embedding = {} if epsilon_embedding is None else {"epsilon_embedding": epsilon_embedding}
    origin = {
        "method": "contextual",
        "domain": statistics.domain,
        **{f"{kind}_{component}": value for component, (kind, value) in rules.items()},
        **embedding,
        "tokens": statistics.n_tokens,
        "content_hash": statistics.content_hash,
    }
    plan = PruningPlan(
        model_hash=statistics.model_hash,
        units={site: anatomy.units(site) for site in keep},
        keep=keep,
        vocabulary_size=model.get_input_embeddings().weight.shape[0],
        vocabulary=vocabulary,
        origin=origin,
    )
    left = _without_removed(plan.kept_features(anatomy), zero)
    return replace(plan, zero=left, neurons=_all_cut_neurons(zero, cut))


def _rules(epsilon_linear, epsilon_activation, quantile) -> dict[str, tuple[str, float]]:
    """Component to ``("epsilon" | "quantile", value)`` for those that are to be cut."""
    several = np.iterable(epsilon_linear) and not isinstance(epsilon_linear, str)
    pair = tuple(epsilon_linear) if several else (epsilon_linear,) * 2
    if len(pair) != 2:
        raise invalid("epsilon_linear", epsilon_linear, "one number, or two: input, output")
    given = dict(zip(COMPONENTS, (*pair, epsilon_activation), strict=False))
    given = {name: EPSILON(f"epsilon_{name}", value) for name, value in given.items()}
    rules = {name: ("epsilon", float(value)) for name, value in given.items() if value is not None}
    if quantile is None:
        return rules
    shares = quantile if isinstance(quantile, Mapping) else {"activation": quantile}
    for name, share in shares.items():
        share = Number(0, below=1)(f"quantile for {name!r}", share)
        targets = COMPONENTS[:2] if name == "linear" else (name,)
        for target in targets:
            if target not in COMPONENTS[:3]:
                allowed = "linear, linear_input, linear_output, activation"
                raise ValueError(f"quantile for unknown component {name!r}; expected {allowed}")
            if target in rules:
                raise ValueError(f"{target} has both an epsilon and a quantile; give one of them")
            rules[target] = ("quantile", float(share))
    return rules


_SIDE = {"linear_input": "input", "linear_output": "output", "activation": "activation"}


def _cut_neurons(
    anatomy: Anatomy, statistics: Statistics, component: str, rule: tuple[str, float]
) -> dict[str, np.ndarray]:
    """Linear layer's name to the neurons of one component that fall under a rule."""
    side, (kind, value) = _SIDE[component], rule
    names = statistics.activations if side == "activation" else list(statistics.layer_of)
    found = {}
    for name in names:
        magnitude = statistics.magnitude(name, side)
        if kind == "epsilon":
            found[name] = np.flatnonzero(magnitude <= value)
        else:
            count = math.floor(value * len(magnitude) + 1e-9)
            found[name] = np.sort(np.argsort(magnitude, kind="stable")[:count])
    return found


def _zero_lists(statistics: Statistics, cut: dict, rules: dict) -> dict[str, dict[str, np.ndarray]]:
    """What the linear components zero in every linear layer."""
    zero: dict[str, dict[str, np.ndarray]] = {}
    for name, neurons in cut.get("linear_input", {}).items():
        zero.setdefault(name, {})["input"] = neurons
    for name, neurons in cut.get("linear_output", {}).items():
        zero.setdefault(name, {})["output"] = neurons
        if statistics.biased(name):
            absolute, unbiased = (
                statistics.mean(name, "output", moment)[neurons]
                for moment in ("absolute", "unbiased")
            )
            kind, limit = rules["linear_output"]
            if kind == "quantile":  # the ε that this layer's quantile amounts to
                limit = np.minimum(absolute, unbiased).max(initial=0)
            zero[name]["bias"] = neurons[absolute <= limit]
    return zero


def _with_silent_values(anatomy: Anatomy, zero: dict) -> dict[str, dict[str, np.ndarray]]:
    """Zero lists that also have, as inputs of attention's last projection, groups without values.

    A query head reads the values of its group, so it has no effect without them.
    """
    found, reader = dict(zero), anatomy.family.consumes["attention"]
    for layer, total in enumerate(anatomy.units("attention")):
        silent = np.zeros(total, bool)
        for projection in anatomy.family.produces["attention"]:
            if "value" in projection.blocks:
                silent |= _silent(anatomy, layer, projection, total, zero, "value")
        if silent.any():
            sides = zero.get(name := anatomy.name(layer, reader), {})
            unread = anatomy.unit_features(reader, layer)[silent].ravel()
            found[name] = {**sides, "input": np.append(unread, sides.get("input", unread[:0]))}
    return found


def _staying_units(
    anatomy: Anatomy,
    statistics: Statistics,
    site: str,
    layer: int,
    total: int,
    zero: dict[str, dict[str, np.ndarray]],
    cut: dict[str, dict[str, np.ndarray]],
) -> list[int]:
    """Units of a layer that still have an effect; at least the strongest one."""
    consumer = anatomy.family.consumes[site]
    name = anatomy.name(layer, consumer)
    dead = _all_cut(anatomy, layer, consumer, total, zero.get(name, {}).get("input"))
    if site == "ffn":
        if name in cut.get("activation", {}):
            dead[cut["activation"][name]] = True
        if anatomy.activation_keeps_zero():
            for projection in anatomy.family.produces[site]:
                for block in projection.blocks:
                    dead |= _silent(anatomy, layer, projection, total, zero, block)
    if dead.all():
        features = anatomy.unit_features(consumer, layer)
        strength = statistics.mean(name, "input", "absolute")[features].mean(1)
        dead[strength.argmax()] = False
    return np.flatnonzero(~dead).tolist()


def _silent(anatomy, layer, projection, total, zero, block) -> np.ndarray:
    """Units whose rows (and biases, if there are any) a plan zeroes in one projection."""
    cuts = zero.get(anatomy.name(layer, projection), {})
    dead = _all_cut(anatomy, layer, projection, total, cuts.get("output"), block)
    if anatomy.module(layer, projection).bias is not None:
        dead &= _all_cut(anatomy, layer, projection, total, cuts.get("bias"), block)
    return dead


def _all_cut(anatomy, layer, projection, total, features, block=None) -> np.ndarray:
    """Units ``[total]`` all of whose features (of one block) are among the given ones."""
    if features is None or len(features) == 0:
        return np.zeros(total, bool)
    return np.isin(anatomy.unit_features(projection, layer, block=block), features).all(1)


def _without_removed(stay: dict, zero: dict) -> dict[str, dict[str, list[int]]]:
    """Zero lists without the features that leave anyway, and without empty entries."""
    found: dict[str, dict[str, list[int]]] = {}
    for name, sides in zero.items():
        for side, cuts in sides.items():
            mask = stay.get((name, "input" if side == "input" else "output"))
            left = cuts if mask is None else cuts[mask[cuts]]
            if len(left):
                found.setdefault(name, {})[side] = np.sort(left).tolist()
    return found


def _all_cut_neurons(zero: dict, cut: dict) -> dict[str, dict[str, list[int]]]:
    """Everything that fell under a threshold, also in units that leave."""
    sides = {name: dict(cuts) for name, cuts in zero.items()}
    for name, neurons in cut.get("activation", {}).items():
        sides.setdefault(name, {})["activation"] = neurons
    return _without_removed({}, sides)


def _counted(token_counts: object) -> np.ndarray:
    """Counts of tokens as an array."""
    return np.array(ListOf(Number(0), least=1)("token_counts", token_counts))


def _staying_tokens(model, statistics, tokenizer, counts, epsilon) -> list[int]:
    rows = len(statistics.token_counts)
    if counts[rows:].any():  # a tokenizer may have special tokens besides, which no text uses
        raise ValueError(f"token_counts has {len(counts)} entries, the vocabulary {rows}")
    counts = np.pad(counts[:rows], (0, max(0, rows - len(counts))))  # models pad their vocabulary
    protected, merges = statistics.protected, statistics.merges
    if tokenizer is not None:
        require_byte_pairs(tokenizer)
        protected, merges = protected_tokens(tokenizer), merge_table(tokenizer)
    if not len(protected) or not len(merges):
        raise ValueError(
            "epsilon_embedding needs the merges of a byte-pair (BPE) tokenizer, and the statistics "
            "know of none: collect them on batches from tokenize(), or pass tokenizer=…; Unigram, "
            "WordPiece and word-level vocabularies cannot be trimmed, leave epsilon_embedding out"
        )
    protected, merges = protected[protected < rows], merges[(merges < rows).all(1)]
    kept = counts / max(1, counts.sum()) > epsilon
    kept[protected] = True
    kept[_config_tokens(model)] = True
    return np.flatnonzero(close_over_merges(kept, merges)).tolist()


def _config_tokens(model: PreTrainedModel) -> list[int]:
    """Special tokens that the model's configs name."""
    fields = [*model.generation_config.to_dict().items(), *model.config.to_dict().items()]
    values = (value for name, value in fields if name.endswith("_token_id"))
    ids = {i for value in values for i in (value if isinstance(value, list) else [value])}
    rows = model.get_input_embeddings().weight.shape[0]
    return [i for i in ids if isinstance(i, int) and 0 <= i < rows]
