"""Speed of models in llama.cpp, at every format, and in PyTorch."""

from __future__ import annotations

import importlib
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import DictOf, Flag, Integer, ListOf, Model, OneOf, Text, checked
from ..export import KINDS, export_gguf
from ..models import inference, require_room
from .arguments import PAIR

PYTORCH = "PyTorch"
_DENSE = (None, PYTORCH)  # what all others are compared with
_FIRST = 5  # token; those before are often special
_SHORT = 8  # tokens of the prompt that decoding starts from

#: Read some tokens, then write some.
Runtime = Callable[[int, int], object]


@checked(
    **PAIR,
    models=DictOf(Text(), Model()),
    kinds=ListOf(OneOf(KINDS)),
    seq_len=Integer(_SHORT + 1),
    new_tokens=Integer(1),
    repeats=Integer(1),
    progress=Flag(),
)
def runtime_speeds(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    models: Mapping[str, PreTrainedModel],
    kinds: Sequence[str] = ("F16", "Q8_0", "Q4_0"),
    seq_len: int = 256,
    new_tokens: int = 32,
    repeats: int = 3,
    progress: bool = True,
) -> pd.DataFrame:
    """Prefill and decode of every model in PyTorch and in llama.cpp, beside the dense one's.

    Measured on one thread, in processor time, so that other work on the machine matters little;
    if a model is on an accelerator, PyTorch in seconds. In every round each has its turn.

    Parameters
    ----------
    model, tokenizer
        The dense pair.
    models : mapping
        Name to a pruned model, or the dense one.
    kinds : sequence of str
        Formats of the files that llama.cpp reads, see `export_gguf`. Without the package
        ``xllamacpp`` PyTorch alone is measured, with a warning.
    seq_len, new_tokens : int
        Tokens of the prompt that is read at once, and those written greedily, one by one.
    repeats : int
        Rounds, after one to warm up.
    progress : bool
        Show a progress bar.

    Returns
    -------
    pandas.DataFrame
        One row per model and ``runtime``, ``"PyTorch"`` in the model's own type or a format:
        ``model, runtime, stored``; ``prefill`` and ``decode``, the dense model's time per token in
        PyTorch over this one's (medians of the rounds' ratios), with ``_low`` and ``_high``, the
        lowest and highest; ``prefill_seconds, decode_seconds`` per token.

    Raises
    ------
    ValueError
        If llama.cpp has no graph for a model, or the tokens do not fit one.
    """
    llama_cpp = _llama_cpp() if kinds else None
    for each in (model, *models.values()):
        require_room(each, seq_len, new_tokens)
    on_cpu = all(each.device.type == "cpu" for each in (model, *models.values()))
    clocks = dict.fromkeys(kinds, time.process_time)
    clocks[PYTORCH] = time.process_time if on_cpu else time.perf_counter
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            runs: dict[tuple, Runtime] = {_DENSE: _in_pytorch(model)}
            for name, each in models.items():
                runs[name, PYTORCH] = _in_pytorch(each)
                for kind in kinds if llama_cpp else ():
                    path = Path(folder) / f"{len(runs)}.gguf"
                    export_gguf(each, tokenizer, path, kind=kind)
                    rows = each.get_input_embeddings().num_embeddings
                    runs[name, kind] = _in_llama_cpp(llama_cpp, path, seq_len + new_tokens, rows)
            rounds: list[dict[tuple, tuple[float, float]]] = [
                {
                    key: _seconds(run, clocks[key[1]], seq_len, new_tokens)
                    for key, run in runs.items()
                }
                for _ in tqdm(range(repeats + 1), "speeds", unit="round", disable=not progress)
            ][1:]
    finally:
        torch.set_num_threads(threads)
    return pd.DataFrame(
        {
            "model": name,
            "runtime": runtime,
            "stored": models[name].num_parameters(),
            **_ratios([r[_DENSE] for r in rounds], [r[name, runtime] for r in rounds]),
        }
        for name, runtime in [*runs][1:]
    )


def _llama_cpp():
    """The package that runs llama.cpp, or None with a warning."""
    try:
        return importlib.import_module("xllamacpp")
    except ImportError as error:
        warnings.warn(f"llama.cpp is not measured ({error}); pip install xllamacpp", stacklevel=3)
        return None


def _in_pytorch(model: PreTrainedModel) -> Runtime:
    """A model in PyTorch."""
    rows = model.get_input_embeddings().num_embeddings

    def run(read: int, written: int) -> object:
        ids = torch.tensor([_prompt(read, rows)], device=model.device)
        options = {"max_new_tokens": written, "min_new_tokens": written, "do_sample": False}
        with inference(model):
            found = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return found.cpu()  # waits for the device

    return run


def _in_llama_cpp(llama_cpp, path: Path, room: int, rows: int) -> Runtime:
    """The same for a file, on one thread of the CPU, with room for so many tokens."""
    options = llama_cpp.CommonParams()
    options.model.path = str(path)
    options.n_ctx, options.n_parallel, options.warmup = max(room, 256), 1, False
    options.n_gpu_layers = 0
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.verbosity = -1
    server = llama_cpp.Server(options)

    def run(read: int, written: int) -> object:
        request = {"prompt": _prompt(read, rows), "n_predict": written}
        request |= {"temperature": 0, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions(request)
        if "error" in answer:
            raise RuntimeError(f"llama.cpp cannot run {path.name}: {answer['error']}")
        return answer

    return run


def _prompt(read: int, rows: int) -> list[int]:
    """So many tokens of a vocabulary of so many rows."""
    return [(_FIRST + place) % rows for place in range(read)]


def _seconds(
    run: Runtime, clock: Callable[[], float], seq_len: int, new_tokens: int
) -> tuple[float, float]:
    """Seconds per token of prefill and of decode; NaN where the clock was too coarse."""
    times = []
    for read, written in ((seq_len, 1), (_SHORT, 1), (_SHORT, 1 + new_tokens)):
        start = clock()
        run(read, written)
        times.append(clock() - start)
    found = (times[0] - times[1]) / (seq_len - _SHORT), (times[2] - times[1]) / new_tokens
    prefill, decode = (seconds if seconds > 0 else float("nan") for seconds in found)
    return prefill, decode


def _ratios(
    dense: Sequence[tuple[float, float]], own: Sequence[tuple[float, float]]
) -> dict[str, float]:
    """Speeds over the dense model's, round by round."""
    found = {}
    for place, name in enumerate(("prefill", "decode")):
        seconds = pd.Series([each[place] for each in own])
        ratios = pd.Series([each[place] for each in dense]) / seconds
        found |= {name: ratios.median(), f"{name}_low": ratios.min(), f"{name}_high": ratios.max()}
        found[f"{name}_seconds"] = seconds.median()
    return found
