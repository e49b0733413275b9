"""Runs: a notebook executed with parameters, in a folder of its own."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import patch

from filelock import FileLock

from ..checks import (
    Flag,
    Location,
    OneOf,
    as_json,
    checked,
    first_line,
    writable_file,
    writable_folder,
)
from ..store import atomic_write, read_cached, read_json
from .parameters import (
    RUNNER_PARAMETERS,
    check_parameters,
    default_parameters,
    find_notebook,
    resolve_paths,
    smoke_parameters,
)
from .recording import NOTEBOOK_VARIABLE
from .records import (
    RECORD,
    environment,
    files_below,
    own_files,
    own_record,
    read_record,
    write_record,
)


@checked(out_dir=Location() | OneOf([""]), smoke=Flag())
def run_notebook(
    name: str | os.PathLike,
    parameters: Mapping[str, object] | None = None,
    out_dir: str | os.PathLike = "",
    *,
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
        Run folder. By default a new one: ``runs/NAME/TIME``, of a smoke run
        ``runs/smoke/NAME/TIME``, of a failed one ``runs/failed/NAME/TIME``.
    smoke : bool
        Use the small parameters of ``notebooks/smoke.yaml`` where `parameters` gives no others;
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
    notebook, given = _prepare(name, parameters, smoke)
    runs = Path.cwd() / "runs"
    if out_dir != "":
        folder = writable_folder(out_dir).resolve()
        _require_executed(folder / notebook.name)
    else:
        folder = _new_folder((runs / "smoke" if smoke else runs) / notebook.stem)
    reason = _execute(notebook, given, folder, smoke)
    if reason and out_dir == "":
        folder = folder.replace(_new_folder(runs / "failed" / notebook.stem))
    _raise(reason, notebook, folder)
    return folder


@checked(out_dir=Location(), smoke=Flag())
def run_once(
    name: str | os.PathLike,
    parameters: Mapping[str, object],
    out_dir: str | os.PathLike,
    *,
    smoke: bool = False,
) -> Path:
    """As `run_notebook`, unless the folder already holds the finished run: a step of a sweep.

    The run works in a scratch folder that takes its name when it is finished, so a folder of that
    name is complete. Whoever else wants the same run meanwhile is blocked until it is finished. A
    killed run is continued in its scratch folder, with what its notebook has kept there.

    Parameters
    ----------
    name, parameters, smoke
        As in `run_notebook`.
    out_dir : str or path
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
    notebook, given = _prepare(name, parameters, smoke)
    folder = writable_folder(out_dir).resolve()
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
    """Move a run to its folder; files of an earlier run there are replaced, a user's are kept."""
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


def _prepare(
    name: str | os.PathLike, parameters: Mapping[str, object] | None, smoke: bool
) -> tuple[Path, dict]:
    """The notebook's file, and its parameters: smoke values, checked ones, paths made absolute."""
    notebook = find_notebook(name)
    plain = as_json({} if parameters is None else parameters, unknown=lambda value: value)
    given = check_parameters(notebook, plain)
    small = smoke_parameters(notebook) if smoke else {}
    return notebook, {key: resolve_paths(key, value) for key, value in (small | given).items()}


def _raise(reason: str | None, notebook: Path, folder: Path) -> None:
    if reason:
        raise RuntimeError(f"{notebook.stem} failed: {reason}; see {folder / notebook.name}")


def _new_folder(home: Path) -> Path:
    """A new folder named by the time."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    for name in itertools.chain([stamp], (f"{stamp}-{n}" for n in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            (home / name).mkdir(parents=True)
            return home / name
    raise AssertionError("there is always another name")


def _execute(notebook: Path, parameters: dict, folder: Path, smoke: bool) -> str | None:
    """Run a notebook and complete its record; return why it failed, if it did."""
    started = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    read_cached(folder / RECORD, own_record)  # refuses a file that is no record
    (folder / RECORD).unlink(missing_ok=True)  # of an earlier run, should this one be killed
    defaults = default_parameters(notebook)
    reason = _papermill(notebook, _injected(notebook, defaults, parameters, folder), folder)
    try:
        content = read_record(folder)
    except ValueError:  # it failed before it recorded anything, or never records
        content = {
            "notebook": notebook.stem,
            "metrics": {},
            "tables": [],
            "parameters": {k: v for k, v in defaults.items() if k not in RUNNER_PARAMETERS},
            **environment(started),
        }
    content["parameters"] |= parameters
    content |= {
        "status": "failed" if reason else "completed",
        "error": reason,
        "smoke": smoke,
        "seed": content["parameters"].get("seed"),
        "wall_seconds": round(time.time() - started, 1),
        "files": files_below(folder),
    }
    write_record(folder, content)
    return reason


def _injected(notebook: Path, defaults: dict, parameters: dict, folder: Path) -> dict:
    """Parameters for papermill: given ones, the runner's, and defaults that are relative paths."""
    runner = {"out_dir": str(folder), "interactive": False}
    paths = {}
    for name, value in defaults.items():
        if isinstance(value, str) and "/" in value and (notebook.parent / value).exists():
            paths[name] = str((notebook.parent / value).resolve())
    return paths | parameters | {k: v for k, v in runner.items() if k in defaults}


def _papermill(notebook: Path, parameters: dict, folder: Path) -> str | None:
    """Execute a notebook into a folder; return why it failed, if it did."""
    import papermill  # slow to import, and notebooks import this module too
    from jupyter_client.kernelspec import NoSuchKernel
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    try:
        with patch.dict(os.environ, {NOTEBOOK_VARIABLE: str(notebook)}):
            papermill.execute_notebook(
                _escaped(notebook),
                _escaped(folder / notebook.name),
                parameters=parameters,
                kernel_name="python3",
                language="python",  # which a notebook of one's own need not say
                cwd=str(folder),
                progress_bar=sys.stderr.isatty(),
                extra_arguments=["--log-level=ERROR"],  # or it warns of TCP, every time
            )
    except PapermillExecutionError as error:
        return f"{error.ename}: {error.evalue}"
    except DeadKernelError as error:
        return first_line(error)
    except NoSuchKernel:
        return (
            "no Jupyter kernel 'python3' here; install it with "
            f"`{sys.executable} -m ipykernel install --sys-prefix`"
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RuntimeError(  # there is no room for a record either
            f"{notebook.stem}: the disk of {folder} is full; free some space and run it again, or "
            "name another folder (--out)"
        ) from error
    return None


def _escaped(path: Path) -> str:
    """A path for papermill, which would replace a parameter's name in braces by its value."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _require_executed(path: Path) -> None:
    """Refuse to write an executed notebook over one that no run wrote: the user's own.

    Raises
    ------
    FileExistsError
        If there is such a notebook.
    """
    if writable_file(path).exists():
        content = read_json(path) if path.stat().st_size else {}
        metadata = content.get("metadata") if isinstance(content, dict) else None
        if not isinstance(metadata, dict) or "papermill" not in metadata:
            raise FileExistsError(
                f"{path} would be replaced by the executed notebook; choose another folder (--out)"
            )
