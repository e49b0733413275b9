"""A training that was stopped leaves the best state so far: nobody may go on as if it had ended."""

from __future__ import annotations

import ast
from pathlib import Path

import pandas as pd
import pytest

import minigpt_lab as lab
from minigpt_lab import studies
from minigpt_lab.recovery import require_ended
from minigpt_lab.studies import prunings

PACKAGE = Path(lab.__file__).parent


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


def test_every_function_of_the_package_that_trains_asks():
    """Each call of `recover` is the argument of `require_ended`."""
    calls = 0
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        asked = {
            id(argument)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require_ended"
            for argument in node.args
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "recover":
                assert id(node) in asked, f"{path.name}:{node.lineno}"
                calls += 1
    assert calls >= 5


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
