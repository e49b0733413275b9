"""What a model can do on held-out text: perplexity with its protocol, and generation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
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
from ..domains import Part, excerpt, running_text, token_ids, window_prefix
from ..models import check_token_ids, inference, tokenizer_for


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
        ``log2(value) * tokens / characters``; comparable between tokenizers, which `value` is not.
    bits_low, bits_high : float
        Its 95 % interval.
    characters : int
        Characters of the tokens scored, blank lines between passages included.
    seq_len, stride : int
        Window length, and tokens by which windows advance.
    text : str
        Which text.
    passages : numpy.ndarray
        Per passage: sum of negative log-likelihoods (nats), tokens scored, their characters
        ``[passage, 3]``; for paired comparisons on the same text. A blank line counts with the
        passage that it follows.
    chunked : bool
        Measured as papers' code does (see `perplexity`).
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
    chunked: bool = False

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
        whole = ", whole windows only" if self.chunked else ""
        return f"{self.tokens:,} tokens, windows of {self.seq_len}, stride {self.stride}{whole}"

    def row(self) -> dict:
        """The numbers as one row of a table."""
        return {
            "perplexity": self.value, "low": self.low, "high": self.high, "tokens": self.tokens,
            "bits_per_character": self.bits_per_character, "bits_low": self.bits_low,
            "bits_high": self.bits_high, "characters": self.characters, "seq_len": self.seq_len,
            "stride": self.stride, "text": self.text,
        }  # fmt: skip


@checked(
    model=Model(), tokenizer=Tokenizer(), text=Texts(), seq_len=Integer(2),
    stride=Integer(1) | None, max_characters=Integer(2) | None, max_tokens=Integer(2) | None,
    batch_size=Integer(1), n_bootstrap=Integer(1), seed=Integer(0), chunked=Flag(), progress=Flag(),
)  # fmt: skip
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
        A budget in tokens of the tokenizer given, besides.
    batch_size : int
        Windows per forward pass.
    n_bootstrap, seed : int
        Resamples of the interval, and their seed.
    progress : bool
        Show a progress bar.
    chunked : bool
        As the code of GPTQ, LLM-Pruner and others does (see `PERPLEXITY_PRESETS`): what the
        tokenizer begins texts with stands once, before the whole text; windows do not overlap, the
        first token of each is not scored, and the shorter last one is left out. `max_tokens` then
        counts the model's own tokens, to the token.

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
    passages = excerpt(
        text, tokenizer, max_tokens=None if chunked else max_tokens, max_characters=max_characters
    )
    tokenizer = tokenizer_for(model, tokenizer)
    prefix = window_prefix(tokenizer)
    limit = None if max_tokens is None or not chunked else max(0, max_tokens - len(prefix))
    running = running_text(passages, tokenizer, limit)
    ids, passage, characters = running.ids, running.passage, running.characters
    if chunked:  # the prefix is text like any other, of no characters
        ids = prefix + ids
        passage, characters = (np.pad(x, (len(prefix), 0)) for x in (passage, characters))
        prefix = []
    length = seq_len - len(prefix)
    needed = seq_len if chunked else 2 - min(len(prefix), 1)
    if len(ids) < needed or length < 1:
        raise ValueError(
            f"{_name(text)} has {len(ids)} token(s); at least {needed} are needed, in windows of "
            f"more than {len(prefix)}: give more text or another seq_len"
        )
    losses, scored = np.zeros(len(ids)), np.zeros(len(ids), bool)
    windows = list(_windows(len(ids), length, min(stride, length)))
    full = [window for window in windows if window[1] - window[0] == length]
    groups = [full[i : i + batch_size] for i in range(0, len(full), batch_size)]
    if not chunked:
        groups += [[window] for window in windows[len(full) :]]  # the shorter tail, by itself
    with inference(model):
        for group in tqdm(groups, desc="perplexity", unit="batch", disable=not progress):
            rows = torch.tensor([prefix + ids[start:stop] for start, stop, _ in group])
            check_token_ids(model, rows)
            nll = _token_losses(model, rows.to(model.device))[:, max(len(prefix) - 1, 0) :]
            for row, (start, stop, fresh) in zip(nll.cpu().double().numpy(), group, strict=True):
                first = start if prefix else start + 1
                begin = max(first, fresh)
                losses[begin:stop], scored[begin:stop] = row[begin - first :], True
    if np.isnan(losses).any():
        raise ValueError(f"the model gives NaN on {_name(text)}: check its weights and dtype")
    table = np.stack(
        [
            np.bincount(passage[scored], weights=column[scored], minlength=passage[-1] + 1)
            for column in (losses, np.ones(len(ids)), characters)
        ],
        axis=1,
    )
    value, bits = _ratios(table.sum(0))
    bits = bits if table[:, 2].any() else math.nan
    draws = np.random.default_rng(seed).integers(len(table), size=(n_bootstrap, len(table)))
    bounds = np.quantile(_ratios(table[draws].sum(1).T), [0.025, 0.975], axis=1)
    if len(table) == 1:  # one passage says nothing about others
        bounds = np.full((2, 2), np.nan)
    return Perplexity(
        value=float(value), low=float(bounds[0, 0]), high=float(bounds[1, 0]),
        tokens=int(scored.sum()), bits_per_character=float(bits), bits_low=float(bounds[0, 1]),
        bits_high=float(bounds[1, 1]), characters=int(table[:, 2].sum()), seq_len=seq_len,
        stride=stride, text=_name(text), passages=table, chunked=chunked,
    )  # fmt: skip


def _ratios(sums: np.ndarray) -> np.ndarray:
    """Perplexity and bits per character of sums of loss, tokens and characters ``[3, …]``."""
    loss, tokens, characters = sums
    tokens, characters = np.maximum(tokens, 1), np.maximum(characters, 1e-9)
    return np.stack([np.exp(loss / tokens), loss / math.log(2) / characters])


def _name(text: Part | Sequence[str] | str) -> str:
    return str(text) if isinstance(text, Part) else "text"


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
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return token_losses(logits, ids[:, 1:])


@checked(model=Model(), tokenizer=Tokenizer(), prompt=Text(), max_new_tokens=Integer(1))
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 40,
) -> str:
    """Greedy continuation of a prompt, without the prompt.

    Always the likeliest token, until the model's end-of-text token: beams, penalties and whatever
    else a model's generation settings ask for are not used.

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
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids),
            generation_config=model.generation_config,
        )  # fmt: skip
    # A piece by itself may be decoded otherwise (without its first space): decode both, and cut.
    before, whole = (
        tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (ids[0], output[0])
    )
    if whole.startswith(before):
        return whole[len(before) :]
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@safe_contextmanager
def _greedy(model: PreTrainedModel, max_new_tokens: int) -> Iterator[None]:
    """Within: nothing of the model's own generation settings counts but its end of text."""
    own = model.generation_config  # None where someone took it away
    end = getattr(own, "eos_token_id", None)
    end = model.config.eos_token_id if end is None else end
    ends = end if isinstance(end, list) else [end]
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens,
        eos_token_id=end, pad_token_id=next(iter(ends), None) or 0,
    )  # fmt: skip
    try:
        yield
    finally:
        model.generation_config = own
