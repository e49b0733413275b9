"""Modules import only what stands before them in CONTRIBUTING.md, and none is long."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "minigpt_lab"
FILES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def order() -> list[str]:
    """Modules and packages as listed, a package after those of its modules that are."""
    words = (ROOT / "CONTRIBUTING.md").read_text()
    listing = re.search(r"locations →[^\n]*(\n +→[^\n]*)+", words)[0]
    found = []
    for name, inner in re.findall(r"(\w+)(?: \(([^)]*)\))?", listing):
        found += [f"{name}.{module}" for module in re.findall(r"\w+", inner)] + [name]
    return found


def listed(parts: tuple[str, ...], names: list[str]) -> str:
    """The listed name that a module of the package goes by."""
    dotted = ".".join(parts[:2])
    return dotted if dotted in names else parts[0]


def module(path: Path) -> tuple[str, ...]:
    """Where in the package a file is."""
    return path.relative_to(PACKAGE).with_suffix("").parts


def imported(path: Path) -> set[tuple[str, ...]]:
    """Modules of the package that a file imports anywhere in it."""
    found = set()
    package = module(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            full = package[: len(package) - node.level + 1]
            if node.module:
                found.add((*full, *node.module.split(".")))
            else:
                found |= {(*full, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            absolute = [node.module] if isinstance(node, ast.ImportFrom) else []
            absolute = absolute or [alias.name for alias in node.names]
            inside = [name for name in absolute if name.split(".")[0] == PACKAGE.name]
            assert not inside, f"{path} imports {inside[0]} by its absolute name"
    return found


def test_imports_go_one_way():
    names = order()
    for path in FILES:
        parts = module(path)
        own = listed(parts, names)
        before = {*names[: names.index(own)], *([own] if len(parts) > 1 else [])}
        behind = {listed(each, names) for each in imported(path)} - before
        assert not behind, f"{path} imports {behind}, which do not stand before {own}"


def test_other_modules_use_what_a_package_names():
    for path in FILES:
        past = [each for each in imported(path) if each[0] != module(path)[0] and len(each) > 1]
        assert not past, f"{path} imports {past}, past the __init__ of its package"


def test_every_module_has_its_place_and_its_line():
    names = order()
    packages = {name.split(".")[0] for name in names if "." in name}
    parts = [module(path) for path in FILES]
    there = {listed(each, names) for each in parts}
    assert sorted(names) == sorted(there)
    missing = {each for each in parts if each[0] in packages and listed(each, names) == each[0]}
    assert missing == {(package, "__init__") for package in packages}
    lines = re.findall(r"^\* `([\w.]+)`: \w", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert sorted(lines) == sorted(there - packages)


def test_no_module_is_longer_than_a_sitting():
    lengths = {p: len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}
    assert max(lengths.values()) <= 400, max(lengths, key=lengths.get)
