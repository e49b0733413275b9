"""Scores: the importance of every unit under one criterion, and the registry of criteria."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from ..calibration import Statistics, tokens_hash
from ..checks import (
    Batches,
    Flag,
    Function,
    Instance,
    Location,
    Model,
    OneOf,
    Text,
    as_json,
    checked,
    to_python,
    writable_folder,
)
from ..domains import unpadded
from ..models import SITES, Anatomy, fingerprint, require_weights
from ..store import cache_folder, cache_key, cached, content_hash, read_tensors, write_tensors
from .units import chosen_sites


@dataclass(frozen=True, repr=False)
class Scores:
    """Importance of every unit; those with the lowest scores are pruned first.

    Parameters
    ----------
    criterion : str
        Name in `CRITERIA`.
    values : dict
        Site to one array ``[unit]`` per layer.
    model_hash : str
        `fingerprint` of the model that was scored.
    options : dict
        Options that the criterion was given.
    domain, content_hash : str
        Name and SHA-256 of the calibration text; empty for criteria without data.
    n_tokens : int
        Tokens of that text, padding excluded.
    """

    criterion: str
    values: dict[str, list[np.ndarray]]
    model_hash: str
    options: dict = field(default_factory=dict)
    domain: str = ""
    content_hash: str = ""
    n_tokens: int = 0

    def __repr__(self) -> str:
        units = [f"{sum(map(len, layers)):,} {site} units" for site, layers in self.values.items()]
        text = f" on {self.n_tokens:,} tokens of {self.domain}" if self.n_tokens else ""
        return f"{self.criterion} scores of {' and '.join(units)}{text}"

    def _repr_html_(self) -> str:
        summary = self.to_frame().groupby("site")["score"].describe()
        return f"<p>{self!r}</p>{summary.to_html()}"

    def to_frame(self) -> pd.DataFrame:
        """Tidy table with columns ``site, layer, unit, score``."""
        parts = [
            pd.DataFrame({"site": site, "layer": i, "unit": np.arange(len(layer)), "score": layer})
            for site, layers in self.values.items()
            for i, layer in enumerate(layers)
        ]
        return pd.concat(parts, ignore_index=True)

    def highest_pruned(self, keep: dict[str, list[list[int]]], site: str = "ffn") -> float:
        """Highest score of a pruned unit of a site; with one global threshold, the threshold ε."""
        layers = zip(self.values[site], keep[site], strict=True)
        pruned = np.concatenate([np.delete(values, units) for values, units in layers])
        return float(pruned.max()) if len(pruned) else 0.0

    def require(self, model: PreTrainedModel) -> dict[str, list[np.ndarray]]:
        """Return the values after checking that they belong to this model.

        Raises
        ------
        ValueError
            If the model's weights are not those that were scored, or not every unit has a finite
            score.
        """
        require_weights(model, self.model_hash, f"these {self.criterion} scores")
        return _as_arrays(self.criterion, model, [*self.values], self.values)

    @checked(path=Location())
    def save(self, path: str | os.PathLike) -> Path:
        """Write everything into one safetensors file; returns its path.

        Raises
        ------
        FileExistsError
            If `path` holds something else than scores: it is left alone.
        OSError
            If it cannot be written.
        """
        tensors = {
            f"{site}|{layer}": torch.from_numpy(np.array(values))
            for site, layers in self.values.items()
            for layer, values in enumerate(layers)
        }
        header = {key: value for key, value in vars(self).items() if key != "values"}
        depths = {site: len(layers) for site, layers in self.values.items()}
        return write_tensors(path, "scores", {**header, "layers": depths}, tensors)

    @classmethod
    @checked(path=Location())
    def load(cls, path: str | os.PathLike) -> Scores:
        """Read a file that `save` wrote; options come back as JSON has them (lists for tuples).

        Raises
        ------
        ValueError
            If the file is not one, or is damaged.
        """

        def build(header: dict, tensors: dict[str, torch.Tensor]) -> Scores:
            values = {
                site: [tensors[f"{site}|{layer}"].numpy() for layer in range(count)]
                for site, count in header.pop("layers").items()
            }
            return cls(values=values, **header)

        return read_tensors(Path(path), "scores", build)


#: Criteria by name; see `criterion` for their signature.
CRITERIA: dict[str, Callable[..., dict[str, list[np.ndarray]]]] = {}


def criterion(name: str) -> Callable:
    """Register a function as a criterion (decorator).

    The function takes ``(model, batches=None, statistics=None, *, sites, **options)`` and returns
    for each of the sites one array ``[unit]`` per layer; ``Anatomy(model).units(site)`` is how
    many units every layer has. Units with the lowest scores are pruned first.

    Parameters
    ----------
    name : str
        Name by which `score` finds it.
    """
    name = Text()("name", name)

    def register(function: Callable) -> Callable:
        CRITERIA[name] = Function()(f"the criterion {name!r}", function)
        return function

    return register


@checked(
    model=Model(),
    criterion=OneOf(CRITERIA),
    batches=Batches() | None,
    statistics=Instance(Statistics, "lab.collect_statistics gives it") | None,
    cache=Flag() | Location(),
)
def score(
    model: PreTrainedModel,
    criterion: str,
    batches: Iterable[dict] | None = None,
    *,
    statistics: Statistics | None = None,
    sites: tuple[str, ...] = SITES,
    units: str = "kv_group",
    cache: bool | str | os.PathLike = False,
    **options,
) -> Scores:
    """Score every unit of a model under one criterion.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model; unchanged afterwards.
    criterion : str
        A key of `CRITERIA`.
    batches : iterable of dict, optional
        Calibration tokens, for criteria that look at activations or gradients.
    statistics : Statistics, optional
        Saved statistics of this model to use instead of a pass over `batches`.
    sites : tuple of str
        Sites to score: ``"ffn"``, ``"attention"``, or both.
    units : {"kv_group", "balanced_heads"}
        Units of attention: whole key/value groups (heads, where every head has its own), or one
        query head of every group, keys and values being kept. Scores and plans then name the site
        ``"balanced_heads"`` instead of ``"attention"``.
    cache : bool or path
        Folder in which scores are cached, or True for the kit's own. Cached scores are used again
        if the model's weights, the tokens, the criterion (its code too), the sites and the options
        are the same. A damaged file is set aside; a full disk only warns.
    **options
        The criterion's own options.

    Returns
    -------
    Scores

    Raises
    ------
    ValueError
        If the criterion, a site, a kind of units or an option is unknown, the model has but one
        query head per group to remove in balance, a criterion lacks its data or does not give
        every unit a finite score.
    RuntimeError
        If the criterion changed the model.
    """
    sites = chosen_sites(model, sites, units)
    if statistics is not None:
        statistics.require(model)
    options = {key: to_python(value) for key, value in options.items()}
    facts = {"model_hash": fingerprint(model), "options": as_json(options)}
    facts |= _text_facts(batches, statistics)

    def compute() -> Scores:
        try:
            values = CRITERIA[criterion](model, batches, statistics, sites=sites, **options)
        except (ValueError, TypeError) as error:  # wrong options, or none of the data it needs
            raise ValueError(f"the {criterion} criterion: {error}") from error
        if fingerprint(model) != facts["model_hash"]:
            raise RuntimeError(f"the {criterion} criterion changed the model's weights")
        return Scores(criterion, _as_arrays(criterion, model, sites, values), **facts)

    path = _cache_file(cache, criterion, sites, facts, options)
    return cached(path, compute, Scores.load, Scores.save)


def _text_facts(batches: Iterable[dict] | None, statistics: Statistics | None) -> dict:
    """Name, hash and length of the text behind statistics, batches or both."""
    texts: dict[str, tuple[str, int]] = {}  # hash to name and number of tokens
    if statistics is not None:
        texts[statistics.content_hash] = statistics.domain, statistics.n_tokens
    if batches is not None:
        n_tokens = sum(ids.numel() for ids in unpadded(batches))
        texts[tokens_hash(batches)] = getattr(batches, "source", ""), n_tokens
    if not texts:
        return {}
    hashes, names, counts = [*texts], *zip(*texts.values(), strict=True)
    return {
        "domain": " + ".join(dict.fromkeys(filter(None, names))),
        "content_hash": hashes[0] if len(hashes) == 1 else content_hash(hashes),
        "n_tokens": sum(counts),
    }


def _cache_file(
    cache: bool | str | os.PathLike, name: str, sites: tuple[str, ...], facts: dict, options: dict
) -> Path | None:
    """Path of these scores in the cache; None if they are not to be cached."""
    if cache is False:
        return None
    try:
        code = inspect.getsource(CRITERIA[name])
        json.dumps(options)
    except (OSError, TypeError):
        # The code was typed at a prompt, or an option is no plain data: two runs whose hashes agree
        # could differ.
        return None
    folder = cache_folder() / "scores" if cache is True else writable_folder(cache)
    return folder / f"{name}-{cache_key(name, code, sites, facts)[:16]}.safetensors"


def _as_arrays(
    name: str, model: PreTrainedModel, sites: Sequence[str], values: Any
) -> dict[str, list[np.ndarray]]:
    """Convert a criterion's values to arrays ``[unit]``; every unit must have a finite score."""
    anatomy, arrays = Anatomy(model), {}
    for site in sites:
        totals = anatomy.units(site)
        try:
            arrays[site] = [_as_array(layer) for layer in values[site]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the {name} criterion gives no {site} scores that are numbers; expected one array "
                f"[unit] for each of {len(totals)} layers"
            ) from error
        if [array.shape for array in arrays[site]] != [(total,) for total in totals]:
            raise ValueError(
                f"the {name} criterion gives other {site} scores than one for each unit of every "
                f"layer; expected arrays of length {totals[:3]}…"
            )
        if not np.isfinite(np.concatenate(arrays[site])).all():
            raise ValueError(f"the {name} criterion gives NaN or infinite {site} scores")
    return arrays


def _as_array(values: Any) -> np.ndarray:
    """One layer's scores (a tensor, an array or a list) as float64."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double()
    return np.asarray(values, dtype=float)
