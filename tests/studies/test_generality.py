"""The studies of reconstruction, of the dial to general text, and of dropped blocks."""

from __future__ import annotations

import warnings

import pandas as pd
import pytest
from helpers import same

import minigpt_lab as lab
from minigpt_lab import figures, studies
from minigpt_lab.studies import dropped_blocks
from minigpt_lab.studies.dropped_blocks import as_fast

SHORT = {"seq_len": 64, "max_tokens": 256}


@pytest.fixture(scope="module")
def texts(tiny, tiny_domain):
    """Calibration tokens of law, held-out ones, and those of games."""
    games = lab.load_domain("tiny-games")
    parts = tiny_domain.calibration, tiny_domain.validation, games.calibration
    return [lab.tokenize(part, tiny[1], seq_len=64, max_tokens=512) for part in parts]


def test_a_blocks_loss_falls_on_its_text(tiny, texts):
    own, other, _ = texts
    curve = studies.reconstruction_curve(tiny[0], own, other, layer=1, ratio=0.5, epochs=3)
    losses = curve.pivot(index="epoch", columns="text", values="loss")
    assert [*losses.index] == [0, 1, 2, 3]
    assert losses["calibration"].is_monotonic_decreasing
    assert losses.loc[0, "held-out"] > losses.loc[0, "calibration"]  # what the closed form fitted
    # the closed form and its fitting are those of slimgpt: layer 0 reads dense inputs too
    counts = {"ffn": [tiny[0].config.intermediate_size // 2, 0, 0, 0]}
    _, plan = lab.slimgpt(tiny[0], own, counts=counts, sites=["ffn"], reconstruct=3, progress=False)
    first = studies.reconstruction_curve(tiny[0], own, other, layer=0, ratio=0.5, epochs=3)
    found = first[first["text"] == "calibration"]["loss"].iloc[[0, -1]]
    assert [*found] == pytest.approx(plan.origin["reconstruction"]["loss"]["ffn"][0], rel=0.01)
    figure = figures.reconstruction_curve(curve)
    assert len(figure.axes[0].lines) >= 4


def test_the_dial_in_a_table_is_slimgpts(tiny, tiny_domain, texts, tmp_path):
    own, _, general = texts
    held_out = [tiny_domain.test, lab.load_domain("tiny-games").test]
    options = {"sites": ["ffn"], "out_dir": tmp_path, **SHORT}
    given = {"general": general, "texts": held_out, "ratios": [0.5], "shares": [0.0, 0.5]}
    table = studies.generality_curve(*tiny, own, **given, **options)
    assert len(table) == 3 * 2 and table["ratio"].isna().sum() == 2
    mini, _ = lab.slimgpt(
        tiny[0], own, ratio=0.5, sites=["ffn"], general=general, generality=0.5, progress=False
    )
    text = lab.excerpt(held_out[1], tiny[1], max_tokens=256)
    expected = lab.perplexity(mini, tiny[1], text, seq_len=64, max_characters=None, progress=False)
    row = table[(table["generality"] == 0.5) & (table["text"] == str(held_out[1]))].iloc[0]
    assert row["perplexity"] == pytest.approx(expected.value)
    # other general text is another variant
    given["general"] = own
    again = studies.generality_curve(*tiny, own, **given, **options)
    row = again[(again["generality"] == 0.5) & (again["text"] == str(held_out[1]))].iloc[0]
    assert row["perplexity"] != pytest.approx(expected.value)
    figure = figures.generality_front(table, domain=held_out[0], other=held_out[1])
    assert [len(axis.lines) for axis in figure.axes] == [4, 2]
    figure = figures.generality_front(table, domain=held_out[0], other=held_out[1], chosen=0.5)
    line, ring = figure.axes[0].lines[-1], figure.axes[1].lines[-1]
    chosen = table[table["generality"] == 0.5].set_index("text")["perplexity"]
    place = [chosen[str(text)] for text in held_out]
    assert line.get_xdata()[0] == 0.5 and [*ring.get_xydata()[0]] == place


def test_plans_are_compared_with_and_without_reconstruction(tiny, tiny_domain, texts):
    model, tokenizer = tiny
    scores = {"magnitude": lab.score(model, "magnitude")}
    methods = {"magnitude": studies.Method("magnitude")}
    plans = studies.method_plans(
        model, scores, methods=methods, statistics=None, ratios=[0.5], sites=["ffn"]
    )
    fitted = studies.reconstructed_plans(plans, texts[0], epochs=2)
    assert [*fitted] == [("magnitude, reconstructed", "ffn", 0.5)]
    plan = plans["magnitude", "ffn", 0.5]
    expected = lab.reconstruct(lab.shrink(model, plan), model, texts[0], epochs=2, progress=False)
    assert same(studies.pruned_model(model, next(iter(fitted.values()))), expected)
    table, _ = studies.method_comparison(
        model, tokenizer, plans | fitted, texts=[tiny_domain.test], **SHORT
    )
    levels = table.set_index("method")["perplexity"]
    assert levels["dense"] < levels["magnitude, reconstructed"] < levels["magnitude"]


@pytest.mark.parametrize(
    ("speeds", "wanted", "share"),
    [
        ({0.2: 1.2, 0.4: 1.6}, 1.4, 0.3),
        ({0.2: 1.2, 0.4: 1.6}, 1.1, 0.1),
        ({0.1: 0.9, 0.2: 1.0, 0.4: 1.5}, 1.25, 0.2),  # slower than dense: says nothing
        ({0.1: 1.3, 0.2: 1.3, 0.4: 1.5}, 1.3, 0.1),  # the least that is as fast
        ({0.2: 1.0, 0.4: 1.0}, 1.0, None),
        ({0.2: 1.2, 0.4: 1.6}, 1.7, None),
    ],
)
def test_the_share_that_is_as_fast(speeds, wanted, share):
    assert as_fast(speeds, wanted) == (share and pytest.approx(share))


def test_a_family_that_takes_no_map_is_compared_without(texts, tiny, tiny_domain):
    model, tokenizer = tiny
    influence = lab.block_influence(model, texts[0], sites=("ffn", "attention"))
    first = influence.query("layer == 0 and site == 'attention'")
    given = {"general": texts[2], "texts": [tiny_domain.test], "influence": first, **SHORT}
    with pytest.warns(UserWarning, match="no map in place of the dropped blocks: .*layer 0's att"):
        table = studies.dropped_or_narrowed(model, tokenizer, texts[0], ratio=1e-3, **given)
    assert [*table["variant"]][:3] == ["dense", "dropped", "narrowed"]


@pytest.mark.parametrize(("measured", "kept"), [(1.3, True), (1.0, False)])
def test_as_fast_is_what_was_measured_so(measured, kept, tiny, tiny_domain, texts, monkeypatch):
    model, tokenizer = tiny
    influence = lab.block_influence(model, texts[0], sites=("ffn", "attention"))
    # dense, dropped, with a map, narrowed twice; four widths; the one between them
    speeds = iter([1.0, 1.4, 1.4, 1.1, 1.1, 1.1, 1.3, 1.6, 1.9, measured])

    def efficiency(*models, **options):
        return pd.DataFrame([{"prefill_speedup": 1.0, "decode_speedup": next(speeds)}])

    monkeypatch.setattr(dropped_blocks, "efficiency", efficiency)
    given = {"general": texts[2], "texts": [tiny_domain.test], "influence": influence, **SHORT}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        table = studies.dropped_or_narrowed(model, tokenizer, texts[0], ratio=0.2, **given)
    assert ("narrowed, as fast" in [*table["variant"]]) == kept
    assert any("decodes as fast" in str(each.message) for each in told) != kept


def test_dropped_blocks_are_compared_at_their_size(tiny, tiny_domain, texts, tmp_path, monkeypatch):
    model, tokenizer = tiny
    influence = lab.block_influence(model, texts[0], sites=("ffn", "attention"))
    given = {"general": texts[2], "texts": [tiny_domain.test], "influence": influence, **SHORT}
    given |= {"ratio": 0.2, "out_dir": tmp_path}
    table = studies.dropped_or_narrowed(model, tokenizer, texts[0], **given)
    with monkeypatch.context() as patch:  # nothing is computed twice
        for name in ("slimgpt", "linear_compensated", "efficiency"):
            patch.setattr(dropped_blocks, name, None)
        again = studies.dropped_or_narrowed(model, tokenizer, texts[0], **given)
    pd.testing.assert_frame_equal(again, table)
    table = table.set_index("variant")
    dropped = lab.shrink(model, lab.plan_dropping(model, influence, ratio=0.2))
    assert table["stored"]["dropped"] == lab.model_size(dropped).stored
    ratios = table["stored"] / table["stored"]["dropped"]
    same_size = ratios.drop(["dense", "narrowed, as fast"], errors="ignore")
    assert ratios["dense"] > 1.1 and same_size.between(0.99, 1).all()
    text = lab.excerpt(tiny_domain.test, tokenizer, max_tokens=256)
    expected = lab.perplexity(dropped, tokenizer, text, seq_len=64, max_characters=None)
    assert table["perplexity"]["dropped"] == pytest.approx(expected.value)
    names = ["dense", "dropped", "dropped, with a map", "narrowed", "narrowed, μ 0.5"]
    assert [*table.index][:5] == names
    assert table["perplexity"][:5].is_unique and (table["decode_speedup"] > 0).all()
