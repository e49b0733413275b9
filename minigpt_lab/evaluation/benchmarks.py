"""Standard benchmarks, by lm-eval, on a model in memory: shrunk, trimmed or dense."""

from __future__ import annotations

import copy
import functools
import logging
import math
import os
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import (
    Integer,
    ListOf,
    Location,
    Model,
    Tokenizer,
    checked,
    first_line,
    safe_contextmanager,
)
from ..domains import encode, window_prefix
from ..models import PRECISION, inference, seeded, tokenizer_for
from ..store import hub_reachable
from .windows import again_in_float32, have_likeliest, require_likeliest

# lm-eval and all it brings along takes seconds to import: it is imported where it is used.


@checked(
    model=Model(),
    tokenizer=Tokenizer(),
    tasks=Location() | ListOf(Location(), least=1),
    num_fewshot=Integer(0) | None,
    limit=Integer(1) | None,
    batch_size=Integer(1),
    include_path=Location() | None,
    precision=PRECISION,
    seed=Integer(0),
)
def benchmark(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    include_path: str | os.PathLike | None = None,
    precision: str = "auto",
    seed: int = 0,
) -> pd.DataFrame:
    """Score a model on tasks of lm-eval, the harness that published numbers come from.

    Parameters
    ----------
    model, tokenizer
        A pair; a trimmed model also takes its original tokenizer, which is trimmed alike.
    tasks : str, path or sequence of them
        Names of tasks, groups or tags (``"arc_easy"``), task files (``"my/task.yaml"``), or folders
        of task files.
    num_fewshot : int, optional
        Solved examples before each question; by default what the task says. A task that says 0
        keeps 0.
    limit : int, optional
        Use only the first so many questions of each task.
    batch_size : int
        Texts per forward pass.
    include_path : str or path, optional
        A folder with more task files, whose tasks may be named.
    precision : {"auto", "bfloat16", "float32"}
        Of the weights while they are read, see `perplexity`; predictions that are not finite are
        warned of, and all tasks read again in float32.
    seed : int
        Of the choice of examples.

    Returns
    -------
    pandas.DataFrame
        One row per task and metric: ``task, metric, value, stderr, low, high, n, num_fewshot,
        higher_is_better, version, precision``; low and high are the 95 % interval
        ``value ± 1.96 stderr``.

    Raises
    ------
    ValueError
        If a task is not known, a file defines none, a number is out of range, or the model answers
        with NaN.
    FileNotFoundError
        If there is no such task file or folder.
    OSError
        If a task's dataset is neither in reach nor in the local cache.
    """
    words = tokenizer_for(model, tokenizer)
    with _quiet(), _offline_unless_in_reach():
        from lm_eval import simple_evaluate

        manager, names = _find_tasks(tasks, include_path)

        def read(precision: str) -> dict[str, Any]:
            with inference(model, precision), seeded(seed):
                harness = _harness()(
                    pretrained=model, batch_size=batch_size, **_with_special_tokens(words, model)
                )
                try:
                    return simple_evaluate(
                        harness,
                        tasks=names,
                        task_manager=manager,
                        num_fewshot=num_fewshot,
                        limit=limit,
                        log_samples=False,
                        bootstrap_iters=1000,  # of metrics other than means
                        random_seed=seed,
                        numpy_random_seed=seed,
                        torch_random_seed=seed,
                        fewshot_random_seed=seed,
                    )
                except FloatingPointError as error:
                    raise FloatingPointError(f"NaN on {', '.join(names)}") from error

        try:
            results, dtype = again_in_float32(read, [model], precision)
        except ConnectionError as error:
            raise OSError(
                f"the data of {', '.join(names)} cannot be had ({first_line(error)}): it comes "
                "from the Hugging Face hub, which is out of reach (no network?), and no earlier "
                "call left a copy; use a task over local files"
            ) from error
    return _table(results).assign(precision=dtype)


def _with_special_tokens(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> dict:
    """A copy of a tokenizer with the special tokens that lm-eval needs, and what texts begin with.

    That is the first or last token of a text, or where it has neither a line break.
    """
    words, rows = copy.deepcopy(tokenizer), model.get_input_embeddings().weight.shape[0]
    special = (words.bos_token_id, words.eos_token_id)
    known = [token for token in special if token is not None and token < rows]
    begin = (known or encode("\n", words)["input_ids"][-1:] or [0])[0]
    if words.eos_token_id is None:
        words.add_special_tokens({"eos_token": "<|endoftext|>"})  # which the model never gives
    if words.pad_token_id is None or words.pad_token_id >= rows:
        words.pad_token = words.convert_ids_to_tokens(begin)
    return {"tokenizer": words, "prefix_token_id": begin}


@functools.cache
def _harness() -> type:
    """lm-eval's wrapper of a model, corrected for tokenizers that put tokens around texts."""
    from lm_eval.models.huggingface import HFLM

    class Harness(HFLM):
        """A text has its prefix in front of it once, and nothing behind it; NaN is an error."""

        rolling = False

        @functools.cached_property
        def text_prefix(self):
            """Ids that the tokenizer puts before every text."""
            return window_prefix(self.tokenizer)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            """Score whole texts; the token that they begin with is put in front of them here."""
            self.rolling = True
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm)
            finally:
                self.rolling = False

        def tok_encode(self, string, add_special_tokens=None):
            """Encode without a token behind the text: it would be scored as its continuation."""
            ids, begin = encode(string, self.tokenizer)["input_ids"], self.text_prefix
            if self.rolling:
                ids = ids[1:] if ids[:1] == [self.prefix_token_id] else ids
            elif add_special_tokens is not False and ids[: len(begin)] != begin:
                ids = begin + ids
            return ids

        def _model_call(self, *args, **options):
            logits = super()._model_call(*args, **options)
            if not have_likeliest(logits):
                raise FloatingPointError("the predictions are NaN or infinite")
            return logits

        def _model_generate(self, *args, **options):
            with self.model.register_forward_hook(require_likeliest):
                return super()._model_generate(*args, **options)

    return Harness


def _find_tasks(tasks, include_path: str | os.PathLike | None) -> tuple:
    """A manager that knows the tasks, and their names."""
    from lm_eval.tasks import TaskManager

    wanted = [tasks] if isinstance(tasks, str | os.PathLike) else list(tasks)
    folders, names = [] if include_path is None else [Path(include_path)], []
    for task in wanted:
        if isinstance(task, os.PathLike) or os.sep in task or task.endswith(".yaml"):
            path = Path(task).resolve()
            folders.append(path if path.is_dir() else path.parent)
            names += _tasks_of(path)
        else:
            names.append(task)
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{str(folder)!r} is no folder; expected one with task files (.yaml)"
            )
    paths = tuple(dict.fromkeys(map(str, folders)))
    local = TaskManager(include_path=list(paths), include_defaults=False)
    if names and set(names) <= set(local.all_subtasks):
        return local, names
    manager = _all_tasks(paths)
    for name in names:
        if name not in manager.task_index:
            close = get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see lm_eval ls"
            raise ValueError(f"lm-eval has no task {name!r}; {hint}")
    return manager, names


@functools.cache
def _all_tasks(paths: tuple[str, ...]):
    """Every task of lm-eval, and those in folders. Reading its files takes several seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(paths))


def _tasks_of(path: Path) -> list[str]:
    """Names of the tasks that a file, or every file of a folder, defines."""
    from lm_eval.tasks import TaskManager

    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a task file (.yaml) or a folder")
    folder = path if path.is_dir() else path.parent
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    if path.is_dir():
        names = manager.all_subtasks
    else:
        entries = manager.task_index.items()
        names = [n for n, e in entries if e.yaml_path and e.yaml_path.resolve() == path]
    if not names:
        raise ValueError(f"{path} defines no task of lm-eval; expected YAML with 'task: NAME'")
    return names


def _table(results: dict) -> pd.DataFrame:
    """One row per task and metric of lm-eval's results."""
    rows = []
    for task, scores in results["results"].items():
        for key, value in scores.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = scores.get(f"{metric}_stderr,{kind}")
            stderr = stderr if isinstance(stderr, float) else math.nan  # "N/A"
            rows.append(
                {
                    "task": task,
                    "metric": metric if kind == "none" else key,
                    "value": value,
                    "stderr": stderr,
                    "low": value - 1.96 * stderr,
                    "high": value + 1.96 * stderr,
                    "n": scores.get("sample_len"),
                    "num_fewshot": results["n-shot"].get(task),
                    "higher_is_better": results["higher_is_better"].get(task, {}).get(metric),
                    "version": results["versions"].get(task),
                }
            )
    return pd.DataFrame(rows)


@safe_contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's warnings that a model in memory was given, and of defaults it uses."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@safe_contextmanager
def _offline_unless_in_reach() -> Iterator[None]:
    """Use what the cache holds, at once: the hub's client retries for half a minute."""
    import datasets
    from huggingface_hub import constants

    modules: tuple[Any, ...] = (constants, datasets.config)
    before = [(module, module.HF_HUB_OFFLINE) for module in modules]
    out_of_reach = not hub_reachable()
    try:
        for module, offline in before:
            module.HF_HUB_OFFLINE = offline or out_of_reach
        yield
    finally:
        for module, offline in before:
            module.HF_HUB_OFFLINE = offline
