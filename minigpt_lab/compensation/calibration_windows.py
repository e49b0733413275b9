"""Calibration tokens of a domain and of general text, each token with its weight."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

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
        self.generality = 0.0 if general is None else generality
        _require_one_tokenizer(batches, general)
        shares = (1 - self.generality, self.generality)
        self.texts: list[list[torch.Tensor]] = [  # windows of the domain, and of general text
            [*(_joined(unpadded(text)) if joined else unpadded(text))] if share else []
            for text, share in zip((batches, general), shares, strict=True)
        ]
        self.windows = [ids for windows in self.texts for ids in windows]  # each [row, token]
        self.weights: list[float] = []  # of every token of a window
        for windows, share in zip(self.texts, shares, strict=True):
            weight = share * _n_tokens(self.windows) / max(_n_tokens(windows), 1)
            self.weights += [weight] * len(windows)

    def batches(self) -> list[dict[str, torch.Tensor]]:
        """The windows, as other functions expect them."""
        return [{"input_ids": ids} for ids in self.windows]

    def split(self, fraction: float) -> tuple[CalibrationWindows, CalibrationWindows]:
        """Held-out windows, evenly spaced in every text and joined, and the others, one by one.

        If all windows of a text are held out, its others are all windows again.
        """
        held_out, others = [], []  # batches of every text
        for windows in self.texts:
            rows = [row[None] for ids in windows for row in ids]
            count = min(max(round(len(rows) * fraction), 1), len(rows))
            chosen = np.linspace(0, len(rows) - 1, count).round().astype(int).tolist()
            left = [row for i, row in enumerate(rows) if i not in chosen]
            picked = sorted((rows[i] for i in chosen), key=torch.numel)
            held_out.append([{"input_ids": ids} for ids in picked])
            others.append([{"input_ids": ids} for ids in left or windows])
        return (
            CalibrationWindows(held_out[0], held_out[1], self.generality, joined=True),
            CalibrationWindows(others[0], others[1], self.generality),
        )


def _require_one_tokenizer(batches: object, general: object) -> None:
    """Refuse two texts of which it is known that different tokenizers made them."""
    first, second = (getattr(each, "tokenizer", None) for each in (batches, general))
    if None in (first, second) or first is second or first.get_vocab() == second.get_vocab():
        return
    raise ValueError(
        f"general was tokenized with {len(second):,} tokens, batches with other {len(first):,}; "
        "tokenize both with the model's tokenizer"
    )


def _n_tokens(windows: Iterable[torch.Tensor]) -> int:
    return sum(ids.numel() for ids in windows)


def _joined(windows: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Windows of one length that follow each other, in batches of up to `STEP_TOKENS` tokens."""
    rows = (row for ids in windows for row in ids)
    for length, group in itertools.groupby(rows, len):
        yield from torch.stack([*group]).split(max(1, STEP_TOKENS // length))
