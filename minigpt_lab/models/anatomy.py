"""A model seen through its family's entry, and what is done to its layers through it."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from .architectures import ALL_SITES, FAMILIES, SITES, Projection
from .layers import moved, own_share, set_attribute

_PLAIN = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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
    to different widths is described as it is. Of attention a layer has so many key/value groups
    (site ``"attention"``; without grouped queries these are its heads) of so many query heads each
    (site ``"balanced_heads"``, whose unit *i* is the *i*-th query head of every group).

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model of a supported family.

    Raises
    ------
    ValueError
        If the model's architecture has no entry in `FAMILIES`, or its weights are quantised or
        wrapped by an adapter.
    """

    def __init__(self, model: PreTrainedModel):
        config = model.config
        if config.model_type not in FAMILIES:
            raise ValueError(
                f"architecture {config.model_type!r} is not supported; supported: "
                f"{', '.join(sorted(FAMILIES))}. To add one, give its projections in an entry of "
                "minigpt_lab.FAMILIES (see minigpt_lab/families/architectures.py)"
            )
        self.model = model
        self.family = FAMILIES[config.model_type]
        self.layers: Sequence[nn.Module] = model.get_submodule(self.family.layers)
        self.head_dim = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        for site in SITES:
            for projection, _ in self.coupled(site):
                self._refuse_unless_plain(self.name(0, projection), self.module(0, projection))

    def _refuse_unless_plain(self, name: str, module: nn.Module) -> None:
        if not is_linear(module) or module.weight.dtype not in _PLAIN:
            kind, weight = type(module).__name__, getattr(module, "weight", None)
            stored = "" if weight is None else f" with weights of type {weight.dtype}"
            raise ValueError(
                f"{name} is {kind}{stored}; expected a linear layer with plain weights. Of a "
                "quantised model load the checkpoint it was made from (or call "
                "model.dequantize()); merge an adapter into its base"
            )

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

    def units(self, site: str) -> list[int]:
        """Number of units in every layer: channels, key/value groups (heads), heads per group."""
        return [self._count(site, layer) for layer in range(len(self.layers))]

    def _count(self, site: str, layer: int) -> int:
        read = self._features(layer, self.family.consumes[site], "input")
        if site == "ffn":
            return read
        made = sum(
            self._features(layer, projection, "output")
            for projection in self.family.produces["attention"]
        )
        groups = (made - read) // 2 // self.head_dim  # keys and values have the same width
        return groups if site == "attention" else read // self.head_dim // groups

    def _features(self, layer: int, projection: Projection, side: str) -> int:
        module = self.module(layer, projection)
        return module.weight.shape[weight_axis(module, side)]

    def _shape(self, block: str, queries: int) -> tuple[int, int]:
        """Heads and features of each that one group (or channel) has in a block."""
        if block == "query":
            return queries, self.head_dim
        return 1, self.head_dim if block in ("key", "value") else 1

    def _width(self, projection: Projection, groups: int, queries: int) -> int:
        return groups * sum(math.prod(self._shape(block, queries)) for block in projection.blocks)

    def _layout(self, projection: Projection, groups: int, queries: int) -> dict[str, np.ndarray]:
        """Block to its places on a projection's unit axis ``[group, head, feature]``."""
        shapes = [self._shape(block, queries) for block in projection.blocks]
        ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
        places = np.arange(self._width(projection, groups, queries))
        if projection.interleaved:
            parts = np.split(places.reshape(groups, -1), ends, axis=1)
        else:
            parts = np.split(places, ends * groups)
        return {
            block: part.reshape(groups, *shape)
            for block, part, shape in zip(projection.blocks, parts, shapes, strict=True)
        }

    def _counts(self, projection: Projection, total: int, layer: int | None) -> tuple[int, int]:
        """Groups and query heads of each, of a layer with `total` units."""
        if not {"query", "key", "value"} & set(projection.blocks):
            return total, 1
        site = "balanced_heads" if projection.axis == 0 else "attention"
        others = set(self.units(site)) if layer is None else {self._count(site, layer)}
        if len(others) > 1:
            raise ValueError(f"layers differ in their {site} {sorted(others)}: name the layer")
        return (total, *others) if projection.axis == 0 else (*others, total)

    def unit_positions(
        self,
        projection: Projection,
        total: int,
        block: str | None = None,
        layer: int | None = None,
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
        layer : int, optional
            The layer; needed where layers differ in the other way to count their heads.

        Returns
        -------
        numpy.ndarray
            Indices ``[unit, feature]``.
        """
        layout = self._layout(projection, *self._counts(projection, total, layer))
        parts = [
            np.moveaxis(places, projection.axis, 0).reshape(total, -1)
            for name, places in layout.items()
            if block in (None, name) and name in projection.unit_blocks
        ]
        return np.concatenate(parts, axis=1)

    def positions(
        self,
        projection: Projection,
        units: Sequence[int],
        total: int,
        block: str | None = None,
        layer: int | None = None,
    ) -> np.ndarray:
        """Features ``[n]`` of a projection's unit axis that belong to `units`, in their order."""
        found = self.unit_positions(projection, total, block, layer)
        return found[np.asarray(units, np.int64)].ravel()

    def layer_widths(self) -> dict[str, list[int]]:
        """Units per layer of all sites: the shape of a (possibly shrunk) model."""
        return {site: self.units(site) for site in ALL_SITES}

    def parameters(self, layer: int, site: str, units: Mapping[str, int] | None = None) -> int:
        """Parameters that a layer's projections coupled by a site have, or would have.

        Parameters
        ----------
        layer : int
            The layer.
        site : str
            ``"ffn"`` or ``"attention"``.
        units : mapping, optional
            Site to the number of units that the layer is imagined to have.
        """
        counts = {name: self._count(name, layer) for name in ALL_SITES} | dict(units or {})
        groups, total = counts[site], 0
        for projection, side in self.coupled(site):
            module = self.module(layer, projection)
            width = self._width(projection, groups, counts["balanced_heads"])
            total += width * module.weight.shape[1 - weight_axis(module, side)]
            if side == "output" and module.bias is not None:
                total += width
        return total

    def unit_parameters(self, site: str, layer: int) -> int:
        """Parameters that leave a layer with one unit."""
        home = "ffn" if site == "ffn" else "attention"
        fewer = {site: self._count(site, layer) - 1}
        return self.parameters(layer, home) - self.parameters(layer, home, fewer)

    @torch.no_grad()
    def set_units(self, keep: Mapping[str, list[list[int]]]) -> None:
        """Rebuild every layer, in place, with just the given units in the given order.

        Parameters
        ----------
        keep : dict
            Site to one list of unit indices per layer. Index -1 stands for a new unit of zeros,
            which changes no output.
        """
        for site, layers in keep.items():
            for layer, units in enumerate(layers):
                count = self._count(site, layer)
                if len(units) != count or units != list(range(count)):
                    self.rebuild(site, layer, units)

    @torch.no_grad()
    def rebuild(self, site: str, layer: int, units: list[int]) -> None:
        """`set_units` for one site of one layer."""
        before = self._counts(self.family.consumes[site], self._count(site, layer), layer)
        after = self._counts(self.family.consumes[site], len(units), layer)
        for projection, side in self.coupled(site):
            self._select(self.module(layer, projection), side, projection, units, before, after)
        if site == "ffn":
            return
        groups, queries = after
        values = {
            "query": groups * queries,
            "key": groups,
            "per_key": queries,
            "features": groups * queries * self.head_dim,
        }
        for path, held in self.family.attributes.items():
            set_attribute(self.layers[layer], path, values[held])
        if site == "attention" and self.family.per_head:
            self._give_shares(self.layers[layer], before[0], units)

    def _select(
        self,
        module: nn.Module,
        side: str,
        projection: Projection,
        units: list[int],
        before: tuple[int, int],
        after: tuple[int, int],
    ) -> None:
        axis, chosen = projection.axis, np.asarray(units)
        places = np.flatnonzero(chosen >= 0)
        old, new = self._layout(projection, *before), self._layout(projection, *after)
        source, target = [], []
        for block in projection.blocks:
            whole = axis == 1 and block != "query"  # keys and values stay with their group
            source.append(old[block] if whole else old[block].take(chosen[places], axis))
            target.append(new[block] if whole else new[block].take(places, axis))
        source, target = (np.concatenate([x.ravel() for x in parts]) for parts in (source, target))
        width = self._width(projection, *after)
        where = weight_axis(module, side)
        module.weight = moved(module.weight, where, source, target, width)
        if side == "output":
            if module.bias is not None:
                module.bias = moved(module.bias, 0, source, target, width)
            setattr(module, "nf" if isinstance(module, Conv1D) else "out_features", width)
        else:
            setattr(module, "nx" if isinstance(module, Conv1D) else "in_features", width)

    def _give_shares(self, layer: nn.Module, total: int, units: list[int]) -> None:
        """Note which of the dense model's heads a layer has now; new ones take free places."""
        left = self._heads(layer, total)
        free = iter(self._free(left))
        heads = [left[unit] if unit >= 0 else next(free) for unit in units]
        if not hasattr(layer, "surviving_heads"):
            layer.register_buffer("surviving_heads", None)
            hook = functools.partial(own_share, self.family.per_head)
            layer.register_forward_pre_hook(hook, with_kwargs=True)
        whole = heads == list(range(self.model.config.num_attention_heads))
        device = next(layer.parameters()).device
        layer.surviving_heads = None if whole else torch.tensor(heads, device=device)

    def _heads(self, layer: nn.Module, total: int) -> list[int]:
        known = getattr(layer, "surviving_heads", None)
        return list(range(total)) if known is None else known.tolist()

    def _free(self, heads: list[int]) -> list[int]:
        return sorted(set(range(self.model.config.num_attention_heads)) - set(heads))

    def padding(self, site: str, layer: int, total: int) -> list[int]:
        """Units for `set_units` that pad a layer with zeros to `total`.

        They come last, or in a family whose heads are told apart by their place
        (`Family.per_head`) where the dense model had them.
        """
        now = self._count(site, layer)
        if site != "attention" or not self.family.per_head:
            return [*range(now), *[-1] * (total - now)]
        left = self._heads(self.layers[layer], now)
        wanted = sorted([*left, *self._free(left)[: total - now]])
        return [left.index(head) if head in left else -1 for head in wanted]

    def set_config(self) -> None:
        """Write the layers' widths into the config, where they agree and it can hold them."""
        widths = self.layer_widths()
        heads = zip(widths["attention"], widths["balanced_heads"], strict=True)
        for counts in (
            [{"channel": width} for width in widths["ffn"]],
            [{"query": groups * queries, "key": groups} for groups, queries in heads],
        ):
            fields = {
                self.family.config[block]: count
                for block, count in counts[0].items()
                if block in self.family.config
            }
            if "query" in counts[0] and fields:
                fields["head_dim"] = self.head_dim
            if all(count == counts[0] for count in counts) and self._holds(fields):
                for name, value in fields.items():
                    setattr(self.model.config, name, value)

    def _holds(self, fields: dict[str, int]) -> bool:
        """Whether the config can take these values, and describes the model's other weights too.

        Llama's wants hidden size % heads == 0; Phi's normalises as many features of a head as
        hidden size / heads.
        """
        config = self.model.config
        try:
            plain = self._plain(type(config).from_dict({**config.to_dict(), **fields}))
        except (ValueError, StrictDataclassError):
            return False
        coupled = {id(self.module(0, p).weight) for site in SITES for p, _ in self.coupled(site)}
        there = dict(plain.layers[0].named_parameters())
        return all(
            weight.shape == there[name].shape
            for name, weight in self.layers[0].named_parameters()
            if name in there and name.endswith("weight") and id(weight) not in coupled
        )

    def _plain(self, config: PretrainedConfig) -> Anatomy:
        with torch.device("meta"), no_init_weights():
            return Anatomy(type(self.model)(copy.deepcopy(config)))

    def config_widths(self) -> dict[str, list[int]]:
        """`layer_widths` of what plain transformers builds from the config."""
        return self._plain(self.model.config).layer_widths()

    def activation_keeps_zero(self) -> bool:
        """Whether the FFN's activation maps 0 to 0, so a channel whose input is cut is dead."""
        activation = self.layers[0].get_submodule(self.family.activation)
        return bool(activation(torch.zeros(1)).item() == 0.0)

    def soft_cap(self) -> float | None:
        """The soft cap behind the head, if the model has one."""
        return getattr(self.model.config, self.family.soft_cap or "_", None)

    def set_soft_cap(self, value: float | None) -> None:
        """Change the soft cap, in a family that has one."""
        if self.family.soft_cap:
            setattr(self.model.config, self.family.soft_cap, value)

    def head_is_tied(self) -> bool:
        """Whether the output head shares its weight with the token embedding."""
        head = self.model.get_output_embeddings()
        return head is None or head.weight is self.model.get_input_embeddings().weight
