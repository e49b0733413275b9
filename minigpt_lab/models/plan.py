"""A pruning plan: the units to keep, and the weights to zero in place.

A plan is data. It is made from statistics or scores (`planning`), applied by `surgery`, and
predicts the pruned model's size without touching a weight.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from ..architectures import ALL_SITES, ATTENTION_UNITS, SITES
from ..checks import DictOf, Integer, ListOf, Location, Model, Number, OneOf, Text, checked, to_path
from ..store import read_cached, read_json, write_json
from .anatomy import Anatomy
from .feature_masks import Masks, all_features, count_weights, without_features
from .sizes import Size, layer_parameters, token_parameters

_INDICES = ListOf(Integer(0), kind=list)
_SIDES = OneOf(["input", "output", "bias"])
_NEURONS = OneOf(["input", "output", "bias", "activation"])
_FIELDS = {
    "model_hash": Text(),
    "units": DictOf(OneOf(ALL_SITES), ListOf(Integer(0), kind=list)),
    "keep": DictOf(OneOf(ALL_SITES), ListOf(_INDICES, kind=list)),
    "zero": DictOf(Text(), DictOf(_SIDES, _INDICES)),
    "vocabulary_size": Integer(0),
    "vocabulary": _INDICES | None,
    "origin": DictOf(Text()),
    "shift": DictOf(Text(), ListOf(Number(), kind=list)),
    "neurons": DictOf(Text(), DictOf(_NEURONS, _INDICES)),
}
_HASH = re.compile(r"\b[0-9a-f]{64}\b")  # shown by its first digits


@dataclass(frozen=True, repr=False)
class PruningPlan:
    """The units of a model to keep, and the weights to zero in place.

    Parameters
    ----------
    model_hash : str
        `fingerprint` of the model the plan was made for.
    units : dict
        Site to the number of units in every layer of that model. The site ``"balanced_heads"``
        prunes query heads in equal number per key/value group; one plan may hold both it and
        ``"attention"``.
    keep : dict
        Site to the units to keep, ascending, one list per layer. Where that is empty, the layer's
        FFN or attention is dropped: it adds only the biases that are left to the residual stream.
    zero : dict
        Linear layer's name to ``{"input": […], "output": […], "bias": […]}``: features whose
        column, row or bias entry becomes zero but is not removed. Features of removed units are
        not listed.
    vocabulary_size : int
        Rows of the token embedding.
    vocabulary : list of int or None
        Tokens to keep, ascending; None keeps the vocabulary as it is.
    origin : dict
        Where the decision came from: method, thresholds, domain, hashes.
    shift : dict
        Linear layer's name to what is added to its bias, one number per output; a layer without a
        bias gets one.
    neurons : dict
        Linear layer's name to ``{"input": […], "output": […], "bias": […], "activation": […]}``:
        all neurons under the thresholds; a plan by thresholds then removes only the units that have
        no effect any more. Used only for the paper's count of non-zero weights
        (`Size.paper_nonzero`).

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
        for site, layers in self.keep.items():
            depth = len(self.units.get(site, ()))
            if len(layers) != depth:
                raise ValueError(f"the plan keeps {site} units of {len(layers)} layers of {depth}")
            for layer, units in enumerate(layers):
                _check_subset(units, self.units[site][layer], f"{site} units in layer {layer}")
        if self.vocabulary is not None:
            _check_subset(self.vocabulary, self.vocabulary_size, "tokens")
            if not self.vocabulary:
                raise ValueError("the plan keeps no token: expected at least one")

    @cached_property
    def removed(self) -> dict[str, list[int]]:
        """Site to the number of units that are removed from every layer."""
        return {
            site: [total - len(kept) for total, kept in zip(self.units[site], layers, strict=True)]
            for site, layers in self.keep.items()
        }

    def kept_mask(self, site: str) -> list[np.ndarray]:
        """Masks of a site's kept units ``[layer][unit]``."""
        return [
            np.isin(np.arange(total), units)
            for total, units in zip(self.units[site], self.keep[site], strict=True)
        ]

    def kept_features(self, anatomy: Anatomy) -> Masks:
        """Masks of the features that are not removed with their units."""
        masks = all_features(anatomy)
        for site in self.keep:
            for layer, kept in enumerate(self.kept_mask(site)):
                of = site
                if site == "balanced_heads" and not kept.any():  # no query reads keys and values
                    of, kept = "attention", np.zeros(anatomy.units("attention")[layer], bool)
                for projection, side in () if kept.all() else anatomy.coupled(of):
                    features = anatomy.unit_features(projection, layer)[~kept]
                    for each in ("output", "bias") if side == "output" else ("input",):
                        masks[anatomy.name(layer, projection)][each][features] = False
        return masks

    @checked(model=Model(lock=False))
    def require(self, model: PreTrainedModel) -> Anatomy:
        """Check that the plan fits the model's shape; returns the model's anatomy.

        Weights are not compared: a plan also fits a fine-tuned copy of its model.

        Raises
        ------
        ValueError
            If it does not fit; the message names what differs.
        """
        anatomy = Anatomy(model)
        for misfit in self._misfits(anatomy):
            raise ValueError(f"the plan {misfit}; apply it to the model it was made for")
        if not self._keeps_block(anatomy):
            raise ValueError(
                "the plan drops the attention and the FFN of every layer; expected at least one "
                "block to be kept"
            )
        flag = anatomy.family.all_heads
        heads = [n for site in ATTENTION_UNITS.values() for n in self.removed.get(site, ())]
        if any(heads) and getattr(model.config, flag or "_", False):
            raise ValueError(
                f"the plan removes heads, which this model cannot do without as its config has "
                f"{flag}=True; load it with that set to false (the same products, in one piece)"
            )
        return anatomy

    def _keeps_block(self, anatomy: Anatomy) -> bool:
        """Whether some layer keeps attention or an FFN."""
        kept = {site: [*map(len, layers)] for site, layers in self.keep.items()}
        widths = anatomy.layer_widths() | kept
        return any(widths["ffn"]) or any(map(min, widths["attention"], widths["balanced_heads"]))

    def _misfits(self, anatomy: Anatomy) -> Iterator[str]:
        """Describe, one by one, the parts of the plan that do not fit the model."""
        for site, expected in self.units.items():
            if (units := anatomy.units(site)) != expected:
                yield f"is for {expected[:3]}… {site} units per layer, the model has {units[:3]}…"
        rows = anatomy.model.get_input_embeddings().weight.shape[0]
        if self.vocabulary is not None and rows != self.vocabulary_size:
            yield f"is for a vocabulary of {self.vocabulary_size}, the model has {rows}"
        masks = all_features(anatomy)
        for name in (*self.zero, *self.shift, *self.neurons):
            if name not in masks:
                yield f"names {name!r}, which is no linear layer of the model's decoder"
        for name, sides in (*self.zero.items(), *self.neurons.items()):
            for side, features in sides.items():
                width = len(masks[name]["input" if side == "activation" else side])
                if features and max(features) >= width:
                    yield f"zeroes {side} {max(features)} of {name}, which has {width}"
        for name, values in self.shift.items():
            if len(values) != (outputs := len(masks[name]["output"])):
                yield f"shifts {len(values)} outputs of {name}, which has {outputs}"

    @checked(model=Model(lock=False))
    def predicted_size(self, model: PreTrainedModel) -> Size:
        """Size of the model that `shrink` would make of `model`, computed from shapes alone.

        Weights that are zero already count as non-zero here.

        Raises
        ------
        ValueError
            If the plan does not fit the model.
        """
        anatomy = self.require(model)
        dense, layers_dense = model.num_parameters(), layer_parameters(model)
        # 1. Features of the decoder's linear layers: all, those kept, and those of them not zeroed.
        present, kept = all_features(anatomy), self.kept_features(anatomy)
        nonzero = without_features(kept, self.zero)
        for name, values in self.shift.items():  # a layer without a bias gets one
            outputs = kept[name]["bias"] = kept[name]["output"]
            nonzero[name]["bias"] |= outputs & (np.array(values) != 0)
        # 2. All other parameters of the model are kept, but for the rows of removed tokens.
        removed = count_weights(present) - count_weights(kept)
        tokens = 0 if self.vocabulary is None else self.vocabulary_size - len(self.vocabulary)
        stored = dense - removed - tokens * token_parameters(model)
        # 3. The paper's code also zeroes tokens, but not in the head's bias.
        paper_zeros = count_weights(present) - count_weights(self._paper_nonzero(anatomy))
        tables = [model.get_input_embeddings()]
        if not anatomy.head_is_tied():
            tables.append(model.get_output_embeddings())
        paper_zeros += tokens * sum(table.weight.shape[1] for table in tables)
        return Size(
            stored=stored,
            nonzero=stored - (count_weights(kept) - count_weights(nonzero)),
            dense=dense,
            layers_stored=layers_dense - removed,
            layers_dense=layers_dense,
            paper_nonzero=dense - paper_zeros,
        )

    def _paper_nonzero(self, anatomy: Anatomy) -> Masks:
        """Features that the code of Mini-GPTs, which removes none, would not set to zero.

        For a pruned activation it zeroes the row (and bias) of the linear layer before it; the
        column of the layer behind it still counts. That code does not know gated FFNs: here it is
        the row of the gate. Linear inputs and outputs under the threshold are zeroed themselves.
        For plans that were not made by thresholds, removed channels count as pruned activations,
        removed heads as pruned outputs of q, k and v.
        """
        masks = without_features(all_features(anatomy), self.neurons or self.zero)
        for site, layer, units in self._paper_units(anatomy):
            for projection in anatomy.family.produces[site][: 1 if site == "ffn" else None]:
                block = "gate" if "gate" in projection.blocks else None
                rows = anatomy.unit_features(projection, layer, block=block)[units]
                for side in ("output", "bias"):
                    masks[anatomy.name(layer, projection)][side][rows] = False
        return masks

    def _paper_units(self, anatomy: Anatomy) -> Iterator[tuple[str, int, Sequence[int]]]:
        """Site, layer and units that the paper's code would prune as activations or heads."""
        if self.neurons:  # by thresholds: of its units, only activations are pruned as such
            for layer in range(len(anatomy.layers)):
                name = anatomy.name(layer, anatomy.family.consumes["ffn"])
                yield "ffn", layer, self.neurons.get(name, {}).get("activation", [])
            return
        for site in self.keep:
            for layer, kept in enumerate(self.kept_mask(site)):
                yield site, layer, np.flatnonzero(~kept).tolist()

    def to_frame(self) -> pd.DataFrame:
        """Units kept and removed, one row per site and layer."""
        rows = [
            (site, layer, total, total - n_removed, n_removed)
            for site, removed in self.removed.items()
            for layer, (total, n_removed) in enumerate(zip(self.units[site], removed, strict=True))
        ]
        return pd.DataFrame(rows, columns=["site", "layer", "units", "kept", "removed"])

    def __repr__(self) -> str:
        origin = ", ".join(f"{key}={value}" for key, value in self.origin.items())
        lines = [f"PruningPlan ({_HASH.sub(lambda digest: digest[0][:12], origin)})"]
        for site, removed in self.removed.items():
            dropped = sum(not units for units in self.keep[site])
            lines.append(
                f"  {site}: {sum(removed)} of {sum(self.units[site])} units removed "
                f"(per layer {min(removed)} to {max(removed)}"
                f"{f'; none left in {dropped} layers' if dropped else ''})"
            )
        if self.vocabulary is not None:
            n_removed = self.vocabulary_size - len(self.vocabulary)
            lines.append(f"  vocabulary: {n_removed} of {self.vocabulary_size} tokens removed")
        if self.zero:
            columns, rows, biases = (
                sum(len(sides.get(side, ())) for sides in self.zero.values())
                for side in ("input", "output", "bias")
            )
            lines.append(f"  zeroed in place: {columns} columns, {rows} rows, {biases} biases")
        if self.shift:
            lines.append(f"  bias shifted in {len(self.shift)} linear layers")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> PruningPlan:
        """Make a plan from the result of `to_dict`.

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
        read_cached(path, PruningPlan.load)
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
        data = read_json(Path(path))
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _check_subset(chosen: list[int], total: int, what: str) -> None:
    """Refuse kept indices that are none, not ascending or out of range."""
    ascending = all(a < b for a, b in zip(chosen, chosen[1:], strict=False))
    if chosen and not (ascending and chosen[0] >= 0 and chosen[-1] < total):
        raise ValueError(
            f"the plan keeps {chosen[:5]}… of {total} {what}: expected them ascending, without "
            "repeats, in range"
        )


def keep_all(anatomy: Anatomy, sites: Iterable[str] = SITES) -> dict[str, list[list[int]]]:
    """`PruningPlan.keep` that keeps every unit of some sites."""
    return {site: [list(range(n)) for n in anatomy.units(site)] for site in sites}
