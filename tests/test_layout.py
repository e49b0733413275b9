"""Modules import only what stands before them in CONTRIBUTING.md, and none is long."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "minigpt_lab"
PACKAGES = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == (2 if path.parent != PACKAGE else 1):
            found |= {node.module.split(".")[0]} if node.module else {n.name for n in node.names}
    return found


def test_imports_go_one_way():
    listing = re.search(r"assets →[^\n]*(\n +→[^\n]*)+", (ROOT / "CONTRIBUTING.md").read_text())
    order = re.findall(r"\w+", listing[0])
    modules = {p.stem for p in PACKAGE.glob("*.py")} | PACKAGES
    assert set(order) == modules - {"__init__"}
    for name in order:
        files = PACKAGE.glob(f"{name}/*.py" if name in PACKAGES else f"{name}.py")
        for path in files:
            assert imported(path) <= set(order[: order.index(name)]), path


def test_every_module_has_its_line():
    words = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"^\* `(\w+)`: \w", words, re.M)
    modules = {p.stem for p in PACKAGE.glob("*.py")} | PACKAGES
    assert sorted(named) == sorted(modules - {"__init__"})


def test_no_module_is_longer_than_a_sitting():
    lengths = {p: len(p.read_text().splitlines()) for p in PACKAGE.rglob("*.py")}
    assert max(lengths.values()) <= 400, max(lengths, key=lengths.get)
