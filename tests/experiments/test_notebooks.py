"""Notebooks as regression tests: papermill on a tiny model, numbers against committed ones.

With ``UPDATE_EXPECTED=1`` in the environment it writes the expectations anew.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import nbformat
import pytest

from minigpt_lab.experiments.parameters import notebook_names, smoke_cases
from minigpt_lab.experiments.records import read_record
from minigpt_lab.experiments.runs import run_notebook

EXPECTED = Path(__file__).parents[1] / "expected"
CASES = smoke_cases()
NAMES = [(name, case) for name, cases in CASES.items() for case in cases]
SWEEP = pytest.mark.xdist_group("sweep")  # one worker makes it for all who read it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("notebook", "case"),
    [pytest.param(*name, marks=[SWEEP] * (name[0] == "07_compare_runs")) for name in NAMES],
)
def test_notebook_gives_the_expected_numbers(notebook, case, tmp_path, request):
    parameters = CASES[notebook][case]
    if notebook == "07_compare_runs":
        parameters = {**parameters, "runs": str(request.getfixturevalue("tiny_sweep").folder)}
    folder = run_notebook(notebook, parameters, tmp_path / "run")
    record = read_record(folder)
    assert record["status"] == "completed" and record["protocol"]
    executed = nbformat.read(folder / f"{notebook}.ipynb", as_version=4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    pictures = sum(cell.source.count("figures.save_figure(") for cell in executed.cells)
    shown = sum("image/png" in output.get("data", {}) for output in outputs)
    assert shown >= pictures >= 1
    assert list(folder.glob("*.png")) and list(folder.glob("*.svg"))
    path = EXPECTED / f"{notebook}-{case}.json"
    if os.environ.get("UPDATE_EXPECTED"):
        path.write_text(json.dumps(record["metrics"], indent=1, sort_keys=True) + "\n")
    expected, found = json.loads(path.read_text()), record["metrics"]
    absent = {key for key, value in expected.items() if value is None}  # a level never reached
    assert absent == {key for key, value in found.items() if value is None}
    assert found.keys() == expected.keys()
    for key in expected.keys() - absent:
        slack = 0.051 if key.endswith("accuracy") else None  # one question of twenty
        assert found[key] == pytest.approx(expected[key], rel=0.02, abs=slack), key


def test_every_notebook_has_two_cases():
    assert set(CASES) == set(notebook_names())
    assert all(len(cases) >= 2 for cases in CASES.values())


def test_unknown_names_are_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match="no notebook '3_contextual'.*03_contextual_pruning"):
        run_notebook("3_contextual")
    with pytest.raises(ValueError, match="no parameter 'epsilon_activations'; did you mean"):
        run_notebook("03_contextual_pruning", {"epsilon_activations": 1}, tmp_path / "run")
    with pytest.raises(ValueError, match="set by the runner"):
        run_notebook("03_contextual_pruning", {"interactive": True}, tmp_path / "run")
    assert not (tmp_path / "run").exists()
