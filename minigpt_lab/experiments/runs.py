"""Notebooks as experiments: run one with parameters, keep what it measured."""

from __future__ import annotations

import errno
import itertools
import os
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock
from transformers import PreTrainedModel

from ..checks import (
    Flag,
    Instance,
    Location,
    Model,
    OneOf,
    Text,
    as_json,
    checked,
    first_line,
    invalid,
    to_python,
    writable_file,
    writable_folder,
)
from ..domains import Domain
from ..models import fingerprint, label
from ..store import atomic_write, content_hash, read_cached, read_json
from .parameters import (
    CIRCUMSTANCES,
    absolute,
    check_parameters,
    default_parameters,
    find_notebook,
    smoke_parameters,
)
from .records import (
    RECORD,
    files_below,
    own_files,
    own_record,
    read_record,
    surroundings,
    write_record,
)

_started = time.time()  # of the kernel, to all practical purposes


@checked(out_dir=Location() | OneOf([""]), smoke=Flag())
def run_notebook(
    name: str | os.PathLike,
    parameters: Mapping[str, object] | None = None,
    out_dir: str | os.PathLike = "",
    smoke: bool = False,
) -> Path:
    """Execute a notebook with parameters, headlessly.

    Parameters
    ----------
    name : str or path
        As `find_notebook` takes it.
    parameters : mapping, optional
        Values for names in its parameters cell, of the kind of their defaults. Paths are looked
        for from the working folder.
    out_dir : str or path, optional
        Run folder, used as it is. By default a new one: ``runs/NAME/TIME``, of a smoke run
        ``runs/smoke/NAME/TIME``, of a failed one ``runs/failed/NAME/TIME``.
    smoke : bool
        With the small parameters of ``notebooks/smoke.yaml`` where `parameters` gives no others;
        the record says so.

    Returns
    -------
    pathlib.Path
        The run folder.

    Raises
    ------
    ValueError
        If there is no such notebook, it has no such parameter, or a value is of another kind.
    RuntimeError
        If a cell fails or no kernel starts; the record in the run folder says ``"failed"``, the
        executed notebook shows where.
    """
    notebook, given = _prepared(name, parameters, smoke)
    runs = Path.cwd() / "runs"
    home = runs / "smoke" if smoke else runs
    named = out_dir != ""
    if named:
        folder = writable_folder(out_dir).resolve()
        _require_no_other(folder / notebook.name)
    else:
        folder = _new_folder(home / notebook.stem)
    reason = _execute(notebook, given, folder, smoke)
    if reason and not named:
        folder = folder.replace(_new_folder(runs / "failed" / notebook.stem))
    _raise(reason, notebook, folder)
    return folder


@checked(folder=Location(), smoke=Flag())
def run_once(
    name: str | os.PathLike,
    parameters: Mapping[str, object],
    folder: str | os.PathLike,
    smoke: bool = False,
) -> Path:
    """As `run_notebook`, unless the folder already holds the finished run: what a sweep does.

    The run works in a scratch folder that takes its name when it is finished, so a folder of that
    name is whole. Whoever else wants the same run meanwhile waits, and then finds it finished. A
    killed run goes on in its scratch folder: what its notebook keeps there is not done again.

    Parameters
    ----------
    name, parameters, smoke
        Of `run_notebook`.
    folder : str or path
        Run folder. A failed run goes to ``failed/`` beside it.

    Returns
    -------
    pathlib.Path
        The run folder.

    Raises
    ------
    ValueError, RuntimeError
        As `run_notebook`.
    """
    notebook, given = _prepared(name, parameters, smoke)
    folder = writable_folder(folder).resolve()
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise FileExistsError(f"{folder} holds something that is no run; choose another folder")
    scratch = folder.parent / ".unfinished" / folder.name
    lock = folder.parent / ".locks" / folder.name
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if is_finished(folder):
            return folder
        reason = _execute(notebook, given, scratch, smoke)
        final = folder.parent / "failed" / folder.name if reason else folder
        install_run(scratch, final)
    _raise(reason, notebook, final)
    return final


def install_run(scratch: Path, final: Path) -> None:
    """Give a run its name; files of an earlier one there go, a user's are kept."""
    if final.is_dir():
        with atomic_write(final, own_files) as staging:
            scratch.replace(staging)
    else:
        final.parent.mkdir(exist_ok=True)
        scratch.replace(final)


def is_finished(folder: Path) -> bool:
    """Whether a run folder holds a completed run."""
    try:
        return read_record(folder)["status"] == "completed"
    except ValueError:
        return False


def _prepared(name, parameters, smoke) -> tuple[Path, dict]:
    notebook = find_notebook(name)
    given = as_json({} if parameters is None else parameters, unknown=lambda value: value)
    check_parameters(notebook, given)
    small = smoke_parameters(notebook) if smoke else {}
    return notebook, {key: absolute(key, value) for key, value in {**small, **given}.items()}


def _raise(reason: str | None, notebook: Path, folder: Path) -> None:
    if reason:
        raise RuntimeError(f"{notebook.stem} failed: {reason}; see {folder / notebook.name}")


def _new_folder(home: Path) -> Path:
    """A folder named by the time, that no other run has."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    names = itertools.chain([stamp], (f"{stamp}-{more}" for more in itertools.count(2)))
    folder = next(home / name for name in names if not (home / name).exists())
    folder.mkdir(parents=True)
    return folder


def _execute(notebook: Path, parameters: dict, folder: Path, smoke: bool) -> str | None:
    """Run a notebook and complete its record; return why it failed, if it did."""
    import papermill  # slow to import, and notebooks import this module too
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    started, reason = time.time(), None
    folder.mkdir(parents=True, exist_ok=True)
    read_cached(folder / RECORD, own_record, ".json")  # or it is none of ours
    (folder / RECORD).unlink(missing_ok=True)  # of an earlier run, should this one be killed
    known = default_parameters(notebook)
    circumstances = {"out_dir": str(folder), "interactive": False}
    handed = {key: _beside(notebook, value) for key, value in known.items()}
    handed = {key: handed[key] for key in known if handed[key] != known[key]} | parameters
    handed |= {key: value for key, value in circumstances.items() if key in known}
    try:
        papermill.execute_notebook(
            _literal(notebook),
            _literal(folder / notebook.name),
            parameters=handed,
            kernel_name="python3",
            language="python",  # which a notebook of one's own need not say
            cwd=str(folder),
            progress_bar=sys.stderr.isatty(),
            extra_arguments=["--log-level=ERROR"],  # else it warns of TCP, every time
        )
    except PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}"
    except DeadKernelError as error:
        reason = first_line(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RuntimeError(  # nor is there room for a record
            f"{notebook.stem}: the disk of {folder} is full; free some space and run it again, or "
            "name another folder (--out)"
        ) from error
    except NoSuchKernel:
        reason = (
            "no Jupyter kernel 'python3' here; install it with "
            f"`{sys.executable} -m ipykernel install --sys-prefix`"
        )
    try:
        content = read_record(folder)
    except ValueError:  # it failed before it recorded anything, or is none of the series
        content = {
            "notebook": notebook.stem, "metrics": {}, "tables": [], **surroundings(started),
            "parameters": {key: known[key] for key in known if key not in CIRCUMSTANCES},
        }  # fmt: skip
    content["parameters"] |= parameters
    content |= {"status": "failed" if reason else "completed", "error": reason, "smoke": smoke}
    content |= {"wall_seconds": round(time.time() - started, 1), "files": files_below(folder)}
    write_record(folder, content | {"seed": content["parameters"].get("seed")})
    return reason


def _require_no_other(path: Path) -> None:
    """Refuse to write an executed notebook over one that no run wrote: the user's own.

    Raises
    ------
    FileExistsError
        If there is such a notebook.
    """
    if writable_file(path).exists():
        content = read_json(path) if path.stat().st_size else {}
        facts = content.get("metadata") if isinstance(content, dict) else None
        if not isinstance(facts, dict) or "papermill" not in facts:
            raise FileExistsError(
                f"{path} would be replaced by the executed notebook; choose another folder (--out)"
            )


def _literal(path: Path) -> str:
    """A path for papermill, which would replace a parameter's name in braces by its value."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _beside(notebook: Path, default: object) -> object:
    """A default that is a path from the notebook's folder, made absolute."""
    if not isinstance(default, str) or "/" not in default:
        return default
    path = notebook.parent / default
    return str(path.resolve()) if path.exists() else default


@checked(notebook=Text(), namespace=Instance(Mapping), model=Model(lock=False) | None)
def record(
    notebook: str,
    namespace: Mapping[str, object],
    model: PreTrainedModel | None,
    protocol: str,
    metrics: Mapping[str, object],
    tables: Mapping[str, pd.DataFrame] | None = None,
) -> Path:
    """Write what a notebook measured: ``record.json`` and one CSV per table.

    Parameters
    ----------
    notebook : str
        Its name.
    namespace : mapping
        The notebook's ``globals()``: the values of its parameters, ``out_dir`` among them, and the
        domains whose hashes are recorded.
    model : transformers.PreTrainedModel or None
        The dense model; None for a notebook that has none.
    protocol : str
        How perplexities were measured.
    metrics : mapping
        Numbers worth comparing between runs.
    tables : mapping, optional
        Name to frame.

    Returns
    -------
    pathlib.Path
        Of the record.

    Raises
    ------
    ValueError
        If a metric is no number, a table no frame, or the namespace lacks a parameter.
    """
    metrics = {name: _metric(name, value) for name, value in _mapping("metrics", metrics).items()}
    tables = _mapping("tables", {} if tables is None else tables)
    for name, table in tables.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise invalid("a table's name", name, "a file's name without its suffix")
        Instance(pd.DataFrame)(f"tables[{name!r}]", table)
    beside = Path(f"{notebook}.ipynb")  # a user's own notebook, or the copy under execution
    known = default_parameters(find_notebook(beside if beside.is_file() else notebook))
    absent = sorted({*known, "out_dir"} - namespace.keys())
    if absent:
        raise ValueError(f"namespace lacks {', '.join(absent)}; pass the notebook's globals()")
    parameters = {name: namespace[name] for name in known if name not in CIRCUMSTANCES}
    folder = Path(str(namespace["out_dir"]))
    for name, table in tables.items():
        with atomic_write(writable_file(folder / f"{name}.csv")) as staging:
            table.to_csv(staging, index=False)
    content = {
        "notebook": notebook,
        "status": "completed",
        "error": None,
        "smoke": False,
        "parameters": parameters,
        "seed": parameters.get("seed"),
        "metrics": metrics,
        "protocol": protocol,
        "model": None,
        "device": None,
        "data": {domain.name: _hashes(domain) for domain in _domains(namespace.values())},
        "tables": list(tables),
        **surroundings(_started),
    }
    if model is not None:
        facts = {"label": label(model), "sha256": fingerprint(model), "dtype": str(model.dtype)}
        on_gpu = model.device.type == "cuda"
        more = f" ({torch.cuda.get_device_name(model.device)})" if on_gpu else ""
        content |= {"model": facts, "device": f"{model.device}{more}"}
    return write_record(folder, content)


def _mapping(name: str, value: object) -> dict:
    """A mapping, as a dict."""
    return dict(Instance(Mapping)(name, value))


def _metric(name: object, value: object) -> float | bool | None:
    """A number of Python's, or None."""
    value = to_python(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    raise invalid(f"metrics[{name!r}]", value, "a number or None")


def _domains(values) -> Iterator[Domain]:
    """Domains among some values, in lists and mappings too."""
    for value in values:
        if isinstance(value, Domain):
            yield value
        elif isinstance(value, list | tuple):
            yield from (entry for entry in value if isinstance(entry, Domain))
        elif isinstance(value, dict):
            yield from (entry for entry in value.values() if isinstance(entry, Domain))


def _hashes(domain: Domain) -> dict[str, str]:
    return {name: content_hash(list(part)) for name, part in domain.parts.items()}
