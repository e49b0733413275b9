"""Held-out text in windows, values of every token of it, and sums and intervals by passage."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import InvalidArgument, safe_contextmanager
from ..domains import SEPARATOR, Part, RunningText, excerpt, running_text, window_prefix
from ..models import check_token_ids, dtype_name, inference, reading_dtype, tokenizer_for
from ..store import content_hash

Result = TypeVar("Result")
#: Types that nothing is read again after.
_EXACT = (torch.float32, torch.float64)
#: Bytes that the logits of one step may take, as float32: on a CPU, and elsewhere.
_CPU_BYTES, _GPU_BYTES = 1 << 28, 1 << 30
_DRAWN = 1 << 20  # random numbers of a block; of each, a resample takes the columns of a passage


@dataclass(frozen=True)
class Window:
    """Tokens ``start`` to ``stop`` of a text; those from ``fresh`` on are in no earlier window."""

    start: int
    stop: int
    fresh: int


@dataclass(frozen=True)
class WindowedText:
    """Running text in windows; a step reads several of them at once.

    Parameters
    ----------
    running : RunningText
        The tokens, and the passages and characters that they belong to.
    prefix : list of int
        Tokens before every window.
    steps : list of list of Window
        Windows of one length that are read together.
    name, content : str
        Name of the text, and SHA-256 of the passages (where a limit cuts them, of what is left).
    """

    running: RunningText
    prefix: list[int]
    steps: list[list[Window]]
    name: str
    content: str

    def passage_sums(
        self,
        models: Sequence[PreTrainedModel],
        per_token: Callable,
        precision: str,
        title: str,
        progress: bool,
    ) -> tuple[np.ndarray, str]:
        """Read the text, and sum what models say of its tokens by passage.

        Parameters
        ----------
        models : sequence of transformers.PreTrainedModel
            All read the same windows.
        per_token : callable
            From logits ``[batch, token, vocabulary]``, one tensor per model, and the tokens that
            they predict ``[batch, token]`` to values ``[batch, token, column]``.
        precision : {"auto", "bfloat16", "float32"}
            See `finite_or_float32`.
        title, progress
            Of the progress bar, and whether it is shown.

        Returns
        -------
        sums : numpy.ndarray
            Of every column, tokens scored and their characters, ``[passage, column + 2]``.
        precision : str
            Type that the models were read in.
        """

        def read(precision: str) -> np.ndarray:
            with _reading(models, precision):
                return self._values(models, per_token, title, progress)

        values, dtype = finite_or_float32(read, models, precision, lambda _: self.name)
        scored, characters = self.scored, self.running.characters
        passage, count = self.running.passage[scored], self.running.passage[-1] + 1
        columns = [*values.T, np.ones(len(values)), characters]
        sums = [np.bincount(passage, weights=column[scored], minlength=count) for column in columns]
        return np.stack(sums, axis=1), dtype

    def _values(
        self, models: Sequence[PreTrainedModel], per_token: Callable, title: str, progress: bool
    ) -> np.ndarray:
        """Values of every token, each in the first window that reaches it, ``[token, column]``.

        A token without one before it in its window has no value: 0.
        """
        ids = self.running.ids
        values = np.empty((0, 0))  # until the number of columns is known
        distinct = [*dict.fromkeys(models)]
        for step in tqdm(self.steps, desc=title, unit="batch", disable=not progress):
            rows = torch.tensor([self.prefix + ids[w.start : w.stop] for w in step])
            for model in distinct:
                check_token_ids(model, rows)
            logits = {
                model: model(input_ids=rows.to(model.device), use_cache=False).logits[:, :-1]
                for model in distinct
            }
            targets = rows[:, 1:].to(logits[models[0]].device)
            new_values = per_token([logits[model] for model in models], targets)
            new_values = new_values[:, max(len(self.prefix) - 1, 0) :].cpu().double().numpy()
            if not len(values):
                values = np.zeros((len(ids), new_values.shape[2]))
            for window, row in zip(step, new_values, strict=True):
                first = window.start + (not self.prefix)  # the first token that has a value
                new = slice(max(first, window.fresh), window.stop)
                values[new] = row[new.start - first :]
        return values

    @property
    def scored(self) -> np.ndarray:
        """Whether each token has another before it in its first window, ``[token]``."""
        scored = np.zeros(len(self.running.ids), dtype=bool)
        for window in (window for step in self.steps for window in step):
            scored[max(window.start + (not self.prefix), window.fresh) : window.stop] = True
        return scored


@safe_contextmanager
def _reading(models: Sequence[PreTrainedModel], precision: str) -> Iterator[None]:
    """Within the block, models are read in a precision; see `inference`."""
    with contextlib.ExitStack() as undo:
        for model in models:
            undo.enter_context(inference(model, precision))
        yield


def windowed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Part | Sequence[str] | str,
    *,
    seq_len: int,
    stride: int | None,
    max_characters: int | None,
    max_tokens: int | None,
    chunked: bool = False,
    batch_size: int | None = None,
) -> WindowedText:
    """Text in windows for a model; the arguments are those of `perplexity`.

    Raises
    ------
    ValueError
        If the text is too short to score, or the stride is out of range.
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
    content = list(passages)
    tokenizer = tokenizer_for(model, tokenizer)
    prefix = window_prefix(tokenizer)
    if chunked:
        limit = None if max_tokens is None else max(0, max_tokens - len(prefix))
        running = _prefixed(running_text(passages, tokenizer, limit), prefix)
        content = [SEPARATOR.join(passages)[: running.characters.sum()]]  # up to the limit
        prefix = []
    else:
        running = running_text(passages, tokenizer)
    # 2. Windows; the shorter last one is left out, or read by itself.
    length = seq_len - len(prefix)
    needed = seq_len if chunked else 2 - min(len(prefix), 1)
    if len(running.ids) < needed or length < 1:
        raise ValueError(
            f"{name} has {len(running.ids)} token(s); at least {needed} are needed, in windows of "
            f"more than {len(prefix)}: give more text or another seq_len"
        )
    windows = list(_windows(len(running.ids), length, min(stride, length)))
    full = [window for window in windows if window.stop - window.start == length]
    size = batch_size or _windows_per_step(model, seq_len)
    steps = [full[i : i + size] for i in range(0, len(full), size)]
    if not chunked:
        steps += [[window] for window in windows[len(full) :]]
    return WindowedText(running, prefix, steps, name, content_hash(content))


def _prefixed(running: RunningText, prefix: list[int]) -> RunningText:
    """Running text after a prefix of no characters, which belongs to the first passage."""
    before = (len(prefix), 0)
    return replace(
        running,
        ids=prefix + running.ids,
        passage=np.pad(running.passage, before),
        characters=np.pad(running.characters, before),
    )


def _windows(total: int, length: int, stride: int) -> Iterator[Window]:
    """Windows that advance by `stride` until they reach the end."""
    fresh = 0
    for start in range(0, total, stride):
        stop = min(start + length, total)
        yield Window(start, stop, fresh)
        if stop == total:
            return
        fresh = stop


def _windows_per_step(model: PreTrainedModel, seq_len: int) -> int:
    """Windows whose logits fit into memory beside the model, at least one."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    available = _CPU_BYTES if model.device.type == "cpu" else _GPU_BYTES
    return max(1, available // (4 * vocabulary * seq_len))


def resampled(table: np.ndarray, ratios: Callable, n_bootstrap: int, seed: int) -> np.ndarray:
    """95 % intervals of ratios of sums over passages, ``[low and high, ratio]``.

    Percentile bootstrap over passages, those without a token left out; NaN for a single one, which
    says nothing about others.

    Parameters
    ----------
    table : numpy.ndarray
        ``[passage, column]``.
    ratios : callable
        From sums ``[column, sample]`` to ratios ``[ratio, sample]``.
    n_bootstrap, seed : int
        Resamples, and their seed: tables of the same length are resampled alike.
    """
    table = table[table.any(1)]
    if len(table) == 1:
        return np.full((2, len(ratios(table.T))), np.nan)
    rng = np.random.default_rng(seed)
    samples = drawn(lambda size: rng.integers(len(table), size=size), n_bootstrap, len(table))
    sums = np.concatenate([table[rows].sum(1) for rows in samples])  # [sample, column]
    return np.quantile(ratios(sums.T), [0.025, 0.975], axis=1)


def drawn(
    draw: Callable[[tuple[int, int]], np.ndarray], n: int, width: int
) -> Iterator[np.ndarray]:
    """Random numbers ``[n, width]`` in blocks of rows that fit into memory, as if drawn at once."""
    rows = max(1, _DRAWN // width)
    for start in range(0, n, rows):
        yield draw((min(rows, n - start), width))


def finite_or_float32(
    read: Callable[[str], np.ndarray],
    models: Sequence[PreTrainedModel],
    precision: str,
    name: Callable[[int], str],
) -> tuple[np.ndarray, str]:
    """`again_in_float32` for values of items, which are to be finite; in float32, no NaN.

    Parameters
    ----------
    read : callable
        From a precision to values ``[item, …]``.
    models, precision
        As for `again_in_float32`.
    name : callable
        From the number of an item to its name, for the message.
    """

    def read_finite(attempt: str) -> np.ndarray:
        values = read(attempt)
        exact = reading_dtype(models[0], attempt) in _EXACT
        wrong = np.isnan(values) if exact else ~np.isfinite(values)
        bad = np.flatnonzero(wrong.reshape(len(values), -1).any(1))
        if len(bad):
            found = "NaN" if np.isnan(values[bad[0]]).any() else "infinite values"
            raise FloatingPointError(f"{found} on {name(bad[0])}")
        return values

    return again_in_float32(read_finite, models, precision)


def again_in_float32(
    read: Callable[[str], Result], models: Sequence[PreTrainedModel], precision: str
) -> tuple[Result, str]:
    """Read models; if that is not finite in less than float32, warn and read again in float32.

    Parameters
    ----------
    read : callable
        From a precision to a result; raises FloatingPointError, which says what was found where.
    models : sequence of transformers.PreTrainedModel
        What is read.
    precision : {"auto", "bfloat16", "float32"}
        What was asked for.

    Returns
    -------
    result
        What `read` gave.
    precision : str
        Type that the models were read in.

    Raises
    ------
    ValueError
        If it is not finite in float32 either, or the models would be read in different types.
    """
    dtypes = [reading_dtype(model, precision) for model in models]
    for dtype in dtypes:
        require_same("precision", dtype_name(dtypes[0]), dtype_name(dtype))
    subject = "the model" if len({*models}) == 1 else "the model or its reference"
    try:
        try:
            return read(precision), dtype_name(dtypes[0])
        except FloatingPointError as error:
            if dtypes[0] in _EXACT:
                raise
            again = f"in {dtype_name(dtypes[0])}; all is read again in float32"
            warnings.warn(f"{subject} gives {error} {again}", stacklevel=4)
        return read("float32"), dtype_name(reading_dtype(models[0], "float32"))
    except FloatingPointError as error:
        raise ValueError(f"{subject} gives {error}: check its weights, dtype") from error


def have_likeliest(logits: torch.Tensor) -> bool:
    """Whether all predictions have a likeliest token; single tokens may be ruled out by -∞."""
    return bool(torch.isfinite(logits.amax(-1)).all())


def require_likeliest(_model: PreTrainedModel, _inputs: object, output) -> None:
    """A forward hook: FloatingPointError unless the last token has a likeliest one behind it.

    Tokens before it may be padding.
    """
    if not have_likeliest(output.logits[:, -1]):
        raise FloatingPointError("the predictions are NaN or infinite")


def by_length(lengths: Sequence[int], batch_size: int) -> list[np.ndarray]:
    """Indices in batches, the longest first: items of a batch need little padding."""
    order = np.argsort([-length for length in lengths], kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def require_same(what: str, first: object, second: object, names: str = "the two") -> None:
    """Refuse to compare two numbers (called `names`) that were measured differently.

    Raises
    ------
    ValueError
        Naming what differs and both values.
    """
    if first != second:
        raise ValueError(
            f"{names} differ in {what}: {first} and {second}; measure both with the same"
        )
