"""Held-out texts on which several variants of a model are measured, each once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..domains import Part, excerpt
from ..evaluation import Perplexity, perplexity
from ..models import dtype_name, fingerprint, model_size, reading_dtype
from ..store import ResultCache, content_hash


class HeldOut:
    """Excerpts of the same length, the same for all variants; finished results are kept.

    Parameters
    ----------
    model, tokenizer
        The dense pair; its tokens cut the texts.
    texts : sequence of Part
        Held out.
    max_tokens, seq_len : int
        Tokens per text, and per window (no overlap).
    path : str or path, optional
        A ``.jsonl`` file of finished results.
    row : callable
        From a `Perplexity` to what is kept of it, as plain data.
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
        row: Callable[[Perplexity], dict] = Perplexity.row,
    ):
        self.tokenizer, self.seq_len, self.row = tokenizer, seq_len, row
        self.cache = ResultCache(path)
        self.texts = [excerpt(text, tokenizer, max_tokens=max_tokens) for text in texts]
        precision = dtype_name(reading_dtype(model))
        texts_hash = [content_hash(text) for text in self.texts]
        self.facts = [fingerprint(model), texts_hash, seq_len, precision]
        self.dense_size = model_size(model).stored

    def get(self, key: object, compute: Callable[[], dict]) -> dict:
        """Result of one variant, computed if it is not known under its key (plain data)."""
        return self.cache.get([self.facts, key], compute)

    def measure(self, model: PreTrainedModel) -> dict:
        """A model's stored parameters, and the row of its perplexity on every text."""
        protocol = {"seq_len": self.seq_len, "max_characters": None, "progress": False}
        found = [perplexity(model, self.tokenizer, text, **protocol) for text in self.texts]
        return {"stored": model_size(model).stored, "rows": [*map(self.row, found)]}

    def table_rows(self, result: dict, **facts) -> list[dict]:
        """Rows of a table, one per text: facts of the variant, its size, its perplexities."""
        size = {"stored": result["stored"], "removed": 1 - result["stored"] / self.dense_size}
        return [{**facts, **size, **row} for row in result["rows"]]
