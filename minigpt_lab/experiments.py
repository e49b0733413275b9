"""Notebooks as experiments: run one with parameters, keep what it measured.

A run folder holds the executed notebook, one ``record.json`` (parameters, versions, hashes, device,
protocol, metrics, status) and its tables and figures. Results are files; notebook outputs are only
for eyes.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from .assets import first_line, nearest, staged
from .runtime import fingerprint, label

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
RECORD = "record.json"
_PACKAGES = ("minigpt-lab", "torch", "transformers", "datasets", "peft", "numpy", "pandas")
_started = time.time()  # of the kernel, to all practical purposes


def notebook_names() -> list[str]:
    """Names of the series' notebooks, without their suffix."""
    return sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


def parameter_names(name: str) -> list[str]:
    """Names that a notebook's parameters cell assigns."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    tagged = (cell for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    statements = ast.parse("".join(next(tagged)["source"])).body
    return [target.id for statement in statements for target in statement.targets]


def run_notebook(
    name: str, parameters: Mapping[str, object] | None = None, out_dir: str | os.PathLike = ""
) -> Path:
    """Execute a notebook of the series with parameters, headlessly.

    Parameters
    ----------
    name : str
        One of `notebook_names`.
    parameters : mapping, optional
        Values for names in its parameters cell.
    out_dir : str or path, optional
        Run folder; by default a new one under ``runs/NAME/``.

    Returns
    -------
    pathlib.Path
        The run folder.

    Raises
    ------
    ValueError
        If there is no such notebook, or it has no such parameter.
    RuntimeError
        If a cell fails; the record in the run folder says ``"failed"``, the executed notebook shows
        where.
    """
    import papermill  # slow to import, and notebooks import this module too
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    if name not in notebook_names():
        raise ValueError(f"no notebook {name!r}; {nearest(name, notebook_names())}")
    source, parameters = NOTEBOOKS / f"{name}.ipynb", dict(parameters or {})
    known = parameter_names(name)
    for parameter in parameters:
        if parameter in ("out_dir", "interactive"):
            raise ValueError(f"{parameter} is set by the runner; --out (out_dir=) names the folder")
        if parameter not in known:
            hint = nearest(parameter, known)
            raise ValueError(f"{name} has no parameter {parameter!r}; {hint}")
    # the kernel works in the run folder: paths given from here must mean the same there
    parameters = {
        key: str(Path(value).resolve())
        if isinstance(value, str) and "/" in value and Path(value).exists()
        else value
        for key, value in parameters.items()
    }
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = (Path(out_dir) if out_dir else Path.cwd() / "runs" / name / stamp).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    parameters |= {"out_dir": str(folder), "interactive": False}
    started = time.time()
    try:
        papermill.execute_notebook(
            str(source),
            str(folder / source.name),
            parameters=parameters,
            kernel_name="python3",
            cwd=str(folder),
            progress_bar=sys.stderr.isatty(),
        )
    except (PapermillExecutionError, DeadKernelError) as error:
        reason = f"{error.ename}: {error.evalue}" if hasattr(error, "ename") else first_line(error)
        failed = {"notebook": name, "parameters": parameters, "error": reason}
        _write_record(folder, {**failed, "status": "failed", **_surroundings(started)})
        raise RuntimeError(f"{name} failed: {reason}; see {folder / source.name}") from error
    return folder


def record(
    notebook: str,
    namespace: Mapping[str, object],
    model: PreTrainedModel,
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
        The notebook's ``globals()``: the values of its parameters, ``out_dir`` among them.
    model : transformers.PreTrainedModel
        The dense model.
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
    """
    parameters = {name: namespace[name] for name in parameter_names(notebook)}
    folder = Path(str(parameters["out_dir"]))
    for name, table in (tables or {}).items():
        folder.mkdir(parents=True, exist_ok=True)
        table.to_csv(folder / f"{name}.csv", index=False)
    content = {
        "notebook": notebook,
        "status": "completed",
        "parameters": parameters,
        "metrics": dict(metrics),
        "protocol": protocol,
        "model": {"label": label(model), "sha256": fingerprint(model), "dtype": str(model.dtype)},
        "device": str(model.device),
        "tables": sorted(tables or {}),
        **_surroundings(_started),
    }
    return _write_record(folder, content)


def _write_record(folder: Path, content: dict) -> Path:
    with staged(folder / RECORD) as staging:
        text = json.dumps(_json(content), indent=1, sort_keys=True, ensure_ascii=False)
        staging.write_text(text, encoding="utf-8")
    return folder / RECORD


def _json(value: object) -> object:
    """Plain data: NumPy's numbers as Python's, what is not finite as null, the rest as text."""
    if isinstance(value, Mapping):
        return {str(key): _json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _surroundings(started: float) -> dict:
    """When, how long, with which code, versions and machine."""
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


def _value(text: str) -> object:
    """A parameter from the command line: JSON or a Python literal where it is one, else text."""
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError):
            return read(text)
    return text


def main() -> None:
    """Run one notebook from the command line and print what it measured and where that is."""
    parser = argparse.ArgumentParser(prog="python -m minigpt_lab.experiments", description=__doc__)
    parser.add_argument("notebook", nargs="?", default="03_contextual_pruning")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--out", default="", help="run folder")
    arguments = parser.parse_args()
    try:
        parameters = {name: _value(text) for name, text in arguments.p}
        folder = run_notebook(arguments.notebook, parameters, arguments.out)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    print(f"\n{content['model']['label']}\n{content['protocol']}\n")
    for name in content["tables"]:
        if name.startswith("summary"):
            print(pd.read_csv(folder / f"{name}.csv").to_string(index=False), "\n")
    for path in sorted(folder.iterdir()):
        if path.suffix in (".ipynb", ".png", ".json") or path.is_dir():
            print(path)


if __name__ == "__main__":
    main()
