"""Calibration tokens of a domain and of general text, each token with its weight."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from ..domains import unpadded

#: Tokens in a batch of joined windows (a window, if that is longer): one step of Adam.
STEP_TOKENS = 512
#: Share of general text by default: on SmolLM2 it costs little in the domain and saves most outside
#: (notebook 11).
GENERALITY = 0.25


class CalibrationWindows:
    """Calibration tokens, each with a weight: of a domain, and of general text if there is any.

    With N tokens in all, of them N_d of the domain and N_g general, a token's weight is
    ``(1 - μ) N / N_d`` or ``μ N / N_g``: second moments and losses are then sums of the two texts'
    means in the shares ``1 - μ`` and μ, whatever their lengths.

    Parameters
    ----------
    batches : iterable of dict
        Of the domain; padding is left out.
    general : iterable of dict, optional
        Of general text.
    generality : float
        μ; a text of weight 0 is not read.
    joined : bool
        Join windows of one length to batches of `STEP_TOKENS`, one for each step of Adam.
    """

    def __init__(
        self,
        batches: Iterable[dict[str, torch.Tensor]],
        general: Iterable[dict[str, torch.Tensor]] | None = None,
        generality: float = 0.0,
        joined: bool = False,
    ):
        shares = [(batches, 1.0)]
        if general is not None:
            _require_one_tokenizer(batches, general)
            shares = [(batches, 1 - generality), (general, generality)]
        texts = [([*unpadded(text)], share) for text, share in shares if share]
        if joined:
            texts = [([*_joined(windows)], share) for windows, share in texts]
        self._set(texts)

    def _set(self, texts: Sequence[tuple[list[torch.Tensor], float]]) -> None:
        """Windows and weights of texts with their shares."""
        self.texts = texts
        total = sum(ids.numel() for windows, _ in texts for ids in windows)
        self.windows: list[torch.Tensor] = []  # each [row, token]
        self.weights: list[float] = []  # of every token of a window
        for windows, share in texts:
            self.windows += windows
            weight = share * total / sum(ids.numel() for ids in windows)
            self.weights += [weight] * len(windows)

    def batches(self) -> list[dict[str, torch.Tensor]]:
        """The windows, as other functions expect them."""
        return [{"input_ids": ids} for ids in self.windows]

    def split(self, fraction: float) -> tuple[CalibrationWindows, CalibrationWindows]:
        """Held-out windows, evenly spaced in every text and joined, and the others, one by one.

        If all windows of a text are held out, its others are all windows again.
        """
        held_out, others = [], []
        for windows, share in self.texts:
            rows = [row for ids in windows for row in ids]
            count = max(round(len(rows) * fraction), 1)
            chosen = np.linspace(0, len(rows) - 1, count).round().astype(int).tolist()
            picked = sorted((rows[i] for i in chosen), key=len)
            held_out.append(([*_joined(row[None] for row in picked)], share))
            left = [rows[i][None] for i in sorted({*range(len(rows))} - {*chosen})]
            others.append((left or windows, share))
        parts = (copy.copy(self), copy.copy(self))
        for part, texts in zip(parts, (held_out, others), strict=True):
            part._set(texts)
        return parts


def _require_one_tokenizer(batches: object, general: object) -> None:
    """Refuse two texts of which it is known that different tokenizers made them."""
    first, second = (getattr(each, "tokenizer", None) for each in (batches, general))
    if None in (first, second) or first is second or first.get_vocab() == second.get_vocab():
        return
    raise ValueError(
        f"general was tokenized with {len(second):,} tokens, batches with other {len(first):,}; "
        "tokenize both with the model's tokenizer"
    )


def _joined(windows: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Windows of one length that follow each other, in batches of up to `STEP_TOKENS` tokens."""
    rows = (row for ids in windows for row in ids)
    for length, group in itertools.groupby(rows, len):
        yield from torch.stack([*group]).split(max(1, STEP_TOKENS // length))
