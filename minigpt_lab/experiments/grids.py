"""Grids: the runs of a notebook that a YAML file asks for, and the id of each.

An id is the hash of the notebook's code and all its parameters: runs of one id are the same run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checks import Instance, ListOf, Location, Number, checked, suggest
from .parameters import (
    absolute,
    cells,
    check_parameters,
    default_parameters,
    find_notebook,
    read_yaml,
    smoke_parameters,
)

_MOST = 10_000  # runs of a grid
_KEYS = ("notebook", "parameters", "grid", "exclude", "jobs", "resources", "smoke")


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
        What each run asks of a Ray cluster; on this machine `cpus` is its number of threads.
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
    path = Path(path).expanduser()
    content = read_yaml(path)
    try:
        return _grid(path, content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _grid(path: Path, content: object) -> Grid:
    if not isinstance(content, dict) or "notebook" not in content:
        raise ValueError("expected 'notebook: NAME' and 'grid: {parameter: [values]}'")
    if not isinstance(content["notebook"], str):
        raise ValueError(
            f"notebook is {content['notebook']!r}; expected a name in quotes, e.g. notebook: '03'"
        )
    for key in content:
        if key not in _KEYS:
            raise ValueError(f"unknown key {key!r}; {suggest(str(key), list(_KEYS))}")
    beside = path.parent / content["notebook"]
    notebook = find_notebook(beside if beside.suffix == ".ipynb" else content["notebook"])
    kinds = {"parameters": dict, "grid": dict, "exclude": list, "resources": dict}
    parts = {key: content.get(key) or kind() for key, kind in kinds.items()}
    for key, kind in kinds.items():
        if not isinstance(parts[key], kind):
            expected = "a list of mappings" if kind is list else "a mapping"
            raise ValueError(f"{key} is {parts[key]!r}; expected {expected}")
    smoke, jobs = content.get("smoke", False), content.get("jobs", 1)
    if not isinstance(smoke, bool):
        raise ValueError(f"smoke is {smoke!r}; expected true or false")
    if type(jobs) is not int or jobs < 1:
        raise ValueError(f"jobs is {jobs!r}; expected a positive whole number")
    fixed = {**(smoke_parameters(notebook) if smoke else {}), **parts["parameters"]}
    runs = {}
    for chosen in _combinations(parts["grid"], default_parameters(notebook)):
        twice = parts["parameters"].keys() & chosen.keys()
        if twice:
            raise ValueError(f"{min(twice)!r} is under parameters and grid; keep one of them")
        parameters = {
            key: absolute(key, value, path.parent, Path.cwd())
            for key, value in {**fixed, **chosen}.items()
        }
        check_parameters(notebook, parameters)
        runs[run_id(notebook, parameters)] = parameters
    for entry in ListOf(Instance(dict))("exclude", parts["exclude"]):
        check_parameters(notebook, entry)
        meant = {key: absolute(key, value, path.parent, Path.cwd()) for key, value in entry.items()}
        gone = [run for run, given in runs.items() if _holds(given, meant)]
        if not gone:
            raise ValueError(f"exclude: {entry} is none of the combinations; correct or drop it")
        runs = {run: given for run, given in runs.items() if run not in gone}
    if not runs:
        raise ValueError("exclude leaves no run; drop an entry")
    resources = {"cpus": 1, "gpus": 0, **parts["resources"]}
    if resources.keys() != {"cpus", "gpus"}:
        raise ValueError(f"resources is {parts['resources']}; expected cpus and gpus of one run")
    resources = {key: Number(low=0)(key, value) for key, value in resources.items()}
    return Grid(path.stem, notebook, runs, jobs, **resources, smoke=smoke)


def _combinations(axes: Mapping[str, object], known: Mapping[str, object]) -> Iterator[dict]:
    """The Cartesian product of the axes, as parameters."""
    for name, values in axes.items():
        if not isinstance(values, list) or not values:
            raise ValueError(
                f"grid: {name} is {values!r}; expected a list of one or more values, e.g. "
                f"{name}: [{known.get(name, '…')}]"
            )
        bundle = name not in known and all(isinstance(value, dict) for value in values)
        if name not in known and not bundle:
            raise ValueError(f"grid: no parameter {name!r}; {suggest(name, list(known))}")
    count = math.prod(map(len, axes.values()))
    if count > _MOST:
        raise ValueError(f"grid: {count:,} combinations; expected at most {_MOST:,}: split it")
    for values in itertools.product(*axes.values()):
        chosen = {}
        for name, value in zip(axes, values, strict=True):
            chosen |= {name: value} if name in known else value
        yield chosen


def _holds(given: Mapping[str, object], meant: Mapping[str, object]) -> bool:
    """Whether a run has all the values of an excluded combination."""
    return all(key in given and given[key] == value for key, value in meant.items())


def run_id(notebook: Path, parameters: Mapping[str, object]) -> str:
    """Ten hex digits that stand for a notebook's name, its code and all its parameters."""
    code = ["".join(cell["source"]) for cell in cells(notebook) if cell["cell_type"] == "code"]
    recipe = [notebook.stem, code, {**default_parameters(notebook), **parameters}]
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:10]
