"""Runs: a notebook executed with parameters, in a folder of its own."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import patch

from filelock import FileLock

from ..checks import Flag, Location, checked, first_line, writable_folder
from ..store import atomic_write, explain_disk_errors, read_cached
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
    blank_record,
    files_below,
    own_files,
    own_record,
    read_record,
    write_record,
)


@checked(out_dir=Location() | None, smoke=Flag())
def run_notebook(
    name: str | os.PathLike,
    parameters: Mapping[str, object] | None = None,
    out_dir: str | os.PathLike | None = None,
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
    own = Path(notebook.stem) / datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    folder = writable_folder(out_dir or (runs / "smoke" if smoke else runs) / own).resolve()
    executed = folder / notebook.name
    if executed.exists() and '"papermill"' not in executed.read_text("utf-8", "replace"):
        raise FileExistsError(
            f"{executed} would be replaced by the executed notebook; choose another folder (--out)"
        )
    failed = folder if out_dir else runs / "failed" / own
    return _execute(notebook, given, smoke, scratch=folder, done=folder, failed=failed)


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
    lock = folder.parent / ".locks" / folder.name
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        if is_finished(folder):
            return folder
        scratch, failed = (folder.parent / home / folder.name for home in (".unfinished", "failed"))
        return _execute(notebook, given, smoke, scratch=scratch, done=folder, failed=failed)


def install_run(scratch: Path, final: Path) -> None:
    """Move a run to its folder; files of an earlier run there are replaced, a user's are kept."""
    if final.is_dir():
        with atomic_write(final, own_files) as staging:
            scratch.replace(staging)
    else:
        final.parent.mkdir(parents=True, exist_ok=True)
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
    given = check_parameters(notebook, {} if parameters is None else parameters)
    small = smoke_parameters(notebook) if smoke else {}
    return notebook, {key: resolve_paths(key, value) for key, value in (small | given).items()}


def _execute(
    notebook: Path, parameters: dict, smoke: bool, *, scratch: Path, done: Path, failed: Path
) -> Path:
    """Run a notebook in a scratch folder and complete its record; the folder is then renamed.

    Raises
    ------
    RuntimeError
        If it failed.
    """
    started = time.time()
    scratch.mkdir(parents=True, exist_ok=True)
    read_cached(scratch / RECORD, own_record)  # refuses a file that is no record
    (scratch / RECORD).unlink(missing_ok=True)  # of an earlier run, should this one be killed
    defaults = default_parameters(notebook)
    injected = _injected(notebook, defaults, parameters, scratch)
    with explain_disk_errors(scratch):  # no room for a record either
        reason = _papermill(notebook, injected, scratch)
    try:
        content = read_record(scratch)
    except ValueError:  # it failed before it recorded anything, or never records
        own = {k: v for k, v in defaults.items() if k not in RUNNER_PARAMETERS}
        content = blank_record(notebook, own, started)
    given = content["parameters"] | parameters
    content |= {"parameters": given, "seed": given.get("seed"), "smoke": smoke, "error": reason}
    content |= {"status": "failed" if reason else "completed", "files": files_below(scratch)}
    content["wall_seconds"] = round(time.time() - started, 1)
    write_record(scratch, content)
    final = failed if reason else done
    if final != scratch:
        install_run(scratch, final)
    if reason:
        raise RuntimeError(f"{notebook.stem} failed: {reason}; see {final / notebook.name}")
    return final


def _injected(notebook: Path, defaults: dict, parameters: dict, folder: Path) -> dict:
    """Parameters for papermill: given ones, the runner's, and defaults that are relative paths."""
    runner = {"out_dir": str(folder), "interactive": False}
    paths = {
        name: str((notebook.parent / value).resolve())
        for name, value in defaults.items()
        if isinstance(value, str) and "/" in value and (notebook.parent / value).exists()
    }
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
        install = f"{sys.executable} -m ipykernel install --sys-prefix"
        return f"no Jupyter kernel 'python3' here; install it with `{install}`"
    return None


def _escaped(path: Path) -> str:
    """A path for papermill, which would replace a parameter's name in braces by its value."""
    return str(path).replace("{", "{{").replace("}", "}}")
