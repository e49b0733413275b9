"""Records: what a run measured and with what, as ``record.json`` in its folder.

Beside it stand the executed notebook, its tables (CSV) and its figures. Results are files; the
outputs of a notebook are only for eyes.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import time
import warnings
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from ..checks import DictOf, Flag, Instance, Location, Number, Text, as_json, checked
from ..store import DATA, read_cached, read_json, remove_empty, write_json

ROOT = DATA.parent
RECORD = "record.json"
SCHEMA = 2  # of a record's keys; 1 had none of schema, data, seed, smoke
#: Values of a record; those that may be None may be missing.
_FIELDS = {
    **dict.fromkeys(("notebook", "status"), Text()),
    "parameters": DictOf(Text()),
    "metrics": DictOf(Text(), Number() | Flag() | None),
    **dict.fromkeys(("protocol", "device", "error", "finished"), Text() | None),
    **dict.fromkeys(("model", "data", "git", "versions"), DictOf(Text()) | None),
    **{"tables": Instance(list) | None, "smoke": Flag() | None, "wall_seconds": Number() | None},
}
_PACKAGES = ("minigpt-lab", "torch", "transformers", "datasets", "peft", "numpy", "pandas")
#: Columns of the table of all runs, before the parameters.
_RUN_COLUMNS = ["run", "notebook", "status", "smoke", "finished", "seconds"]
_RUN_COLUMNS += ["model", "device", "protocol", "commit", "error"]
#: Direction in which a metric is better, by the first pattern that is in its name.
_BETTER = (
    (r"accuracy|\b(won|surely|beats_mix)\b", "higher"),
    (r"\b(bits|perplexity|loss|validation|test|recovery_tokens)\b", "lower"),
    (r"\b(stored|nonzero|paper_nonzero|size|layers)\b|share", "lower"),
    (r"^(pruned|recovered) .+ on .+", "lower"),  # perplexity of a pruned model on a text
)


def better(metric: str) -> str | None:
    """``"lower"`` or ``"higher"``, whichever is better of a metric; None where neither is."""
    return next((way for pattern, way in _BETTER if re.search(pattern, metric)), None)


def write_record(folder: Path, content: Mapping[str, object]) -> Path:
    """Write a run's record under the current schema, atomically.

    Numbers that are not finite become null; what JSON does not know becomes text.

    Raises
    ------
    FileExistsError
        If a file of that name is there that is no record: it is left alone.
    """
    read_cached(folder / RECORD, own_record)
    plain = _finite(as_json({**content, "schema": SCHEMA}))
    return write_json(folder / RECORD, plain, indent=1)


def _finite(value: object) -> object:
    """JSON without NaN and infinity, which its standard does not have."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def own_record(path: Path) -> dict:
    """A record that some version of the package wrote.

    Raises
    ------
    ValueError
        If the file is something else or damaged.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not {"schema", "notebook"} & content.keys():
        raise ValueError(f"{path} is no record of a run")
    return content


def own_files(folder: Path) -> set[str]:
    """Files (paths from the folder) that a run wrote into its folder, by its record."""
    try:
        listed = own_record(folder / RECORD).get("files")
    except (ValueError, OSError):
        return set()
    listed = map(str, listed) if isinstance(listed, list) else ()
    return {*files_below(folder)} & {RECORD, *listed}


def files_below(folder: Path) -> list[str]:
    """Paths of all files in a folder, from the folder."""
    files = [path for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
    return sorted(path.relative_to(folder).as_posix() for path in files)


def discard_run(folder: Path) -> None:
    """Remove a run's files, and the folders that this leaves empty."""
    for name in own_files(folder):
        (folder / name).unlink(missing_ok=True)
        for parent in (folder / name).parents:
            if parent == folder.parent:
                break
            remove_empty(parent)


def blank_record(notebook: Path, parameters: Mapping[str, object], started: float) -> dict:
    """Record of a run that ends now and measured nothing: parameters, time, versions, machine.

    Parameters
    ----------
    notebook : pathlib.Path
        What was run.
    parameters : mapping
        Its parameters.
    started : float
        When it began, in seconds since the epoch.
    """
    commit = _git("rev-parse", "HEAD")
    return {
        "notebook": notebook.stem,
        "status": "completed",
        "error": None,
        "smoke": False,
        "parameters": parameters,
        "seed": parameters.get("seed"),
        "metrics": {},
        "tables": [],
        "files": [],
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_seconds": round(time.time() - started, 1),
        "git": {"commit": commit, "dirty": bool(_git("status", "--porcelain")) if commit else None},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in _PACKAGES}},
        "machine": {
            "system": platform.system(),
            "processor": processor_name(),
            "cores": os.cpu_count(),
        },
    }


def processor_name() -> str:
    """The processor's name; on Linux `platform` does not know it."""
    try:
        facts = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = re.search(r"model name\s*: (.*)", facts)
    return found[1] if found else platform.processor()


def _git(*arguments: str) -> str | None:
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def read_record(folder: str | os.PathLike) -> dict:
    """The record of a run folder.

    Raises
    ------
    ValueError
        If it is missing, damaged or of another schema: one line that says which, and what to do.
    """
    path = Path(folder) / RECORD
    if not os.path.lexists(path):
        raise ValueError(f"{folder} holds no {RECORD}: no run ended there")
    try:
        content = read_json(path)
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"{path} has schema {schema}, this version reads {SCHEMA}")
        for key, check in _FIELDS.items():
            check(f"{path}: {key}", content.get(key))
    except (ValueError, OSError) as error:
        remedy = "update minigpt_lab, or delete its folder and run it again"
        raise ValueError(f"{error}; {remedy}") from None
    return content


def read_records(
    root: str | os.PathLike = "runs", *, smoke: bool = False, failed: bool = False
) -> Iterator[tuple[Path, dict]]:
    """Run folders under a folder, with their records, in the order of their paths.

    A record that cannot be read is left out with one warning.

    Parameters
    ----------
    root : str or path
        A run folder, or any folder above some.
    smoke, failed : bool
        Smoke runs too; failed runs too.

    Raises
    ------
    ValueError
        If there is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"no folder {root}: name one that holds runs, or run a notebook first")
    for path in sorted(root.rglob(RECORD)):
        folder = path.parent
        if any(part.startswith(".") for part in folder.relative_to(root).parts):
            continue  # unfinished runs of a sweep
        try:
            content = read_record(folder)
        except ValueError as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
            continue
        if (smoke or not content.get("smoke")) and (failed or content["status"] == "completed"):
            yield folder, content


@checked(root=Location(), smoke=Flag(), failed=Flag())
def results(
    root: str | os.PathLike = "runs", *, smoke: bool = False, failed: bool = False
) -> pd.DataFrame:
    """All records under a folder as one tidy table, a row per run and metric.

    Parameters
    ----------
    root : str or path
        A run folder, or any folder above some.
    smoke, failed : bool
        Smoke runs too; failed runs too. A run without metrics has one row.

    Returns
    -------
    pandas.DataFrame
        Columns ``run`` (folder, relative to `root`), ``notebook, status, smoke, finished, seconds,
        model, device, protocol, commit, error``; a column per notebook parameter (lists and
        mappings as JSON; empty where a notebook has no such parameter); ``metric, value, better``
        (``"lower"``, ``"higher"`` or None).

    Raises
    ------
    ValueError
        If there is no such folder.
    """
    rows = []
    for folder, content in read_records(root, smoke=smoke, failed=failed):
        run = {name: content.get(name) for name in _RUN_COLUMNS} | {
            "run": folder.relative_to(root).as_posix(),
            "smoke": bool(content.get("smoke")),
            "seconds": content.get("wall_seconds"),
            "model": (content.get("model") or {}).get("label"),
            "commit": (content.get("git") or {}).get("commit"),
        }
        parameters = {k: as_cell(v) for k, v in content["parameters"].items() if k not in run}
        for metric, value in (content["metrics"] or {None: None}).items():
            way = better(metric) if metric else None
            rows.append({**run, **parameters, "metric": metric, "value": value, "better": way})
    last = ["metric", "value", "better"]
    frame = pd.DataFrame(rows, columns=None if rows else [*_RUN_COLUMNS, *last])
    frame = frame[[*frame.columns.difference(last, sort=False), *last]]
    return frame.assign(value=pd.to_numeric(frame["value"], errors="coerce"))


@checked(root=Location(), smoke=Flag(), failed=Flag())
def provenance(
    root: str | os.PathLike = "runs", *, smoke: bool = False, failed: bool = False
) -> pd.DataFrame:
    """Every distinct protocol, model, text, device, commit and package version of some runs.

    Parameters
    ----------
    root, smoke, failed
        As in `results`.

    Returns
    -------
    pandas.DataFrame
        Columns ``what, value``; models and texts by their hashes.

    Raises
    ------
    ValueError
        If there is no such folder.
    """
    rows = []
    for _, content in read_records(root, smoke=smoke, failed=failed):
        model, git = content.get("model") or {}, content.get("git") or {}
        commit = f"{git.get('commit')}{' (dirty)' if git.get('dirty') else ''}"
        texts = [
            (f"text of {domain}/{part}", digest)
            for domain, parts in (content.get("data") or {}).items()
            for part, digest in parts.items()
        ]
        rows += [("protocol", content.get("protocol")), ("model", model.get("label"))]
        rows += [("weights", model.get("sha256")), ("device", content.get("device")), *texts]
        rows += [("commit", commit), *(content.get("versions") or {}).items()]
    known = {(what, str(value)): None for what, value in rows if value}
    frame = pd.DataFrame(list(known), columns=["what", "value"])
    return frame.sort_values("what", kind="stable", ignore_index=True)


def as_cell(value: object) -> object:
    """A parameter's value as a table holds it: lists and mappings as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def varying(frame: pd.DataFrame, names: list[str]) -> list[str]:
    """Those of some columns in which not all rows have the same value."""
    return [name for name in names if name in frame and frame[name].nunique(dropna=False) > 1]
