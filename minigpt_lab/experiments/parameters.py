"""Notebook files and their parameters: names, defaults, smoke values, checks of what is given."""

from __future__ import annotations

import ast
import functools
import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..checks import DictOf, Flag, Integer, ListOf, Location, Number, Text, first_line, suggest
from ..store import DATA, read_json, read_text, read_toml

NOTEBOOKS = DATA.parent / "notebooks"
SMOKE = NOTEBOOKS / "smoke.yaml"
#: Parameters that the runner sets; they are no part of an experiment.
RUNNER_PARAMETERS = ("out_dir", "interactive")
_MAX_YAML_NODES = 100_000  # each alias counts as all that it stands for


class _Loader(yaml.SafeLoader):
    """YAML in which ``1e-3`` is a number (PyYAML takes it for a string)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), "-+.0123456789"
)


def read_yaml(path: Path) -> Any:
    """Content of a YAML file.

    Raises
    ------
    ValueError
        If it is not YAML, too large or contains itself: one line, with the place.
    """
    text = read_text(path)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None or _count_nodes(node, {}) <= _MAX_YAML_NODES:
            return node and loader.construct_document(node)
    except RecursionError:
        pass
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date of the 99th month
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    raise ValueError(
        f"{path} has more than {_MAX_YAML_NODES:,} values or is nested too deeply; expected a "
        "list of runs"
    )


def _count_nodes(node: yaml.Node, known: dict[yaml.Node, float]) -> float:
    """Number of values below a node; infinite for a node that contains itself."""
    if node not in known:
        known[node] = float("inf")  # until it is counted: meeting it again is a cycle
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = itertools.chain(*children)
        known[node] = 1 + sum(_count_nodes(child, known) for child in children)
    return known[node]


def notebook_names() -> list[str]:
    """Names of the series' notebooks, without their suffix and without the solutions."""
    return sorted(path.stem for path in NOTEBOOKS.glob("[0-9]*.ipynb"))


def find_notebook(name: str | os.PathLike) -> Path:
    """The file of a notebook.

    Parameters
    ----------
    name : str or path
        A name of the series, its number (``3``, ``"03"``), an unambiguous beginning of a name, or
        the path of any ``.ipynb`` file.

    Raises
    ------
    ValueError
        If no notebook, or more than one, begins so.
    """
    path = Path(Location()("notebook", name))
    if path.suffix == ".ipynb" and path.is_file():
        return path.resolve()
    names, name = notebook_names(), str(name)
    start = f"{int(name):02d}_" if name.isdecimal() else name
    matches = [name] if name in names else [known for known in names if known.startswith(start)]
    if len(matches) != 1:
        hint = f"it could be {' or '.join(matches)}" if matches else suggest(name, names)
        raise ValueError(f"no notebook {name!r}; {hint}")
    return NOTEBOOKS / f"{matches[0]}.ipynb"


def cells(notebook: Path) -> list[dict]:
    """Cells of a notebook file, each with its source as one string.

    Raises
    ------
    ValueError
        If it is no notebook.
    """
    content: Any = read_json(notebook)
    try:
        return [{**cell, "source": "".join(cell["source"])} for cell in content["cells"]]
    except (TypeError, KeyError):
        raise ValueError(f"{notebook} is no notebook: its cells cannot be read") from None


def parameters_cell(notebook: Path) -> str:
    """Source of the cell tagged ``parameters``; empty if there is none."""
    for cell in cells(notebook):
        if "parameters" in cell.get("metadata", {}).get("tags", []):
            return cell["source"]
    return ""


def default_parameters(notebook: Path) -> dict[str, object]:
    """Names and values that a notebook's parameters cell assigns.

    Raises
    ------
    ValueError
        If it holds anything but ``NAME = literal``.
    """
    defaults = {}
    try:
        for statement in ast.parse(parameters_cell(notebook)).body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    defaults[name] = ast.literal_eval(value)
                case _:
                    raise ValueError(f"line {statement.lineno} is something else")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"{notebook.name}: its parameters cell may hold only NAME = number, text, list or "
            f"mapping: {first_line(error)}"
        ) from None
    return defaults


def smoke_parameters(notebook: Path) -> dict[str, object]:
    """Parameters of a smoke run: the notebook's first case in ``notebooks/smoke.yaml``.

    Raises
    ------
    ValueError
        If that file has no such notebook.
    """
    cases = smoke_cases().get(notebook.stem)
    if not cases:
        raise ValueError(f"{SMOKE} has no small parameters for {notebook.stem}; give them with -p")
    return next(iter(cases.values()))


def smoke_cases() -> dict[str, dict[str, dict]]:
    """Notebook to case to parameters, as ``notebooks/smoke.yaml`` lists them."""
    content = read_yaml(SMOKE)
    common = content.pop("common")
    cases = {}
    for name, given in content.items():
        known = default_parameters(find_notebook(name))
        shared = {key: value for key, value in common.items() if key in known}
        cases[name] = {case: {**shared, **values} for case, values in given.items()}
    return cases


def check_parameters(notebook: Path, parameters: Mapping[str, object]) -> dict[str, object]:
    """Refuse parameters that a notebook does not have, or of another kind than its defaults.

    Returns
    -------
    dict
        The same parameters, with numbers and arrays of NumPy and torch as Python's.

    Raises
    ------
    ValueError
        Naming the value, what was expected, and what to do.
    """
    defaults, checked_values = default_parameters(notebook), {}
    for name, value in DictOf(Text())("parameters", parameters).items():
        if name in RUNNER_PARAMETERS:
            raise ValueError(f"{name} is set by the runner; --out (out_dir=) names the folder")
        if name not in defaults:
            hint = suggest(name, list(defaults)) if defaults else "it has none"
            raise ValueError(f"{notebook.stem} has no parameter {name!r}; {hint}")
        check = _check_like(defaults[name])
        checked_values[name] = check(f"{notebook.stem}: {name}", value)
    return checked_values


_SCALAR = Flag() | Number() | Text() | None


def _check_like(default: object) -> Any:
    """A check for values of the same kind as a default."""
    match default:
        case bool():
            return Flag()
        case int():
            return Integer()
        case float():
            return Number() | None
        case str():
            return Text()
        case [first, *_]:
            return ListOf(_check_like(first), kind=list)
        case {} if not default:  # arguments of a function
            return DictOf(Text(), _SCALAR | ListOf(_SCALAR, kind=list))
        case dict():
            first = next(iter(default.values()))
            return DictOf(Text(), _check_like(first) if isinstance(first, list | dict) else _SCALAR)
        case _:  # None or an empty list
            return Number() | Text() | ListOf(_SCALAR, kind=list) | None


#: Parameters whose values may be names of files or folders.
_PATH_PARAMETERS = re.compile(r"domain|model|^(runs|path|folder)$|_(path|dir)$")


def resolve_paths(name: str, value: object, *bases: Path) -> object:
    """Make paths that exist absolute, because a notebook runs in its run folder.

    A string with a ``/``, or the name of a file with a suffix, may be a path in any parameter; a
    bare name only in a parameter that takes one (``domain_name``, ``model_name``). Names of the
    kit's own domains and models are never paths.

    Parameters
    ----------
    name : str
        The parameter.
    value : object
        Its value; strings in lists count too.
    *bases : pathlib.Path
        Folders to look in, in this order; by default the working folder.
    """
    if isinstance(value, list):
        return [resolve_paths(name, entry, *bases) for entry in value]
    if not isinstance(value, str) or not value.strip() or value in _kit_names():
        return value
    for base in bases or (Path.cwd(),):
        try:
            path = base / Path(value).expanduser()
            looks_like_path = "/" in value or os.sep in value or (path.suffix and path.is_file())
            if (looks_like_path or _PATH_PARAMETERS.search(name)) and path.exists():
                return str(path.resolve())
        except (OSError, ValueError, RuntimeError):  # too long, a NUL, no such user
            continue
    return value


@functools.cache
def _kit_names() -> frozenset[str]:
    """Names of the kit's own domains and models."""
    files = (DATA / "domains.toml", DATA / "models.toml")
    return frozenset(name for file in files for name in read_toml(file))
