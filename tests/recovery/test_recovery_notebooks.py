"""Cells of notebook 04 whose parameters may not fit each other, and the grid of the paper."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
CURVES = NOTEBOOKS / "04_recovery_curves.ipynb"
CELLS = {cell.id: cell.source for cell in nbformat.read(CURVES, as_version=4).cells}
GRID = yaml.safe_load((NOTEBOOKS / "grids" / "paper_recovery.yaml").read_text())["parameters"]


def run(*ids: str, **names) -> dict:
    """What cells leave behind, after that of the parameters."""
    scope: dict = {}
    exec(CELLS["recovery-b"], scope)
    scope |= names
    for each in ids:
        exec(CELLS[each], scope)
    return scope


class Loaded(Exception):
    pass


def load_model(name: str):
    raise Loaded


FEW = {"step_ratios": [0.79, 0.6]}


@pytest.mark.parametrize("parameters", [{}, {"step_ratios": []}, {**FEW, **GRID}])
def test_steps_that_end_at_the_last_size_are_taken(parameters):
    with pytest.raises(Loaded):
        run("recovery-d", **parameters, lab=SimpleNamespace(load_model=load_model))


def test_steps_that_end_at_another_size_are_refused():
    with pytest.raises(ValueError, match=r"step_ratios is .*0.6\]; expected it to end at 0.58"):
        run("recovery-d", **FEW, lab=SimpleNamespace(load_model=load_model))
    with pytest.raises(Loaded):  # not SlimGPT's, so not taken
        run("recovery-d", **FEW, pruners=["contextual"], lab=SimpleNamespace(load_model=load_model))


@pytest.mark.parametrize("pruners", [["contextual"], ["reconstructed", "slimgpt"]])
def test_steps_are_compared_with_a_model_that_slimgpt_pruned(pruners):
    """Without it there is no row that its line could begin at in `restore_or_adapt`."""
    lab = SimpleNamespace(
        load_model=lambda _: (None, None),
        load_domains=lambda _: (SimpleNamespace(summary=lambda _: None),) * 2,
        slimgpt=lambda *_, **__: ("mini", None),
        recover=lambda *_, **__: "history",
    )
    stubs = {"pd": SimpleNamespace(concat=lambda *_, **__: None), "require_ended": str}
    stubs |= {"minis": {}, "how": {}, "batches": None, "dense_size": SimpleNamespace(stored=1000)}
    found = run("recovery-d", "steps", pruners=pruners, lab=lab, **stubs)["minis"]
    wanted = {("aggressive", "slimgpt", "mix in 2 steps"): "mini"}
    assert found == (wanted if "slimgpt" in pruners else {})


def test_the_grid_of_the_paper_stops_where_the_paper_does():
    assert GRID["stop_at_dense"] is True and GRID["step_ratios"] == []
