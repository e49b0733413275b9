"""The API reference: a page per room with its public names, which Sphinx's autodoc fills."""

from __future__ import annotations

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_NAME = _PACKAGE.name
_HEADER = """\
API reference
=============

Every public name, by the room that it stands in. After ``import minigpt_lab as lab`` the names are
``lab.NAME``, or ``lab.ROOM.NAME`` in {rooms}.

"""


def api_pages() -> dict[str, str]:
    """Pages by name: ``api``, with a line for every public name, and ``api/ROOM`` with docstrings.

    The package's stub says which names are public and in which room they are.
    """
    rooms = _imports(_PACKAGE / "__init__.pyi")
    names = {room: [f"{_NAME}.{name}" for name in rooms[room]] for room in rooms if room}
    for room in rooms[""]:  # public as a whole
        inside = {n for group in _imports(_PACKAGE / room / "__init__.py").values() for n in group}
        rest = sorted(inside - {*rooms.get(room, ())})
        names[room] = names.get(room, []) + [f"{_NAME}.{room}.{name}" for name in rest]
    toctree = [".. toctree::", "   :hidden:", "", *(f"   api/{room}" for room in sorted(names))]
    lines, pages = [*toctree, ""], {}
    for room in sorted(names):
        about = inspect.getdoc(import_module(f"{_NAME}.{room}")) or ""
        entries = [_entry(name, room) for name in names[room]]
        pages[f"api/{room}"] = f"{_heading(room, '=')}\n{about}\n\n" + "\n".join(entries)
        lines += [_heading(room, "-"), about.split("\n")[0], ""]
        lines += [_line(name, room) for name in names[room]] + [""]
    whole = ", ".join(f"``{room}``" for room in rooms[""])
    return {"api": _HEADER.format(rooms=whole) + "\n".join(lines), **pages}


def _imports(path: Path) -> dict[str, list[str]]:
    """Names that a file imports from beside it, by module; whole modules under ``""``."""
    found: dict[str, list[str]] = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found.setdefault(node.module or "", []).extend(alias.name for alias in node.names)
    return found


def _heading(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}\n"


def _value(name: str) -> object:
    """The object of a qualified name."""
    module, _, last = name.rpartition(".")
    return getattr(import_module(module), last)


def _line(name: str, room: str) -> str:
    """An item of the list of all names: a link and the first line of what it does."""
    value, last = _value(name), name.rsplit(".", 1)[1]
    text = inspect.getdoc(value) if callable(value) else _comment(last, room)
    summary = re.split(r"\n\s*\n", text or "")[0].replace("\n", " ")
    shown = name.removeprefix(f"{_NAME}.")
    return f"* `{shown} <{name}>`" + (f": {escape_bars(summary)}" if summary else "")


def _entry(name: str, room: str) -> str:
    """A directive that documents a name: autodoc's, or for a constant one with its comment."""
    value, (module, _, last) = _value(name), name.rpartition(".")
    current = f".. py:currentmodule:: {module}\n\n"
    if inspect.isclass(value):
        return f"{current}.. autoclass:: {last}\n   :members:\n"
    if callable(value):
        return f"{current}.. autofunction:: {last}\n"
    keys = ", ".join(f"``{key!r}``" for key in value) if isinstance(value, dict) else ""
    words = [_comment(last, room), f"Keys: {keys}." if keys else ""]
    return f"{current}.. py:data:: {last}\n\n" + "".join(f"   {each}\n\n" for each in words)


def _comment(name: str, room: str) -> str:
    """The ``#:`` lines above the place where a room assigns a constant."""
    pattern = re.compile(rf"((?:^#: .*\n)+)^{name}\b", re.MULTILINE)
    for path in sorted((_PACKAGE / room).glob("*.py")):
        if found := pattern.search(path.read_text("utf-8")):
            return found[1].replace("#: ", "").replace("\n", " ").strip()
    return ""


def escape_bars(text: str) -> str:
    """The text with a backslash before each bar that stands in no literal."""
    return re.sub(r"(``.*?``|`[^`]*`)|\|", lambda match: match[1] or r"\|", text)
