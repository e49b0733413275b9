"""The last cell of a notebook: what it measured, written as a record."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from IPython import get_ipython
from transformers import PreTrainedModel

from ..checks import (
    DictOf,
    Frame,
    Location,
    Model,
    Text,
    checked,
    invalid,
    to_python,
    writable_file,
)
from ..domains import Domain
from ..models import dtype_name, fingerprint, label, reading_dtype
from ..store import atomic_write, content_hash
from .parameters import RUNNER_PARAMETERS, default_parameters, find_notebook
from .records import blank_record, write_record

#: Environment variable in which the runner names the notebook to its kernel.
NOTEBOOK_VARIABLE = "MINIGPT_LAB_NOTEBOOK"
_started = time.time()  # of the kernel: notebooks import this module first of all


@checked(frame=Frame(), column=Text(), name=Text())
def metrics_from(frame: pd.DataFrame, column: str, name: str) -> dict[str, object]:
    """Metrics of a record, one per row of a table.

    Parameters
    ----------
    frame : pandas.DataFrame
        The table.
    column : str
        Of the values.
    name : str
        What a metric is called, with columns in braces: ``"{variant} {text} bits"``. Of rows with
        the same name the last counts.
    """
    rows = frame.reset_index().to_dict("records")
    return {name.format(**row): row[column] for row in rows}


@checked(
    metrics=DictOf(Text()),
    tables=DictOf(Text(), Frame()) | None,
    model=Model(lock=False) | None,
    protocol=Text(),
    notebook=Location() | None,
)
def record(
    metrics: Mapping[str, object],
    tables: Mapping[str, pd.DataFrame] | None = None,
    *,
    model: PreTrainedModel | None = None,
    protocol: str = "",
    notebook: str | os.PathLike | None = None,
) -> Path:
    """Write what the running notebook measured: ``record.json``, and a CSV file per table.

    The record also holds the values of the notebook's parameters, and the hashes of all domains
    among its variables. It goes to the folder that the variable ``out_dir`` names.

    Parameters
    ----------
    metrics : mapping
        Numbers worth comparing between runs.
    tables : mapping, optional
        Name to frame.
    model : transformers.PreTrainedModel, optional
        The dense model, if there is one.
    protocol : str
        How it was measured.
    notebook : str or path, optional
        As `find_notebook` takes it; needed only where it cannot be told: outside of JupyterLab,
        VS Code and `run_notebook`.

    Returns
    -------
    pathlib.Path
        Of the record.

    Raises
    ------
    ValueError
        If a metric is no number, a table no frame, or a parameter is not defined.
    RuntimeError
        If no notebook runs, or it cannot be told which.
    """
    metrics = {name: _metric(name, value) for name, value in metrics.items()}
    shell = get_ipython()
    if shell is None:
        raise RuntimeError("record is called from a notebook; no notebook is running")
    namespace = shell.user_ns
    source = find_notebook(notebook) if notebook else current_notebook(namespace)
    defaults = default_parameters(source)
    missing = sorted({*defaults, "out_dir"} - namespace.keys())
    if missing:
        raise ValueError(
            f"{source.stem} has no {', '.join(missing)}; run its parameters cell first"
        )
    parameters = {name: namespace[name] for name in defaults if name not in RUNNER_PARAMETERS}
    folder = Path(str(namespace["out_dir"]))
    for name, table in (tables or {}).items():
        if Path(name).name != name:
            raise invalid("a table's name", name, "a file's name without its suffix")
        with atomic_write(writable_file(folder / f"{name}.csv")) as staging:
            table.to_csv(staging, index=False)
    facts: dict[str, Any] = {"model": None, "device": None}
    if model is not None:
        identity = {"label": label(model), "sha256": fingerprint(model), "dtype": str(model.dtype)}
        identity["read_in"] = dtype_name(reading_dtype(model))
        facts = {"model": identity, "device": _device(model)}
    written = write_record(
        folder,
        {
            **blank_record(source, parameters, _started),
            "metrics": metrics,
            "protocol": protocol,
            "data": {domain.name: _hashes(domain) for domain in _domains(namespace.values())},
            "tables": list(tables or {}),
            **facts,
        },
    )
    return _Recorded(written)


class _Recorded(type(Path())):  # type: ignore[misc]  # of this system
    """The path of a record; a notebook cell shows it as a sentence."""

    def _repr_pretty_(self, printer, cycle: bool) -> None:
        printer.text(f"recorded in {self}")


def current_notebook(namespace: Mapping[str, Any]) -> Path:
    """The file of the notebook that runs in this kernel.

    Parameters
    ----------
    namespace : mapping
        Its variables.

    Raises
    ------
    RuntimeError
        If neither `run_notebook`, VS Code nor Jupyter says.
    """
    candidates: tuple[Any, ...] = (
        os.environ.get(NOTEBOOK_VARIABLE),
        namespace.get("__vsc_ipynb_file__"),
        os.environ.get("JPY_SESSION_NAME"),
    )
    for candidate in candidates:
        if candidate and Path(candidate).is_file():
            return find_notebook(candidate)
    raise RuntimeError(
        "cannot tell which notebook runs in this kernel; pass its name, e.g. "
        "record(metrics, notebook='03_contextual_pruning')"
    )


def _metric(name: str, value: object) -> float | bool | None:
    """A number of Python's, or None."""
    value = to_python(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    raise invalid(f"metrics[{name!r}]", value, "a number or None")


def _device(model: PreTrainedModel) -> str:
    """The device of a model, and which GPU that is."""
    if model.device.type != "cuda":
        return str(model.device)
    return f"{model.device} ({torch.cuda.get_device_name(model.device)})"


def _domains(values) -> Iterator[Domain]:
    """Domains among some values, in lists and mappings too."""
    for value in values:
        entries = value.values() if isinstance(value, dict) else value
        entries = entries if isinstance(value, dict | list | tuple) else [value]
        yield from (entry for entry in entries if isinstance(entry, Domain))


def _hashes(domain: Domain) -> dict[str, str]:
    return {name: content_hash(list(part)) for name, part in domain.parts.items()}
