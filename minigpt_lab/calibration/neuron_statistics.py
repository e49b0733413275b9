"""One streaming pass over a domain: what every neuron does on average.

Mini-GPTs (arXiv 2312.12682) scores neuron *j* by its mean absolute activation over *N* calibration
tokens, ``m_j = (1/N) Σ_t |a_tj|``, for inputs and outputs of linear layers and outputs of the FFN's
activation. The same pass keeps the mean and the second moment, which the other criteria use.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..checks import Batches, Flag, Integer, Location, Model, check_fields, checked
from ..models import (
    Anatomy,
    check_token_ids,
    fingerprint,
    inference,
    label,
    require_weights,
    weight_axis,
)
from ..store import DamagedFile, cached, read_tensors, write_tensors
from .collector import Collector, Key

#: Fields of `Statistics` beside the sums, in a file's header and among its tensors.
_HEADER = (
    "activations", "layer_of", "n_tokens", "model_hash", "model_name", "domain", "content_hash",
)  # fmt: skip
_ARRAYS = ("token_counts", "merges", "protected")


@dataclass
class Statistics:
    """What one pass over `n_tokens` tokens of a domain found, per neuron.

    Parameters
    ----------
    sums : dict
        ``(module, side)`` to sums over tokens ``[moment, neuron]`` in float64; the moments are
        those of `MOMENTS`, and for outputs of biased layers a fourth, ``|y - b|``.
    activations : list of str
        Per layer, the module whose input is the output of the FFN's activation.
    layer_of : dict
        Module name to layer index.
    token_counts : numpy.ndarray
        How often each vocabulary token occurred ``[vocabulary]``.
    merges : numpy.ndarray
        The tokenizer's merges as ids ``[merge, (left, right, result)]``; empty if not known.
    protected : numpy.ndarray
        Tokens that never leave (bytes, special tokens); empty if not known.
    n_tokens : int
        Tokens counted, padding excluded.
    model_hash, model_name, domain, content_hash : str
        Which model, which text: `fingerprint`, caption, name and SHA-256 of the windows' tokens.
    """

    sums: dict[Key, np.ndarray]
    activations: list[str]
    layer_of: dict[str, int]
    token_counts: np.ndarray
    merges: np.ndarray
    protected: np.ndarray
    n_tokens: int
    model_hash: str
    model_name: str
    domain: str
    content_hash: str

    def __post_init__(self):
        check_fields(self, n_tokens=Integer(1))

    MOMENTS = ("absolute", "sum", "square", "unbiased")

    def mean(self, module: str, side: str, moment: str) -> np.ndarray:
        """Mean over tokens of one moment of every neuron ``[neuron]``.

        ``side="activation"`` is the output of the FFN's activation: the input of its second
        projection. ``"unbiased"`` falls back to ``"absolute"`` where a layer has no bias.
        """
        table = self.sums[module, "input" if side == "activation" else side]
        row = self.MOMENTS.index(moment)
        return table[row if row < len(table) else 0] / self.n_tokens

    def variance(self, module: str, side: str) -> np.ndarray:
        """Variance over tokens, divided by their number, of every neuron ``[neuron]``."""
        mean, square = (self.mean(module, side, moment) for moment in ("sum", "square"))
        return np.maximum(square - mean**2, 0)

    def magnitude(self, module: str, side: str) -> np.ndarray:
        """What ε is compared with ``[neuron]``: mean |a|, of outputs the smaller of it and |y - b|.

        An output that only its bias keeps away from zero counts as unused (Mini-GPTs' reference
        code).
        """
        found = self.mean(module, side, "absolute")
        return np.minimum(found, self.mean(module, side, "unbiased")) if side == "output" else found

    def biased(self, module: str) -> bool:
        """Whether the linear layer has a bias."""
        return len(self.sums[module, "output"]) == len(self.MOMENTS)

    def sides(self) -> Iterator[Key]:
        """Every ``(module, side)`` that was measured, layer by layer."""
        yield from self.sums
        for module in self.activations:
            yield module, "activation"

    def __repr__(self) -> str:  # the arrays fill pages
        return f"Statistics of {self.n_tokens:,} tokens of {self.domain} under {self.model_name}"

    def to_frame(self) -> pd.DataFrame:
        """Tidy table, one row per neuron.

        Returns
        -------
        pandas.DataFrame
            Columns ``layer, module, side`` (input, output or activation), ``neuron, mean_abs,
            mean_abs_unbiased`` (NaN without a bias), ``mean, variance, second_moment, tokens``.
        """
        parts = []
        for module, side in self.sides():
            mean = self.mean(module, side, "sum")
            unbiased = self.mean(module, side, "unbiased")
            parts.append(
                pd.DataFrame(
                    {
                        "layer": self.layer_of[module],
                        "module": module.split(f".{self.layer_of[module]}.", 1)[1],
                        "side": side,
                        "neuron": np.arange(len(mean)),
                        "mean_abs": self.mean(module, side, "absolute"),
                        "mean_abs_unbiased": unbiased
                        if side == "output" and self.biased(module)
                        else np.nan,
                        "mean": mean,
                        "variance": self.variance(module, side),
                        "second_moment": self.mean(module, side, "square"),
                        "tokens": self.n_tokens,
                    }
                )
            )
        table = pd.concat(parts, ignore_index=True)
        return table.astype({"module": "category", "side": "category"})

    def __add__(self, other: object) -> Statistics:
        """Statistics of both texts together, of one model.

        Raises
        ------
        ValueError
            If the two are of different models.
        """
        if not isinstance(other, Statistics):
            return NotImplemented
        if self.model_hash != other.model_hash:
            raise ValueError(
                "statistics of two models cannot be added: "
                f"{self.model_name} ({self.model_hash[:12]}) and "
                f"{other.model_name} ({other.model_hash[:12]})"
            )
        both = hashlib.sha256((self.content_hash + other.content_hash).encode()).hexdigest()
        return replace(
            self,
            sums={key: table + other.sums[key] for key, table in self.sums.items()},
            token_counts=self.token_counts + other.token_counts,
            n_tokens=self.n_tokens + other.n_tokens,
            domain=" + ".join(dict.fromkeys((self.domain, other.domain))),
            content_hash=both,
        )

    def require(self, model: PreTrainedModel) -> None:
        """Refuse another model than the one measured.

        Raises
        ------
        ValueError
            If the model's weights are not those that the pass saw, or a sum is missing or no
            finite number.
        """
        require_weights(model, self.model_hash, f"these statistics of {self.model_name}")
        check_fields(self, n_tokens=Integer(1))
        for _, name, module in Anatomy(model).linears():
            for side in ("input", "output"):
                table, width = self.sums.get((name, side)), module.weight.shape
                shape = (3, 4), width[weight_axis(module, side)]
                if table is None or len(table) not in shape[0] or table.shape[1:] != shape[1:]:
                    raise ValueError(f"the statistics have no sums of the {side}s of {name}")
                if not np.isfinite(table).all():
                    raise ValueError(f"the statistics of {name} have NaN or infinite {side} sums")

    @checked(path=Location())
    def save(self, path: str | os.PathLike) -> Path:
        """Write everything into one safetensors file; returns its path.

        Raises
        ------
        FileExistsError
            If `path` holds something else than statistics: it is left alone.
        OSError
            If it cannot be written.
        """
        tensors = {f"{module}|{side}": table for (module, side), table in self.sums.items()}
        tensors |= {f"|{name}": getattr(self, name) for name in _ARRAYS}
        header = {name: getattr(self, name) for name in _HEADER} | {
            "order": [f"{module}|{side}" for module, side in self.sums]
        }
        arrays = {name: torch.from_numpy(np.array(table)) for name, table in tensors.items()}
        return write_tensors(path, "statistics", header, arrays)

    @classmethod
    @checked(path=Location())
    def load(cls, path: str | os.PathLike) -> Statistics:
        """Read a file that `save` wrote.

        Raises
        ------
        ValueError
            If the file is not one, or is damaged.
        """
        header, tensors = read_tensors(Path(path), "statistics")
        try:
            order = [tuple(key.rsplit("|", 1)) for key in header.pop("order")]
            sums = {key: tensors["|".join(key)].numpy() for key in order}
            arrays = {name: tensors[f"|{name}"].numpy() for name in _ARRAYS}
            return cls(sums=sums, **header, **arrays)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedFile(f"{path} is no readable statistics file ({error})") from error


@checked(model=Model(), batches=Batches(), path=Location() | None, progress=Flag())
def collect_statistics(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    path: str | os.PathLike | None = None,
    progress: bool = True,
) -> Statistics:
    """Mean absolute value, mean and second moment of every neuron, in one pass (Mini-GPTs §3).

    Memory grows with the number of neurons, not of tokens. Padding is left out. The model is left
    as it was found.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model.
    batches : iterable of dict
        ``input_ids`` and, if there is padding, ``attention_mask``, both ``[batch, tokens]``. What
        `tokenize` returns also brings the domain's name and the tokenizer's merges.
    path : str or path, optional
        A file to keep them in: it is read instead if it holds the same model on the same tokens,
        and written otherwise; a damaged one is set aside, anything else refused. A full disk only
        warns.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Statistics

    Raises
    ------
    ValueError
        If there are no tokens, a token id is out of range, or an activation is not finite.
    """

    def is_current(known: Statistics) -> bool:
        if (known.model_hash, known.content_hash) != (fingerprint(model), tokens_hash(batches)):
            return False
        return len(getattr(batches, "merges", known.merges)) == len(known.merges)

    compute = partial(_collect, model, batches, progress)
    return cached(path, compute, Statistics.load, Statistics.save, is_current)


def _collect(model: PreTrainedModel, batches: Iterable[dict], progress: bool) -> Statistics:
    """Statistics of one pass over all batches."""
    collector = Collector(model)
    content = hashlib.sha256()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    token_counts = torch.zeros(vocabulary, dtype=torch.int64)
    with inference(model), collector.hooks():
        for batch in tqdm(batches, desc="statistics", unit="batch", disable=not progress):
            ids, mask = batch["input_ids"].long(), _mask(batch).bool()
            _update(content, batch)
            # a padded batch comes window by window: what padding computes may be NaN
            whole = (
                [ids]
                if mask.all()
                else [row[real][None] for row, real in zip(ids, mask, strict=True)]
            )
            for window in whole:
                if window.numel():
                    check_token_ids(model, window)  # the ids of padding may be anything
                    token_counts += torch.bincount(window.flatten().cpu(), minlength=vocabulary)
                    model(input_ids=window.to(model.device), use_cache=False, logits_to_keep=1)
    n_tokens = int(token_counts.sum())
    if n_tokens == 0:
        raise ValueError("no tokens to collect statistics from: batches is empty or all padding")
    sums = collector.tables(n_tokens)
    for (module, side), table in sums.items():
        if not np.isfinite(table).all():
            raise ValueError(
                f"{module} has NaN or infinite values at its {side}: check the weights"
            )
    anatomy = Anatomy(model)
    second = anatomy.family.consumes["ffn"]
    empty = np.zeros(0, dtype=np.int64)
    return Statistics(
        sums=sums,
        activations=[anatomy.name(layer, second) for layer in range(len(anatomy.layers))],
        layer_of=collector.layer_of,
        token_counts=token_counts.numpy(),
        merges=getattr(batches, "merges", empty.reshape(0, 3)),
        protected=getattr(batches, "protected", empty),
        n_tokens=n_tokens,
        model_hash=fingerprint(model),
        model_name=label(model),
        domain=getattr(batches, "source", ""),
        content_hash=content.hexdigest(),
    )


def _mask(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]) if mask is None else mask


def tokens_hash(batches: Iterable[dict[str, torch.Tensor]]) -> str:
    """SHA-256 of every window's length and tokens, without the padding ones."""
    content = hashlib.sha256()
    for batch in batches:
        _update(content, batch)
    return content.hexdigest()


def _update(content, batch: dict[str, torch.Tensor]) -> None:
    """Hash a batch window by window: the same text in other windows is another measurement."""
    for ids, mask in zip(batch["input_ids"].cpu().long(), _mask(batch).cpu(), strict=True):
        content.update(str(len(ids)).encode())
        content.update(ids[mask.bool()].contiguous().numpy())
