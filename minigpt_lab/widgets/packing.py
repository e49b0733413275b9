"""The explorer's arrays: what a browser needs to count every plan by itself, as one block of bytes.

Magnitudes become indices into `planning.EPSILONS`, so a browser's ``index(m) <= index(ε)`` is
Python's ``m <= ε``, exactly.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import Statistics
from ..models import Anatomy, label, layer_parameters, token_parameters
from ..planning import EPSILONS, SHARES, removals, token_removals

SITES = ("ffn", "attention")
_PLACES = 300_000  # of examples, of all neurons and domains: about a megabyte of the page
_LONGEST = 12  # tokens of a run: characters take one to four


class Packer:
    """Arrays by name; bytes of equal weight lie together, which deflates better."""

    def __init__(self) -> None:
        self.index: dict[str, list[int]] = {}
        self._blocks: list[bytes] = []
        self._length = 0

    def add(self, name: str, array: np.ndarray, steps: bool = False) -> None:
        """Add integers; `steps` stores the differences of neighbours."""
        values = np.diff(array, prepend=0) if steps else np.asarray(array)
        limit = max(int(np.max(np.abs(values), initial=0)), int(np.max(np.abs(array), initial=0)))
        kinds = ("<i4", "<f8") if steps else ("<u1", "<u2", "<i4", "<f8")
        kind = next(k for k in kinds if k == "<f8" or limit <= np.iinfo(k).max)
        planes = values.astype(kind)[:, None].view(np.uint8).T  # [byte of a number, number]
        self.index[name] = [len(planes), self._length, len(values), int(steps)]
        self._blocks.append(planes.tobytes())
        self._length += planes.size

    def deflated(self) -> bytes:
        """All arrays."""
        return zlib.compress(b"".join(self._blocks), 9)


def pack(
    model: PreTrainedModel,
    statistics: Mapping[str, Statistics],
    token_counts: Mapping[str, np.ndarray],
    sweeps: Mapping[str, pd.DataFrame],
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[dict[str, Any], bytes]:
    """Facts as plain data, and the arrays of all domains."""
    packer, anatomy = Packer(), Anatomy(model)
    for number, (name, found) in enumerate(statistics.items()):
        _add_linear(packer, number, model, found)
        if can_trim(statistics):
            _add_tokens(packer, number, model, found, token_counts.get(name))
    if tokenizer is not None:
        _add_examples(packer, list(statistics.values()), tokenizer)
    first = next(iter(statistics.values()))
    layers = range(len(anatomy.layers))
    grouped = max(anatomy.units("balanced_heads")) > 1
    facts = {
        "model": label(model),
        "dense": model.num_parameters(),
        "layers_dense": layer_parameters(model),
        "bytes_per_parameter": model.dtype.itemsize,
        "dtype": str(model.dtype).removeprefix("torch."),
        "units": {site: anatomy.units(site) for site in SITES},
        "unit_parameters": {
            site: [anatomy.unit_parameters(site, layer) for layer in layers] for site in SITES
        },
        "attention_unit": "key/value groups" if grouped else "heads",
        "features": sum(table.shape[1] for table in first.sums.values()),
        "vocabulary": len(first.token_counts),
        "token_parameters": token_parameters(model),
        "components": list(components(statistics)),
        "domains": [
            {
                "name": name,
                "examples": found.examples.count if found.examples and tokenizer else 0,
                "sweep": _points(sweeps.get(name)),
            }
            for name, found in statistics.items()
        ],
        "collected": max(
            found.examples.count if found.examples else 0 for found in statistics.values()
        ),
        "arrays": packer.index,
    }
    return facts, packer.deflated()


def can_trim(statistics: Mapping[str, Statistics]) -> bool:
    """Whether the vocabulary can be trimmed: the batches brought a tokenizer's merges."""
    return all(len(found.merges) and len(found.protected) for found in statistics.values())


def components(statistics: Mapping[str, Statistics]) -> tuple[str, ...]:
    """What a threshold can act on, as in `threshold_sweep`."""
    tokens = ("embedding", "all") if can_trim(statistics) else ()
    return ("activation", "linear", *tokens)


def _add_linear(packer: Packer, number: int, model: PreTrainedModel, found: Statistics) -> None:
    """Thresholds of all units, and counts of features at or below every threshold."""
    by_epsilon = removals(model, found)
    packer.add(f"{number}/activation", np.concatenate(by_epsilon.activation))
    for site, layers in by_epsilon.linear.items():
        packer.add(f"{number}/{site}", np.concatenate(layers))
    packer.add(f"{number}/zeroed", by_epsilon.zeroed, steps=True)
    first = [np.searchsorted(EPSILONS, found.magnitude(*key)) for key in found.sums]
    packer.add(f"{number}/features", _at_most(np.concatenate(first)), steps=True)
    by_share = removals(model, found, rule="share")
    packer.add(f"{number}/zeroed-shares", by_share.zeroed, steps=True)
    for site, layers in by_share.linear.items():
        counts = [[(each <= index).sum() for each in layers] for index in range(len(SHARES))]
        packer.add(f"{number}/{site}-shares", np.ravel(counts))  # [share, layer]


def _add_tokens(
    packer: Packer, number: int, model: PreTrainedModel, found: Statistics, counts
) -> None:
    """Tokens at or below every threshold, and tokens that it removes."""
    own, removal = token_removals(model, found, token_counts=counts)
    packer.add(f"{number}/tokens", _at_most(own), steps=True)
    packer.add(f"{number}/removed-tokens", _at_most(removal), steps=True)


def _add_examples(
    packer: Packer, statistics: list[Statistics], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Places of the windows that excite each neuron, and the text around them.

    As many of each neuron as fit on a page; what a neuron never answered to is no example.
    """
    known = {number: each.examples for number, each in enumerate(statistics) if each.examples}
    if not known:
        return
    pieces: dict[str, int] = {}
    for number, found in known.items():
        texts, begins = whole_characters(found.tokens, found.starts, tokenizer)
        packer.add(f"{number}/read", np.array([pieces.setdefault(t, len(pieces)) for t in texts]))
        packer.add(f"{number}/starts", np.searchsorted(begins, found.starts))
        fit = max(1, _PLACES // (len(found.values) * len(statistics)))
        places = np.searchsorted(begins, found.places, side="right")  # from 1; 0: none
        places = np.where(found.values > 0, places, 0)[:, :fit]
        packer.add(f"{number}/places", places.T.ravel())  # [example, neuron]
    packer.add("pieces", np.frombuffer("\0".join(pieces).encode("utf-8"), np.uint8))


def whole_characters(
    tokens: np.ndarray, starts: np.ndarray, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], np.ndarray]:
    """Text of the shortest runs of tokens that end with a whole character, and where each begins.

    Mostly a run is a token. One that ends within a character decodes to U+FFFD at its end: the
    tokens after it complete the character.

    Parameters
    ----------
    tokens, starts : numpy.ndarray
        Token ids of windows one after the other, and index of the first of every window.
    tokenizer : transformers.PreTrainedTokenizerBase
        That they are of.
    """
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]  # some decoders strip the first
    decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    begun = decode(anchor)

    @functools.cache
    def text_of(*run: int) -> str:  # within a text: with the space before it
        return decode([*anchor, *run]).removeprefix(begun).replace("\0", " ")

    ids, ends = tokens.tolist(), {*starts.tolist(), len(tokens)}
    texts: list[str] = []
    begins = [0]
    for end in range(1, len(ids) + 1):
        text = text_of(*ids[begins[-1] : end])
        if not text.endswith("\ufffd") or end in ends or end - begins[-1] == _LONGEST:
            texts.append(text)
            begins.append(end)
    return texts, np.array(begins[:-1])


def _at_most(indices: np.ndarray) -> np.ndarray:
    """Number of indices at most as large as that of every ε ``[threshold]``."""
    return np.cumsum(np.bincount(indices, minlength=len(EPSILONS))[: len(EPSILONS)])


def _points(sweep: pd.DataFrame | None) -> dict[str, list[list[float | None]]]:
    """Component to ε, loss and its interval at every measured point, ascending.

    One passage has no interval: its ends are None.
    """
    if sweep is None:
        return {}
    points = sweep[(sweep["method"] == "contextual") & np.isfinite(sweep["perplexity_ratio"])]
    columns = ["epsilon", "perplexity_ratio", "ratio_low", "ratio_high"]
    return {
        str(component): [
            [float(x) if np.isfinite(x) else None for x in row]
            for row in rows.sort_values("epsilon")[columns].to_numpy(float)
        ]
        for component, rows in points.groupby("component", sort=False)
    }
