"""Cost of a model: parameters, multiply-accumulates, memory, time."""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import Integer, Model, Tokenizer, checked, safe_contextmanager
from ..models import dtype_name, inference, model_size, require_room


@checked(
    model=Model(),
    tokenizer=Tokenizer(),
    dense=Model() | None,
    seq_len=Integer(1),
    new_tokens=Integer(1),
    batch_size=Integer(1),
    repeats=Integer(1),
)
def efficiency(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dense: PreTrainedModel | None = None,
    seq_len: int = 256,
    new_tokens: int = 16,
    batch_size: int = 1,
    repeats: int = 5,
) -> pd.DataFrame:
    """Size, multiply-accumulates, memory and speed of a model, beside those of the dense model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Any supported model, on any device.
    tokenizer : transformers.PreTrainedTokenizerBase
        Random tokens of it are the prompts.
    dense : transformers.PreTrainedModel, optional
        The model it was pruned from: measured in turns with it, so that a drifting machine slows
        both alike.
    seq_len, new_tokens, batch_size : int
        Tokens of the prompt (prefill), tokens decoded one by one with the cache, sequences at once.
    repeats : int
        Timed rounds, after one to warm up.

    Returns
    -------
    pandas.DataFrame
        One row per model (``variant`` "dense" or "model"): ``stored, nonzero`` (parameters),
        ``weight_bytes``, ``macs_per_token`` (multiply-accumulates of the prefill, per token, head
        included), ``peak_bytes`` (weights and what prefill and decoding held at most beside them;
        NaN where the device does not tell), ``prefill_seconds, prefill_low, prefill_high``
        (median, fastest, slowest), the same of ``decode_`` (per token),
        ``prefill_tokens_per_second, decode_tokens_per_second``. With `dense` also
        ``prefill_speedup, decode_speedup`` (median of the rounds' ratios), ``mac_reduction``
        (dense over model) and ``realised`` (speed-up of the prefill over that reduction).

    Raises
    ------
    ValueError
        If a count is below 1 or the prompt and the new tokens do not fit the model.
    """
    counts = {"seq_len": seq_len, "new_tokens": new_tokens, "batch_size": batch_size}
    models = ({"dense": dense} if dense is not None else {}) | {"model": model}
    for subject in models.values():
        require_room(subject, seq_len, new_tokens)
    rounds = {name: {"prefill": [], "decode": []} for name in models}
    peaks = dict.fromkeys(models, 0.0)
    for number in range(repeats + 1):
        for name, subject in models.items():
            with inference(subject), peak_memory(subject.device) as peak:
                ids = _prompt(subject, tokenizer, batch_size, seq_len)
                prefill, cache = timed(subject.device, partial(_prefill, subject, ids))
                decode, _ = timed(subject.device, partial(_decode, subject, ids, cache, new_tokens))
            peaks[name] = max(peaks[name], peak())
            if number:  # the first round warms caches and kernels up
                rounds[name]["prefill"].append(prefill)
                rounds[name]["decode"].append(decode / new_tokens)
    rows = [
        {
            "variant": name,
            **_sizes(subject, dense, ids, peaks[name]),
            **_speeds(rounds[name], batch_size, seq_len),
            **counts,
            "repeats": repeats,
            "device": str(subject.device),
            "dtype": dtype_name(subject.dtype),
        }
        for name, subject in models.items()
    ]
    table = pd.DataFrame(rows)
    if dense is not None:
        _compare(table, rounds)
    return table


def _prompt(model, tokenizer, batch_size: int, seq_len: int) -> torch.Tensor:
    vocabulary = min(len(tokenizer), model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (batch_size, seq_len), generator=generator)
    return ids.to(model.device)


def _prefill(model: PreTrainedModel, ids: torch.Tensor):
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def _decode(model: PreTrainedModel, ids: torch.Tensor, cache, new_tokens: int) -> None:
    token = ids[:, -1:]
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values


def timed(device: torch.device, function: Callable):
    """Call a function; return the seconds that it takes on the device, and its result."""
    _synchronize(device)
    start = time.perf_counter()
    result = function()
    _synchronize(device)
    return time.perf_counter() - start, result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float]]:
    """Within: memory is measured; yields a function that returns the most bytes added so far.

    On CUDA by the allocator, on Linux by the process's resident size; elsewhere NaN.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
    elif device.type == "cpu" and _reset_high_water():
        before = _resident("VmRSS")
        yield lambda: max(_resident("VmHWM") - before, 0)
    else:
        yield lambda: float("nan")


def _reset_high_water() -> bool:
    """Start the process's peak resident size anew; only Linux can."""
    with contextlib.suppress(AttributeError):  # glibc: what is free would be used again unseen
        ctypes.CDLL(None).malloc_trim(0)  # first, or what it gives back would count as a peak
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int:
    """Bytes of a memory field of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def macs_per_token(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Multiply-accumulates per token of a prompt ``[batch, tokens]``, counted by running it once.

    With eager attention: the counter does not see into a CPU's fused attention.
    """
    with _eager(model), inference(model), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    return counter.get_total_flops() / 2 / ids.numel()


@safe_contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Within: attention as written out in Python."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(before)


def _sizes(model, dense, ids: torch.Tensor, working: float) -> dict:
    size = model_size(model, dense)
    tensors = {id(p): p.numel() * p.element_size() for p in model.parameters()}  # tied once
    weight_bytes = sum(tensors.values())
    return {
        "stored": size.stored,
        "nonzero": size.nonzero,
        "weight_bytes": weight_bytes,
        "peak_bytes": weight_bytes + working,
        "macs_per_token": macs_per_token(model, ids),
    }


def _speeds(rounds: dict[str, list[float]], batch_size: int, seq_len: int) -> dict:
    row = {}
    for kind, seconds in rounds.items():
        row[f"{kind}_seconds"] = statistics.median(seconds)
        row[f"{kind}_low"], row[f"{kind}_high"] = min(seconds), max(seconds)
    row["prefill_tokens_per_second"] = batch_size * seq_len / row["prefill_seconds"]
    row["decode_tokens_per_second"] = batch_size / row["decode_seconds"]
    return row


def _compare(table: pd.DataFrame, rounds: dict) -> None:
    """Ratios to the dense row, in place: 1 for the dense row itself."""
    for kind in ("prefill", "decode"):
        pairs = list(zip(rounds["dense"][kind], rounds["model"][kind], strict=True))
        speedup = statistics.median(before / after for before, after in pairs)
        table[f"{kind}_speedup"] = [1.0, speedup]
    table["mac_reduction"] = table["macs_per_token"].iloc[0] / table["macs_per_token"]
    table["realised"] = table["prefill_speedup"] / table["mac_reduction"]
