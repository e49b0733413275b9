"""Sweeps: every run of a grid once, in processes of this machine or on a Ray cluster.

A sweep folder holds one folder per finished run, named by its id; the same grid (or a larger one)
on the same folder runs only what is missing.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ..checks import Instance, Integer, Location, OneOf, Text, checked, writable_folder
from .executors import run_locally, run_on_ray
from .grids import Grid
from .records import (
    as_cell,
    blank_record,
    discard_run,
    files_below,
    read_record,
    varying,
    write_record,
)
from .runs import install_run, is_finished

EXECUTORS = ("local", "ray")


@checked(
    grid=Instance(Grid, "read_grid reads one from its file"),
    out_dir=Location() | None,
    jobs=Integer(1) | None,
    executor=OneOf(EXECUTORS),
    address=Text() | None,
)
def sweep(
    grid: Grid,
    out_dir: str | os.PathLike | None = None,
    *,
    jobs: int | None = None,
    executor: str = "local",
    address: str | None = None,
) -> pd.DataFrame:
    """Do the runs of a grid that are not finished yet; a failed run does not stop the others.

    Parameters
    ----------
    grid : Grid
        From `read_grid`.
    out_dir : str or path, optional
        Sweep folder; by default ``runs/sweeps/NAME``, of a smoke grid ``runs/smoke/sweeps/NAME``.
        On Ray every node must see it under the same path.
    jobs : int, optional
        Runs at a time on this machine; by default what the grid says.
    executor : {"local", "ray"}
        A process per run here, or a task per run on an existing Ray cluster.
    address : str, optional
        Of the cluster; by default the one that this machine belongs to.

    Returns
    -------
    pandas.DataFrame
        A row per run: ``run``, the parameters that vary, ``status`` (``"completed"``,
        ``"skipped"`` or ``"failed"``), ``seconds``, ``error``; ``attrs["folder"]`` is the sweep
        folder.

    Raises
    ------
    ValueError
        If an argument is out of range or Ray is not installed.
    RuntimeError
        If another sweep works in the folder, or no cluster answers.
    """
    home = Path("runs/smoke/sweeps" if grid.smoke else "runs/sweeps")
    folder = writable_folder(out_dir or home / grid.name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        skipped = {run for run in grid.runs if is_finished(folder / run)}
        missing = [run for run in grid.runs if run not in skipped]
        for run in missing:
            discard_run(folder / "failed" / run)  # it gets another chance
        if executor == "ray" and missing:
            ended = run_on_ray(grid, missing, folder, address)
        else:
            ended = run_locally(grid, missing, folder, jobs or grid.jobs)
        bar = tqdm(total=len(grid.runs), initial=len(skipped), desc=grid.name, unit="run")
        with contextlib.closing(ended), bar:
            for run, message in ended:
                outcome = _outcome(grid, run, folder, message)
                if outcome["status"] == "failed":
                    bar.write(f"{run} failed: {outcome['error']}", file=sys.stderr)
                bar.update()
        return _summary(grid, folder, skipped)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other sweeps out of a folder; the lock of a killed one is free again."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise RuntimeError(
            f"another sweep works in {folder}; try again when it has ended, or give this one "
            "another folder (--out)"
        ) from None


def _outcome(grid: Grid, run: str, folder: Path, message: str) -> dict:
    """The record of a run that ended; one that died without a record gets one now."""
    scratch, failed = folder / ".unfinished" / run, folder / "failed" / run
    for home in (folder / run, failed):
        with contextlib.suppress(ValueError):
            return read_record(home)
    if scratch.is_dir():  # the notebook as far as it came
        install_run(scratch, failed)
    content = blank_record(grid.notebook, grid.runs[run], time.time())
    content |= {"status": "failed", "error": message, "smoke": grid.smoke}
    content["files"] = files_below(failed) if failed.is_dir() else []
    write_record(failed, content)
    return content


def _summary(grid: Grid, folder: Path, skipped: set[str]) -> pd.DataFrame:
    """A row per run of a sweep that has ended."""
    rows = []
    for run, parameters in grid.runs.items():
        outcome = _outcome(grid, run, folder, "it did not start")
        status = "skipped" if run in skipped else outcome["status"]
        cells = {name: as_cell(value) for name, value in parameters.items()}
        rows.append({"run": run, **cells, "status": status, "error": outcome["error"]})
        rows[-1]["seconds"] = outcome["wall_seconds"]
    table = pd.DataFrame(rows)
    names = varying(table, list(next(iter(grid.runs.values()))))
    table = table[["run", *names, "status", "seconds", "error"]]
    table.attrs["folder"] = str(folder)
    return table
