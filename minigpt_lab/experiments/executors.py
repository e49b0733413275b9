"""Executors of a sweep: each starts its runs and yields those that end, with their last words."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Generator
from pathlib import Path
from urllib.parse import urlsplit

from ..checks import first_line
from .grids import Grid, run_id
from .parameters import NOTEBOOKS, find_notebook
from .runs import run_once

Ended = Generator[tuple[str, str], None, None]  # id of a run, its last words
_RAY_RETRIES = 5  # of a run whose node died


def run_locally(grid: Grid, runs: list[str], folder: Path, jobs: int) -> Ended:
    """Start a process per run, `jobs` at a time.

    Yields
    ------
    run, message : str
        Id of a run that ended, and the last line that its process wrote.
    """
    pending, running = list(runs), {}
    logs = folder / ".logs"
    logs.mkdir(exist_ok=True)
    try:
        while pending or running:
            while pending and len(running) < jobs:
                run = pending.pop(0)
                running[run] = _start(grid, run, folder, logs / run)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                yield run, _last_line(logs / run, running.pop(run).returncode)
            time.sleep(0.1)
    finally:
        for process in running.values():
            process.terminate()  # its kernel sees that and ends within a second
        for process in running.values():
            process.wait()


def _start(grid: Grid, run: str, folder: Path, log: Path) -> subprocess.Popen:
    """The command line's ``run --once`` in a process of its own."""
    command = [sys.executable, "-m", "minigpt_lab", "run", str(grid.notebook), "--once"]
    command += ["--out", str(folder / run), *(["--smoke"] * grid.smoke)]
    for name, value in grid.runs[run].items():
        command += ["-p", f"{name}={json.dumps(value)}"]
    with log.open("wb") as stderr:
        return subprocess.Popen(
            command,
            env={"OMP_NUM_THREADS": str(max(1, int(grid.cpus)))} | os.environ,  # or the user's own
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which passes it on
        )


def _last_line(log: Path, code: int) -> str:
    """Why a process that left no record ended."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    killed = f"killed by signal {-code} (out of memory?); " if code < 0 else ""
    return killed + last.removeprefix("error: ")


def run_on_ray(grid: Grid, runs: list[str], folder: Path, address: str | None) -> Ended:
    """Start a task per run on a cluster; yields as `run_locally`.

    Raises
    ------
    ValueError
        If Ray is not installed.
    RuntimeError
        If no cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("--executor ray needs Ray; install it: pip install .[ray]") from None
    try:
        if address:  # ask first: Ray itself would try for minutes
            place = urlsplit(address if "://" in address else f"ray://{address}")
            socket.create_connection((place.hostname, place.port), timeout=10).close()
        ray.init(address or "auto", log_to_driver=False, ignore_reinit_error=True)
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"no Ray cluster at {address or 'this machine'} ({first_line(error)}); start one with "
            "`ray start --head`, or give --address"
        ) from None
    needed = {"CPU": grid.cpus, "GPU": grid.gpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(has.get(kind, 0) >= n for kind, n in needed.items()) for has in nodes):
        warnings.warn(f"no node of the cluster has {needed} yet; runs are queued", stacklevel=2)
    return _ray_tasks(ray, grid, runs, folder)


def _ray_tasks(ray, grid: Grid, runs: list[str], folder: Path) -> Ended:
    task = ray.remote(_run_on_node).options(
        num_cpus=grid.cpus, num_gpus=grid.gpus, max_retries=_RAY_RETRIES, retry_exceptions=False
    )
    # every node has the series, perhaps in another folder
    name = grid.notebook.stem if grid.notebook.parent == NOTEBOOKS else str(grid.notebook)
    pending = {
        task.remote(name, grid.runs[run], str(folder / run), grid.smoke): run for run in runs
    }
    try:
        while pending:
            (done, *_), _ = ray.wait(list(pending), num_returns=1)
            try:
                message = ray.get(done)
            except ray.exceptions.RayError as error:
                message = first_line(error)
            yield pending.pop(done), message
    finally:
        for reference in pending:
            ray.cancel(reference)
        ray.shutdown()


def _run_on_node(name: str, parameters: dict, folder: str, smoke: bool) -> str:
    """Do a run on a node; return why it failed, if it did."""
    home = Path(folder).parent
    if not (home / ".lock").exists():
        return f"{home} is not to be seen from a node; put the sweep on a folder that all share"
    if run_id(find_notebook(name), parameters) != Path(folder).name:
        return f"{name} is another version on a node; install the same commit everywhere"
    try:
        run_once(name, parameters, folder, smoke=smoke)
    except (ValueError, RuntimeError, OSError) as error:
        return first_line(error)
    return ""
