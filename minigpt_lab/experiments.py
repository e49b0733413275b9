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
import re
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
DEFAULT = "03_contextual_pruning"  # what the command line runs unasked
RECORD = "record.json"
_PACKAGES = ("minigpt-lab", "torch", "transformers", "datasets", "peft", "numpy", "pandas")
_started = time.time()  # of the kernel, to all practical purposes


def notebook_names() -> list[str]:
    """Names of the series' notebooks, without their suffix."""
    return sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


def find_notebook(name: str) -> str:
    """The full name of a notebook, from it or from a beginning that no other has (``"03"``).

    Raises
    ------
    ValueError
        If no notebook, or more than one, begins so.
    """
    names = notebook_names()
    found = [name] if name in names else [known for known in names if known.startswith(name)]
    if len(found) != 1:
        hint = f"it could be {' or '.join(found)}" if found else nearest(name, names)
        raise ValueError(f"no notebook {name!r}; {hint}")
    return found[0]


def parameters_cell(name: str) -> str:
    """Source of a notebook's parameters cell: names, defaults and what they mean."""
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    tagged = (cell for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    return "".join(next(tagged)["source"])


def default_parameters(name: str) -> dict[str, object]:
    """What a notebook's parameters cell assigns."""
    return {
        target.id: ast.literal_eval(statement.value)
        for statement in ast.parse(parameters_cell(name)).body
        for target in statement.targets
    }


_EXPECTED = {
    bool: "True or False", int: "a whole number", float: "a number or None", str: "a text",
    list: "a list of the same kind", dict: "a mapping",
    type(None): "a number, a text, a list or None",
}  # fmt: skip


def _fits(value: object, default: object) -> bool:
    """Whether a parameter's value is of the kind of its default; a bool is no number."""
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, list):
        return isinstance(value, list) and all(_fits(v, d) for v in value for d in default[:1])
    if default is None:
        return isinstance(value, int | float | str | list | None)
    if isinstance(default, float):
        return isinstance(value, int | float | None)
    return isinstance(value, type(default))


def _check_parameters(name: str, parameters: Mapping[str, object]) -> None:
    defaults = default_parameters(name)
    for parameter, value in parameters.items():
        if parameter in ("out_dir", "interactive"):
            raise ValueError(f"{parameter} is set by the runner; --out (out_dir=) names the folder")
        if parameter not in defaults:
            hint = nearest(parameter, list(defaults))
            raise ValueError(f"{name} has no parameter {parameter!r}; {hint}")
        default = defaults[parameter]
        if not _fits(value, default):
            raise ValueError(
                f"{name}: {parameter} is {value!r}; expected {_EXPECTED[type(default)]}, as its "
                f"default {default!r}"
            )


def _absolute(value: object) -> object:
    """Paths that exist here, made absolute: the kernel works in the run folder."""
    if isinstance(value, list):
        return [_absolute(entry) for entry in value]
    is_path = isinstance(value, str) and "/" in value and Path(value).exists()
    return str(Path(value).resolve()) if is_path else value


def run_notebook(
    name: str, parameters: Mapping[str, object] | None = None, out_dir: str | os.PathLike = ""
) -> Path:
    """Execute a notebook of the series with parameters, headlessly.

    Parameters
    ----------
    name : str
        One of `notebook_names`, or its beginning.
    parameters : mapping, optional
        Values for names in its parameters cell, of the kind of their defaults.
    out_dir : str or path, optional
        Run folder; by default a new one under ``runs/NAME/``.

    Returns
    -------
    pathlib.Path
        The run folder.

    Raises
    ------
    ValueError
        If there is no such notebook, it has no such parameter, or a value is of another kind.
    RuntimeError
        If a cell fails; the record in the run folder says ``"failed"``, the executed notebook shows
        where.
    """
    import papermill  # slow to import, and notebooks import this module too
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    name = find_notebook(name)
    source = NOTEBOOKS / f"{name}.ipynb"
    _check_parameters(name, parameters or {})
    parameters = {key: _absolute(value) for key, value in (parameters or {}).items()}
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
            extra_arguments=["--log-level=ERROR"],  # else it warns of TCP, every time
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
    parameters = {name: namespace[name] for name in default_parameters(notebook)}
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
        "tables": list(tables or {}),
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


def _digits(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run",
        description="Run a notebook of the series with parameters; print what it measured.",
        epilog="notebooks (a beginning will do: run 03):\n  " + "\n  ".join(notebook_names())
        + "\nrun NOTEBOOK --help shows its parameters.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )  # fmt: skip
    parser.add_argument("notebook", nargs="?", help=f"default: {DEFAULT}")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="set a parameter; -p NAME=VALUE is the same")  # fmt: skip
    parser.add_argument("--out", default="", help="run folder; default: runs/NOTEBOOK/TIME")
    parser.add_argument("-h", "--help", action="store_true", help="show this and exit")
    words = []  # a value may itself hold an equals sign
    for before, word in zip(["", *sys.argv[1:]], sys.argv[1:], strict=False):
        joined = before == "-p" and re.match(r"\w+=", word)
        words += word.split("=", 1) if joined else [word]
    arguments = parser.parse_args(words)
    if arguments.help and not arguments.notebook:
        parser.print_help()
        parser.exit()
    return arguments


def main() -> None:
    """Run one notebook from the command line and print what it measured and where that is."""
    arguments = _arguments()
    try:
        name = find_notebook(arguments.notebook or DEFAULT)
        if arguments.help:
            print(f"{name}: its parameters and their defaults\n\n{parameters_cell(name)}")
            return
        parameters = {key: _value(text) for key, text in arguments.p}
        folder = run_notebook(name, parameters, arguments.out)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    print(f"\n{content['model']['label']}\n{content['protocol']}\n")
    for name in content["tables"]:
        if name.startswith("summary"):
            table = pd.read_csv(folder / f"{name}.csv")
            print(table.to_string(index=False, float_format=_digits), "\n")
    for path in sorted(folder.iterdir()):
        if path.suffix in (".ipynb", ".png", ".json") or path.is_dir():
            print(path)


if __name__ == "__main__":
    main()
