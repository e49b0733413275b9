"""A pruning plan: which units stay, which weights are only zeroed, and what size that makes.

A plan is data. It is made from statistics or scores (`planning`), carried out by `surgery`, and
predicts a model's size without touching a weight.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from ..checks import DictOf, Integer, ListOf, Location, Model, Number, OneOf, Text, checked, to_path
from ..store import DamagedFile, read_cached, read_json, write_json
from .anatomy import Anatomy, weight_axis
from .architectures import ALL_SITES, ATTENTION_UNITS, SITES
from .sizes import Size, layer_parameters, token_parameters

_INDICES = ListOf(Integer(0), kind=list)
_SIDES = OneOf(["input", "output", "bias"])
_NEURONS = OneOf(["input", "output", "bias", "activation"])
_FIELDS = {
    "model_hash": Text(),
    "units": DictOf(OneOf(ALL_SITES), ListOf(Integer(1), kind=list)),
    "keep": DictOf(OneOf(ALL_SITES), ListOf(_INDICES, kind=list)),
    "zero": DictOf(Text(), DictOf(_SIDES, _INDICES)),
    "vocabulary_size": Integer(0),
    "vocabulary": _INDICES | None,
    "origin": DictOf(Text()),
    "shift": DictOf(Text(), ListOf(Number(), kind=list)),
    "neurons": DictOf(Text(), DictOf(_NEURONS, _INDICES)),
}
_AXES = {"input": "input", "output": "output", "bias": "output"}
_HASH = re.compile(r"\b[0-9a-f]{64}\b")  # shown by its first digits


@dataclass(frozen=True)
class PruningPlan:
    """Which units of a model stay, and which weights are zeroed in place.

    Parameters
    ----------
    model_hash : str
        `fingerprint` of the model the plan was made for.
    units : dict
        Site to the number of units in every layer of that model. A cut of query heads in equal
        number per key/value group is the site ``"balanced_heads"``; one plan may hold both that
        and ``"attention"``.
    keep : dict
        Site to the units that stay, ascending, one list per layer.
    zero : dict
        Linear layer's name to ``{"input": […], "output": […], "bias": […]}``: features whose
        column, row or bias entry becomes zero without leaving. Features of removed units are not
        listed.
    vocabulary_size : int
        Rows of the token embedding.
    vocabulary : list of int or None
        Tokens that stay, ascending; None leaves the vocabulary alone.
    origin : dict
        Where the decision came from: method, thresholds, domain, hashes.
    shift : dict
        Linear layer's name to what is added to its bias, one number per output; a layer without a
        bias gets one.
    neurons : dict
        Linear layer's name to ``{"input": […], "output": […], "bias": […], "activation": […]}``:
        what thresholds cut, before the units that this leaves without effect are removed. Only
        the paper's count (`paper_zeros`) asks for it.

    Raises
    ------
    ValueError, TypeError
        If a field is of another type, an index out of range, or a number not finite.
    """

    model_hash: str
    units: dict[str, list[int]]
    keep: dict[str, list[list[int]]]
    zero: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    vocabulary_size: int = 0
    vocabulary: list[int] | None = None
    origin: dict = field(default_factory=dict)
    shift: dict[str, list[float]] = field(default_factory=dict)
    neurons: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    def __post_init__(self):
        for name, check in _FIELDS.items():
            object.__setattr__(self, name, check(f"the plan's {name}", getattr(self, name)))
        if set(self.keep) - set(self.units) or set(self.units) - set(ALL_SITES):
            got = f"{[*self.units]}, {[*self.keep]}"
            raise ValueError(f"a plan is for sites {ALL_SITES}; got {got}")
        for site, layers in self.keep.items():
            if len(layers) != len(self.units[site]):
                raise ValueError(f"the plan lists {len(layers)} of {len(self.units[site])} layers")
            for layer, units in enumerate(layers):
                _check_subset(units, self.units[site][layer], f"{site} units in layer {layer}")
        if self.vocabulary is not None:
            _check_subset(self.vocabulary, self.vocabulary_size, "tokens")

    @cached_property
    def removed(self) -> dict[str, list[int]]:
        """Site to the number of units that leave every layer."""
        return {
            site: [total - len(kept) for total, kept in zip(self.units[site], layers, strict=True)]
            for site, layers in self.keep.items()
        }

    def kept_mask(self, site: str) -> list[np.ndarray]:
        """Whether each unit of a site stays, flags ``[layer][unit]``."""
        return [
            np.isin(np.arange(total), units)
            for total, units in zip(self.units[site], self.keep[site], strict=True)
        ]

    @checked(model=Model(lock=False))
    def require(self, model: PreTrainedModel) -> Anatomy:
        """The model's anatomy, if the plan fits the model's shape.

        Weights are not compared: a plan also serves a fine-tuned copy of its model.

        Raises
        ------
        ValueError
            Naming what differs.
        """
        anatomy = Anatomy(model)
        rows = model.get_input_embeddings().weight.shape[0]
        for site, expected in self.units.items():
            if anatomy.units(site) != expected:
                raise ValueError(
                    f"the plan is for {expected[:3]}… {site} units per layer, the model has "
                    f"{anatomy.units(site)[:3]}…: apply it to the model it was made for"
                )
        if self.vocabulary is not None and rows != self.vocabulary_size:
            raise ValueError(
                f"the plan is for a vocabulary of {self.vocabulary_size}, the model has {rows}: "
                "apply it to the model it was made for"
            )
        flag = anatomy.family.all_heads
        heads = [n for site in ATTENTION_UNITS.values() for n in self.removed.get(site, ())]
        if any(heads) and getattr(model.config, flag or "_", False):
            raise ValueError(
                f"the plan removes heads, which this model cannot do without as its config has "
                f"{flag}=True; load it with that set to false (the same products, in one piece)"
            )
        modules = {name: module for _, name, module in anatomy.linears()}
        for name in (*self.zero, *self.shift, *self.neurons):
            if name not in modules:
                raise ValueError(
                    f"the plan names {name!r}, which is no linear layer of the model's decoder: "
                    "apply it to the model it was made for"
                )
        for name, sides in (*self.zero.items(), *self.neurons.items()):
            for side, features in sides.items():
                reads = side in ("input", "activation")
                axis = weight_axis(modules[name], "input" if reads else "output")
                if (
                    features
                    and not 0 <= min(features) <= max(features) < modules[name].weight.shape[axis]
                ):
                    raise ValueError(f"the plan zeroes a feature that {name} does not have: {side}")
        for name, values in self.shift.items():
            outputs = modules[name].weight.shape[weight_axis(modules[name], "output")]
            if len(values) != outputs:
                raise ValueError(
                    f"the plan shifts {len(values)} outputs of {name}, which has {outputs}: apply "
                    "it to the model it was made for"
                )
        return anatomy

    @checked(model=Model(lock=False))
    def predicted_size(self, model: PreTrainedModel) -> Size:
        """What `surgery.shrink` would make of `model`, from shapes alone.

        Weights that are zero already count as non-zero here.

        Raises
        ------
        ValueError
            If the plan does not fit the model.
        """
        anatomy = self.require(model)
        dense = sum(p.numel() for p in model.parameters())
        layers_dense = layer_parameters(model)
        gone = zeroed = 0
        stay = self.kept_features(anatomy)
        for _, name, module in anatomy.linears():
            rows, columns = (
                stay.get(
                    (name, side), np.ones(module.weight.shape[weight_axis(module, side)], bool)
                )
                for side in ("output", "input")
            )
            dead = {side: np.array(v, np.int64) for side, v in self.zero.get(name, {}).items()}
            alive_rows, alive_columns, alive_bias = rows.copy(), columns.copy(), rows.copy()
            alive_rows[dead.get("output", [])] = False
            alive_columns[dead.get("input", [])] = False
            alive_bias[dead.get("bias", [])] = False
            kept = int(rows.sum()) * int(columns.sum())
            gone += module.weight.numel() - kept
            zeroed += kept - int(alive_rows.sum()) * int(alive_columns.sum())
            shift = np.array(self.shift.get(name, np.zeros(len(rows))))
            if module.bias is not None:
                gone += len(rows) - int(rows.sum())
                zeroed += int(rows.sum()) - int((alive_bias | (rows & (shift != 0))).sum())
            elif name in self.shift:
                gone -= int(rows.sum())
                zeroed += int((rows & (shift == 0)).sum())
        layers_stored = layers_dense - gone
        if self.vocabulary is not None:
            tokens = self.vocabulary_size - len(self.vocabulary)
            gone += tokens * token_parameters(model)
        stored = dense - gone
        paper = dense - self.paper_zeros(model)
        return Size(stored, stored - zeroed, dense, layers_stored, layers_dense, paper)

    @checked(model=Model(lock=False))
    def paper_zeros(self, model: PreTrainedModel) -> int:
        """Weights that the code of Mini-GPTs sets to zero, where this plan cuts.

        It removes nothing. An activation that is cut costs the row (and bias) of the linear layer
        before it (in gated FFNs, which that code does not know, of the gate); the column of the
        layer behind it still counts. Linear inputs and outputs are zeroed as they fall under the
        threshold, tokens in embedding and head but not in the head's bias. In plans that were not
        made by thresholds, the units that leave are taken for what is cut: channels as
        activations, heads as outputs of the projections that make them.

        Parameters
        ----------
        model : transformers.PreTrainedModel
            The one that the plan was made for.
        """
        anatomy = self.require(model)
        modules = {name: module for _, name, module in anatomy.linears()}
        dead = {
            name: {side: np.zeros(module.weight.shape[weight_axis(module, axis)], bool)
                   for side, axis in _AXES.items()}
            for name, module in modules.items()
        }  # fmt: skip
        for name, sides in (self.neurons or self.zero).items():
            for side in sides.keys() & _AXES.keys():
                dead[name][side][sides[side]] = True
        for site, layer, units in self._cut(anatomy):
            # of a gated FFN the one that feeds the activation
            for projection in anatomy.family.produces[site][: 1 if site == "ffn" else None]:
                block = "gate" if "gate" in projection.blocks else None
                rows = anatomy.unit_features(projection, layer, block=block)[units]
                for side in ("output", "bias"):
                    dead[anatomy.name(layer, projection)][side][rows] = True
        zeros = 0
        for name, module in modules.items():
            rows, columns, bias = (~dead[name][side] for side in ("output", "input", "bias"))
            zeros += module.weight.numel() - int(rows.sum()) * int(columns.sum())
            zeros += 0 if module.bias is None else int((~bias).sum())
        if self.vocabulary is not None:
            tables = [model.get_input_embeddings()]
            if not anatomy.head_is_tied():
                tables.append(model.get_output_embeddings())
            gone = self.vocabulary_size - len(self.vocabulary)
            zeros += gone * sum(table.weight.shape[1] for table in tables)
        return zeros

    def _cut(self, anatomy: Anatomy) -> Iterator[tuple[str, int, list[int]]]:
        """Site, layer and units that were cut as such: by their activation, or by a score."""
        reader = anatomy.family.consumes["ffn"]
        for layer in range(len(anatomy.layers)):
            if self.neurons:
                units = self.neurons.get(anatomy.name(layer, reader), {}).get("activation", [])
                yield "ffn", layer, units
                continue
            for site, layers in self.keep.items():
                yield site, layer, np.setdiff1d(np.arange(self.units[site][layer]), layers[layer])

    def kept_features(self, anatomy: Anatomy) -> dict[tuple[str, str], np.ndarray]:
        """``(module, side)`` to a mask of the features that stay, where units leave."""
        found = {}
        for site, layers in self.keep.items():
            for layer, units in enumerate(layers):
                total = self.units[site][layer]
                if len(units) == total:
                    continue
                gone = np.delete(np.arange(total), units)
                for projection, side in anatomy.coupled(site):
                    module = anatomy.module(layer, projection)
                    mask = np.ones(module.weight.shape[weight_axis(module, side)], bool)
                    mask[anatomy.unit_features(projection, layer)[gone]] = False
                    key = anatomy.name(layer, projection), side
                    found[key] = mask & found.get(key, True)
        return found

    def to_frame(self) -> pd.DataFrame:
        """Units kept and removed, one row per site and layer."""
        rows = [
            (site, layer, total, total - gone, gone)
            for site, removed in self.removed.items()
            for layer, (total, gone) in enumerate(zip(self.units[site], removed, strict=True))
        ]
        return pd.DataFrame(rows, columns=["site", "layer", "units", "kept", "removed"])

    def __str__(self) -> str:
        origin = ", ".join(f"{key}={value}" for key, value in self.origin.items())
        lines = [f"PruningPlan ({_HASH.sub(lambda found: found[0][:12], origin)})"]
        for site, removed in self.removed.items():
            lines.append(
                f"  {site}: {sum(removed)} of {sum(self.units[site])} units leave "
                f"(per layer {min(removed)} to {max(removed)})"
            )
        if self.vocabulary is not None:
            gone = self.vocabulary_size - len(self.vocabulary)
            lines.append(f"  vocabulary: {gone} of {self.vocabulary_size} tokens leave")
        counts = {
            side: sum(len(sides.get(side, [])) for sides in self.zero.values())
            for side in ("input", "output", "bias")
        }
        if any(counts.values()):
            lines.append(
                f"  zeroed in place: {counts['input']} columns, {counts['output']} rows, "
                f"{counts['bias']} biases"
            )
        if self.shift:
            lines.append(f"  bias shifted in {len(self.shift)} linear layers")
        return "\n".join(lines)

    __repr__ = __str__  # the fields hold thousands of indices

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> PruningPlan:
        """A plan from what `to_dict` gave.

        Raises
        ------
        ValueError
            If a field is missing, unknown or of another type, or the units are out of range.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"this is no pruning plan: {error}") from error

    @checked(path=Location())
    def save(self, path: str | os.PathLike) -> Path:
        """Write the plan as JSON; returns the path.

        Raises
        ------
        FileExistsError
            If `path` holds something else than a plan: it is left alone.
        OSError
            If it cannot be written.
        """
        read_cached(path, _read_fields, ".json")
        return write_json(to_path(path), self.to_dict())

    @classmethod
    @checked(path=Location())
    def load(cls, path: str | os.PathLike) -> PruningPlan:
        """Read a plan that `save` wrote.

        Raises
        ------
        ValueError
            If the file is not one.
        """
        return cls.from_dict(_read_fields(Path(path)))


def _read_fields(path: Path) -> dict:
    """A plan's fields from its file, their values as they stand there."""
    try:
        data = read_json(path)
    except DamagedFile as error:
        raise DamagedFile(f"{path} is no pruning plan: {error}") from error
    if not isinstance(data, dict) or not {"model_hash", "units", "keep"} <= data.keys():
        raise ValueError(f"{path} is no pruning plan: it holds something else")
    return data


def _check_subset(chosen: list[int], total: int, what: str) -> None:
    ascending = all(a < b for a, b in zip(chosen, chosen[1:], strict=False))
    if not chosen or not ascending or chosen[0] < 0 or chosen[-1] >= total:
        raise ValueError(
            f"the plan keeps {chosen[:5]}… of {total} {what}: expected at least one, ascending, "
            "without repeats, in range"
        )


def keep_all(anatomy: Anatomy, sites: Iterable[str] = SITES) -> dict[str, list[list[int]]]:
    """`PruningPlan.keep` that keeps every unit of some sites."""
    return {site: [list(range(n)) for n in anatomy.units(site)] for site in sites}
