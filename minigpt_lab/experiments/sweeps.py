"""Sweeps: every run of a grid once, in processes of this machine or on a Ray cluster.

A sweep folder holds one folder per finished run, named by its id; the same grid (or a larger one)
on the same folder runs only what is missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pandas as pd
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ..checks import Instance, Integer, Location, OneOf, Text, checked, first_line, writable_folder
from .grids import Grid, run_id
from .parameters import NOTEBOOKS, find_notebook
from .records import (
    cell,
    discard_run,
    files_below,
    read_record,
    surroundings,
    varying,
    write_record,
)
from .runs import install_run, is_finished, run_once

EXECUTORS = ("local", "ray")
_RETRIES = 5  # of a run whose Ray node died


@checked(
    grid=Instance(Grid, "read_grid reads one from its file"), out_dir=Location() | OneOf([""]),
    jobs=Integer(1) | None, executor=OneOf(EXECUTORS), address=Text() | None,
)  # fmt: skip
def sweep(
    grid: Grid,
    out_dir: str | os.PathLike = "",
    jobs: int | None = None,
    executor: str = "local",
    address: str | None = None,
) -> pd.DataFrame:
    """Do the runs of a grid that are not finished yet; one that fails does not stop the others.

    Parameters
    ----------
    grid : Grid
        From `minigpt_lab.experiments.grids.read_grid`.
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
    jobs = grid.jobs if jobs is None else jobs
    home = Path("runs/smoke/sweeps" if grid.smoke else "runs/sweeps")
    folder = writable_folder(out_dir or home / grid.name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        skipped = {run for run in grid.runs if is_finished(folder / run)}
        todo = [run for run in grid.runs if run not in skipped]
        for run in todo:
            discard_run(folder / "failed" / run)  # it gets another chance
        if executor == "ray" and todo:
            work = _on_ray(grid, todo, folder, address)
        else:
            work = _here(grid, todo, folder, jobs)
        bar = tqdm(total=len(grid.runs), initial=len(skipped), desc=grid.name, unit="run")
        with contextlib.closing(work), bar:
            failed = 0
            for run, words in work:
                outcome = _outcome(grid, run, folder, words)
                if outcome["status"] == "failed":
                    failed += 1
                    bar.write(f"{run} failed: {outcome['error']}", file=sys.stderr)
                    bar.set_postfix(failed=failed)
                bar.update()
        return _summary(grid, folder, skipped)


def _summary(grid: Grid, folder: Path, skipped: set[str]) -> pd.DataFrame:
    rows = []
    for run, parameters in grid.runs.items():
        outcome = _outcome(grid, run, folder, "it did not start")
        status = "skipped" if run in skipped else outcome["status"]
        given = {name: cell(value) for name, value in parameters.items()}
        facts = {"seconds": outcome["wall_seconds"], "error": outcome["error"]}
        rows.append({"run": run, **given, "status": status, **facts})
    table = pd.DataFrame(rows)
    names = varying(table, list(next(iter(grid.runs.values()))))
    table = table[["run", *names, "status", "seconds", "error"]]
    table.attrs["folder"] = str(folder)
    return table


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One sweep at a time in a folder; the lock of a killed one is free again."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        with lock:
            yield
    except Timeout:
        raise RuntimeError(
            f"another sweep works in {folder}; wait for it, or give this one another folder (--out)"
        ) from None


def _outcome(grid: Grid, run: str, folder: Path, words: str) -> dict:
    """The record of a run, finished or failed; one that died without it gets one now."""
    scratch, failed = folder / ".unfinished" / run, folder / "failed" / run
    for home in (folder / run, failed):
        with contextlib.suppress(ValueError):
            return read_record(home)
    content = {
        "notebook": grid.notebook.stem, "parameters": grid.runs[run], "metrics": {}, "tables": [],
        "status": "failed", "error": words, "smoke": grid.smoke, **surroundings(time.time()),
    }  # fmt: skip
    if scratch.is_dir():  # the notebook as far as it came
        install_run(scratch, failed)
    write_record(failed, content | {"files": files_below(failed) if failed.is_dir() else []})
    return content


def _here(grid: Grid, todo: list[str], folder: Path, jobs: int) -> Iterator[tuple[str, str]]:
    """A process per run, `jobs` at a time; yields each run that ended, and its last words."""
    waiting, running = list(todo), {}
    logs = folder / ".logs"
    logs.mkdir(exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(max(1, int(grid.cpus)))}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                command = [sys.executable, "-m", "minigpt_lab", "run", str(grid.notebook), "--once"]
                command += ["--out", str(folder / run), *(["--smoke"] * grid.smoke)]
                for name, value in grid.runs[run].items():
                    command += ["-p", name, json.dumps(value)]
                with (logs / run).open("wb") as log:
                    running[run] = subprocess.Popen(
                        command, env=os.environ | threads, stdout=subprocess.DEVNULL, stderr=log,
                        start_new_session=True,  # Ctrl-C is for this process, which passes it on
                    )  # fmt: skip
            for run in [run for run, process in running.items() if process.poll() is not None]:
                yield run, _last_words(logs / run, running.pop(run).returncode)
            time.sleep(0.1)
    finally:
        for process in running.values():
            process.terminate()  # its kernel sees that and ends within a second
        for process in running.values():
            process.wait()


def _last_words(log: Path, code: int) -> str:
    """Why a process that left no record ended."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    killed = f"killed by signal {-code} (out of memory?); " if code < 0 else ""
    return killed + said.removeprefix("error: ")


def _on_ray(
    grid: Grid, todo: list[str], folder: Path, address: str | None
) -> Iterator[tuple[str, str]]:
    """A task per run on a cluster; yields each run that ended, and its last words."""
    try:
        import ray
    except ImportError:
        raise ValueError("--executor ray needs Ray; install it: pip install .[ray]") from None
    try:
        if address:  # Ray itself asks for minutes before it gives up
            place = urlsplit(address if "://" in address else f"ray://{address}")
            socket.create_connection((place.hostname, place.port), timeout=10).close()
        ray.init(address or "auto", log_to_driver=False, ignore_reinit_error=True)
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"no Ray cluster at {address or 'this machine'} ({first_line(error)}); start one with "
            "`ray start --head`, or give --address"
        ) from None
    wanted = {"CPU": grid.cpus, "GPU": grid.gpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(has.get(kind, 0) >= n for kind, n in wanted.items()) for has in nodes):
        warnings.warn(f"no node of the cluster has {wanted} yet; runs wait for one", stacklevel=2)
    return _ray_tasks(ray, grid, todo, folder)


def _ray_tasks(ray, grid: Grid, todo: list[str], folder: Path) -> Iterator[tuple[str, str]]:
    remote = ray.remote(_on_node).options(
        num_cpus=grid.cpus, num_gpus=grid.gpus, max_retries=_RETRIES, retry_exceptions=False
    )
    series = grid.notebook.parent == NOTEBOOKS  # which every node has, perhaps elsewhere
    name = grid.notebook.stem if series else str(grid.notebook)
    pending = {
        remote.remote(name, grid.runs[run], str(folder / run), grid.smoke): run for run in todo
    }
    try:
        while pending:
            (done, *_), _ = ray.wait(list(pending), num_returns=1)
            try:
                words = ray.get(done)
            except ray.exceptions.RayError as error:
                words = first_line(error)
            yield pending.pop(done), words
    finally:
        for task in pending:
            ray.cancel(task)
        ray.shutdown()


def _on_node(name: str, parameters: dict, folder: str, smoke: bool) -> str:
    """What a Ray node does of a sweep; returns the run's last words."""
    home = Path(folder).parent
    if not (home / ".lock").exists():
        return f"{home} is not to be seen from a node; put the sweep on a folder that all share"
    if run_id(find_notebook(name), parameters) != Path(folder).name:
        return f"{name} is another version on a node; install the same commit everywhere"
    try:
        run_once(name, parameters, folder, smoke)
    except (ValueError, RuntimeError, OSError) as error:
        return first_line(error)
    return ""
