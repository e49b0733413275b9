"""Mean activations of every neuron, in one streaming pass over a domain.

Mini-GPTs (arXiv 2312.12682) scores neuron *j* by its mean absolute activation over *N* calibration
tokens, ``m_j = (1/N) Σ_t |a_tj|``, for inputs and outputs of linear layers and outputs of the FFN's
activation. The same pass keeps the mean and the second moment, which the other criteria use.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from ..checks import Batches, Flag, Integer, Location, Model, check_fields, checked
from ..domains import read_windows
from ..models import (
    PRECISION,
    Anatomy,
    dtype_name,
    fingerprint,
    inference,
    label,
    reading_dtype,
    require_weights,
    weight_axis,
)
from ..store import cached, read_tensors, write_tensors
from .examples import ExampleFinder, Examples
from .forward import run_decoder
from .moments import SUMS, FeatureSums, Key

_ARRAYS = ("token_counts", "merges", "protected")  # fields that a file has among its tensors
_EXAMPLES = tuple(each.name for each in fields(Examples))  # of which it may have none


@dataclass(repr=False)
class Statistics:
    """Sums over the tokens of a domain, for every neuron of a model.

    Parameters
    ----------
    sums : dict
        ``(module, side)`` to sums over tokens ``[moment, neuron]`` in float64: of ``|x|``, ``x``
        and ``x²``, and for outputs of layers with a bias of ``|y - b|``.
    activations : list of str
        Per layer, the module whose input is the output of the FFN's activation.
    layer_of : dict
        Module name to layer index.
    token_counts : numpy.ndarray
        How often each vocabulary token occurred ``[vocabulary]``.
    merges : numpy.ndarray
        The tokenizer's merges as ids ``[merge, (left, right, result)]``; empty if not known.
    protected : numpy.ndarray
        Tokens that are never removed (bytes, special tokens); empty if not known.
    n_tokens : int
        Tokens counted, padding excluded.
    model_hash, model_name, domain, content_hash : str
        The model's `fingerprint` and caption; the text's name and SHA-256 of its windows' tokens.
    precision, asked_precision : str
        Type that the model was read in, and the one that was asked for if that gave NaN.
    examples : Examples, optional
        The windows that excite each FFN neuron most.
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
    precision: str = "float32"
    examples: Examples | None = None
    asked_precision: str = ""

    def __post_init__(self):
        check_fields(self, n_tokens=Integer(1))

    def mean(self, module: str, side: str, moment: str) -> np.ndarray:
        """Mean over tokens of one moment of every neuron ``[neuron]``.

        ``side="activation"`` is the output of the FFN's activation: the input of its second
        projection. ``"unbiased"`` falls back to ``"absolute"`` where a layer has no bias.
        """
        table = self.sums[module, "input" if side == "activation" else side]
        row = SUMS.index(moment)
        return table[row if row < len(table) else 0] / self.n_tokens

    def variance(self, module: str, side: str) -> np.ndarray:
        """Variance over tokens, divided by their number, of every neuron ``[neuron]``."""
        mean, square = (self.mean(module, side, moment) for moment in ("sum", "square"))
        return np.maximum(square - mean**2, 0)

    def magnitude(self, module: str, side: str) -> np.ndarray:
        """Mean |a| of every neuron, of outputs the smaller of it and mean |y - b| ``[neuron]``.

        The thresholds ε of Mini-GPTs are compared with it: an output that only its bias keeps away
        from zero counts as unused, as in the reference code.
        """
        absolute = self.mean(module, side, "absolute")
        if side != "output":
            return absolute
        return np.minimum(absolute, self.mean(module, side, "unbiased"))

    def biased(self, module: str) -> bool:
        """Whether the linear layer has a bias."""
        return len(self.sums[module, "output"]) == len(SUMS)

    def sides(self) -> Iterator[Key]:
        """Every ``(module, side)`` that was measured, layer by layer."""
        yield from self.sums
        for module in self.activations:
            yield module, "activation"

    def __repr__(self) -> str:
        text = f"{self.n_tokens:,} tokens of {self.domain}"
        return f"Statistics of {text} under {self.model_name}, {self.precision}"

    def _repr_html_(self) -> str:
        summary = self.to_frame().groupby("side", observed=True)["mean_abs"].describe()
        return f"<p>{self!r}: mean |a| of neurons</p>{summary.to_html()}"

    def to_frame(self) -> pd.DataFrame:
        """Tidy table, one row per neuron.

        Returns
        -------
        pandas.DataFrame
            Columns ``layer, module, side`` (input, output or activation), ``neuron, mean_abs,
            mean_abs_unbiased`` (NaN without a bias), ``mean, variance, second_moment, tokens``.
        """
        table = pd.concat([self._rows(*key) for key in self.sides()], ignore_index=True)
        return table.astype({"module": "category", "side": "category"})

    def _rows(self, module: str, side: str) -> pd.DataFrame:
        """Part of the table that is of one side of one module."""
        layer, mean_abs = self.layer_of[module], self.mean(module, side, "absolute")
        unbiased = side == "output" and self.biased(module)
        columns = {
            "layer": layer,
            "module": module.split(f".{layer}.", 1)[1],
            "side": side,
            "neuron": np.arange(len(mean_abs)),
            "mean_abs": mean_abs,
            "mean_abs_unbiased": self.mean(module, side, "unbiased") if unbiased else np.nan,
            "mean": self.mean(module, side, "sum"),
            "variance": self.variance(module, side),
            "second_moment": self.mean(module, side, "square"),
            "tokens": self.n_tokens,
        }
        return pd.DataFrame(columns)

    def __add__(self, other: object) -> Statistics:
        """Statistics of both texts together, of one model; with examples where both have some.

        Raises
        ------
        ValueError
            If the two are of different models or precisions.
        """
        if not isinstance(other, Statistics):
            return NotImplemented
        if self.model_hash != other.model_hash:
            names = [f"{each.model_name} ({each.model_hash[:12]})" for each in (self, other)]
            raise ValueError("statistics of two models cannot be added: {} and {}".format(*names))
        if self.precision != other.precision:
            raise ValueError(
                f"statistics read in {self.precision} and {other.precision} cannot be added; "
                "collect both in one precision"
            )
        both = hashlib.sha256((self.content_hash + other.content_hash).encode()).hexdigest()
        return replace(
            self,
            sums={key: table + other.sums[key] for key, table in self.sums.items()},
            token_counts=self.token_counts + other.token_counts,
            n_tokens=self.n_tokens + other.n_tokens,
            domain=" + ".join(dict.fromkeys((self.domain, other.domain))),
            content_hash=both,
            examples=self.examples + other.examples if self.examples and other.examples else None,
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
        header = {"order": [*tensors]}
        for each in fields(self):
            if each.name in _ARRAYS:
                tensors[f"|{each.name}"] = getattr(self, each.name)
            elif each.name not in ("sums", "examples"):
                header[each.name] = getattr(self, each.name)
        if self.examples is not None:
            tensors |= {f"|examples|{name}": getattr(self.examples, name) for name in _EXAMPLES}
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

        def build(header: dict, tensors: dict[str, torch.Tensor]) -> Statistics:
            order = [tuple(key.rsplit("|", 1)) for key in header.pop("order")]
            sums = {key: tensors["|".join(key)].numpy() for key in order}
            arrays = {name: tensors[f"|{name}"].numpy() for name in _ARRAYS}
            if f"|examples|{_EXAMPLES[0]}" in tensors:
                parts = {name: tensors[f"|examples|{name}"].numpy() for name in _EXAMPLES}
                arrays["examples"] = Examples(**parts)
            return cls(sums=sums, **header, **arrays)

        return read_tensors(Path(path), "statistics", build)


@checked(
    model=Model(),
    batches=Batches(),
    path=Location() | None,
    precision=PRECISION,
    examples=Integer(0),
    progress=Flag(),
)
def collect_statistics(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    path: str | os.PathLike | None = None,
    precision: str = "auto",
    examples: int = 0,
    progress: bool = True,
) -> Statistics:
    """Mean absolute value, mean and second moment of every neuron, in one pass (Mini-GPTs §3).

    Memory grows with neurons, not with tokens; padding is not counted; the model is left unchanged.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model.
    batches : iterable of dict
        ``input_ids`` and, if there is padding, ``attention_mask``, both ``[batch, tokens]``. The
        batches of `tokenize` also bring the domain's name and the tokenizer's merges.
    path : str or path, optional
        File to keep the statistics in: read instead of the pass if it is of this model, these
        tokens and this precision, written otherwise. A damaged file is set aside, another kind of
        file refused; a full disk only warns.
    precision : {"auto", "bfloat16", "float32"}
        Type that the model is read in; sums are in float32 or more. ``"auto"``: bfloat16 for
        float32 weights where the device is fast at it, else as stored; if NaN, again in float32.
    examples : int
        Windows to remember of every FFN neuron, those in which its |activation| was largest, in the
        same pass; 0 remembers none. Takes 12 bytes per neuron and example.
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
    content, dtype = tokens_hash(batches), dtype_name(reading_dtype(model, precision))

    def is_current(known: Statistics) -> bool:
        merges = getattr(batches, "merges", known.merges)
        same_text = known.content_hash == content and len(known.merges) == len(merges)
        same_precision = dtype in (known.precision, known.asked_precision)
        same_model = same_precision and known.model_hash == fingerprint(model)
        remembered = known.examples.count if known.examples else 0
        return same_text and same_model and remembered >= examples

    compute = partial(_collect, model, batches, content, precision, examples, progress)
    return cached(path, compute, Statistics.load, Statistics.save, is_current)


def _collect(
    model: PreTrainedModel,
    batches: Iterable[dict],
    content: str,
    precision: str,
    examples: int,
    progress: bool,
) -> Statistics:
    """Statistics of one pass over all batches."""
    anatomy = Anatomy(model)
    reader = anatomy.family.consumes["ffn"]
    readers = {
        anatomy.name(layer, reader): anatomy.module(layer, reader)
        for layer in range(len(anatomy.layers))
    }
    finder = ExampleFinder(readers if examples else {}, examples)
    sums, token_counts = _one_pass(model, batches, precision, finder, progress)
    dtype = reading_dtype(model, precision)
    if bad := [key for key, table in sums.items() if not np.isfinite(table).all()]:
        found = "{} has NaN or infinite values at its {}".format(*bad[0])
        if dtype in (torch.float32, torch.float64):
            raise ValueError(f"{found}: check the weights")
        warnings.warn(f"{found} in {dtype_name(dtype)}; all is read again in float32", stacklevel=2)
        exact = _collect(model, batches, content, "float32", examples, progress)
        return replace(exact, asked_precision=dtype_name(dtype))
    empty = np.zeros(0, dtype=np.int64)
    return Statistics(
        sums=sums,
        activations=list(readers),
        layer_of={name: layer for layer, name, _ in anatomy.linears()},
        token_counts=token_counts,
        merges=getattr(batches, "merges", empty.reshape(0, 3)),
        protected=getattr(batches, "protected", empty),
        n_tokens=int(token_counts.sum()),
        model_hash=fingerprint(model),
        model_name=label(model),
        domain=getattr(batches, "source", ""),
        content_hash=content,
        precision=dtype_name(dtype),
        examples=finder.examples(),
    )


def _one_pass(
    model: PreTrainedModel,
    batches: Iterable[dict],
    precision: str,
    finder: ExampleFinder,
    progress: bool,
) -> tuple[dict[Key, np.ndarray], np.ndarray]:
    """Sums over all tokens, and how often each token of the vocabulary occurs."""
    feature_sums = FeatureSums({name: module for _, name, module in Anatomy(model).linears()})
    vocabulary = model.get_input_embeddings().weight.shape[0]
    token_counts = torch.zeros(vocabulary, dtype=torch.int64)
    with inference(model, precision), feature_sums.watching(), finder.watching():
        for ids in read_windows(batches, "statistics", progress):
            finder.begin(ids)
            run_decoder(model, ids)
            token_counts += torch.bincount(ids.flatten().cpu(), minlength=vocabulary)
    return feature_sums.tables(), token_counts.numpy()


def tokens_hash(batches: Iterable[dict[str, torch.Tensor]]) -> str:
    """SHA-256 of every window's length and tokens, without the padding ones.

    Window by window: the same text in other windows is another measurement.
    """
    content = hashlib.sha256()
    for batch in batches:
        ids = batch["input_ids"].cpu().long()
        mask = batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask.cpu()
        for window, real in zip(ids, mask, strict=True):
            content.update(str(len(window)).encode())
            content.update(window[real.bool()].contiguous().numpy())
    return content.hexdigest()
