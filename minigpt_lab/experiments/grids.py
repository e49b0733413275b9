"""Grids: the runs of a notebook that a YAML file asks for, and the id of each.

An id is the hash of the notebook's code and all its parameters: runs of one id are the same run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import (
    DictOf,
    Flag,
    Instance,
    Integer,
    ListOf,
    Location,
    Number,
    OneOf,
    Text,
    checked,
    suggest,
)
from .parameters import (
    cells,
    check_parameters,
    default_parameters,
    find_notebook,
    read_yaml,
    resolve_paths,
    smoke_parameters,
)

_MAX_RUNS = 10_000
#: Keys of a grid file: what each may hold, and its default.
_KEYS = {
    "notebook": (Text(), None),
    "parameters": (Instance(dict), {}),
    "grid": (Instance(dict), {}),
    "exclude": (ListOf(Instance(dict)), []),
    "jobs": (Integer(1), 1),
    "resources": (DictOf(OneOf(["cpus", "gpus"]), Number(0)), {}),
    "smoke": (Flag(), False),
}


@dataclass(frozen=True)
class Grid:
    """A notebook and the runs that are wanted of it.

    Parameters
    ----------
    name : str
        Of the grid's file.
    notebook : pathlib.Path
        What to run.
    runs : mapping
        Id to parameters.
    jobs : int
        How many run at a time on this machine.
    cpus, gpus : float
        What each run asks of a Ray cluster; on this machine `cpus` is its number of threads,
        unless OMP_NUM_THREADS is set.
    smoke : bool
        The runs only show that it works.
    """

    name: str
    notebook: Path
    runs: Mapping[str, dict]
    jobs: int = 1
    cpus: float = 1
    gpus: float = 0
    smoke: bool = False


@checked(path=Location())
def read_grid(path: str | os.PathLike) -> Grid:
    """The runs that a grid file asks for.

    Parameters
    ----------
    path : str or path
        A YAML file with keys ``notebook`` (name, or path of an ``.ipynb`` from the grid's folder),
        ``parameters`` (the same in all runs), ``grid`` (parameter to a list of values; every
        combination is run. An axis that is no parameter and lists mappings sets several at once),
        in both of which paths are looked for in the grid's folder, then in the working folder;
        ``exclude`` (list of mappings: combinations to leave out), ``jobs``, ``resources`` (``cpus``
        and ``gpus`` of a run), ``smoke``.

    Raises
    ------
    ValueError
        In one line: the key or value, what was expected, what to do.
    """
    path = Path(path)
    content = read_yaml(path)
    try:
        content, given = DictOf(OneOf(_KEYS))("the grid", content), {}
        for key, (check, default) in _KEYS.items():
            value = content.get(key)
            given[key] = check(key, default if value is None else value)
        return _grid(path, **given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _grid(
    path: Path,
    notebook: str,
    parameters: Mapping,
    grid: Mapping,
    exclude: Sequence[Mapping],
    jobs: int,
    resources: Mapping,
    smoke: bool,
) -> Grid:
    """The grid of a file's keys."""
    beside = path.parent / notebook
    source = find_notebook(beside if beside.suffix == ".ipynb" else notebook)
    fixed = {**(smoke_parameters(source) if smoke else {}), **parameters}
    runs = {}
    for chosen in _combinations(grid, default_parameters(source)):
        for name in parameters.keys() & chosen.keys():
            raise ValueError(f"{name!r} is under parameters and grid; keep one of them")
        run = _parameters(path, source, {**fixed, **chosen})
        runs[run_id(source, run)] = run
    for entry in exclude:
        excluded = _parameters(path, source, entry).items()
        kept = {id_: run for id_, run in runs.items() if not excluded <= run.items()}
        if len(kept) == len(runs):
            raise ValueError(f"exclude: {entry} is none of the combinations; correct or drop it")
        runs = kept
    if not runs:
        raise ValueError("exclude leaves no run; drop an entry")
    return Grid(path.stem, source, runs, jobs, smoke=smoke, **resources)


def _parameters(path: Path, notebook: Path, given: Mapping[str, object]) -> dict[str, object]:
    """Parameters of a grid file as a run takes them: paths made absolute, kinds checked."""
    bases = (path.parent, Path.cwd())
    resolved = {name: resolve_paths(name, value, *bases) for name, value in given.items()}
    return check_parameters(notebook, resolved)


def _combinations(axes: Mapping[str, Any], known: Mapping[str, object]) -> Iterator[dict]:
    """The Cartesian product of the axes, as parameters."""
    for name, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ValueError(
                f"grid: {name} is {values!r}; expected a list of one or more values, e.g. "
                f"{name}: [{known.get(name, '…')}]"
            )
        if name not in known and not all(isinstance(value, dict) for value in values):
            raise ValueError(f"grid: no parameter {name!r}; {suggest(name, list(known))}")
    count = math.prod(map(len, axes.values()))
    if count > _MAX_RUNS:
        raise ValueError(f"grid: {count:,} combinations; expected at most {_MAX_RUNS:,}: split it")
    for values in itertools.product(*axes.values()):
        chosen = {}
        for name, value in zip(axes, values, strict=True):
            chosen |= {name: value} if name in known else value
        yield chosen


def run_id(notebook: Path, parameters: Mapping[str, object]) -> str:
    """Ten hex digits that stand for a notebook's name, its code and all its parameters."""
    code = [cell["source"] for cell in cells(notebook) if cell["cell_type"] == "code"]
    key = [notebook.stem, code, {**default_parameters(notebook), **parameters}]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]
