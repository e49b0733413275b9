"""The worked examples of CONTRIBUTING.md run."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from helpers import random_model

import minigpt_lab as lab
from minigpt_lab.criteria import scores, units
from minigpt_lab.figures import axes, frames, style

GUIDE = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text()


def example(holds: str) -> str:
    """The Python block of the guide that holds some words."""
    return next(block for block in GUIDE.split("```python\n")[1:] if holds in block).split("```")[0]


def test_the_example_of_a_criterion(monkeypatch):
    monkeypatch.setitem(lab.CRITERIA, "l1", None)  # and gone again after the test
    del lab.CRITERIA["l1"]
    exec(example("def l1_scores"), {**vars(scores), **vars(units)})
    model = random_model("llama")
    expected = model.model.layers[0].mlp.down_proj.weight.abs().sum(0)
    result = lab.score(model, "l1", sites=("ffn",))
    assert result.values["ffn"][0] == pytest.approx(expected.detach().numpy(), rel=1e-5)


def test_the_example_of_a_figure():
    names = {**vars(axes), **vars(frames), **vars(style), "pd": pd}
    exec("from __future__ import annotations\n" + example("def size_against_loss"), names)
    table = pd.DataFrame(
        {"variant": ["dense", "shrunk"], "stored": [10.0, 5.0], "perplexity": [20.0, 30.0]}
    )
    figure = names["size_against_loss"](table, caption="two variants")
    assert len(figure.axes[0].lines) == 2
