"""Where each architecture keeps what can be pruned: one declarative entry per family.

Everything else in the package asks an `Anatomy` and never an architecture by name. To add a family,
add an entry to `FAMILIES`; the property tests then run on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

SITES = ("ffn", "attention")


@dataclass(frozen=True)
class Projection:
    """A linear layer whose rows or columns belong to units.

    Parameters
    ----------
    path : str
        Module path below one decoder layer.
    blocks : tuple of str
        What its unit axis holds, in order: ``"channel"``, ``"query"``, ``"key"``, ``"value"``.
        More than one block means a fused projection.
    interleaved : bool
        For fused projections: True if every head has its blocks side by side (BLOOM, GPT-NeoX),
        False if one block follows the other (GPT-2, Phi-3).
    """

    path: str
    blocks: tuple[str, ...]
    interleaved: bool = False


@dataclass(frozen=True)
class Family:
    """Names by which one architecture calls its parts.

    Parameters
    ----------
    layers : str
        Path of the list of decoder layers.
    produces : dict
        Site to the projections whose *output* features are the site's units.
    consumes : dict
        Site to the one projection whose *input* features are the site's units.
    activation : str
        Config field with the name of the FFN's activation function.
    config : dict
        Block to the config field that holds its count (FFN width, number of query and key heads).
        A block without a field cannot be narrowed in the config of plain transformers.
    attributes : dict
        Attribute path below one layer to the block whose head count it holds.
    """

    layers: str = "model.layers"
    produces: dict[str, tuple[Projection, ...]] = field(default_factory=dict)
    consumes: dict[str, Projection] = field(default_factory=dict)
    activation: str = "hidden_act"
    config: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)


def _separate(prefix: str, output: str) -> tuple[tuple[Projection, ...], Projection]:
    """Unfused q/k/v projections below `prefix`, and the output projection."""
    producers = tuple(
        Projection(f"{prefix}.{block[0]}_proj", (block,)) for block in ("query", "key", "value")
    )
    return producers, Projection(f"{prefix}.{output}", ("query",))


def _channels(*paths: str) -> tuple[Projection, ...]:
    return tuple(Projection(path, ("channel",)) for path in paths)


_heads, _o_proj = _separate("self_attn", "o_proj")
_ROTARY = {
    "channel": "intermediate_size",
    "query": "num_attention_heads",
    "key": "num_key_value_heads",
}

_LLAMA = Family(
    produces={"ffn": _channels("mlp.gate_proj", "mlp.up_proj"), "attention": _heads},
    consumes={"ffn": _channels("mlp.down_proj")[0], "attention": _o_proj},
    config=_ROTARY,
)
_OPT = Family(
    layers="model.decoder.layers",
    produces={"ffn": _channels("fc1"), "attention": _heads},
    consumes={"ffn": _channels("fc2")[0], "attention": _separate("self_attn", "out_proj")[1]},
    activation="activation_function",
    config={"channel": "ffn_dim"},
    attributes={"self_attn.num_heads": "query"},
)
_PHI = Family(
    produces={"ffn": _channels("mlp.fc1"), "attention": _heads},
    consumes={"ffn": _channels("mlp.fc2")[0], "attention": _separate("self_attn", "dense")[1]},
    config=_ROTARY,
)

#: Supported architectures by transformers' ``model_type``.
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,  # also SmolLM, SmolLM2, TinyLlama, Sheared-LLaMA
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "opt": _OPT,
    "phi": _PHI,
}


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, in either of transformers' two layouts."""
    return isinstance(module, nn.Linear | Conv1D)


def weight_axis(module: nn.Module, side: str) -> int:
    """Dimension of ``module.weight`` that holds its ``"input"`` or ``"output"`` features."""
    transposed = isinstance(module, Conv1D)  # stored [in, out], nn.Linear [out, in]
    return int(transposed) if side == "output" else int(not transposed)


class Anatomy:
    """A model seen through its family's entry: layers, units and the weights that belong to them.

    Unit counts are read from the tensors, not from the config, so a model whose layers were shrunk
    to different widths is described as it is.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model of a supported family.

    Raises
    ------
    ValueError
        If the model's architecture has no entry in `FAMILIES`.
    """

    def __init__(self, model: PreTrainedModel):
        config = model.config
        if config.model_type not in FAMILIES:
            raise ValueError(
                f"architecture {config.model_type!r} is not supported; supported: "
                f"{', '.join(sorted(FAMILIES))}. To add one, give its projections in an entry of "
                "minigpt_lab.FAMILIES (see minigpt_lab/families.py)"
            )
        self.model = model
        self.family = FAMILIES[config.model_type]
        self.layers: Sequence[nn.Module] = model.get_submodule(self.family.layers)
        query_heads = config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or query_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
        self.queries_per_group = query_heads // key_heads

    def name(self, layer: int, projection: Projection) -> str:
        """Full module name of a projection."""
        return f"{self.family.layers}.{layer}.{projection.path}"

    def module(self, layer: int, projection: Projection) -> nn.Module:
        """The projection's linear layer."""
        return self.layers[layer].get_submodule(projection.path)

    def linears(self) -> Iterator[tuple[int, str, nn.Module]]:
        """Layer index, full name and module of every linear layer inside the decoder layers.

        The head is left out: its outputs are tokens, which the vocabulary site prunes.
        """
        for index, layer in enumerate(self.layers):
            for path, module in layer.named_modules():
                if is_linear(module):
                    yield index, f"{self.family.layers}.{index}.{path}", module

    def coupled(self, site: str) -> Iterator[tuple[Projection, str]]:
        """Projections whose ``"output"`` or ``"input"`` features are the site's units."""
        for projection in self.family.produces[site]:
            yield projection, "output"
        yield self.family.consumes[site], "input"

    def block_width(self, block: str) -> int:
        """Features that one unit owns in a block."""
        if block == "channel":
            return 1
        return self.head_dim * (self.queries_per_group if block == "query" else 1)

    def units(self, site: str) -> list[int]:
        """Number of units in every layer: FFN channels, or attention heads / key-value groups."""
        consumer = self.family.consumes[site]
        width = sum(map(self.block_width, consumer.blocks))
        modules = [self.module(layer, consumer) for layer in range(len(self.layers))]
        return [module.weight.shape[weight_axis(module, "input")] // width for module in modules]

    def unit_positions(
        self, projection: Projection, total: int, block: str | None = None
    ) -> np.ndarray:
        """Features of a projection's unit axis, unit by unit.

        Parameters
        ----------
        projection : Projection
            One entry of ``family.produces[site]``, or ``family.consumes[site]``.
        total : int
            Number of units of the layer.
        block : str, optional
            Only this block's features (for fused projections).

        Returns
        -------
        numpy.ndarray
            Indices ``[unit, feature]``.
        """
        units = np.arange(total)[:, None]
        widths = [self.block_width(name) for name in projection.blocks]
        starts = np.concatenate([[0], np.cumsum(widths)[:-1]])
        parts = []
        for name, width, start in zip(projection.blocks, widths, starts, strict=True):
            if block in (None, name):
                step = sum(widths) if projection.interleaved else width
                offset = start if projection.interleaved else start * total
                parts.append(offset + units * step + np.arange(width))
        return np.concatenate(parts, axis=1)

    def positions(
        self, projection: Projection, units: Sequence[int], total: int, block: str | None = None
    ) -> np.ndarray:
        """Features ``[n]`` of a projection's unit axis that belong to `units`, in their order."""
        return self.unit_positions(projection, total, block)[np.asarray(units, np.int64)].ravel()

    def layer_widths(self) -> dict[str, list[int]]:
        """Units per layer of both sites: the shape of a (possibly shrunk) model."""
        return {site: self.units(site) for site in SITES}

    def unit_parameters(self, site: str, layer: int) -> int:
        """Parameters that leave a layer with one unit."""
        total = 0
        for projection, side in self.coupled(site):
            module = self.module(layer, projection)
            width = sum(map(self.block_width, projection.blocks))
            total += width * module.weight.shape[1 - weight_axis(module, side)]
            if side == "output" and module.bias is not None:
                total += width
        return total

    @torch.no_grad()
    def set_units(self, keep: dict[str, list[list[int]]]) -> None:
        """Rebuild every layer, in place, with just the given units in the given order.

        Parameters
        ----------
        keep : dict
            Site to one list of unit indices per layer. Index -1 stands for a new unit of zeros,
            which changes no output.
        """
        for site, layers in keep.items():
            totals = self.units(site)
            for layer, units in enumerate(layers):
                if units == list(range(totals[layer])):
                    continue
                for projection, side in self.coupled(site):
                    module = self.module(layer, projection)
                    self._select(module, side, projection, units, totals[layer])
                for path, block in self.family.attributes.items():
                    if any(block in projection.blocks for projection in self.family.produces[site]):
                        owner, _, name = path.rpartition(".")
                        heads = len(units) * self.block_width(block) // self.head_dim
                        setattr(self.layers[layer].get_submodule(owner), name, heads)

    def _select(
        self,
        module: nn.Module,
        side: str,
        projection: Projection,
        units: list[int],
        total: int,
    ) -> None:
        places = np.flatnonzero(np.asarray(units) >= 0)
        source = self.positions(projection, np.asarray(units)[places], total)
        target = self.positions(projection, places, len(units))
        width = len(units) * sum(map(self.block_width, projection.blocks))
        axis = weight_axis(module, side)
        module.weight = _moved(module.weight, axis, source, target, width)
        if side == "output":
            if module.bias is not None:
                module.bias = _moved(module.bias, 0, source, target, width)
            setattr(module, "nf" if isinstance(module, Conv1D) else "out_features", width)
        else:
            setattr(module, "nx" if isinstance(module, Conv1D) else "in_features", width)

    def set_config(self) -> bool:
        """Write the layers' widths into the config, where it can hold them.

        Returns
        -------
        bool
            True if the config now describes the model, so that plain transformers loads it; False
            if layers differ, or the architecture's config has no field for a width.
        """
        config, complete = self.model.config, True
        for site in SITES:
            units = self.units(site)
            counts = {
                block: units[0] * self.block_width(block) // (1 if site == "ffn" else self.head_dim)
                for projection in self.family.produces[site]
                for block in projection.blocks
            }
            fields = {
                self.family.config[block]: count
                for block, count in counts.items()
                if block in self.family.config
            }
            if site == "attention" and "query" in self.family.config:
                fields["head_dim"] = self.head_dim
            if len(set(units)) == 1 and fields and _accepts(config, fields):
                for name, value in fields.items():
                    setattr(config, name, value)
            else:
                complete = complete and units == self.config_units(site)
        return complete

    def config_units(self, site: str) -> list[int]:
        """Units per layer that plain transformers would build from the config."""
        config, block = self.model.config, "channel" if site == "ffn" else "query"
        default = "num_attention_heads"  # a family whose config cannot narrow attention has MHA
        count = getattr(config, self.family.config.get(block, default))
        groups = count if site == "ffn" else count // self.queries_per_group
        return [groups] * len(self.layers)

    def activation_keeps_zero(self) -> bool:
        """Whether the FFN's activation maps 0 to 0, so a channel whose input is cut is dead."""
        activation = ACT2FN[getattr(self.model.config, self.family.activation)]
        return bool(activation(torch.zeros(1)).item() == 0.0)

    def head_is_tied(self) -> bool:
        """Whether the output head shares its weight with the token embedding."""
        head = self.model.get_output_embeddings()
        return head is None or head.weight is self.model.get_input_embeddings().weight


def _moved(
    tensor: torch.Tensor, axis: int, source: np.ndarray, target: np.ndarray, width: int
) -> nn.Parameter:
    """Copy slices `source` of an axis to places `target` of a new one, zero elsewhere."""
    shape = list(tensor.shape)
    shape[axis] = width
    new = tensor.new_zeros(shape)
    source, target = (torch.as_tensor(index, device=tensor.device) for index in (source, target))
    new.index_copy_(axis, target, tensor.index_select(axis, source))
    return nn.Parameter(new, requires_grad=tensor.requires_grad)


def _accepts(config: PretrainedConfig, fields: dict[str, int]) -> bool:
    """Whether the config class takes these values (Llama's wants hidden size % heads == 0)."""
    try:
        type(config).from_dict({**config.to_dict(), **fields})
    except ValueError:
        return False
    return True
