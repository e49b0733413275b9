"""Supported architectures: names of their layers, projections, config fields and attributes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

#: Sites inside the decoder layers that are pruned unless said otherwise.
SITES = ("ffn", "attention")

#: Units that can be removed from attention, and their site. Under grouped-query attention the
#: index of a query head determines the keys that it reads: if groups lost different numbers of
#: heads, kept heads would silently read the keys of other groups. So a unit is a whole key/value
#: group, or the *i*-th query head of *every* group.
ATTENTION_UNITS = {"kv_group": "attention", "balanced_heads": "balanced_heads"}

ALL_SITES = ("ffn", *ATTENTION_UNITS.values())


@dataclass(frozen=True)
class Projection:
    """A linear layer whose rows or columns belong to units.

    Parameters
    ----------
    path : str
        Module path below one decoder layer.
    blocks : tuple of str
        Parts of its unit axis, in order: ``"query"``, ``"key"``, ``"value"``, or FFN channels
        under any other names (``"channel"``; ``"gate"``, ``"up"``). More than one block means a
        fused projection.
    interleaved : bool
        For fused projections: True if every head has its blocks side by side (BLOOM, GPT-NeoX),
        False if one block follows the other (GPT-2, Phi-3).
    axis : int
        Axis of the units in the grid ``[group, query head of the group, feature]``: 0 if a unit is
        a channel, head or group, 1 if it is one query head of every group.
    """

    path: str
    blocks: tuple[str, ...]
    interleaved: bool = False
    axis: int = 0

    @property
    def unit_blocks(self) -> tuple[str, ...]:
        """Blocks of which every unit owns a part."""
        return self.blocks if self.axis == 0 else ("query",)

    @property
    def site(self) -> str:
        """The site of its units."""
        if {"query", "key", "value"}.isdisjoint(self.blocks):
            return "ffn"
        return "balanced_heads" if self.axis else "attention"


@dataclass(frozen=True)
class Family:
    """Names of one architecture's parts.

    Parameters
    ----------
    layers : str
        Module path of the list of decoder layers.
    produces : dict
        Site to the projections whose *output* features are the site's units. The site
        ``"balanced_heads"`` follows from ``"attention"``.
    consumes : dict
        Site to the one projection whose *input* features are the site's units.
    activation : str
        Path of the FFN's activation below one layer.
    config : dict
        ``"channel"``, ``"query"`` or ``"key"`` to the config field that holds the FFN's width or
        the number of such heads. Where there is no field, a narrower model is of a class of its own
        even if all layers agree.
    attributes : dict
        Attributes that a layer's forward pass reads, to be updated when the layer is resized: path
        below the layer to the number that it holds, of ``"query"`` heads, ``"key"`` heads, query
        heads ``"per_key"``, or ``"features"`` of all query heads. A path through ``config`` gives
        that module a view of the config with a value of its own (`LayerConfig`).
    per_head : str
        Keyword argument of a decoder layer with one entry for every head of the dense model,
        ``[batch * heads, …]``, such as ALiBi's slopes. A pruned layer selects those of its heads.
    soft_cap : str
        Config field with the soft cap of the logits.
    all_heads : str
        Config flag that makes attention compute with the dense model's width; while it is set, no
        head can be removed.
    """

    layers: str = "model.layers"
    produces: dict[str, tuple[Projection, ...]] = field(default_factory=dict)
    consumes: dict[str, Projection] = field(default_factory=dict)
    activation: str = "mlp.act_fn"
    config: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    per_head: str = ""
    soft_cap: str = ""
    all_heads: str = ""

    def __post_init__(self):
        # The site "balanced_heads": the projections of attention that hold queries, along axis 1.
        heads = [p for p in self.produces["attention"] if "query" in p.blocks]
        balanced = tuple(replace(projection, axis=1) for projection in heads)
        object.__setattr__(self, "produces", {**self.produces, "balanced_heads": balanced})
        balanced = replace(self.consumes["attention"], axis=1)
        object.__setattr__(self, "consumes", {**self.consumes, "balanced_heads": balanced})


def _separate(prefix: str) -> tuple[Projection, ...]:
    """Unfused q/k/v projections below `prefix`."""
    return tuple(
        Projection(f"{prefix}.{block[0]}_proj", (block,)) for block in ("query", "key", "value")
    )


def _fused(path: str, interleaved: bool) -> tuple[Projection]:
    """One fused q/k/v projection."""
    return (Projection(path, ("query", "key", "value"), interleaved),)


def _channels(*paths: str) -> tuple[Projection, ...]:
    """Projections into the FFN's channels."""
    return tuple(Projection(path, ("channel",)) for path in paths)


def _consumers(ffn: str, attention: str) -> dict[str, Projection]:
    """The projections that read the units, from their paths (Llama's down and o)."""
    return {"ffn": Projection(ffn, ("channel",)), "attention": Projection(attention, ("query",))}


_HEADS = {
    "channel": "intermediate_size",
    "query": "num_attention_heads",
    "key": "num_key_value_heads",
}
_GROUPED = {"self_attn.num_key_value_groups": "per_key"}

_LLAMA = Family(
    produces={
        "ffn": _channels("mlp.gate_proj", "mlp.up_proj"),
        "attention": _separate("self_attn"),
    },
    consumes=_consumers("mlp.down_proj", "self_attn.o_proj"),
    config=_HEADS,
    attributes=_GROUPED,
)
_GEMMA = replace(_LLAMA, soft_cap="final_logit_softcapping")
_OPT = Family(
    layers="model.decoder.layers",
    produces={"ffn": _channels("fc1"), "attention": _separate("self_attn")},
    consumes=_consumers("fc2", "self_attn.out_proj"),
    activation="activation_fn",
    config={"channel": "ffn_dim"},
    attributes={"self_attn.num_heads": "query"},
)
_PHI = Family(
    produces={"ffn": _channels("mlp.fc1"), "attention": _separate("self_attn")},
    consumes=_consumers("mlp.fc2", "self_attn.dense"),
    activation="mlp.activation_fn",
    config=_HEADS,
    attributes=_GROUPED,
)
_PHI3 = Family(
    produces={
        "ffn": (Projection("mlp.gate_up_proj", ("gate", "up")),),
        "attention": _fused("self_attn.qkv_proj", interleaved=False),
    },
    consumes=_consumers("mlp.down_proj", "self_attn.o_proj"),
    activation="mlp.activation_fn",
    config=_HEADS,
    attributes={
        **_GROUPED,
        "self_attn.num_key_value_heads": "key",
        "self_attn.config.num_attention_heads": "query",
    },
)
_GPT2 = Family(
    layers="transformer.h",
    produces={"ffn": _channels("mlp.c_fc"), "attention": _fused("attn.c_attn", interleaved=False)},
    consumes=_consumers("mlp.c_proj", "attn.c_proj"),
    activation="mlp.act",
    config={"channel": "n_inner"},
    attributes={"attn.num_heads": "query", "attn.split_size": "features"},
)
_NEOX = Family(
    layers="gpt_neox.layers",
    produces={
        "ffn": _channels("mlp.dense_h_to_4h"),
        "attention": _fused("attention.query_key_value", interleaved=True),
    },
    consumes=_consumers("mlp.dense_4h_to_h", "attention.dense"),
    activation="mlp.act",
    config={"channel": "intermediate_size"},
)
_BLOOM = Family(
    layers="transformer.h",
    produces={
        "ffn": _channels("mlp.dense_h_to_4h"),
        "attention": _fused("self_attention.query_key_value", interleaved=True),
    },
    consumes=_consumers("mlp.dense_4h_to_h", "self_attention.dense"),
    activation="mlp.gelu_impl",
    attributes={"self_attention.num_heads": "query", "self_attention.hidden_size": "features"},
    per_head="alibi",
    all_heads="slow_but_exact",
)

#: Supported architectures by transformers' ``model_type``.
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,  # also SmolLM, SmolLM2, TinyLlama, Sheared-LLaMA
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "opt": _OPT,
    "phi": _PHI,
    "phi3": _PHI3,  # also Phi-4
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,  # also Pythia
    "bloom": _BLOOM,
}

_PRUNED = "minigpt-"  # before the ``model_type`` of a family, for its pruned models


def pruned_type(model_type: str) -> str:
    """``model_type`` of a family's models whose layers differ in width (``"minigpt-llama"``)."""
    return _PRUNED + dense_type(model_type)


def dense_type(model_type: str) -> str:
    """``model_type`` of the family that a dense or pruned model is of (``"llama"``)."""
    return model_type.removeprefix(_PRUNED)
