"""Perplexity of a model on held-out text, with its protocol."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import token_losses
from ..checks import Flag, Integer, Model, Texts, Tokenizer, checked
from ..domains import Part
from ..models import PRECISION
from .results import OneRow
from .windows import WindowedText, resampled, windowed


@dataclass(frozen=True, repr=False)
class Perplexity(OneRow):
    """A perplexity with everything needed to compare it.

    Parameters
    ----------
    value : float
        ``exp`` of the mean negative log-likelihood per token.
    bits_per_character : float
        ``log2(value) * tokens / characters``; comparable between tokenizers, which `value` is not.
    low, high, bits_low, bits_high : float
        Their 95 % intervals: percentile bootstrap over passages; NaN for a single passage.
    seq_len, stride : int
        Window length, and tokens by which windows advance.
    text, content : str
        Name of the text, and SHA-256 of its passages.
    passages : numpy.ndarray
        Per passage: sum of negative log-likelihoods (nats), tokens scored, their characters
        ``[passage, 3]``; for paired comparisons on the same text. A blank line counts with the
        passage that it follows.
    chunked : bool
        Measured as papers' code does (see `perplexity`).
    precision : str
        Type that the model was read in.
    """

    value: float
    bits_per_character: float
    low: float
    high: float
    bits_low: float
    bits_high: float
    seq_len: int
    stride: int
    text: str
    passages: np.ndarray = field(compare=False)
    chunked: bool = False
    precision: str = "float32"
    content: str = ""

    @property
    def tokens(self) -> int:
        """Tokens scored."""
        return int(self.passages[:, 1].sum())

    @property
    def characters(self) -> int:
        """Characters of the tokens scored, blank lines between passages included."""
        return int(self.passages[:, 2].sum())

    @property
    def protocol(self) -> str:
        """Size of the text and of the windows, and precision, to be written beside the number."""
        note = ", whole windows only" if self.chunked else ""
        windows = f"windows of {self.seq_len}, stride {self.stride}{note}"
        return f"{self.tokens:,} tokens, {windows}, {self.precision}"

    def row(self) -> dict:
        """The numbers as one row of a table."""
        names = (
            "low high tokens bits_per_character bits_low bits_high characters seq_len stride text "
            "precision"
        )
        return {"perplexity": self.value, **{name: getattr(self, name) for name in names.split()}}

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        return (
            f"perplexity {self.value:.2f} [{self.low:.2f}, {self.high:.2f}] on {self.text} "
            f"({self.protocol}), {self.bits_per_character:.3f} bits per character"
        )


@checked(
    model=Model(),
    tokenizer=Tokenizer(),
    text=Texts(),
    seq_len=Integer(2),
    stride=Integer(1) | None,
    max_characters=Integer(2) | None,
    max_tokens=Integer(2) | None,
    chunked=Flag(),
    batch_size=Integer(1) | None,
    precision=PRECISION,
    n_bootstrap=Integer(1),
    seed=Integer(0),
    progress=Flag(),
)
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Part | Sequence[str] | str,
    *,
    seq_len: int = 256,
    stride: int | None = None,
    max_characters: int | None = 65_536,
    max_tokens: int | None = None,
    chunked: bool = False,
    batch_size: int | None = None,
    precision: str = "auto",
    n_bootstrap: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of a model on text it was not fitted to.

    Passages are joined by blank lines, encoded once and split into windows; a token is scored once,
    in the first window that reaches it, given the tokens before it in that window. The first token
    of the text (and, with non-overlapping windows, of each window) has no context and is not
    scored, unless the tokenizer begins every text with a token of its own: then each window begins
    with that token, and all of the text is scored.

    Parameters
    ----------
    model, tokenizer
        A pair; a trimmed model also takes its original tokenizer, which is trimmed alike.
    text : Part, sequence of str, or str
        E.g. ``domain.test``.
    seq_len : int
        Tokens per window.
    stride : int, optional
        Tokens by which windows advance; by default `seq_len` (no overlap).
    max_characters : int or None
        Use the first whole passages with at most so many characters (see `excerpt`): the same text
        for every tokenizer. None uses all.
    max_tokens : int, optional
        The same in tokens of the tokenizer given.
    chunked : bool
        As the code of GPTQ, LLM-Pruner and others does (see `PERPLEXITY_PRESETS`): what the
        tokenizer begins texts with stands once, before the whole text; windows do not overlap, the
        first token of each is not scored, and the shorter last one is left out. `max_tokens` then
        counts the model's own tokens, to the token.
    batch_size : int, optional
        Windows per forward pass; by default as many as fit beside their logits.
    precision : {"auto", "bfloat16", "float32"}
        Type that the model is read in. ``"auto"``: bfloat16 for float32 weights where the device is
        fast at it, else as stored. NaN in bfloat16 is warned of and measured again in float32.
    n_bootstrap, seed : int
        Resamples of the interval, and their seed.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Perplexity

    Raises
    ------
    ValueError
        If the text is too short to score, a number is out of range, tokenizer and model do not
        belong together, or the model answers with NaN.
    """
    texts = windowed(
        model,
        tokenizer,
        text,
        seq_len=seq_len,
        stride=stride,
        max_characters=max_characters,
        max_tokens=max_tokens,
        chunked=chunked,
        batch_size=batch_size,
    )

    table, dtype = texts.passage_sums([model], _losses, precision, "perplexity", progress)
    protocol = {"seq_len": seq_len, "stride": stride or seq_len, "chunked": chunked}
    return of_passages(table, texts, n_bootstrap, seed, precision=dtype, **protocol)


def _losses(logits: list[torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every token, ``[batch, token, 1]``."""
    return token_losses(logits[0], targets)[..., None]


def of_passages(
    table: np.ndarray, texts: WindowedText, n_bootstrap: int, seed: int, **protocol
) -> Perplexity:
    """Perplexity of sums of losses, tokens and characters ``[passage, 3]``, with its intervals."""
    value, bits = _ratios(table.sum(0))
    (low, bits_low), (high, bits_high) = resampled(table, _ratios, n_bootstrap, seed).tolist()
    return Perplexity(
        float(value),
        float(bits) if table[:, 2].any() else math.nan,
        passages=table,
        **{"low": low, "high": high, "bits_low": bits_low, "bits_high": bits_high},
        text=texts.name,
        content=texts.content,
        **protocol,
    )


def _ratios(sums: np.ndarray) -> np.ndarray:
    """Perplexity and bits per character of sums of loss, tokens and characters ``[3, …]``."""
    loss, tokens, characters = sums
    tokens, characters = np.maximum(tokens, 1), np.maximum(characters, 1e-9)
    return np.stack([np.exp(loss / tokens), loss / math.log(2) / characters])
