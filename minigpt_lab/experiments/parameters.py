"""Which notebooks there are, what each can be given, and small values that show that it works."""

from __future__ import annotations

import ast
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from ..checks import Location, invalid, suggest
from ..store import DATA, read_text, read_toml, read_user_json

NOTEBOOKS = DATA.parent / "notebooks"
SMOKE = NOTEBOOKS / "smoke.yaml"
#: Parameters that the runner sets: no part of an experiment.
CIRCUMSTANCES = ("out_dir", "interactive")


class _Loader(yaml.SafeLoader):
    """YAML whose ``1e-3`` is a number, as everywhere but in PyYAML."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), "-+.0123456789"
)


_MOST = 100_000  # values of a YAML file, those behind aliases counted wherever they are used


def read_yaml(path: Path) -> object:
    """Content of a YAML file.

    Raises
    ------
    ValueError
        If it is not there, no YAML, too large or part of itself: one line, with the place.
    """
    try:
        loader = _Loader(read_text(path))
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > _MOST:
            raise ValueError(f"{path} has more than {_MOST:,} values; expected a list of runs")
        return _constructed(loader, node, path)
    except FileNotFoundError:
        raise ValueError(f"no file {path}") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None


def _constructed(loader: _Loader, node: yaml.Node, path: Path) -> object:
    try:
        return loader.construct_document(node)
    except ValueError as error:  # a date of the 99th month, a number of a million digits
        raise ValueError(f"{path} is no YAML: {error}") from None


def _size(node: yaml.Node, known: dict[yaml.Node, float]) -> float:
    """Values below a node, infinite for one that holds itself."""
    if node not in known:
        known[node] = float("inf")  # what comes back here is inside itself
        below = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = isinstance(node, yaml.MappingNode)
        entries = [each for pair in below for each in pair] if pairs else below
        known[node] = 1 + sum(_size(entry, known) for entry in entries)
    return known[node]


def notebook_names() -> list[str]:
    """Names of the series' notebooks, without their suffix; their solutions are not among them."""
    return sorted(path.stem for path in NOTEBOOKS.glob("[0-9]*.ipynb"))


def find_notebook(name: str | os.PathLike) -> Path:
    """The file of a notebook.

    Parameters
    ----------
    name : str or path
        A name of the series, its number (``3``, ``"03"``) or a beginning that no other name has, or
        the path of any ``.ipynb`` file.

    Raises
    ------
    ValueError
        If no notebook, or more than one, begins so.
    """
    nothing = isinstance(name, str) and not name
    path = Path("" if nothing else Location()("notebook", name)).expanduser()
    if path.suffix == ".ipynb" and path.is_file():
        return path.resolve()
    names, name = notebook_names(), str(name)
    start = f"{int(name):02d}_" if name.isdecimal() else name
    found = [name] if name in names else [known for known in names if known.startswith(start)]
    if len(found) != 1:
        hint = f"it could be {' or '.join(found)}" if found else suggest(name, names)
        raise ValueError(f"no notebook {name!r}; {hint}")
    return NOTEBOOKS / f"{found[0]}.ipynb"


def parameters_cell(notebook: Path) -> str:
    """Source of a notebook's parameters cell: names, defaults and what they mean; "" if none."""
    tagged = (cell for cell in cells(notebook) if "parameters" in cell["metadata"].get("tags", []))
    return "".join(next(tagged, {"source": ""})["source"])


def cells(notebook: Path) -> list[dict]:
    """Cells of a notebook file.

    Raises
    ------
    ValueError
        If it is no notebook.
    """
    content = read_user_json(notebook)
    found = content.get("cells") if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(map(_is_cell, found)):
        raise ValueError(f"{notebook} is no notebook: its cells cannot be read")
    return found


def _is_cell(cell: object) -> bool:
    kinds = {"cell_type": str, "metadata": dict, "source": str | list}
    return isinstance(cell, dict) and all(isinstance(cell.get(k), t) for k, t in kinds.items())


def default_parameters(notebook: Path) -> dict[str, object]:
    """What a notebook's parameters cell assigns.

    Raises
    ------
    ValueError
        If it assigns what is no plain value.
    """
    found = {}
    try:
        statements = ast.parse(parameters_cell(notebook)).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{notebook.name}: its parameters cell is no Python: {error}") from None
    for statement in statements:
        try:
            value = ast.literal_eval(statement.value)
            found |= {target.id: value for target in statement.targets}
        except (AttributeError, ValueError):
            raise ValueError(
                f"{notebook.name}: its parameters cell has {ast.unparse(statement)!r}; expected "
                "only NAME = number, text, list or mapping"
            ) from None
    return found


def smoke_parameters(notebook: Path) -> dict[str, object]:
    """Small parameters of a notebook, for a run that only shows that it works.

    They are the first case in ``notebooks/smoke.yaml``.

    Raises
    ------
    ValueError
        If that file knows no such notebook.
    """
    cases = smoke_cases().get(notebook.stem)
    if not cases:
        raise ValueError(f"{SMOKE} has no small parameters for {notebook.stem}; give them with -p")
    return next(iter(cases.values()))


def smoke_cases() -> dict[str, dict[str, dict]]:
    """Notebook to case to small parameters, of ``notebooks/smoke.yaml``."""
    content = read_yaml(SMOKE)
    common = content.pop("common")
    cases = {}
    for name, given in content.items():
        known = default_parameters(find_notebook(name))
        shared = {key: value for key, value in common.items() if key in known}
        cases[name] = {case: {**shared, **values} for case, values in given.items()}
    return cases


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


def check_parameters(notebook: Path, parameters: Mapping[str, object]) -> None:
    """Refuse parameters that a notebook does not have, or of another kind than its defaults.

    Raises
    ------
    ValueError
        Naming the value, what was expected, and what to do.
    """
    if not isinstance(parameters, Mapping):
        raise invalid("parameters", parameters, "a mapping of names to values")
    name, defaults = notebook.stem, default_parameters(notebook)
    for parameter, value in parameters.items():
        if parameter in CIRCUMSTANCES:
            raise ValueError(f"{parameter} is set by the runner; --out (out_dir=) names the folder")
        if parameter not in defaults:
            hint = suggest(parameter, list(defaults)) if defaults else "it has none"
            raise ValueError(f"{name} has no parameter {parameter!r}; {hint}")
        default = defaults[parameter]
        if not (_is_plain(value) and _fits(value, default)):
            raise ValueError(
                f"{name}: {parameter} is {value!r}; expected {_EXPECTED[type(default)]}, as its "
                f"default {default!r}"
            )


def _is_plain(value: object) -> bool:
    """Whether a value is made of numbers, texts, lists and mappings alone."""
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | None)


#: Parameters whose texts may be names of files or folders, by a part of their name.
_PLACES = re.compile(
    r"domain|model|texts?$|^(pair|explored|general|runs|path|folder)$|_(path|dir)$"
)


def absolute(name: str, value: object, *bases: Path) -> object:
    """Paths that exist, made absolute, as the kernel works in the run folder.

    A text with a ``/`` or the name of a file with a suffix may be a path in any parameter, a bare
    name only where a parameter takes one (``domain``, ``model_name``); what the kit itself has a
    text or model of is never one.

    Parameters
    ----------
    name : str
        Of the parameter.
    value : object
        Texts in lists count too.
    *bases : pathlib.Path
        Folders to look in, one after the other; by default the working folder.
    """
    if isinstance(value, list):
        return [absolute(name, entry, *bases) for entry in value]
    if not isinstance(value, str) or not value.strip() or value in _kit_names():
        return value
    for base in bases or (Path.cwd(),):
        path = base / Path(value).expanduser()
        try:
            named = "/" in value or os.sep in value or (path.suffix and path.is_file())
            if (named or _PLACES.search(name)) and path.exists():
                return str(path.resolve())
        except (OSError, ValueError, RuntimeError):  # too long, a NUL, no such user
            continue
    return value


@functools.cache
def _kit_names() -> frozenset[str]:
    """Names of the kit's own domains and models."""
    files = (DATA / "domains.toml", DATA / "models.toml")
    return frozenset(name for file in files for name in read_toml(file))
