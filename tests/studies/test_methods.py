"""The comparison of methods: same sizes, same text, every criterion, a user's own too."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
from helpers import random_model

import minigpt_lab as lab
from minigpt_lab import figures, studies
from minigpt_lab.criteria.scores import CRITERIA
from minigpt_lab.models.anatomy import Anatomy
from minigpt_lab.store import cache_key
from minigpt_lab.studies.methods import (
    Method,
    method_comparison,
    method_overlap,
    method_plans,
    method_scores,
    registered_methods,
)
from minigpt_lab.studies.prunings import (
    FineTunedRun,
    pruning_key,
    reconstructed_plans,
    slimgpt_runs,
)


@pytest.fixture(scope="module")
def compared(tiny, tiny_domain, tmp_path_factory):
    """Plans and table of three methods on the tiny Llama, and where its cells are kept."""
    model, tokenizer = tiny
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=512)
    statistics = lab.collect_statistics(model, batches, progress=False)
    methods = {
        "random": Method("random", {"seed": 1}), "wanda": Method("wanda"),
        "flap": Method("fluctuation", bias_compensation=True),
    }  # fmt: skip
    scores, costs = method_scores(model, batches, statistics=statistics, methods=methods)
    assert list(costs["method"]) == list(methods) and (costs["seconds"] > 0).all()
    plans = method_plans(
        model,
        scores,
        methods=methods,
        statistics=statistics,
        ratios=[0.25, 0.5],
        sites=["ffn", "both"],
    )
    folder = tmp_path_factory.mktemp("comparison")
    texts = [tiny_domain.test, lab.load_domain("tiny-games").test]
    table, losses = method_comparison(
        model, tokenizer, plans, texts=texts, max_tokens=256, seq_len=64, out_dir=folder
    )
    return plans, table, folder, texts


def test_all_methods_store_the_same(compared):
    _, table, _, texts = compared
    assert len(table) == len(texts) * (1 + 3 * 2 * 2)
    cuts = table[~table["method"].isin(["dense", "flap"])]
    assert (cuts.groupby(["sites", "ratio"])["stored"].nunique() == 1).all()
    widest = table[table["method"] == "dense"]["stored"].iloc[0]
    assert table["removed"].to_numpy() == pytest.approx(1 - table["stored"] / widest)


def test_cells_are_those_of_the_functions(compared, tiny):
    plans, table, _, texts = compared
    model, tokenizer = tiny
    mini = lab.shrink(model, plans["flap", "both", 0.5])
    row = table.query("method == 'flap' and sites == 'both' and ratio == 0.5").iloc[1]
    held_out = lab.excerpt(texts[1], tokenizer, max_tokens=256)
    expected = lab.perplexity(mini, tokenizer, held_out, seq_len=64, max_characters=None)
    assert row["perplexity"] == pytest.approx(expected.value)
    assert row["stored"] == lab.model_size(mini).stored


def test_finished_cells_are_not_measured_again(compared, tiny, monkeypatch):
    plans, table, folder, texts = compared
    monkeypatch.setattr("minigpt_lab.studies.held_out.diverging", None)
    again, _ = method_comparison(
        *tiny, plans, texts=texts, max_tokens=256, seq_len=64, out_dir=folder
    )
    assert again.equals(table)


def test_recovered_cells_are_others(compared, tiny, tiny_domain):
    plans, table, _, texts = compared
    some = {cell: plan for cell, plan in plans.items() if cell == ("random", "ffn", 0.5)}
    recovery = {"method": "lora", "max_tokens": 1024, "seq_len": 64, "learning_rate": 5e-3}
    after, _ = method_comparison(
        *tiny,
        some,
        texts=texts[:1],
        max_tokens=256,
        seq_len=64,
        recover_on=tiny_domain,
        recovery=recovery,
    )
    assert list(after["method"]) == ["dense", "dense", "random"]
    assert list(after["recovered"]) == [False, True, True]
    dense, control = after["perplexity"].iloc[:2]
    assert control != dense  # a copy is trained, not the model itself
    expected = table.query("method == 'dense'")["perplexity"].iloc[0]
    assert dense == pytest.approx(expected)
    before = table.query("method == 'random' and sites == 'ffn' and ratio == 0.5").iloc[0]
    assert after["perplexity"].iloc[2] < before["perplexity"]
    assert after["perplexity"].iloc[0] == table["perplexity"].iloc[0]  # dense


def test_overlap_of_what_leaves(compared):
    plans, _, _, _ = compared
    table = method_overlap(plans, sites="ffn", ratio=0.5).set_index(["domain", "other"])
    assert table.loc[("wanda", "wanda"), "jaccard"] == 1
    ours, flap = (
        {(i, u) for i, units in enumerate(plans[name, "ffn", 0.5].keep["ffn"]) for u in units}
        for name in ("wanda", "flap")
    )
    every = {(i, u) for i, n in enumerate(plans["flap", "ffn", 0.5].units["ffn"]) for u in range(n)}
    gone = every - ours, every - flap
    expected = len(gone[0] & gone[1]) / len(gone[0] | gone[1])
    assert table.loc[("wanda", "flap"), "jaccard"] == pytest.approx(expected)


def test_a_users_criterion_takes_part(monkeypatch):
    def by_index(model, batches=None, statistics=None, *, sites):
        anatomy = Anatomy(model)
        return {site: [np.arange(n, dtype=float) for n in anatomy.units(site)] for site in sites}

    monkeypatch.setitem(CRITERIA, "index", by_index)
    methods = registered_methods()
    assert {*CRITERIA} <= set(methods) and methods["index"].criterion == "index"
    model = random_model("llama")
    scores = {"index": lab.score(model, "index")}
    plans = method_plans(
        model, scores, methods=methods, statistics=None, ratios=[0.5], sites=["ffn"]
    )
    assert plans["index", "ffn", 0.5].keep["ffn"][0] == list(range(10, 20))


def test_curves_of_every_method(compared):
    _, table, _, texts = compared
    figure = figures.method_curves(table, caption="tiny")
    assert len(figure.axes) == 2 * len(texts)
    axis = figure.axes[0]
    labels = [line.get_label() for line in axis.lines]
    assert labels == ["random", "wanda", "flap", "dense"]
    points = table.query("method == 'wanda' and sites == 'ffn'")
    points = points[points["text"] == points["text"].iloc[0]].sort_values("ratio")
    assert list(axis.lines[1].get_ydata()) == list(points["perplexity"])


def test_curves_name_what_is_off_the_scale(compared):
    _, table, _, _ = compared
    worse = table.copy()
    worse.loc[worse["method"] == "random", "perplexity"] *= 1e4
    axis = figures.method_curves(worse, caption="tiny").axes[0]
    assert axis.get_title(loc="left").endswith("\nabove the scale: random")
    kept = worse[(worse["text"] == worse["text"].iloc[0]) & (worse["method"] != "random")]
    assert kept["perplexity"].max() < axis.get_ylim()[1] < worse["perplexity"].max()


def test_a_comparison_may_fine_tune_on_the_calibration_tokens(tiny, tiny_domain, tmp_path):
    """The control of reconstruction: the pruned model, trained by labels and by the dense one."""
    model, tokenizer = tiny
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=512)
    scores = lab.score(model, "magnitude", sites=("ffn",))
    plans = {("magnitude", "ffn", 0.5): lab.plan_from_scores(model, scores, ratio=0.5)}
    closed = studies.slimgpt_runs(plans, batches, variants={"slimgpt": {}})
    how = {"max_tokens": 512, "epochs": 2, "seq_len": 64, "learning_rate": 1e-3}
    tuned = studies.fine_tuned_runs(closed, tokenizer, tiny_domain, **how)
    names = [name for name, *_ in tuned]
    assert names == ["slimgpt, fine-tuned (label)", "slimgpt, fine-tuned (kl)"]
    seen = lab.excerpt(tiny_domain.calibration, tokenizer, max_tokens=512)
    how = {"texts": [seen], "max_tokens": 512, "seq_len": 64, "out_dir": tmp_path}
    table, _ = studies.method_comparison(model, tokenizer, closed | tuned, **how)
    table = table.set_index("method")
    assert (table.loc[names, "perplexity"] < table.loc["slimgpt", "perplexity"]).all()
    assert table.loc["slimgpt, fine-tuned (kl)", "kl"] < table.loc["slimgpt", "kl"]
    assert (table.loc[names, "seconds"] > table.loc["slimgpt", "seconds"]).all()
    assert table.loc["dense", "seconds"] == 0
    again, _ = studies.method_comparison(model, tokenizer, closed | tuned, **how)
    assert again.set_index("method").equals(table)


def test_what_tells_cells_apart(tiny, tiny_domain, compared):
    """Models, domains and tokens count by what they hold; what cannot be told is refused."""
    plans, *_ = compared
    plans = {cell: plan for cell, plan in plans.items() if cell[:2] == ("random", "ffn")}
    model, tokenizer = tiny
    other = copy.deepcopy(model)
    other.model.norm.weight.data *= 1.5
    games = lab.load_domain("tiny-games")
    namesake = replace(games, name=tiny_domain.name)
    batches = [lab.tokenize(each.calibration, tokenizer, seq_len=64) for each in (games, namesake)]
    keys = []
    for options in (
        {"teacher": model, "loss": "kl"}, {"teacher": other, "loss": "kl"},
        {"general": tiny_domain}, {"general": namesake},
    ):  # fmt: skip
        keys.append(pruning_key(FineTunedRun(None, tokenizer, tiny_domain, options)))
    for generality in (0.25, 0.5):
        variant = {"general": batches[0], "generality": generality}
        runs = slimgpt_runs(plans, batches[0], variants={"mixed": variant})
        keys += [pruning_key(run) for run in runs.values()]
    assert len({cache_key(key) for key in keys}) == len(keys)
    variant = {"allocation": lambda ratio, layer_sites: [ratio] * len(layer_sites)}
    runs = slimgpt_runs(plans, batches[0], variants={"mine": variant})
    with pytest.raises(ValueError, match="lambda.* is no plain data"):
        method_comparison(*tiny, runs, texts=[tiny_domain.test], max_tokens=256, seq_len=64)
    given = ((slimgpt_runs, {"variants": {"a": {}}}), (reconstructed_plans, {"epochs": 1}))
    for function, how in given:
        with pytest.raises(TypeError, match="expected a PruningPlan"):
            function(runs, batches[0], **how)
    with pytest.raises(ValueError, match="recovery is .* no effect with recover_on=None"):
        method_comparison(*tiny, plans, texts=[tiny_domain.test], recovery={"max_tokens": 64})


def test_a_cost_that_was_lost_is_measured_again(tiny, tiny_domain, tmp_path):
    model, tokenizer = tiny
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=256)
    statistics = lab.collect_statistics(model, batches, progress=False)
    methods = {"taylor": Method("taylor"), "ffn alone": Method("taylor")}
    how = {"statistics": statistics, "methods": methods, "out_dir": tmp_path, "sites": ("ffn",)}
    calls, real = [], CRITERIA["taylor"]

    def counted(*arguments, **options):
        calls.append(1)
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CRITERIA, "taylor", counted)
        for costs_lost in (False, False, True):
            if costs_lost:
                (tmp_path / "costs.json").unlink()
            scores, costs = method_scores(model, batches, **how)
    assert len(calls) == 2 and (costs["seconds"] > 0).all()
    plans = method_plans(model, scores, methods=methods, statistics=statistics, ratios=[0.5])
    assert {kind for _, kind, _ in plans} == {"ffn"}
    how = {"methods": methods, "statistics": statistics, "ratios": [0.5], "sites": ["both"]}
    with pytest.raises(ValueError, match="no scores of attention; score them"):
        method_plans(model, scores, **how)
