"""Which notebooks there are, what each can be given, and small values that show that it works."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from ..assets import DATA, nearest

NOTEBOOKS = DATA.parent / "notebooks"
SMOKE = NOTEBOOKS / "smoke.yaml"
#: Parameters that the runner sets: no part of an experiment.
CIRCUMSTANCES = ("out_dir", "interactive")


class _Loader(yaml.SafeLoader):
    """YAML whose ``1e-3`` is a number, as everywhere but in PyYAML."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), "-+.0123456789"
)


def read_yaml(path: Path) -> object:
    """Content of a YAML file.

    Raises
    ------
    ValueError
        If it is not there or no YAML: one line, with the place.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ValueError(f"no file {path}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None


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
    path = Path(name)
    if path.suffix == ".ipynb" and path.is_file():
        return path.resolve()
    names, name = notebook_names(), str(name)
    start = f"{int(name):02d}_" if name.isdecimal() else name
    found = [name] if name in names else [known for known in names if known.startswith(start)]
    if len(found) != 1:
        hint = f"it could be {' or '.join(found)}" if found else nearest(name, names)
        raise ValueError(f"no notebook {name!r}; {hint}")
    return NOTEBOOKS / f"{found[0]}.ipynb"


def parameters_cell(notebook: Path) -> str:
    """Source of a notebook's parameters cell: names, defaults and what they mean; "" if none."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    tagged = (cell for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    return "".join(next(tagged, {"source": ""})["source"])


def default_parameters(notebook: Path) -> dict[str, object]:
    """What a notebook's parameters cell assigns.

    Raises
    ------
    ValueError
        If it assigns what is no plain value.
    """
    found = {}
    for statement in ast.parse(parameters_cell(notebook)).body:
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
    name, defaults = notebook.stem, default_parameters(notebook)
    for parameter, value in parameters.items():
        if parameter in CIRCUMSTANCES:
            raise ValueError(f"{parameter} is set by the runner; --out (out_dir=) names the folder")
        if parameter not in defaults:
            hint = nearest(parameter, list(defaults)) if defaults else "it has none"
            raise ValueError(f"{name} has no parameter {parameter!r}; {hint}")
        default = defaults[parameter]
        if not _fits(value, default):
            raise ValueError(
                f"{name}: {parameter} is {value!r}; expected {_EXPECTED[type(default)]}, as its "
                f"default {default!r}"
            )


def absolute(value: object) -> object:
    """Paths that exist here, made absolute: the kernel works in the run folder."""
    if isinstance(value, list):
        return [absolute(entry) for entry in value]
    is_path = isinstance(value, str) and "/" in value and Path(value).exists()
    return str(Path(value).resolve()) if is_path else value
