"""Runs beside each other: what is read from records, what is on the front, what is drawn."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest

from minigpt_lab import __main__ as command_line
from minigpt_lab import figures
from minigpt_lab.experiments import comparisons
from minigpt_lab.experiments.records import write_record
from minigpt_lab.experiments.reports import write_report


def run(folder, table, text="abc", weights="012", **parameters):
    """A run folder with a summary table; `text` and `weights` are hashes."""
    folder.mkdir(parents=True)
    pd.DataFrame(table).to_csv(folder / "summary.csv", index=False)
    given = {"domain_name": "law", "seq_len": 64, "test_tokens": 1024, **parameters}
    write_record(folder, {
        "notebook": "03_contextual_pruning", "status": "completed", "parameters": given,
        "metrics": {"nonzero": 70}, "tables": ["summary"], "protocol": "quickly",
        "model": {"label": "tiny", "sha256": weights}, "data": {"law": {"test": text}},
        "versions": {"torch": "2"},
    })  # fmt: skip


def rows(stored, perplexity, bits, text="law/test"):
    variants = ["dense", "masked", "shrunk", "reloaded"]
    return {
        "text": text, "variant": variants, "stored": [100, 100, stored, stored],
        "nonzero": [99, stored, stored, stored], "perplexity": [16.0, 9.0, perplexity, perplexity],
        "low": [8.0, 8, 8, 8], "high": [32.0, 32, 32, 32], "bits_per_character": [2, 3, bits, bits],
    }  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    run(tmp_path / "a", rows(80, 20.0, 2.5))
    run(tmp_path / "b", rows(60, 30.0, 3.0))
    run(tmp_path / "c", rows(70, 40.0, 3.5))
    run(tmp_path / "d", rows(50, 9.0, 3.0), domain_name="games")  # cut for another domain
    return tmp_path


def test_measurements_are_on_the_scale_of_the_dense_tokens(runs):
    table = comparisons.measurements(runs)
    assert table["method"].value_counts().to_dict() == {"pruned": 4, "dense": 1}
    one = table[(table["run"] == "a") & (table["method"] == "pruned")].iloc[0]
    assert one["perplexity"] == pytest.approx(16 ** (2.5 / 2)) == pytest.approx(32)
    # an interval of bits: 2.5 · log 8 / log 20 and so on
    assert one["low"] == pytest.approx(16 ** (2.5 * np.log(8) / np.log(20) / 2))
    assert one["stored_ratio"] == 0.8 and one["nonzero_ratio"] == pytest.approx(80 / 99)
    assert one["perplexity_ratio"] == pytest.approx(2)
    assert one["protocol"] == "at most 1,024 test tokens, windows of 64"
    dense = table[table["method"] == "dense"].iloc[0]
    assert (dense["low"], dense["perplexity"]) == (8, 16) and dense["inside"]
    assert table.set_index("run")["inside"]["d"] == np.False_


def test_methods_have_one_name_whatever_the_size(tmp_path):
    variants = ["dense", "mild, slimgpt", "mild, slimgpt, kl"]
    table = {"text": "law/test", "variant": variants, "stored": [9, 8, 8],
             "perplexity": [1.0, 3.0, 2.0]}  # fmt: skip
    run(tmp_path / "recovery", table, stored_ratios={"mild": 0.9})
    answers = {"domain": ["law", "games"] * 2, "variant": ["dense"] * 2 + ["random"] * 2,
               "stored": [9, 9, 8, 8], "perplexity": [1.0, 2.0, 3.0, 4.0], "accuracy": 0.5,
               "low": 0.4, "high": 0.6}  # fmt: skip
    run(tmp_path / "answers", answers, domain_name=None, test_tokens=512)
    found = comparisons.measurements(tmp_path)
    assert set(found["method"]) == {"dense", "pruned, slimgpt", "recovered, slimgpt, kl", "random"}
    assert found["low"].isna().all() and found["inside"].all()
    assert set(found["text"]) == {"law/test", "games/test"}


def test_front_is_what_nothing_beats():
    points = pd.DataFrame(
        [(10, 5.0), (8, 6.0), (8, 7.0), (9, 6.0), (4, 9.0), (4, 9.0), (5, 9.5), (3, np.nan)],
        columns=["stored", "perplexity"],
    ).assign(model="m", protocol="p", text="t")
    on_front = [True, True, False, False, True, True, False, False]
    assert comparisons.pareto(points).tolist() == on_front
    other = points.assign(text="u")  # another text has a front of its own
    assert (
        comparisons.pareto(pd.concat([points, other], ignore_index=True)).tolist() == on_front * 2
    )


@pytest.mark.parametrize("other", [{"text": "d" * 64}, {"weights": "d" * 64}])
def test_one_label_of_other_content_has_a_front_of_its_own(tmp_path, other):
    run(tmp_path / "a", rows(80, 20.0, 2.5))
    run(tmp_path / "b", rows(60, 18.0, 2.2), **other)  # would beat it
    run(tmp_path / "c", rows(90, 30.0, 3.0), **other)
    table = comparisons.select(comparisons.measurements(tmp_path))
    assert len(table) == 5 and table["method"].eq("dense").sum() == 2
    front = table.assign(front=comparisons.pareto(table)).query("method != 'dense'")
    assert front.set_index("run")["front"].to_dict() == {"a": True, "b": True, "c": False}
    assert set(comparisons.smallest(table, 9)["run"]) == {"a", "b"}
    kinds = ("text", "domain") if "text" in other else ("model",)
    for kind in kinds:  # and the pictures say which is which
        assert table[kind].str.contains("dddddd").sum() == 3, kind
        assert not table[kind].str.contains("d" * 7).any()


def test_select_and_smallest(runs):
    table = comparisons.measurements(runs)
    inside = comparisons.select(table)
    assert set(inside["run"]) == {"a", "b", "c"} and "dense" in set(inside["method"])
    assert "d" in set(comparisons.select(table, outside=True)["run"])
    with pytest.raises(ValueError, match="no run has the domain 'lwa'; did you mean 'law'"):
        comparisons.select(table, domains=["lwa"])
    with pytest.raises(ValueError, match="'sotred'; expected one of 'stored', 'nonzero'; did"):
        comparisons.select(table, size="sotred")
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        comparisons.measurements(runs / "nowhere")
    assert comparisons.smallest(inside, 2.5)["run"].tolist() == ["a"]
    assert comparisons.smallest(inside, 1.5)["method"].tolist() == ["dense"]
    (runs / "nothing").mkdir()
    empty = comparisons.select(comparisons.measurements(runs / "nothing"), domains=["law"])
    assert empty.empty and comparisons.smallest(empty, 2).empty
    assert comparisons.pareto(empty).empty


def test_figure_draws_the_front_and_fades_the_rest(runs):
    table = comparisons.measurements(runs)
    table = comparisons.select(table)
    table = table.assign(front=comparisons.pareto(table))
    random = table[table["run"] == "c"].assign(method="random", stored=90)
    table = pd.concat([table, random.assign(front=False)], ignore_index=True)
    figure = figures.pareto_front(table, caption="tiny runs")
    axis = figure.axes[0]
    assert axis.get_xscale() == axis.get_yscale() == "log"
    assert "tiny" in axis.get_title(loc="left") and "tiny runs" in figure._supxlabel.get_text()
    steps = [line for line in axis.lines if line.get_drawstyle() == "steps-post"]
    assert [line.get_xdata().tolist() for line in steps] == [[60, 80, 100]]
    points = {line.get_marker(): line for line in axis.lines if line not in steps}
    assert points["*"].get_xdata().tolist() == [100]
    assert points["x"].get_alpha() < 1
    assert sorted(text.get_text() for text in axis.texts) == ["×2", "×4"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["law", "dense", "pruned", "random", "not on the front"]


def test_labels_do_not_overlap_and_panels_keep_protocols_apart():
    table = pd.DataFrame(
        {"stored": np.linspace(1e6, 1.1e6, 40), "perplexity": np.linspace(30, 29, 40)}
    ).assign(domain="law", text="law/test", method="pruned", model="m", front=True,
             perplexity_ratio=1.5)  # fmt: skip
    table["protocol"] = ["p", "q"] * 20
    figure = figures.pareto_front(table)
    assert len([axis for axis in figure.axes if axis.get_visible()]) == 2
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "not on the front" not in labels  # nothing is faded
    figures.png_bytes(figure)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert 1 < len(boxes) < 20
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_figure_of_nothing_says_so(runs):
    table = comparisons.measurements(runs).iloc[:0].assign(front=False)
    assert "no run has a size" in figures.pareto_front(table).texts[-1].get_text()


@pytest.mark.slow
def test_report_is_one_page_with_everything(runs, tmp_path, monkeypatch):
    failed = {"notebook": "03_contextual_pruning", "status": "failed", "parameters": {},
              "metrics": {}, "error": "no <luck>"}  # fmt: skip
    write_record(runs / "failed" / "e", failed)
    monkeypatch.setattr(sys, "argv", ["minigpt_lab", "report", str(runs)])
    command_line.main()
    page = (runs / "report.html").read_text()
    assert "4 runs completed, 1 failed" in page and "no &lt;luck&gt;" in page
    assert "data:image/png;base64," in page and "experiments." not in page
    for words in ("quickly", "abc", "nonzero", "tiny", "law"):
        assert words in page
    silent = {"notebook": "mine", "status": "completed", "parameters": {}, "metrics": {}}
    write_record(tmp_path / "nothing" / "one", silent)
    assert "No run in" in write_report(tmp_path / "nothing").read_text()
    write_record(tmp_path / "nothing" / "one", {**silent, "smoke": True})
    with pytest.raises(ValueError, match="no run ended in"):
        write_report(tmp_path / "nothing")
