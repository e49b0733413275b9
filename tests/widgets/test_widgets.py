"""The explorers without a front end: values, pictures, the message path of a browser."""

from __future__ import annotations

import io
import threading

import numpy as np
import pandas as pd
import pytest
import traitlets
from PIL import Image

import minigpt_lab as lab
from minigpt_lab import figures
from minigpt_lab.widgets.base import Chooser
from minigpt_lab.widgets.jobs import ModelJob, perplexity_job
from minigpt_lab.widgets.pruning import RELATIVE, RatioExplorer, ThresholdExplorer
from minigpt_lab.widgets.recipes import MiniForm

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def statistics(tiny, tiny_statistics):
    model, tokenizer = tiny
    batches = lab.tokenize(
        lab.load_domain("tiny-games").calibration, tokenizer, seq_len=64, max_tokens=512
    )
    games = lab.collect_statistics(model, batches, progress=False)
    return {"tiny-law": tiny_statistics, "tiny-games": games}


@pytest.fixture
def explorer(tiny, statistics):
    return ThresholdExplorer(tiny[0], statistics, "tiny-law", epsilon=0.05)


def test_moving_epsilon_changes_numbers_and_picture(explorer, tiny, statistics):
    before = explorer.image.value
    explorer.epsilon["activation"].value = 0.1
    plan = lab.contextual_plan(tiny[0], statistics["tiny-law"], epsilon_activation=0.1)
    assert explorer.plan == plan
    assert f"stored {plan.predicted_size(tiny[0]).stored:,}" in explorer.summary.value
    assert explorer.image.value[:8] == PNG and explorer.image.value != before


def test_every_component_reaches_the_plan(explorer, tiny, statistics):
    explorer.active["linear"].value = explorer.active["embedding"].value = True
    explorer.epsilon["linear"].value = 0.04
    thresholds = {"epsilon_linear": 0.04, "epsilon_activation": 0.05, "epsilon_embedding": 0.0}
    found = statistics["tiny-law"]
    assert explorer.plan == lab.contextual_plan(tiny[0], found, **thresholds)
    frequency = float(np.sort(found.token_counts)[-5] / found.n_tokens)
    explorer.epsilon["embedding"].value = frequency
    thresholds["epsilon_embedding"] = frequency
    assert explorer.plan == lab.contextual_plan(tiny[0], found, **thresholds)
    for box in explorer.active.values():
        box.value = False
    assert explorer.plan.predicted_size(tiny[0]).stored == lab.model_size(tiny[0]).stored


def test_shares_of_each_layer(explorer, tiny, statistics):
    explorer.rule.value = RELATIVE
    explorer.share["activation"].value = 0.25
    quantile = {"activation": 0.25}
    assert explorer.plan == lab.contextual_plan(tiny[0], statistics["tiny-law"], quantile=quantile)
    assert "the lowest 25% of each layer" in explorer.summary.value
    assert explorer.epsilon["activation"].layout.display == "none"
    assert explorer.share["activation"].layout.display is None


def test_messages_of_a_browser(explorer):
    explorer.domain.set_state({"index": 1})
    explorer.epsilon["activation"].set_state({"value": 0.07})
    assert "<b>tiny-games</b>" in explorer.summary.value
    assert "activation ε = 7.000e-02" in explorer.summary.value
    assert "elsewhere: tiny-law" in explorer.summary.value


def test_the_same_value_does_not_redraw(explorer, monkeypatch):
    drawn = []
    monkeypatch.setattr(explorer, "render", lambda: drawn.append(1))
    explorer.epsilon["activation"].value = explorer.epsilon["activation"].value
    assert drawn == []
    explorer.epsilon["activation"].value = 0.06
    assert drawn == [1]


def test_a_slider_never_runs_the_model(explorer, tiny, monkeypatch):
    monkeypatch.setattr(type(tiny[0]), "forward", None)
    explorer.epsilon["activation"].value = 0.03
    assert "3.000e-02" in explorer.summary.value


def test_a_sweep_is_read_where_it_was_measured(tiny, statistics):
    rows = [["activation", "contextual", e, r] for e, r in ((0.04, 1.5), (0.08, 6.0))]
    sweep = pd.DataFrame(rows, columns=["component", "method", "epsilon", "perplexity_ratio"])
    explorer = ThresholdExplorer(
        tiny[0], statistics, "tiny-law", epsilon=0.04, sweeps={"tiny-law": sweep}
    )
    assert "activation alone: validation perplexity ×1.50" in explorer.summary.value
    explorer.epsilon["activation"].value = 0.04 * 2**0.5
    assert "×3.00, between ε = 0.04 and 0.08" in explorer.summary.value
    explorer.epsilon["activation"].value = 0.03
    assert "sweep" not in explorer.summary.value
    explorer.epsilon["activation"].value = 0.05
    explorer.domain.value = "tiny-games"  # measured on the other one
    assert "sweep" not in explorer.summary.value


def test_bad_values(explorer, monkeypatch):
    with pytest.raises(traitlets.TraitError):
        explorer.domain.value = "astrology"

    def broken(*_args, **_kwargs):
        raise ValueError("no <such> thing")

    picture = explorer.image.value
    monkeypatch.setattr(figures.ThresholdPicture, "draw", broken)
    explorer.epsilon["activation"].value = 0.02
    assert (
        "no &lt;such&gt; thing" in explorer.summary.value
    )  # seen by the reader, not lost in a log
    assert explorer.image.value == picture


def test_a_start_that_does_not_exist_is_named(tiny, statistics):
    with pytest.raises(ValueError, match="domain is 'law'; expected one of 'tiny-law'"):
        ThresholdExplorer(tiny[0], statistics, "law", epsilon=0.05)
    for epsilon in (-1, float("nan"), float("inf"), "0.1"):
        with pytest.raises(
            ValueError, match=f"epsilon is {epsilon!r}; expected a number of at least 0"
        ):
            ThresholdExplorer(tiny[0], statistics, "tiny-law", epsilon=epsilon)


def test_epsilon_zero_is_a_place_to_start(tiny, statistics):
    explorer = ThresholdExplorer(tiny[0], statistics, "tiny-law", epsilon=0.0)
    assert 0 < explorer.epsilon["activation"].value < 0.1


def test_drawing_only_what_moved_gives_the_whole_picture(explorer, tiny, statistics):
    """The quick path (a kept background) against a picture drawn from nothing."""
    explorer.show(interactive=True)  # draws ahead
    for value in (0.06, 0.07):
        explorer.epsilon["activation"].value = value
    explorer.domain.value = "tiny-games"
    explorer.epsilon["activation"].value = 0.08
    fresh = ThresholdExplorer(tiny[0], statistics, "tiny-games", epsilon=0.08)
    quick, whole = (
        np.asarray(Image.open(io.BytesIO(e.image.value)), float) for e in (explorer, fresh)
    )
    assert quick.shape == whole.shape and np.abs(quick - whole).mean() < 0.5


def test_pages_with_and_without_widgets(explorer):
    live = explorer.show(interactive=True)._repr_mimebundle_()
    static = explorer.show(interactive=False)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in live
    assert set(static) == {"image/png", "text/html"}
    assert live["image/png"] == static["image/png"] and "tiny-law" in static["text/html"]


@pytest.fixture
def ratios(tiny):
    scores = {name: lab.score(tiny[0], name) for name in ("magnitude", "random")}
    return RatioExplorer(tiny[0], scores)


def test_ratio_and_method(ratios, tiny):
    before = ratios.image.value
    ratios.method.set_state({"index": 1})
    ratios.ratio.set_state({"value": 0.5})
    ratios.allocation.value = "global"
    random = ratios.scores["random"]
    assert ratios.plan == lab.plan_from_scores(tiny[0], random, ratio=0.5, allocation="global")
    assert f"stored {ratios.plan.predicted_size(tiny[0]).stored:,}" in ratios.summary.value
    assert ratios.image.value != before


def test_choosing_among_results():
    table = pd.DataFrame({"domain": ["law", "law", "games"], "n": [1, 2, 3]})
    chooser = Chooser(lambda domain: table[table["domain"] == domain], domain=["law", "games"])
    assert "<td>2</td>" in chooser.summary.value and "<td>3</td>" not in chooser.summary.value
    chooser.controls["domain"].set_state({"index": 1})
    assert "<td>3</td>" in chooser.summary.value and "<td>2</td>" not in chooser.summary.value
    assert set(chooser.show(interactive=False)._repr_mimebundle_()) == {"text/html"}


def test_a_job_reports_and_keeps_its_last_result():
    answers = iter(["first", ValueError("broke")])

    def work(tick):
        tick(0.5)
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    job = ModelJob("measure", work)
    job.button.click()
    job.wait()
    assert (job.result.value, job.state.value, job.progress.value) == ("first", "", 1.0)
    job.button.click()
    job.wait()
    assert job.result.value == "first" and "ValueError: broke" in job.state.value
    assert not job.button.disabled and job.cancel.disabled


def test_a_job_can_be_cancelled_and_is_not_started_twice():
    running, calls = threading.Event(), []

    def work(tick):
        calls.append(1)
        while True:
            running.set()
            tick(0.1)

    job = ModelJob("measure", work)
    job.button.click()
    assert running.wait(300)
    job.start()
    job.cancel.click()
    job.wait()
    assert "cancelled" in job.state.value and len(calls) == 1
    assert not job.button.disabled


def test_measuring_the_explorers_choice(explorer, tiny, tiny_domain):
    model, tokenizer = tiny
    job = perplexity_job(explorer, tokenizer, tiny_domain.validation, max_tokens=256, seq_len=64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    job.button.click()
    job.wait()
    held_out = lab.excerpt(tiny_domain.validation, tokenizer, max_tokens=256)
    mini = lab.shrink(model, explorer.plan)
    expected = lab.perplexity(mini, tokenizer, held_out, seq_len=64, max_characters=None)
    assert f"{expected.value:.2f}" in job.result.value and "64" in job.result.value
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_the_form_of_a_mini_says_what_is_kept(tiny):
    form = MiniForm(tiny[0], domain="tiny-law", size=0.5, minutes=10)
    dense = lab.model_size(tiny[0]).stored
    assert f"at most {dense // 2:,} of {dense:,} parameters" in form.summary.value
    form.size.value, form.minutes.value = 0.25, 20
    assert form.chosen == {"size": 0.25, "minutes": 20}
    assert f"at most {dense // 4:,} of" in form.summary.value
    assert "image/png" not in form.show(False)._repr_mimebundle_()
    with pytest.raises(ValueError, match="size is 2; expected a number above 0 and below 1"):
        MiniForm(tiny[0], domain="tiny-law", size=2, minutes=10)
