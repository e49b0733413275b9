"""The explorer without a front end: values, pictures, the message path of a browser."""

from __future__ import annotations

import pytest
import traitlets

import minigpt_lab as lab
from minigpt_lab.widgets import ThresholdExplorer

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def statistics(tiny, tiny_statistics):
    model, tokenizer = tiny
    batches = lab.tokenize(lab.load_domain("tiny-games").calibration, tokenizer, 64, 512)
    games = lab.collect_statistics(model, batches, progress=False)
    return {"tiny-law": tiny_statistics, "tiny-games": games}


@pytest.fixture
def explorer(tiny, statistics):
    return ThresholdExplorer(tiny[0], statistics, "tiny-law", 0.05)


def test_moving_epsilon_changes_numbers_and_picture(explorer, tiny, statistics):
    before = explorer.image.value
    explorer.epsilon.value = 0.1
    plan = lab.contextual_plan(tiny[0], statistics["tiny-law"], epsilon_activation=0.1)
    assert str(plan.predicted_size(tiny[0])) in explorer.summary.value
    assert explorer.image.value[:8] == PNG and explorer.image.value != before


def test_messages_of_a_browser(explorer):
    explorer.domain.set_state({"index": 1})
    explorer.epsilon.set_state({"value": 0.07})
    assert "<b>tiny-games</b>, ε = 7.000e-02" in explorer.summary.value


def test_the_same_value_does_not_redraw(explorer, monkeypatch):
    drawn = []
    monkeypatch.setattr(explorer, "render", lambda: drawn.append(1))
    explorer.epsilon.value = explorer.epsilon.value
    assert drawn == []


def test_a_slider_never_runs_the_model(explorer, tiny, monkeypatch):
    monkeypatch.setattr(type(tiny[0]), "forward", None)
    explorer.epsilon.value = 0.03
    assert "3.000e-02" in explorer.summary.value


def test_bad_values(explorer, monkeypatch):
    with pytest.raises(traitlets.TraitError):
        explorer.domain.value = "astrology"

    def broken(*_args, **_kwargs):
        raise ValueError("no such thing")

    monkeypatch.setattr("minigpt_lab.widgets.activation_histograms", broken)
    explorer.epsilon.value = 0.02
    assert "no such thing" in explorer.summary.value  # seen by the reader, not lost in a log


def test_epsilon_zero_is_a_place_to_start(tiny, statistics):
    explorer = ThresholdExplorer(tiny[0], statistics, "tiny-law", 0.0)
    assert 0 < explorer.epsilon.value < 0.1


def test_headless_shows_the_picture(explorer):
    assert explorer.show(interactive=True) is explorer.view
    assert explorer.show(interactive=False).data == explorer.image.value
