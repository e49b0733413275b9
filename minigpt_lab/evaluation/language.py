"""What a model can do on held-out text: perplexity with its protocol, and generation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..domains import Part, encoded, excerpt, window_prefix
from ..runtime import check_token_ids, inference
from ..vocabulary import tokenizer_for


@dataclass(frozen=True)
class Perplexity:
    """A perplexity with everything needed to compare it.

    Parameters
    ----------
    value : float
        ``exp`` of the mean negative log-likelihood per token.
    low, high : float
        95 % interval: percentile bootstrap over passages; NaN for a single passage.
    tokens : int
        Tokens scored.
    bits_per_character : float
        Comparable between tokenizers, which `value` is not.
    bits_low, bits_high : float
        Its 95 % interval.
    characters : int
        Characters of the text.
    seq_len, stride : int
        Window length, and tokens by which windows advance.
    text : str
        Which text.
    passages : numpy.ndarray
        Per passage: sum of negative log-likelihoods (nats), tokens scored, characters
        ``[passage, 3]``; for paired comparisons on the same text.
    """

    value: float
    low: float
    high: float
    tokens: int
    bits_per_character: float
    bits_low: float
    bits_high: float
    characters: int
    seq_len: int
    stride: int
    text: str
    passages: np.ndarray = field(repr=False, compare=False)

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return (
            f"perplexity {self.value:.2f} [{self.low:.2f}, {self.high:.2f}] on {self.text} "
            f"({self.protocol}), {self.bits_per_character:.3f} bits per character"
        )

    @property
    def protocol(self) -> str:
        """How it was measured, to be written beside the number."""
        return f"{self.tokens:,} tokens, windows of {self.seq_len}, stride {self.stride}"

    def row(self) -> dict:
        """The numbers as one row of a table."""
        return {
            "perplexity": self.value, "low": self.low, "high": self.high, "tokens": self.tokens,
            "bits_per_character": self.bits_per_character, "bits_low": self.bits_low,
            "bits_high": self.bits_high, "characters": self.characters, "seq_len": self.seq_len,
            "stride": self.stride, "text": self.text,
        }  # fmt: skip


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Part | Sequence[str] | str,
    seq_len: int = 256,
    stride: int | None = None,
    max_characters: int | None = 65_536,
    max_tokens: int | None = None,
    batch_size: int = 4,
    n_bootstrap: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> Perplexity:
    """Perplexity of a model on text it was not fitted to.

    Passages are joined by blank lines and cut into windows; a token is scored once, in the first
    window that reaches it, given the tokens before it in that window. The first token of the text
    (and, with non-overlapping windows, of each window) has no context and is not scored, unless the
    tokenizer begins every text with a token of its own.

    Parameters
    ----------
    model, tokenizer
        A pair; a trimmed model also takes its original tokenizer, which is trimmed alike.
    texts : Part, sequence of str, or str
        E.g. ``domain.test``.
    seq_len : int
        Tokens per window.
    stride : int, optional
        Tokens by which windows advance; by default `seq_len` (no overlap).
    max_characters : int or None
        Use the first whole passages with at most so many characters (see `excerpt`): the same text
        for every tokenizer. None uses all.
    max_tokens : int, optional
        A budget in tokens of the tokenizer given, besides.
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
    if seq_len < 2 or not 1 <= stride <= seq_len:
        raise ValueError(f"seq_len={seq_len}, stride={stride}; expected 1 ≤ stride ≤ seq_len ≥ 2")
    passages = [texts] if isinstance(texts, str) else texts
    passages = excerpt(passages, tokenizer, max_tokens, max_characters)
    tokenizer = tokenizer_for(model, tokenizer)
    ids, passage, characters = _encode(passages, tokenizer)
    if len(ids) < 2:
        raise ValueError(f"{_name(texts)} has {len(ids)} token(s); at least 2 are needed")
    prefix = window_prefix(tokenizer)
    losses, scored = np.zeros(len(ids)), np.zeros(len(ids), bool)
    length = seq_len - len(prefix)
    windows = list(_windows(len(ids), length, max(1, stride - len(prefix))))
    full = [window for window in windows if window[1] - window[0] == length]
    groups = [full[i : i + batch_size] for i in range(0, len(full), batch_size)]
    groups += [[window] for window in windows[len(full) :]]  # the shorter tail, by itself
    with inference(model):
        for group in tqdm(groups, desc="perplexity", unit="batch", disable=not progress):
            rows = torch.tensor([prefix + ids[start:stop] for start, stop, _ in group])
            check_token_ids(model, rows)
            nll = _token_losses(model, rows.to(model.device))[:, len(prefix) - 1 if prefix else 0 :]
            for row, (start, stop, fresh) in zip(nll.cpu().double().numpy(), group, strict=True):
                first = start if prefix else start + 1
                begin = max(first, fresh)
                losses[begin:stop], scored[begin:stop] = row[begin - first :], True
    if np.isnan(losses).any():
        raise ValueError(f"the model gives NaN on {_name(texts)}: check its weights and dtype")
    table = np.stack(
        [
            np.bincount(passage[scored], weights=column[scored], minlength=passage[-1] + 1)
            for column in (losses, np.ones(len(ids)), characters)
        ],
        axis=1,
    )
    value, bits = _ratios(table.sum(0))
    draws = np.random.default_rng(seed).integers(len(table), size=(n_bootstrap, len(table)))
    bounds = np.quantile(_ratios(table[draws].sum(1).T), [0.025, 0.975], axis=1)
    if len(table) == 1:  # one passage says nothing about others
        bounds = np.full((2, 2), np.nan)
    return Perplexity(
        value=float(value), low=float(bounds[0, 0]), high=float(bounds[1, 0]),
        tokens=int(scored.sum()), bits_per_character=float(bits), bits_low=float(bounds[0, 1]),
        bits_high=float(bounds[1, 1]), characters=sum(map(len, passages)), seq_len=seq_len,
        stride=stride, text=_name(texts), passages=table,
    )  # fmt: skip


def _ratios(sums: np.ndarray) -> np.ndarray:
    """Perplexity and bits per character of sums of loss, tokens and characters ``[3, …]``."""
    loss, tokens, characters = sums
    tokens, characters = np.maximum(tokens, 1), np.maximum(characters, 1e-9)
    return np.stack([np.exp(loss / tokens), loss / math.log(2) / characters])


def _name(texts: Part | Sequence[str] | str) -> str:
    return str(texts) if isinstance(texts, Part) else "text"


def _encode(passages, tokenizer) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Token ids, the passage of each token, and its share of the passage's characters."""
    ids: list[int] = []
    passage, share = [], []
    for index, (tokens, characters) in enumerate(encoded(passages, tokenizer)):
        ids += tokens
        passage.append(np.full(len(tokens), index))
        share.append(np.full(len(tokens), characters / max(1, len(tokens))))
    if not ids:
        raise ValueError("the text is empty")
    return ids, np.concatenate(passage), np.concatenate(share)


def _windows(total: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Start and stop of every window, and the first token that no earlier window has scored."""
    fresh = 0
    for start in range(0, total, stride):
        stop = min(start + length, total)
        yield start, stop, fresh
        if stop == total:
            return
        fresh = stop


def _token_losses(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of tokens 1… of each row, ``[batch, tokens - 1]``, in float32."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )  # flat: twice as fast as with the classes in the middle
    return losses.view(len(ids), -1)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 40,
) -> str:
    """Greedy continuation of a prompt, without the prompt.

    Parameters
    ----------
    model, tokenizer
        A causal language model, and its tokenizer (that of the dense model will do).
    prompt : str
        What it is to continue.
    max_new_tokens : int
        Length of the continuation, unless the model ends it.

    Raises
    ------
    ValueError
        If the prompt is empty, or longer than the model can continue.
    """
    tokenizer = tokenizer_for(model, tokenizer)
    encoding = tokenizer(prompt, return_tensors="pt").to(model.device)
    if encoding["input_ids"].shape[1] == 0:
        raise ValueError("the prompt is empty; give at least one character")
    check_token_ids(model, encoding["input_ids"])
    length = encoding["input_ids"].shape[1] + max_new_tokens
    longest = getattr(model.config, "max_position_embeddings", length)
    if length > longest:
        raise ValueError(
            f"prompt and continuation would be {length} tokens, this model takes {longest}; "
            "shorten one of them"
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with inference(model):
        output = model.generate(
            input_ids=encoding["input_ids"], attention_mask=encoding["attention_mask"],
            max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad,
        )  # fmt: skip
    return tokenizer.decode(output[0, encoding["input_ids"].shape[1] :], skip_special_tokens=True)
