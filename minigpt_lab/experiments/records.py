"""Records: what every run leaves behind, and all of them read back as one table.

A record is one ``record.json`` in a run folder, beside the executed notebook, its tables (CSV) and
its figures. Results are files; notebook outputs are only for eyes.
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

from ..checks import Flag, Location, as_json, checked
from ..store import DATA, atomic_write, read_cached, read_json, remove_empty

ROOT = DATA.parent
RECORD = "record.json"
SCHEMA = 2  # of a record's keys; 1 had none of schema, data, seed, smoke
_PACKAGES = ("minigpt-lab", "torch", "transformers", "datasets", "peft", "numpy", "pandas")
_NEEDED = ("notebook", "status", "parameters", "metrics")
_KINDS = {  # of a record's values, where they are there
    "notebook": str, "status": str, "protocol": str, "device": str, "error": str, "finished": str,
    "parameters": dict, "metrics": dict, "model": dict, "data": dict, "git": dict, "versions": dict,
    "tables": list, "smoke": bool, "wall_seconds": int | float,
}  # fmt: skip
_FACTS = (  # of a run, in the table of all
    "run", "notebook", "status", "smoke", "finished", "seconds", "model", "device", "protocol",
    "commit", "error",
)  # fmt: skip
#: Which direction of a metric is better, by the first pattern that its name holds.
_BETTER = (
    (r"accuracy|\b(won|surely|beats_mix)\b", "higher"),
    (r"\b(bits|perplexity|loss|validation|test|stored|nonzero|paper_nonzero|size|layers|recovery_tokens)\b|share",
     "lower"),
    (r"^(pruned|recovered) .+ on .+", "lower"),  # perplexity of a cut on a text
)  # fmt: skip


def better(metric: str) -> str | None:
    """``"lower"`` or ``"higher"``, whichever is better of a metric; None where neither is."""
    return next((way for pattern, way in _BETTER if re.search(pattern, metric)), None)


def write_record(folder: Path, content: Mapping[str, object]) -> Path:
    """Write a run's record under the current schema, whole or not at all.

    Numbers that are not finite become null, what JSON does not know becomes text.

    Raises
    ------
    FileExistsError
        If a file of that name is there that is no record: it is left alone.
    """
    read_cached(folder / RECORD, own_record, ".json")
    plain = _json(as_json({**content, "schema": SCHEMA}))
    text = json.dumps(plain, indent=1, sort_keys=True, ensure_ascii=False)
    with atomic_write(folder / RECORD) as staging:
        staging.write_text(text, encoding="utf-8")
    return folder / RECORD


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
    """Files (paths from the folder) that a run wrote into its folder, as far as it says."""
    try:
        listed = own_record(folder / RECORD).get("files")
    except (ValueError, OSError):
        return set()
    listed = map(str, listed) if isinstance(listed, list) else ()
    return {*files_below(folder)} & {RECORD, *listed}


def files_below(folder: Path) -> list[str]:
    """Paths of all files in a folder, from the folder."""
    there = [path for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
    return sorted(path.relative_to(folder).as_posix() for path in there)


def discard_run(folder: Path) -> None:
    """Remove a run's files, and its folder if that was all."""
    for name in own_files(folder):
        (folder / name).unlink(missing_ok=True)
        for parent in (folder / name).parents:
            if parent == folder.parent:
                break
            remove_empty(parent)


def _json(value: object) -> object:
    if isinstance(value, dict):
        return {key: _json(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def surroundings(started: float) -> dict:
    """When a run that began at `started` ended, how long it took, and with which code and machine.

    Parameters
    ----------
    started : float
        Seconds since the epoch.
    """
    commit = _git("rev-parse", "HEAD")
    return {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_seconds": round(time.time() - started, 1),
        "git": {"commit": commit, "dirty": bool(_git("status", "--porcelain")) if commit else None},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in _PACKAGES}},
        "machine": {"system": platform.system(), "cores": os.cpu_count()},
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def read_record(folder: str | os.PathLike) -> dict:
    """The record of a run folder.

    Raises
    ------
    ValueError
        If there is none, it is cut short, or a version with another schema wrote it: one line that
        says which, and what to do.
    """
    path = Path(folder) / RECORD
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {RECORD}: no run ended there") from None
    except ValueError as error:
        raise ValueError(f"{error}; delete its folder and run it again") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        found = f"has schema {schema}" if schema else "has no schema number"
        newer = isinstance(schema, int) and schema > SCHEMA
        remedy = "update minigpt_lab" if newer else "run it again"
        raise ValueError(f"{path} {found}, this version reads {SCHEMA}; {remedy}")
    absent = [key for key in _NEEDED if key not in content]
    if absent:
        raise ValueError(f"{path} lacks {', '.join(absent)}; delete its folder and run it again")
    kinds = {key: kind if key in _NEEDED else kind | None for key, kind in _KINDS.items()}
    odd = [key for key, kind in kinds.items() if not isinstance(content.get(key), kind)]
    if not odd:
        odd = [f"metric {key!r}" for key, value in content["metrics"].items() if not _number(value)]
    if odd:
        raise ValueError(
            f"{path}: {', '.join(odd)} is not what a run writes; delete its folder and run it again"
        )
    return content


def _number(value: object) -> bool:
    """Whether a metric can be compared: a number that a float holds, or nothing."""
    return value is None or (isinstance(value, int | float) and abs(value) < 1e308)


def read_records(
    root: str | os.PathLike = "runs", everything: bool = False
) -> Iterator[tuple[Path, dict]]:
    """Run folders under a folder, with their records, in the order of their paths.

    A record that cannot be read is left out with one warning.

    Parameters
    ----------
    root : str or path
        A run folder, or any folder above some.
    everything : bool
        Smoke and failed runs too.

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
            continue  # a sweep's unfinished runs
        try:
            content = read_record(folder)
        except ValueError as error:
            warnings.warn(f"left out: {error}", stacklevel=2)
            continue
        if everything or (content["status"] == "completed" and not content.get("smoke")):
            yield folder, content


@checked(root=Location(), everything=Flag())
def results(root: str | os.PathLike = "runs", everything: bool = False) -> pd.DataFrame:
    """All records under a folder as one tidy table, a row per run and metric.

    Parameters
    ----------
    root : str or path
        A run folder, or any folder above some.
    everything : bool
        Smoke and failed runs too. A run without metrics has one row.

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
    for folder, content in read_records(root, everything):
        facts = {name: content.get(name) for name in _FACTS} | {
            "run": folder.relative_to(root).as_posix(),
            "smoke": bool(content.get("smoke")),
            "seconds": content.get("wall_seconds"),
            "model": (content.get("model") or {}).get("label"),
            "commit": (content.get("git") or {}).get("commit"),
        }
        given = {key: cell(v) for key, v in content["parameters"].items() if key not in facts}
        metrics = content["metrics"] or {None: None}
        for metric, value in metrics.items():
            way = better(metric) if metric else None
            rows.append({**facts, **given, "metric": metric, "value": value, "better": way})
    last = ["metric", "value", "better"]
    frame = pd.DataFrame(rows, columns=None if rows else [*_FACTS, *last])
    frame = frame[[*frame.columns.difference(last, sort=False), *last]]
    return frame.assign(value=pd.to_numeric(frame["value"], errors="coerce"))


def cell(value: object) -> object:
    """A parameter's value as a table holds it: lists and mappings as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def varying(frame: pd.DataFrame, names: list[str]) -> list[str]:
    """Those of some columns in which not all rows say the same."""
    return [name for name in names if name in frame and frame[name].nunique(dropna=False) > 1]
