"""SlimGPT taken apart: variants, one layer at a time, one layer's losses, time; and pictures."""

from __future__ import annotations

import math
from functools import partial

import pandas as pd
import pytest
import torch
from helpers import random_model

import minigpt_lab as lab
from minigpt_lab import figures
from minigpt_lab.compensation import layer_by_layer
from minigpt_lab.models.anatomy import Anatomy
from minigpt_lab.studies import ablations, projections

FULL = {"ratio": 0.5, "allocation": "uniform"}


@pytest.fixture(scope="module")
def study(tiny, tiny_domain, tmp_path_factory):
    model, tokenizer = tiny
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=512)
    other = lab.tokenize(tiny_domain.train, tokenizer, seq_len=64, max_tokens=512)
    texts = [tiny_domain.test, lab.load_domain("tiny-games").test]
    variants = {
        "full": FULL,
        "plain": {**FULL, "compensate": False},
        "elsewhere": {**FULL, "batches": other},
    }
    measuring = {"max_tokens": 256, "seq_len": 64, "prompt": "The court",
                 "out_dir": tmp_path_factory.mktemp("study")}  # fmt: skip
    table, layers = ablations.slimgpt_variants(
        model, tokenizer, variants, batches=batches, texts=texts, **measuring
    )
    return variants, batches, texts, measuring, table, layers


def test_variants_are_those_of_the_functions(study, tiny):
    variants, batches, texts, _, table, layers = study
    model, tokenizer = tiny
    assert list(dict.fromkeys(table["variant"])) == ["dense", *variants]
    assert len(table) == len(texts) * 4
    for name in ("full", "elsewhere"):
        options = {"batches": batches, **variants[name]}
        mini, plan = lab.slimgpt(model, options.pop("batches"), **options, progress=False)
        row = table[(table["variant"] == name) & (table["text"] == str(texts[1]))].iloc[0]
        held_out = lab.excerpt(texts[1], tokenizer, max_tokens=256)
        expected = lab.perplexity(mini, tokenizer, held_out, seq_len=64, max_characters=None)
        assert row["perplexity"] == pytest.approx(expected.value)
        assert row["stored"] == lab.model_size(mini).stored
        assert row["continuation"] == lab.generate(mini, tokenizer, "The court", max_new_tokens=20)
        own = layers[(layers["variant"] == name) & (layers["site"] == "ffn")]
        assert list(own["removed"]) == plan.removed["ffn"]
        assert list(own["error"]) == plan.origin["error"]["ffn"]
        cut = layers[layers["variant"] == name]
        assert (cut["removed"] * cut["cost"]).sum() == lab.model_size(model).stored - row["stored"]


def test_the_control_is_of_the_same_size_and_worse(study):
    *_, table, _ = study
    rows = table[table["text"] == table["text"].iloc[0]].set_index("variant")
    assert rows.loc["full", "stored"] == rows.loc["plain", "stored"] < rows.loc["dense", "stored"]
    assert rows.loc["full", "perplexity"] < rows.loc["plain", "perplexity"]
    assert not rows.loc["plain", "compensated"] and rows.loc["full", "compensated"]
    assert rows.loc["dense", ["removed", "perplexity_ratio"]].tolist() == [0, 1]
    ratio = rows["perplexity"] / rows.loc["dense", "perplexity"]
    assert rows["perplexity_ratio"].tolist() == pytest.approx(ratio.tolist())


def test_a_finished_variant_is_found_under_any_name(study, tiny, monkeypatch):
    variants, batches, texts, measuring, table, layers = study
    monkeypatch.setattr(ablations, "slimgpt", None)
    monkeypatch.setattr("minigpt_lab.studies.held_out.diverging", None)
    renamed = {f"{name} again": options for name, options in variants.items()}
    renamed["full again"] = {**FULL, "compensate": True, "block_size": "dynamic"}  # the defaults
    again, same = ablations.slimgpt_variants(
        *tiny, renamed, batches=batches, texts=texts, **measuring
    )
    assert again.drop(columns="variant").equals(table.drop(columns="variant"))
    assert same.drop(columns="variant").equals(layers.drop(columns="variant"))
    with pytest.raises(TypeError):  # other options are another variant
        other = {"other": {**FULL, "saliency": "diag"}}
        ablations.slimgpt_variants(*tiny, other, batches=batches, texts=texts, **measuring)


def test_a_study_of_searches(study, tiny, tmp_path, monkeypatch):
    search = partial(lab.search_counts, levels=2, rounds=1, steps=2)
    monkeypatch.setattr(layer_by_layer, "search_counts", search)
    model, tokenizer = tiny
    _, batches, texts, measuring, *_ = study
    other, _ = lab.slimgpt(model, batches, ratio=0.05, progress=False)
    measuring = {**measuring, "out_dir": tmp_path, "prompt": ""}
    measuring |= {"batches": batches, "texts": texts[:1]}
    variant = {"ratio": 0.3, "allocation": "search"}
    for each in (model, other):  # one folder for a study of several models
        ablations.slimgpt_variants(each, tokenizer, {"s": variant}, **measuring)
    ablations.slimgpt_variants(model, tokenizer, {"s": {**variant, "ratio": 0.4}}, **measuring)
    assert len(list(tmp_path.glob("search-*/search.json"))) == 3
    assert len(list(tmp_path.glob("search-*/state.json"))) == 3
    for wrong in ({"dense": FULL}, {"s": {**FULL, "inplace": True}}):
        with pytest.raises(ValueError, match="a study names 'dense' and sets inplace"):
            ablations.slimgpt_variants(model, tokenizer, wrong, **measuring)


def test_one_layer_at_a_time_leaves_the_others_whole(study, tiny):
    _, batches, texts, measuring, *_ = study
    model, _ = tiny
    measuring = {**measuring, "prompt": ""}
    table = ablations.one_layer_at_a_time(
        *tiny, batches, texts=texts[:1], places=[0.0, 0.2, 1.0], ratios=[0.25, 0.75], **measuring
    )
    last = len(Anatomy(model).layers) - 1
    layers = sorted({0, round(0.2 * last), last})
    assert table[["layer", "ratio"]].values.tolist() == [
        [i, r] for i in layers for r in (0.25, 0.75)
    ]
    assert (table["removed"] < 0.75 / (last + 1)).all()
    mini, plan = lab.slimgpt(
        model, batches, ratio=0.75, allocation="uniform", keep_layers=(last, 0)
    )
    assert not any(sum(counts[:-1]) for counts in plan.removed.values())
    assert table["stored"].iloc[-1] == lab.model_size(mini).stored


def test_one_layers_problems_are_those_of_the_dense_model():
    model = random_model("llama")
    ids = torch.randint(3, 97, (4, 16), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    problems = projections.layer_problems(model, batches, layer=2)
    anatomy = Anatomy(model)
    names = {site: anatomy.name(2, anatomy.family.consumes[site]) for site in problems}
    hessians = lab.collect_hessians(model, batches, names.values(), progress=False)
    for site, name in names.items():
        expected = hessians.matrices[name].float()
        torch.testing.assert_close(problems[site].H, expected, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_losses_of_one_layer(study, tiny):
    _, batches, *_ = study
    problems = projections.layer_problems(tiny[0], batches, layer=1)
    table = projections.layer_losses(problems, [0.0, 0.1, 0.5, 1.0])
    assert set(table["site"]) == {"attention", "ffn"}
    assert (table["leave"] > 0).all() and (table["leave"] < table["units"]).all()
    cells = table.set_index(["site", "leave", "choice", "draw", "compensated"])["loss"].unstack()
    assert (cells[True] < cells[False]).all()
    channels = table[(table["site"] == "ffn") & table["compensated"]]
    means = channels.groupby(["leave", "choice"])["loss"].mean().unstack()
    assert (means["SlimGPT"] < means["random"]).all()
    given = problems["attention"]  # one unit leaves: the loss is the exact error
    scale = float(((given.W @ given.H) * given.W).sum())
    errors = lab.SALIENCIES["exact"](
        given.W, torch.linalg.inv(given.H.double()).float(), given.unit_columns
    )
    one = table.query("site == 'attention' and leave == 1 and choice == 'SlimGPT' and compensated")
    best = float(errors.min()) / scale
    assert best * 0.999 < one["loss"].item() < best * 1.2  # damped, so not quite the least


def test_time_is_measured_beside_a_plain_pass(study, tiny, tmp_path, monkeypatch):
    _, batches, *_ = study
    table = ablations.slimgpt_timing(
        tiny[0], [batches[:1], batches], repeats=2, out_dir=tmp_path, **FULL
    )
    tokens = [batch["input_ids"].numel() for batch in batches]
    assert list(table["tokens"]) == [tokens[0], sum(tokens)]
    assert (table["min"] <= table["passes"]).all() and (table["passes"] <= table["max"]).all()
    assert (table["min"] > 0).all()
    monkeypatch.setattr(ablations, "slimgpt", None)
    again = ablations.slimgpt_timing(
        tiny[0], [batches[:1], batches], repeats=2, out_dir=tmp_path, **FULL
    )
    assert again.equals(table)


def test_dots_of_variants_say_what_is_compensated(study):
    *_, table, _ = study
    figure = figures.variant_dots(table, caption="tiny", title="Why?")
    assert figure._suptitle.get_text() == "Why?" and len(figure.axes) == 2
    axis = figure.axes[0]
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == ["full", "plain", "elsewhere"]
    rows = table[table["text"] == table["text"].iloc[0]].set_index("variant").loc[names]
    assert [t.get_text() for t in axis.texts] == [f"{value:.3g}" for value in rows["perplexity"]]
    dots = [line for line in axis.lines if line.get_marker() not in ("None", "", "|")]
    assert [dot.get_markerfacecolor() == "white" for dot in dots] == [False, True, False]
    assert [text.get_text() for text in figure.legends[0].get_texts()][0] == "compensated"
    worse = table.assign(perplexity=table["perplexity"] * 1000)
    words = [text.get_text() for text in figures.variant_dots(worse).axes[0].texts]
    assert words == [f"{1000 * value:,.0f}" for value in rows["perplexity"]]
    alone = table.assign(low=math.nan, high=math.nan)
    assert not figures.variant_dots(alone[alone["compensated"]]).legends


def test_budgets_are_shares_of_parameters(study):
    *_, layers = study
    figure = figures.layer_budgets(layers[layers["variant"] == "full"], caption="tiny")
    shares, costs = figure.axes
    assert shares.lines[0].get_ydata() == pytest.approx(0.5, abs=0.01)
    own = layers[(layers["variant"] == "full") & (layers["site"] == "ffn")]
    assert list(costs.lines[0].get_ydata()) == list(own["error"])


def test_the_other_pictures(study, tiny):
    _, batches, *_ = study
    losses = projections.layer_losses(
        projections.layer_problems(tiny[0], batches, layer=0), [0.2, 0.5]
    )
    figure = figures.layer_losses(losses, caption="tiny")
    assert [text.get_text() for text in figure.legends[0].get_texts()][:4] == [
        f"{choice}, {way}compensated" for choice in ("SlimGPT", "random") for way in ("", "not ")
    ]
    one = pd.DataFrame(
        {"layer": [0, 4] * 2, "ratio": [0.25] * 2 + [0.5] * 2, "text": "law/test",
         "perplexity_ratio": [1.1, 1.0, 1.4, 1.2]}
    )  # fmt: skip
    (axis,) = figures.one_layer_curves(one, caption="tiny").axes
    assert [list(line.get_ydata()) for line in axis.lines[:2]] == [[1.4, 1.2], [1.1, 1.0]]
    settings = pd.DataFrame(
        {"setting": ["tokens"] * 2 + ["window"], "value": [512, 1024, 64], "text": "law/test",
         "perplexity": [40.0, 30.0, 35.0], "dense": 20.0}
    )  # fmt: skip
    axes = figures.calibration_settings(settings, caption="tiny").axes
    assert [axis.get_xlabel() for axis in axes] == ["tokens", "window"]
    assert [t.get_text() for t in axes[0].get_xticklabels()] == ["512", "1,024"]


def test_amounts_of_text_and_lengths_of_windows(study, tiny, tiny_domain):
    _, batches, texts, measuring, table, _ = study
    measuring = {**measuring, "prompt": ""}
    source = tiny_domain.calibration
    found = ablations.calibration_amounts(
        *tiny,
        source,
        texts=texts,
        options=FULL,
        tokens=[256, 512],
        lengths=[32, 64],
        total=512,
        **measuring,
    )
    assert list(found["setting"].unique()) == [
        "calibration tokens", "tokens per window, 512 in all",
    ]  # fmt: skip
    assert found["value"].tolist() == [256] * 2 + [512] * 2 + [32] * 2 + [64] * 2
    cells = found.set_index(["value", "text"])["perplexity"]
    known = table.set_index(["variant", "text"])["perplexity"]
    for text in map(str, texts):
        assert cells[512, text] == cells[64, text] == known["full", text]
        assert (found.loc[found["text"] == text, "dense"] == known["dense", text]).all()
