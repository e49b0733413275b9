"""Held-out texts on which several variants of a model are measured, each once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from ..calibration import patched_forward
from ..checks import safe_contextmanager
from ..domains import Part, excerpt, running_text, window_prefix
from ..evaluation import Divergence, Perplexity, divergence, perplexity, same_vocabulary
from ..models import dtype_name, fingerprint, model_size, reading_dtype
from ..store import ResultCache, cache_key, content_hash

#: Columns of a table row that only a `Divergence` fills.
NO_DIVERGENCE = {"kl": None, "agreement": None}


class HeldOut:
    """Excerpts of the same length, the same for all variants; finished results are kept.

    All results are of one precision: if a variant can be read only in float32 (`perplexity` warns
    of it), `results` reads the others again too, and `get` refuses to go on.

    Parameters
    ----------
    model, tokenizer
        The dense pair; the texts are shortened by its tokens, its predictions are the reference.
    texts : sequence of Part
        Held out.
    max_tokens, seq_len : int
        Tokens per text (None for all), and per window (no overlap).
    path : str or path, optional
        A ``.json`` file of finished results.
    precision : {"auto", "bfloat16", "float32"}
        In which the models are read, see `perplexity`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[Part],
        *,
        max_tokens: int | None,
        seq_len: int,
        path: str | os.PathLike | None,
        precision: str = "auto",
    ):
        self.dense, self.tokenizer, self.seq_len = model, tokenizer, seq_len
        self.cache = ResultCache(path)
        self.texts = [excerpt(text, tokenizer, max_tokens=max_tokens) for text in texts]
        self.precision, self.read_in = precision, dtype_name(reading_dtype(model, precision))
        ids = [running_text(text, tokenizer).ids for text in self.texts]
        what = [content_hash(text) for text in self.texts], window_prefix(tokenizer), ids
        self.facts = [fingerprint(model), cache_key(what), seq_len, self.read_in]
        self.dense_size = model_size(model).stored
        self._states: dict[tuple, torch.Tensor] = {}  # of the dense decoder
        self._given = False  # whether `get` has returned a result

    def get(self, key: object, compute: Callable[[], dict]) -> dict:
        """Result of one variant, computed if it is not known under its key (plain data).

        Raises
        ------
        ValueError
            If it can be read only in float32, and the variants before it were read in less.
        """
        before = self.read_in
        result = self._kept(key, compute)
        if self.read_in != before and self._given:
            raise ValueError(
                f"a variant can be read only in float32, those before it were read in {before}: "
                "set MINIGPT_LAB_PRECISION=float32 and call again"
            )
        self._given |= "losses" in result
        return result

    def results(
        self,
        variants: Sequence[tuple[object, Callable[[], dict]]],
        title: str,
        unit: str,
        progress: bool = True,
    ) -> list[dict]:
        """Results of variants (key and computation of each), all in one precision."""
        before = self.read_in
        bar = partial(tqdm, variants, desc=title, unit=unit, disable=not progress)
        found = [self._kept(key, compute) for key, compute in bar()]
        if self.read_in != before:
            warnings.warn(
                f"a variant can be read only in float32: those that were read in {before} are "
                "measured again, so that all are in one precision",
                stacklevel=3,
            )
            found = [self._kept(key, compute) for key, compute in bar()]
        return found

    def _kept(self, key: object, compute: Callable[[], dict]) -> dict:
        """A result, known or computed; from one that needs float32 on, all are read in it."""
        result = self.cache.get([self.facts, key], compute)
        losses = result.get("losses", ())
        if self.read_in != "float32" and any(loss["precision"] == "float32" for loss in losses):
            self.precision = self.read_in = self.facts[-1] = "float32"
            result = self.cache.get([self.facts, key], lambda: result)
        return result

    def measure(self, model: PreTrainedModel) -> dict:
        """A model's stored parameters, and how well it predicts every text, as plain data."""
        found = self._read(model, self.precision)
        losses = [losses_of(each) for each in found]
        if len({loss.precision for loss in losses}) > 1:  # a text that could be read in less
            found = self._read(model, "float32")
            losses = [losses_of(each) for each in found]
        return {
            "stored": model_size(model).stored,
            "rows": [{**NO_DIVERGENCE, **each.row()} for each in found],
            "losses": [asdict(each) | {"passages": _short(each.passages)} for each in losses],
        }

    def _read(self, model: PreTrainedModel, precision: str) -> list[Divergence | Perplexity]:
        """What `diverging` says of a model on every text."""
        protocol: dict[str, Any] = {"seq_len": self.seq_len, "max_characters": None}
        protocol |= {"progress": False, "precision": precision}
        with decoder_runs_once(self.dense, self._states):
            return [
                diverging(model, self.dense, self.tokenizer, text, **protocol)
                for text in self.texts
            ]

    def table_rows(self, result: dict, **facts) -> list[dict]:
        """Rows of a table, one per text: facts of the variant, its size, its numbers."""
        size = {"stored": result["stored"], "removed": 1 - result["stored"] / self.dense_size}
        return [{**facts, **size, **row} for row in self.rows(result)]

    def rows(self, result: dict) -> list[dict]:
        """A row of numbers per text, as those of `row_of`."""
        losses = self.perplexities(result)
        return [
            {**row, "passages": passages_text(loss)}
            for row, loss in zip(result["rows"], losses, strict=True)
        ]

    def perplexities(self, result: dict) -> list[Perplexity]:
        """Its perplexity on every text, for `lab.compare`."""
        return [
            Perplexity(**(loss | {"passages": np.array(loss["passages"])}))
            for loss in result["losses"]
        ]


def row_of(found: Divergence | Perplexity) -> dict:
    """A row of a table; without a divergence those columns are None."""
    return {**NO_DIVERGENCE, **found.row(), "passages": passages_text(losses_of(found))}


def losses_of(found: Divergence | Perplexity) -> Perplexity:
    """The model's perplexity."""
    return found.model if isinstance(found, Divergence) else found


def passages_text(loss: Perplexity) -> str:
    """Summed loss and tokens of each passage, ``"41.3021/12 …"``.

    With them a table is enough for paired comparisons.
    """
    return " ".join(f"{nats:.4f}/{tokens:.0f}" for nats, tokens, _ in loss.passages)


def _short(passages: np.ndarray) -> list[list[float]]:
    """Sums of passages as short numbers: a comparison keeps hundreds of them."""
    losses, *counts = passages.T.tolist()
    return [
        [round(loss, 4), *map(int, count)] for loss, *count in zip(losses, *counts, strict=True)
    ]


@safe_contextmanager
def decoder_runs_once(model: PreTrainedModel, states: dict[tuple, torch.Tensor]) -> Iterator[None]:
    """Within the block, the decoder runs once per window; `states` keeps its last hidden states.

    Only for a model whose weights do not change between the passes.
    """

    def forward(run: Callable, *args, **kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        key = model.dtype, ids.shape, ids.cpu().numpy().tobytes()
        if key not in states:
            states[key] = run(*args, **kwargs)[0]  # [window, token, feature]
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states[key])

    with patched_forward([model.base_model], forward):
        yield


def diverging(
    model: PreTrainedModel, dense: PreTrainedModel | None, tokenizer, text: Part, **protocol
) -> Divergence | Perplexity:
    """Divergence from a dense model; the perplexity alone without one of the same vocabulary."""
    if dense is not None and same_vocabulary(model, dense):
        return divergence(model, dense, tokenizer, text, **protocol)
    return perplexity(model, tokenizer, text, **protocol)
