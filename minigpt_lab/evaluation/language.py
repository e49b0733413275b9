"""Perplexity of a model on held-out text, with its protocol, and greedy generation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import token_losses
from ..checks import (
    Flag,
    Integer,
    InvalidArgument,
    Model,
    Text,
    Texts,
    Tokenizer,
    checked,
    safe_contextmanager,
)
from ..domains import Part, RunningText, excerpt, running_text, token_ids, window_prefix
from ..models import check_token_ids, inference, tokenizer_for


@dataclass(frozen=True, repr=False)
class Perplexity:
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
    text : str
        Name of the text.
    passages : numpy.ndarray
        Per passage: sum of negative log-likelihoods (nats), tokens scored, their characters
        ``[passage, 3]``; for paired comparisons on the same text. A blank line counts with the
        passage that it follows.
    chunked : bool
        Measured as papers' code does (see `perplexity`).
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
        """Size of the text and of the windows, to be written beside the number."""
        note = ", whole windows only" if self.chunked else ""
        return f"{self.tokens:,} tokens, windows of {self.seq_len}, stride {self.stride}{note}"

    def row(self) -> dict:
        """The numbers as one row of a table."""
        names = (
            "low high tokens bits_per_character bits_low bits_high characters seq_len stride text"
        )
        return {"perplexity": self.value, **{name: getattr(self, name) for name in names.split()}}

    def to_frame(self) -> pd.DataFrame:
        """The numbers as a table of one row."""
        return pd.DataFrame([self.row()])

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        return (
            f"perplexity {self.value:.2f} [{self.low:.2f}, {self.high:.2f}] on {self.text} "
            f"({self.protocol}), {self.bits_per_character:.3f} bits per character"
        )

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False)


@checked(
    model=Model(),
    tokenizer=Tokenizer(),
    text=Texts(),
    seq_len=Integer(2),
    stride=Integer(1) | None,
    max_characters=Integer(2) | None,
    max_tokens=Integer(2) | None,
    chunked=Flag(),
    batch_size=Integer(1),
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
    batch_size: int = 4,
    n_bootstrap: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of a model on text it was not fitted to.

    Passages are joined by blank lines, encoded once and cut into windows; a token is scored once,
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
    batch_size : int
        Windows per forward pass.
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
    stride = seq_len if stride is None else stride
    if stride > seq_len or (chunked and stride < seq_len):
        raise InvalidArgument(
            f"stride={stride}, seq_len={seq_len}; expected a stride of at most seq_len, and of no "
            "other length with chunked=True; leave stride out"
        )
    name = str(text) if isinstance(text, Part) else "text"
    # 1. Text to tokens, each window with what the tokenizer puts before a text.
    budget = {"max_tokens": None if chunked else max_tokens, "max_characters": max_characters}
    passages = excerpt(text, tokenizer, **budget)
    tokenizer = tokenizer_for(model, tokenizer)
    prefix = window_prefix(tokenizer)
    if chunked:
        limit = None if max_tokens is None else max(0, max_tokens - len(prefix))
        running = _prefixed(running_text(passages, tokenizer, limit), prefix)
        prefix = []
    else:
        running = running_text(passages, tokenizer)
    # 2. Windows; the shorter last one is left out, or scored by itself.
    length = seq_len - len(prefix)
    needed = seq_len if chunked else 2 - min(len(prefix), 1)
    if len(running.ids) < needed or length < 1:
        raise ValueError(
            f"{name} has {len(running.ids)} token(s); at least {needed} are needed, in windows of "
            f"more than {len(prefix)}: give more text or another seq_len"
        )
    windows = list(_windows(len(running.ids), length, min(stride, length)))
    full = [window for window in windows if window.stop - window.start == length]
    groups = [full[i : i + batch_size] for i in range(0, len(full), batch_size)]
    if not chunked:
        groups += [[window] for window in windows[len(full) :]]
    # 3. Negative log-likelihood of every token, in its first window.
    with inference(model):
        bar = tqdm(groups, desc="perplexity", unit="batch", disable=not progress)
        losses, scored = _window_losses(model, running.ids, prefix, bar)
    if np.isnan(losses).any():
        raise ValueError(f"the model gives NaN on {name}: check its weights and dtype")
    # 4. Sums per passage, and an interval by resampling passages.
    table = _passage_sums(running, losses, scored)
    value, bits = _ratios(table.sum(0))
    bits = float(bits) if table[:, 2].any() else math.nan
    (low, bits_low), (high, bits_high) = _interval(table, n_bootstrap, seed).tolist()
    bounds = {"low": low, "high": high, "bits_low": bits_low, "bits_high": bits_high}
    protocol = {"seq_len": seq_len, "stride": stride, "text": name, "chunked": chunked}
    return Perplexity(float(value), bits, passages=table, **bounds, **protocol)


def _prefixed(running: RunningText, prefix: list[int]) -> RunningText:
    """Running text after a prefix of no characters, which belongs to the first passage."""
    before = (len(prefix), 0)
    return replace(
        running,
        ids=prefix + running.ids,
        passage=np.pad(running.passage, before),
        characters=np.pad(running.characters, before),
    )


@dataclass(frozen=True)
class _Window:
    """Tokens ``start`` to ``stop`` of a text; those from ``fresh`` on are in no earlier window."""

    start: int
    stop: int
    fresh: int


def _windows(total: int, length: int, stride: int) -> Iterator[_Window]:
    """Windows that advance by `stride` until they reach the end."""
    fresh = 0
    for start in range(0, total, stride):
        stop = min(start + length, total)
        yield _Window(start, stop, fresh)
        if stop == total:
            return
        fresh = stop


def _window_losses(
    model: PreTrainedModel, ids: list[int], prefix: list[int], groups: Iterable[list[_Window]]
) -> tuple[np.ndarray, np.ndarray]:
    """Loss of every token in its first window, and whether it has one, ``[token]`` each.

    A token has a loss if another stands before it in that window.
    """
    losses, scored = np.zeros(len(ids)), np.zeros(len(ids), dtype=bool)
    for group in groups:
        rows = torch.tensor([prefix + ids[w.start : w.stop] for w in group])  # [batch, token]
        check_token_ids(model, rows)
        rows = rows.to(model.device)
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        nll = token_losses(logits, rows[:, 1:])[:, max(len(prefix) - 1, 0) :]
        for window, row in zip(group, nll.cpu().double().numpy(), strict=True):
            first = window.start + (not prefix)  # the first token that has a loss
            new = slice(max(first, window.fresh), window.stop)
            losses[new], scored[new] = row[new.start - first :], True
    return losses, scored


def _passage_sums(running: RunningText, losses: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """Sums of loss, tokens scored and their characters, ``[passage, 3]``."""
    passage, count = running.passage[scored], running.passage[-1] + 1
    columns = (losses, np.ones(len(losses)), running.characters)
    sums = [np.bincount(passage, weights=column[scored], minlength=count) for column in columns]
    return np.stack(sums, axis=1)


def _ratios(sums: np.ndarray) -> np.ndarray:
    """Perplexity and bits per character of sums of loss, tokens and characters ``[3, …]``."""
    loss, tokens, characters = sums
    tokens, characters = np.maximum(tokens, 1), np.maximum(characters, 1e-9)
    return np.stack([np.exp(loss / tokens), loss / math.log(2) / characters])


def _interval(table: np.ndarray, n_bootstrap: int, seed: int) -> np.ndarray:
    """95 % intervals of perplexity and bits per character, ``[low and high, 2]``."""
    if len(table) == 1:  # one passage says nothing about others
        return np.full((2, 2), np.nan)
    samples = np.random.default_rng(seed).integers(len(table), size=(n_bootstrap, len(table)))
    return np.quantile(_ratios(table[samples].sum(1).T), [0.025, 0.975], axis=1)


@checked(model=Model(), tokenizer=Tokenizer(), prompt=Text(), max_new_tokens=Integer(1))
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 40,
) -> str:
    """Greedy continuation of a prompt, without the prompt.

    Always the likeliest token, until the model's end-of-text token; the model's own generation
    settings (beams, penalties, …) are not used.

    Parameters
    ----------
    model, tokenizer
        A causal language model, and its tokenizer (that of the dense model will do).
    prompt : str
        Beginning of the text.
    max_new_tokens : int
        Length of the continuation, unless the model ends it.

    Raises
    ------
    ValueError
        If the prompt is empty, or longer than the model can continue.
    """
    tokenizer = tokenizer_for(model, tokenizer)
    text = token_ids(prompt, tokenizer)
    if not text:
        raise InvalidArgument(
            f"prompt is {prompt!r:.60}, which has no token; expected at least one that the "
            "tokenizer knows"
        )
    ids = torch.tensor([window_prefix(tokenizer) + text])
    length = ids.shape[1] + max_new_tokens
    longest = getattr(model.config, "max_position_embeddings", None) or length
    if length > longest:
        raise InvalidArgument(
            f"prompt and continuation would be {length} tokens, this model takes {longest}; "
            "shorten one of them"
        )
    check_token_ids(model, ids)
    ids = ids.to(model.device)
    with inference(model), _greedy(model, max_new_tokens):
        settings = {"generation_config": model.generation_config}
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    # A continuation alone may be decoded otherwise (without its first space): decode both.
    before, whole = (
        tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (ids[0], output[0])
    )
    if whole.startswith(before):
        return whole.removeprefix(before)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@safe_contextmanager
def _greedy(model: PreTrainedModel, max_new_tokens: int) -> Iterator[None]:
    """Within: of the model's own generation settings only its end of text counts."""
    own = model.generation_config  # None where someone removed it
    end = getattr(own, "eos_token_id", None)
    end = model.config.eos_token_id if end is None else end
    ends = end if isinstance(end, list) else [end]
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=next(iter(ends), None) or 0,
    )
    try:
        yield
    finally:
        model.generation_config = own
