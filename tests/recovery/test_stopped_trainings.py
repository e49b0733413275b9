"""A training that was stopped leaves the best state so far: nobody may go on as if it had ended."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest

import minigpt_lab as lab
from minigpt_lab import studies
from minigpt_lab.recovery import require_ended
from minigpt_lab.studies import prunings

PACKAGE = Path(lab.__file__).parent
NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def history(why: str) -> pd.DataFrame:
    found = pd.DataFrame({"seconds": [1.0]})
    found.attrs["stopped"] = why
    return found


@pytest.mark.parametrize(("why", "error"), [("interrupted", KeyboardInterrupt), ("disk", OSError)])
def test_what_stopped_it_is_raised(why, error):
    with pytest.raises(error):
        require_ended(history(why))


@pytest.mark.parametrize("why", ["finished", "patience", "recovered", "diverged"])
def test_what_ended_is_passed_on(why):
    assert require_ended(history(why)).attrs["stopped"] == why


def trainings(source: str, where: str) -> int:
    """Number of calls of `recover`, each of them the argument of `require_ended`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = {"require_ended": [], "recover": []}
    for call in calls:  # of recover(…) or lab.recover(…)
        name = getattr(call.func, "id", getattr(call.func, "attr", ""))
        named.get(name, []).append(call)
    asked = {id(argument) for call in named["require_ended"] for argument in call.args}
    for call in named["recover"]:
        assert id(call) in asked, f"{where}:{call.lineno}"
    return len(named["recover"])


def test_every_function_of_the_package_that_trains_asks():
    paths = [*PACKAGE.rglob("*.py")]
    assert sum(trainings(path.read_text(), path.name) for path in paths) >= 5


def test_every_notebook_that_trains_asks():
    """Its record, or its table, would be that of a model trained by half."""
    paths = [path for path in NOTEBOOKS.glob("*.ipynb") if path.stem != "solutions"]
    found = 0
    for path in paths:
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                source = re.sub("^%.*", "", cell.source, flags=re.MULTILINE)
                found += trainings(source, f"{path.name}, {cell.id}")
    assert found >= 5


def test_a_comparison_keeps_no_half_trained_control(tiny, tiny_domain, tmp_path, monkeypatch):
    model, tokenizer = tiny
    plan = lab.plan_from_scores(model, lab.score(model, "magnitude", sites=("ffn",)), ratio=0.5)
    closed = {("magnitude", "ffn", 0.5): plan}
    how = {"max_tokens": 1024, "epochs": 2, "seq_len": 64, "learning_rate": 1e-3}
    tuned = studies.fine_tuned_runs(closed, tokenizer, tiny_domain, losses=["kl"], **how)
    how = {"texts": [tiny_domain.test], "max_tokens": 256, "seq_len": 64, "out_dir": tmp_path}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prunings, "recover", lambda *_, **__: history("interrupted"))
        studies.method_comparison(model, tokenizer, closed | tuned, **how)
    table, _ = studies.method_comparison(model, tokenizer, closed | tuned, **how)
    values = table.set_index("method")["perplexity"]
    assert values["magnitude, fine-tuned (kl)"] < values["magnitude"]
    for options, words in (
        ({"loss": "kl"}, "loss: expected"),
        ({"general": tiny_domain}, "general: expected"),
        ({"epochz": 3}, "epochz: expected .*epochs"),
    ):
        with pytest.raises(ValueError, match=words):
            studies.fine_tuned_runs(closed, tokenizer, tiny_domain, **options)
