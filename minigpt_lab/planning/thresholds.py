"""From statistics to a plan: contextual pruning by thresholds and quantiles (Mini-GPTs)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import Statistics
from ..checks import DictOf, Instance, ListOf, Model, Number, OneOf, Tokenizer, checked, invalid
from ..criteria import attention_site
from ..models import (
    ATTENTION_UNITS,
    Anatomy,
    Masks,
    Projection,
    PruningPlan,
    all_features,
    close_over_merges,
    keep_all,
    merge_table,
    protected_tokens,
    require_byte_pairs,
    without_features,
)

EPSILON = Number(0) | None
#: Components of `Statistics` that thresholds apply to, and their side there.
SIDES = {"linear_input": "input", "linear_output": "output", "activation": "activation"}
QUANTILE = Number(0, below=1)

Rules = dict[str, tuple[str, float]]  # component to ("epsilon" or "quantile", its value)
Neurons = dict[str, dict[str, np.ndarray]]  # linear layer's name, side (or component) to indices


@checked(
    model=Model(),
    statistics=Instance(Statistics, "lab.collect_statistics gives it"),
    epsilon_activation=EPSILON,
    epsilon_embedding=EPSILON,
    quantile=QUANTILE | DictOf(OneOf(("linear", *SIDES)), QUANTILE) | None,
    tokenizer=Tokenizer() | None,
    token_counts=ListOf(Number(0), least=1) | None,
    units=OneOf(ATTENTION_UNITS),
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
    """Plan contextual pruning as in Mini-GPTs (arXiv 2312.12682): ``prune j iff m_j ≤ ε``.

    *m_j* is neuron *j*'s mean absolute value on the domain. An FFN channel whose activation is
    pruned is removed from the model, and so is any channel or head that has no effect once linear
    inputs and outputs are pruned. All other pruned neurons are zeroed. The strongest unit of a
    layer is always kept.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model that the statistics were collected on.
    statistics : Statistics
        Of one domain.
    epsilon_linear : float or (float, float), optional
        Threshold for inputs and outputs of linear layers, or one for each. An output is pruned
        if the smaller of its mean |y| and mean |y - b| is at or below it; its bias only if mean |y|
        is (the reference code's unbiased rule). None prunes none of them, and so below.
    epsilon_activation : float, optional
        Threshold for outputs of the FFN's activation.
    epsilon_embedding : float, optional
        Threshold for a token's share of the domain's tokens; 0 removes the tokens that never
        occur. Bytes, special tokens and all that a kept token is merged from are kept.
    quantile : float or mapping, optional
        Prune the lowest share of each layer instead of by an absolute ε, which is not comparable
        between layers: a number for the activations, or a mapping with keys ``"linear"`` (or
        ``"linear_input"``, ``"linear_output"``) and ``"activation"``.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Needed with `epsilon_embedding` if the batches were not made by `tokenize`.
    token_counts : numpy.ndarray, optional
        Counts ``[vocabulary]`` over more text than the statistics saw, e.g. `count_tokens`.
    units : {"kv_group", "balanced_heads"}
        Units of attention: whole key/value groups (heads, where every head has its own), or one
        query head of every group, keys and values being kept, once it is without effect in all of
        them. The plan then has the site ``"balanced_heads"`` too.

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
    sites = ("ffn", attention_site(model, units))
    statistics.require(model)
    anatomy = Anatomy(model)
    pruned = {
        component: _pruned_neurons(statistics, component, rule) for component, rule in rules.items()
    }
    zero = _zeroed(statistics, pruned, rules)
    keep = keep_all(anatomy)
    alive = without_features(all_features(anatomy), zero)
    _silence_heads(anatomy, alive)
    for site in sites:
        keep[site] = [
            _kept_units(anatomy, statistics, site, layer, alive, pruned.get("activation", {}))
            for layer in range(len(anatomy.layers))
        ]
    origin: dict = {"method": "contextual", "domain": statistics.domain}
    origin |= {f"{kind}_{component}": value for component, (kind, value) in rules.items()}
    vocabulary = None
    if epsilon_embedding is not None:
        counts = statistics.token_counts if token_counts is None else np.array(token_counts)
        vocabulary = _kept_tokens(model, statistics, tokenizer, counts, epsilon_embedding)
        origin["epsilon_embedding"] = epsilon_embedding
    origin |= {"tokens": statistics.n_tokens, "content_hash": statistics.content_hash}
    plan = PruningPlan(
        model_hash=statistics.model_hash,
        units={site: anatomy.units(site) for site in keep},
        keep=keep,
        vocabulary_size=model.get_input_embeddings().weight.shape[0],
        vocabulary=vocabulary,
        origin=origin,
    )
    neurons = {name: dict(sides) for name, sides in zero.items()}
    for name, activations in pruned.get("activation", {}).items():
        neurons.setdefault(name, {})["activation"] = activations
    in_kept_units = _restricted(zero, plan.kept_features(anatomy))
    return replace(plan, zero=in_kept_units, neurons=_restricted(neurons, all_features(anatomy)))


def _rules(epsilon_linear, epsilon_activation, quantile) -> Rules:
    """Rules of the components that are pruned."""
    several = np.iterable(epsilon_linear) and not isinstance(epsilon_linear, str)
    pair = tuple(epsilon_linear) if several else (epsilon_linear,) * 2
    if len(pair) != 2:
        raise invalid("epsilon_linear", epsilon_linear, "one number, or two: input, output")
    rules: Rules = {}
    for component, value in zip(SIDES, (*pair, epsilon_activation), strict=True):
        value = EPSILON(f"epsilon_{component}", value)
        if value is not None:
            rules[component] = ("epsilon", float(value))
    if quantile is not None and not isinstance(quantile, Mapping):
        quantile = {"activation": quantile}
    for name, share in (quantile or {}).items():
        for component in ("linear_input", "linear_output") if name == "linear" else (name,):
            if component in rules:
                raise ValueError(f"{component} has two rules; give one epsilon or quantile for it")
            rules[component] = ("quantile", float(share))
    return rules


def _pruned_neurons(
    statistics: Statistics, component: str, rule: tuple[str, float]
) -> dict[str, np.ndarray]:
    """Neurons of one component at or below its threshold, by linear layer's name."""
    side, (kind, value) = SIDES[component], rule
    pruned = {}
    for name in statistics.activations if side == "activation" else statistics.layer_of:
        magnitude = statistics.magnitude(name, side)
        if kind == "epsilon":
            pruned[name] = np.flatnonzero(magnitude <= value)
        else:
            count = math.floor(value * len(magnitude) + 1e-9)
            pruned[name] = np.sort(np.argsort(magnitude, kind="stable")[:count])
    return pruned


def _zeroed(statistics: Statistics, pruned: Neurons, rules: Rules) -> Neurons:
    """Inputs, outputs and biases of every linear layer that its pruned neurons set to zero."""
    zero: Neurons = {}
    for component, side in (("linear_input", "input"), ("linear_output", "output")):
        for name, neurons in pruned.get(component, {}).items():
            zero.setdefault(name, {})[side] = neurons
            if side == "output" and statistics.biased(name):
                zero[name]["bias"] = _zeroed_biases(statistics, name, neurons, rules[component])
    return zero


def _zeroed_biases(
    statistics: Statistics, name: str, neurons: np.ndarray, rule: tuple[str, float]
) -> np.ndarray:
    """Pruned outputs whose bias is pruned too: mean |y| itself is at or below the threshold."""
    kind, threshold = rule
    if kind == "quantile":  # the ε that this layer's quantile amounts to
        threshold = statistics.magnitude(name, "output")[neurons].max(initial=0)
    absolute = statistics.mean(name, "output", "absolute")[neurons]
    return neurons[absolute <= threshold]


def _silence_heads(anatomy: Anatomy, alive: Masks) -> None:
    """Zero what attention's last projection reads of key/value groups whose values are all zero.

    A query head reads the values of its group, so it has no effect without them.
    """
    reader = anatomy.family.consumes["attention"]
    for layer in range(len(anatomy.layers)):
        for projection in anatomy.family.produces["attention"]:
            if "value" in projection.blocks:
                silent = _silent(anatomy, layer, projection, alive, "value")
                unread = anatomy.unit_features(reader, layer)[silent]
                alive[anatomy.name(layer, reader)]["input"][unread] = False


def _kept_units(
    anatomy: Anatomy,
    statistics: Statistics,
    site: str,
    layer: int,
    alive: Masks,
    activations: dict[str, np.ndarray],
) -> list[int]:
    """Units of a layer that still have an effect; at least the strongest one."""
    consumer = anatomy.family.consumes[site]
    name, features = anatomy.name(layer, consumer), anatomy.unit_features(consumer, layer)
    dead = ~alive[name]["input"][features].any(axis=1)  # [unit]
    if site == "ffn":
        dead[activations.get(name, [])] = True
        if anatomy.activation_keeps_zero():
            for projection in anatomy.family.produces[site]:
                for block in projection.blocks:
                    dead |= _silent(anatomy, layer, projection, alive, block)
    if len(dead) and dead.all():
        strength = statistics.mean(name, "input", "absolute")[features].mean(1)  # [unit]
        dead[strength.argmax()] = False
    return np.flatnonzero(~dead).tolist()


def _silent(
    anatomy: Anatomy, layer: int, projection: Projection, alive: Masks, block: str
) -> np.ndarray:
    """Units ``[unit]`` whose rows (and biases, if there are any) of a projection are all zeroed."""
    masks = alive[anatomy.name(layer, projection)]
    features = anatomy.unit_features(projection, layer, block=block)  # [unit, feature]
    return ~(masks["output"] | masks["bias"])[features].any(axis=1)


def _restricted(neurons: Neurons, kept: Masks) -> dict[str, dict[str, list[int]]]:
    """Neurons that are among the kept features, as lists, without empty entries."""
    restricted: dict[str, dict[str, list[int]]] = {}
    for name, sides in neurons.items():
        for side, indices in sides.items():
            indices = indices[kept[name]["input" if side == "activation" else side][indices]]
            if len(indices):
                restricted.setdefault(name, {})[side] = np.sort(indices).tolist()
    return restricted


def _kept_tokens(model, statistics, tokenizer, counts, epsilon) -> list[int]:
    """Tokens more frequent than ε or always kept, and all that they are merged from."""
    shares, always, merges = token_facts(model, statistics, tokenizer, counts)
    return np.flatnonzero(close_over_merges((shares > epsilon) | always, merges)).tolist()


def token_facts(model, statistics, tokenizer, counts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every token's share of the text, whether it is always kept ``[token]``; the merges."""
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
    always = np.zeros(rows, bool)
    always[protected[protected < rows]] = True
    always[_config_tokens(model)] = True
    return counts / max(1, counts.sum()), always, merges[(merges < rows).all(1)]


def _config_tokens(model: PreTrainedModel) -> list[int]:
    """Special tokens that the model's configs name."""
    fields = [*model.generation_config.to_dict().items(), *model.config.to_dict().items()]
    values = (value for name, value in fields if name.endswith("_token_id"))
    ids = {i for value in values for i in (value if isinstance(value, list) else [value])}
    rows = model.get_input_embeddings().weight.shape[0]
    return [i for i in ids if isinstance(i, int) and 0 <= i < rows]
