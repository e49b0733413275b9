"""Notebooks as regression tests: papermill on a tiny model, numbers against committed ones.

``UPDATE_EXPECTED=1 python -m pytest tests/test_notebooks.py`` writes the expectations anew.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import nbformat
import pytest

from minigpt_lab.experiments import RECORD, notebook_names, run_notebook

EXPECTED = Path(__file__).parent / "expected"
SMALL = {"model_name": "tiny-llama", "seq_len": 64, "calibration_tokens": 2048}
RECOVERY = {
    "stored_ratios": {"mild": 0.9, "aggressive": 0.7}, "recovery_tokens": 2048, "eval_every": 512,
    "learning_rates": {"full": 1e-3, "lora": 5e-3}, "eval_characters": 3000, "test_tokens": 1024,
    "calibration_tokens": 1024,
}  # fmt: skip
ANSWERS = {
    "n_questions": 20, "recovery_tokens": 1024, "learning_rate": 1e-3, "test_tokens": 512,
    "n_rotated": 5,
}  # fmt: skip
MATRIX = {"calibration_tokens": 1024, "test_tokens": 512, "recovery_tokens": 1024}
CASES = {
    "01_activation_histograms": {
        "law-games": {"domains": ["tiny-law", "tiny-games"], "pair": ["tiny-law", "tiny-games"]},
        "opt": {"domains": ["tiny-medical", "tiny-economics"], "model_name": "tiny-opt"},
    },
    "02_threshold_sweep": {
        domain: {
            "domain": domain, "explored": ["tiny-medical"], "epsilon_linear": [0.01, 0.05],
            "epsilon_activation": [0.03, 0.1],
            "epsilon_embedding": [0.0], "epsilon_all": [0.05], "validation_tokens": 512,
            "test_tokens": 512,
        }
        for domain in ("tiny-law", "tiny-games")
    },
    "03_contextual_pruning": {
        "tiny-law": {"domain": "tiny-law", "other_domain": "tiny-games", "test_tokens": 1024},
        "tiny-games": {
            "domain": "tiny-games", "other_domain": "tiny-law", "test_tokens": 1024,
            "model_name": "tiny-phi", "epsilon_linear": 0.05, "quantile_activation": None,
            "epsilon_activation": 0.05,
        },
        "same": {
            "domain": "tiny-law", "other_domain": "tiny-law", "test_tokens": 512,
            "model_name": "tiny-opt",
        },
    },
    "04_recovery_curves": {
        "tiny-law": {"domain": "tiny-law", "other_domain": "tiny-games", **RECOVERY},
        "tiny-games": {
            "domain": "tiny-games", "other_domain": "tiny-law", "model_name": "tiny-phi",
            "allocation": "global", **RECOVERY, "learning_rates": {"lora": 5e-3},
        },
    },
    "05_mcq_evaluation": {
        "two": {"domains": ["tiny-law", "tiny-games"], **ANSWERS},
        "opt": {
            "domains": ["tiny-medical"], "model_name": "tiny-opt", "score": "logprob", **ANSWERS,
        },
    },
    "06_domain_matrix": {
        "three": {"domains": ["tiny-law", "tiny-games", "tiny-medical"], **MATRIX},
        "own": {
            "domains": ["tiny-law", "tiny-economics"], "model_name": "tiny-opt",
            "recover_on": "own", **MATRIX, "draws": 2,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("notebook", "case"), [(name, case) for name, cases in CASES.items() for case in cases]
)
def test_notebook_gives_the_expected_numbers(notebook, case, tmp_path):
    folder = run_notebook(notebook, {**SMALL, **CASES[notebook][case]}, tmp_path / "run")
    record = json.loads((folder / RECORD).read_text())
    assert record["status"] == "completed" and record["protocol"]
    executed = nbformat.read(folder / f"{notebook}.ipynb", as_version=4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
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
    with pytest.raises(
        ValueError, match="no notebook '0'; it could be 01_activation_histograms or"
    ):
        run_notebook("0", {}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_failed_run_leaves_a_record_and_the_notebook(tmp_path):
    wrong = {**SMALL, "domain": "tiny-lore"}
    with pytest.raises(RuntimeError, match="unknown domain 'tiny-lore'.*tiny-law"):
        run_notebook("03_contextual_pruning", wrong, tmp_path / "run")
    record = json.loads((tmp_path / "run" / RECORD).read_text())
    assert record["status"] == "failed" and "tiny-lore" in record["error"]
    assert (tmp_path / "run" / "03_contextual_pruning.ipynb").is_file()
