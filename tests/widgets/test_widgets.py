"""The explorers without a front end: values, pictures, the message path of a browser."""

from __future__ import annotations

import re
import threading

import numpy as np
import pandas as pd
import pytest
import traitlets
from tokenizer_kinds import KINDS, SCRIPTS, SPELLS_ALL, tokenizer_of

import minigpt_lab as lab
from minigpt_lab.widgets.base import Chooser
from minigpt_lab.widgets.jobs import ModelJob, perplexity_job
from minigpt_lab.widgets.packing import whole_characters
from minigpt_lab.widgets.pruning import RatioExplorer
from minigpt_lab.widgets.recipes import MiniForm
from minigpt_lab.widgets.threshold_explorer import ThresholdExplorer

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


def expected_plan(tiny, statistics, **options):
    return lab.contextual_plan(tiny[0], statistics["tiny-law"], **options)


def test_the_plan_follows_component_rule_and_threshold(explorer, tiny, statistics):
    explorer.epsilon = 0.1
    assert explorer.plan == expected_plan(tiny, statistics, epsilon_activation=0.1)
    explorer.component = "linear"
    assert explorer.plan == expected_plan(tiny, statistics, epsilon_linear=0.1)
    thresholds = {"epsilon_linear": 0.1, "epsilon_activation": 0.1, "epsilon_embedding": 0.0}
    explorer.component = "all"
    assert explorer.plan == expected_plan(tiny, statistics, **thresholds)
    explorer.rule, explorer.share = "share", 0.25
    plan = expected_plan(
        tiny, statistics, quantile={"linear": 0.25, "activation": 0.25}, epsilon_embedding=0.0
    )
    assert explorer.plan == plan and explorer.size == plan.predicted_size(tiny[0])
    explorer.component, explorer.epsilon = "embedding", 0.001  # tokens have no layers to share
    assert explorer.plan == expected_plan(tiny, statistics, epsilon_embedding=0.001)


def test_messages_of_a_browser(explorer, tiny, statistics):
    explorer.set_state({"domain": "tiny-games", "epsilon": 0.07})
    plan = lab.contextual_plan(tiny[0], statistics["tiny-games"], epsilon_activation=0.07)
    assert explorer.plan == plan


def test_thresholds_have_three_digits(explorer, tiny, statistics):
    for given, taken in ((0.061728, 0.0617), (0.0, 0.0), (1e-30, 1e-12), (1e30, 9.99e6)):
        explorer.epsilon = given
        assert explorer.epsilon == taken
    start = ThresholdExplorer(tiny[0], statistics, "tiny-law", epsilon=0.0)
    assert start.epsilon == 0.0
    assert start.plan.predicted_size(tiny[0]).stored == lab.model_size(tiny[0]).stored


@pytest.mark.parametrize("kind", KINDS)
def test_whole_characters_appear_where_tokens_complete_them(kind):
    tokenizer, spells_all = tokenizer_of(kind), kind in SPELLS_ALL
    text = SCRIPTS if spells_all else "The court held that."
    ids = tokenizer.encode(text, add_special_tokens=False)
    texts, begins = whole_characters(np.array(2 * ids), np.array([0, len(ids)]), tokenizer)
    assert len(texts) == len(begins) and len(ids) in begins  # no character reaches over two windows
    half = "".join(texts[: len(texts) // 2])
    assert texts == 2 * texts[: len(texts) // 2]
    assert half.removeprefix(" ") == tokenizer.decode(ids).removeprefix(" ")
    if spells_all:
        assert half.removeprefix(" ") == SCRIPTS
        assert len(begins) < 2 * len(ids)
        ends = [*begins[1:], 2 * len(ids)]
        for text, begin, end in zip(texts, begins, ends, strict=True):  # each is as short as can be
            assert end - begin == 1 or len(text.strip()) <= 2, text


def test_half_a_character_is_told(tiny):
    ids = tiny[1].encode("ab 🙂", add_special_tokens=False)[:-1]
    texts, begins = whole_characters(np.array(ids), np.array([0]), tiny[1])
    assert "".join(texts).startswith("ab") and texts[-1].endswith("\ufffd")
    marks = tiny[1].encode("\ufffd" * 40, add_special_tokens=False)  # never completed: in pieces
    texts, begins = whole_characters(np.array(marks), np.array([0]), tiny[1])
    assert "".join(texts) == "\ufffd" * 40 and len(texts) > 1


def test_an_explorer_never_runs_the_model(tiny, statistics, monkeypatch):
    monkeypatch.setattr(type(tiny[0]), "forward", None)
    explorer = ThresholdExplorer(tiny[0], statistics, "tiny-law", epsilon=0.05)
    explorer.epsilon = 0.03
    assert "data:image/png" in explorer.to_html()


def test_bad_values(explorer, tiny, statistics):
    with pytest.raises(ValueError, match="domain is 'astrology'; expected"):
        explorer.domain = "astrology"
    with pytest.raises(ValueError, match="component is 'heads'; expected"):
        explorer.component = "heads"
    for name, value in (("rule", "half"), ("epsilon", -1), ("share", 1)):
        with pytest.raises(traitlets.TraitError):
            setattr(explorer, name, value)
    with pytest.raises(ValueError, match="domain is 'law'; expected"):
        ThresholdExplorer(tiny[0], statistics, "law", epsilon=0.05)
    for epsilon in (-1, float("nan"), float("inf"), "0.1"):
        with pytest.raises(
            ValueError, match=f"epsilon is {epsilon!r}; expected a number of at least 0"
        ):
            ThresholdExplorer(tiny[0], statistics, "tiny-law", epsilon=epsilon)
    with pytest.raises(ValueError, match="sweeps.* is .*; expected a DataFrame with columns"):
        ThresholdExplorer(
            tiny[0], statistics, "tiny-law", epsilon=0.1, sweeps={"tiny-law": pd.DataFrame()}
        )


def test_pages_with_and_without_a_kernel(explorer):
    live, *_ = explorer.show(interactive=True)._repr_mimebundle_()
    static = explorer.show(interactive=False)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in live
    assert set(static) == {"text/html"} and live["text/html"] == static["text/html"]
    page = static["text/html"]
    assert "tiny-law" in page and '<script type="module">' in page
    assert not re.findall(r"(?:src|href)=.(?!data:)", page)  # nothing comes over the network
    assert not re.findall(r"\bimport\b|\bfetch\b|https?:", page.split('type="module"')[1])


@pytest.fixture
def ratios(tiny):
    scores = {name: lab.score(tiny[0], name) for name in ("magnitude", "random")}
    return RatioExplorer(tiny[0], scores)


def test_ratio_and_method(ratios, tiny):
    before = ratios.picture
    ratios.method.set_state({"index": 1})
    ratios.ratio.set_state({"value": 0.5})
    ratios.allocation.value = "global"
    random = ratios.scores["random"]
    assert ratios.plan == lab.plan_from_scores(tiny[0], random, ratio=0.5, allocation="global")
    assert f"stored {ratios.plan.predicted_size(tiny[0]).stored:,}" in ratios.shown.value
    assert ratios.picture != before


def test_what_changes_is_said_while_it_is_computed(ratios):
    seen = []
    ratios.shown.observe(lambda change: seen.append(change["new"]), "value")
    ratios.ratio.value = 0.5
    busy, done = seen
    assert "computing…" in busy and "computing…" not in done
    assert "data:image/png" in done and ratios.words in done  # words and picture at once


def test_a_share_that_rounds_to_nothing_is_said(tiny):
    scores = lab.score(tiny[0], "random", sites=("attention", "ffn"))
    ratios = RatioExplorer(tiny[0], {"random": scores}, ratio=0.1)
    assert ratios.allocation.value == "global" and "rounds to 0" not in ratios.words
    ratios.allocation.value = "uniform"
    assert "attention: nothing is removed, as 10% of 2 units per layer rounds to 0" in ratios.words
    assert "ffn: nothing" not in ratios.words
    ratios.ratio.value = 0.5
    assert "rounds to 0" not in ratios.words


def test_choosing_among_results():
    table = pd.DataFrame({"domain": ["law", "law", "games"], "n": [1, 2, 3]})
    chooser = Chooser(lambda domain: table[table["domain"] == domain], domain=["law", "games"])
    assert ">2</td>" in chooser.shown.value and ">3</td>" not in chooser.shown.value
    chooser.controls["domain"].set_state({"index": 1})
    assert ">3</td>" in chooser.shown.value and ">2</td>" not in chooser.shown.value
    assert set(chooser.show(interactive=False)._repr_mimebundle_()) == {"text/html"}
    assert "<img" not in chooser.shown.value


@pytest.mark.parametrize(
    ("choices", "kind"),
    [
        (["0.0", "0.25", "1.0"], "SelectionSlider"),
        (["1.0", "0.5"], "Dropdown"),
        (["0.5"], "Dropdown"),
        (["0.5", "search"], "Dropdown"),
    ],
)
def test_numbers_in_order_have_a_slider(choices, kind):
    chooser = Chooser(lambda n: pd.DataFrame({"chosen": [n]}), n=choices)
    assert type(chooser.controls["n"]).__name__ == kind
    chooser.controls["n"].set_state({"index": len(choices) - 1})
    assert f">{choices[-1]}<" in chooser.shown.value


def test_numbers_of_a_table_are_short_and_all_of_their_digits_are_read():
    columns = {"n": [94_700_000], "loss": [1234.5], "kl": [0.01234], "low": [float("nan")]}
    shown = Chooser(lambda name: pd.DataFrame(columns), name=["law"]).shown.value
    assert all(f">{text}<" in shown for text in ("94,700,000", "1,234", "0.0123", "–"))


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
    assert f"at most {dense // 2:,} of {dense:,} parameters" in form.shown.value
    form.size.value, form.minutes.value = 0.25, 20
    assert form.chosen == {"size": 0.25, "minutes": 20}
    assert f"at most {dense // 4:,} of" in form.shown.value
    assert "image/png" not in form.show(False)._repr_mimebundle_()
    with pytest.raises(ValueError, match="size is 2; expected a number above 0 and below 1"):
        MiniForm(tiny[0], domain="tiny-law", size=2, minutes=10)
