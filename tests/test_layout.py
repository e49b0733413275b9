"""Rooms import only rooms above them in the tree of CONTRIBUTING.md; no module is long."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import minigpt_lab as lab

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "minigpt_lab"
FILES = sorted(PACKAGE.rglob("*.py"))


def rooms() -> list[str]:
    """Names of the rooms, in the order of the tree: the lines of its block that name a folder."""
    block = (ROOT / "CONTRIBUTING.md").read_text().split("```")[1]
    return [line.split("/")[0] for line in block.splitlines() if "/ " in line]


def imported(path: Path) -> set[tuple[str, ...]]:
    """Modules of the package that a file imports anywhere in it, as parts of their names."""
    modules = set()
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            modules |= {(*base, *name.split(".")) for name in names}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names = names or [alias.name for alias in node.names]
            inside = [name for name in names if name.split(".")[0] == PACKAGE.name]
            assert not inside, f"{path} imports {inside[0]} by its absolute name"
    return modules


def test_the_tree_names_every_room_and_nothing_else_stands_at_the_root():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert sorted(rooms()) == sorted(folders)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_imports_go_up_the_tree():
    order = rooms()
    for path in FILES:
        room = path.parent.name
        allowed = set(order[: order.index(room) + 1] if room in order else order)
        below = {module[0] for module in imported(path)} - allowed
        assert not below, f"{path} imports {below}, which stand below {room} in the tree"


def test_rooms_use_what_other_rooms_name():
    for path in FILES:
        inner = [m for m in imported(path) if m[0] != path.parent.name and len(m) > 1]
        assert not inner, f"{path} imports {inner}, past the __init__ of that room"


def test_no_module_is_longer_than_a_sitting():
    lengths = {path: len(path.read_text().splitlines()) for path in FILES}
    assert max(lengths.values()) <= 400, max(lengths, key=lengths.get)


def test_no_module_is_named_as_a_standard_module_or_as_what_it_holds():
    for path in FILES:
        names = {
            node.name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef)
        }
        assert path.stem not in names | set(sys.stdlib_module_names), path


def test_public_names_exist():
    assert [name for name in lab.__all__ if not hasattr(lab, name)] == []


@pytest.mark.slow
def test_import_and_help_load_no_framework():
    code = (
        "import sys, runpy; sys.argv = ['minigpt_lab', '--help']; import minigpt_lab\n"
        "try: runpy.run_module('minigpt_lab', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'pandas'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]" and "sweep" in done.stdout


def test_no_two_test_files_share_a_name():
    """pytest collects a name once, and takes the other for a stale copy of it."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len({*names})


@pytest.mark.xdist_group("one worker")
def test_a_group_of_tests_reaches_the_workers(request):
    """Else every worker makes anew what a group shares: minutes, and nothing fails."""
    if hasattr(request.config, "workerinput"):
        assert request.node.nodeid.endswith("@one worker")
