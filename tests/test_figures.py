"""What the figures draw: labels, artists, limits; not pixels."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from minigpt_lab import analysis, figures


@pytest.fixture
def activations():
    rng = np.random.default_rng(0)
    parts = []
    for domain, shift in (("law", -1), ("medical", 0)):
        for layer in range(8):
            values = rng.lognormal(shift, 1, 50)
            values[:5] = 0
            rows = {"domain": domain, "layer": layer, "neuron": range(50), "mean_abs": values}
            parts.append(pd.DataFrame(rows))
    return pd.concat(parts, ignore_index=True)


def test_histograms_show_zero_mass_and_epsilon(activations):
    figure = figures.activation_histograms(activations, 0.3, n_layers=4, caption="tiny model")
    axes = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title(loc="left") for axis in axes] == [f"layer {i}" for i in (0, 2, 5, 7)]
    for axis in axes:
        assert [bar.get_height() for bar in axis.containers[0]] == [0.1]  # 5 of 50 are never on
        assert axis.lines[-1].get_xdata()[0] == pytest.approx(np.log10(0.3))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["law", "medical", "ε = 0.3"]
    assert "tiny model" in figure._supxlabel.get_text()


def test_histograms_say_how_many_are_never_on_and_thin_the_decades(activations):
    figure = figures.activation_histograms(activations, n_layers=2)
    assert [text.get_text() for text in figure.axes[0].texts] == ["never on:\n10.0%"]
    wide = activations.assign(mean_abs=activations["mean_abs"] ** 6)
    for frame in (activations, wide):
        ticks = figures.activation_histograms(frame, n_layers=2).axes[0].get_xticklabels()
        assert ticks[0].get_text() == "0" and 3 <= len(ticks) <= 8
    live = activations[activations["mean_abs"] > 0]
    axis = figures.activation_histograms(live, n_layers=2).axes[0]
    assert not axis.texts and axis.get_xticklabels()[0].get_text() != "0"


def test_titles_stay_inside_narrow_figures(sweep):
    overlap = pd.DataFrame(
        [("law", "law", 0.9, 0.18)], columns="domain other jaccard chance".split()
    )
    for figure in (figures.threshold_sweep(sweep), figures.overlap_matrix(overlap)):
        figures.png_bytes(figure)  # lays it out
        assert figure.get_suptitle().endswith("?")
        box = figure._suptitle.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width


def test_overlap_matrix_writes_every_cell():
    names = ("law", "games")
    rows = [(a, b, 0.9 if a == b else 0.4, 0.18) for a in names for b in names]
    frame = pd.DataFrame(rows, columns=["domain", "other", "jaccard", "chance"])
    axis = figures.overlap_matrix(frame).axes[0]
    assert sorted(text.get_text() for text in axis.texts) == ["0.40", "0.40", "0.90", "0.90"]
    assert axis.collections[0].get_clim() == (pytest.approx(0.18), 1)
    frame.loc[1, "chance"] = 0.3
    axis = figures.overlap_matrix(frame).axes[0]
    assert sorted(text.get_text() for text in axis.texts)[0] == "0.40\n(0.18)"
    axis = figures.overlap_matrix(frame.assign(chance=1.0)).axes[0]
    assert axis.collections[0].get_clim() == (0.99, 1)
    nothing = figures.overlap_matrix(frame.assign(jaccard=np.nan))
    assert "choose a larger ε" in nothing.texts[-1].get_text()


def test_scatter_puts_domains_on_axes(activations):
    axis = figures.magnitude_scatter(activations, "law", "medical", 0.3).axes[0]
    assert axis.get_xlabel().endswith("law") and axis.get_ylabel().endswith("medical")
    assert axis.get_xscale() == axis.get_yscale() == "log"
    assert len(axis.lines) == 3  # diagonal, ε both ways


@pytest.fixture
def sweep():
    rows = []
    for method, slope in (("contextual", 1.0), ("random", 3.0), ("magnitude", 2.0)):
        for epsilon, left in ((1e-3, 1.0), (1e-2, 0.8), (1e-1, 0.4)):
            rows.append(["activation", method, epsilon, *[left] * 3, 1 + slope * (1 - left) ** 3])
    names = "component method epsilon stored_ratio nonzero_ratio layer_ratio perplexity_ratio"
    return pd.DataFrame(rows, columns=names.split())


def test_sweep_draws_every_method_and_mark(sweep):
    figure = figures.threshold_sweep(sweep, [1e-5, 1e-3, 1e-1], {"activation": 1e-2})
    size, loss = figure.axes
    assert len(size.lines) == 2 + 2 + 1  # stored and non-zero, two marks in range, the knee
    assert {text.get_text() for text in loss.get_legend().get_texts()} == set(sweep["method"])
    assert "knee at ε = 0.01" in size.get_title(loc="left")


def test_sweep_of_one_point_has_its_tick_and_no_knee(sweep):
    for epsilon, words in ((0.05, "0.05"), (0.0, "0")):
        point = sweep[sweep["epsilon"] == 1e-2].assign(epsilon=epsilon, component="embedding")
        size, loss = figures.threshold_sweep(point, knees={"embedding": epsilon}).axes
        assert [tick.get_text() for tick in loss.get_xticklabels()] == [words]
        assert "knee" not in size.get_title(loc="left")
        assert all(line.get_marker() not in ("", "None") for line in size.lines)
        assert "share of tokens" in loss.get_xlabel()


def test_knee_is_the_last_cheap_point(sweep):
    curve = sweep[sweep["method"] == "contextual"]
    assert analysis.knee(curve)["epsilon"] == 1e-2
    steep = curve.assign(perplexity_ratio=[1, 39, 40])
    assert analysis.knee(steep)["stored_ratio"] == 1.0  # nothing below the line: no knee
    flat = curve.assign(perplexity_ratio=1.0)
    assert analysis.knee(flat)["stored_ratio"] == 1.0


def test_budget_bars_add_up():
    rows = [
        ("dense", "embeddings", 2e6), ("dense", "ffn", 3e6),
        ("shrunk", "embeddings", 1e6), ("shrunk", "ffn", 2e6),
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["variant", "part", "parameters"])
    axis = figures.budget_bars(frame).axes[0]
    assert [text.get_text() for text in axis.texts] == [" 5 M", " 3 M"]


def test_layer_profile_has_a_bar_per_layer():
    rows = [("ffn", i, 20, 20 - i) for i in range(6)]
    frame = pd.DataFrame(rows, columns=["site", "layer", "units", "kept"])
    axis = figures.layer_profile(frame).axes[0]
    assert [round(bar.get_height(), 3) for bar in axis.patches] == [1, 0.95, 0.9, 0.85, 0.8, 0.75]


def test_loss_dots_have_intervals_and_numbers():
    rows = [
        ("dense", "law/test", 1.0, 0.9, 1.2), ("shrunk", "law/test", 1.2, 1.0, 1.4),
        ("dense", "games/test", 1.1, 1.0, 1.3), ("shrunk", "games/test", 1.5, 1.3, 1.6),
    ]  # fmt: skip
    names = "variant text bits_per_character bits_low bits_high".split()
    figure = figures.perplexity_dots(pd.DataFrame(rows, columns=names))
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["law/test", "games/test"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.000", "1.200"]
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()


def test_loss_dots_say_when_there_is_no_interval():
    names = "variant text bits_per_character bits_low bits_high".split()
    rows = [("dense", "law/test", 1.0, np.nan, np.nan), ("dense", "games/test", 1.1, 1.0, 1.3)]
    axes = figures.perplexity_dots(pd.DataFrame(rows, columns=names)).axes
    assert axes[0].get_title(loc="left") == "law/test: one passage, no interval"
    assert [axis.get_xlabel() for axis in axes] == [
        "bits per character", "bits per character (95 % interval)",
    ]  # fmt: skip


def test_saving_writes_picture_vector_and_data(tmp_path, sweep):
    figure = figures.threshold_sweep(sweep)
    assert figures.save_figure(figure, tmp_path / "f" / "sweep", sweep) is figure
    assert sorted(p.suffix for p in (tmp_path / "f").iterdir()) == [".csv", ".png", ".svg"]
    assert figures.png_bytes(figures.threshold_sweep(sweep)) == figures.png_bytes(
        figures.threshold_sweep(sweep)
    )


def test_colours_are_one_per_domain():
    six = [figures.colour(name) for name in figures.DOMAIN_COLOURS]
    assert len(set(six)) == 6
    assert figures.colour("tiny-law") == figures.colour("law")
    assert figures.colour("mine", ["mine"]) != "#000000"


@pytest.fixture
def histories():
    rows = [
        [regime, method, tokens, 30 - tokens / 100 - 5 * (regime == "mild"), 40 + tokens / 100]
        for regime in ("mild", "aggressive")
        for method in ("full", "lora")
        for tokens in (0, 512, 1024)
    ]
    return pd.DataFrame(
        rows, columns=["regime", "method", "tokens", "perplexity", "other_perplexity"]
    )


def test_recovery_curves_mark_where_dense_was_reached(histories):
    figure = figures.recovery_curves(histories, {"law": 18.0, "games": 35.0}, "two runs")
    mild, aggressive = figure.axes
    stars = [
        [len(line.get_xdata()) for line in axis.lines if line.get_marker() == "*"]
        for axis in (mild, aggressive)
    ]
    assert stars == [[1, 1], [0, 0]]  # only the mild cut comes back
    levels = [set(line.get_ydata()) for line in mild.lines if len(line.get_xdata()) == 2]
    assert {18.0} in levels and {35.0} in levels
    words = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"full", "lora", "on law", "dense on games"} <= words


def test_answers_stand_beside_chance():
    table = pd.DataFrame(
        [
            [domain, variant, 0.3, 0.2, 0.4, 0.25, 100]
            for domain in ("law", "medical")
            for variant in ("dense", "pruned", "recovered")
        ],
        columns=["domain", "variant", "accuracy", "low", "high", "chance", "items"],
    )
    axis = figures.answer_dots(table).axes[0]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["law\nn = 100", "medical\nn = 100"]
    assert len(axis.containers) == 3 and axis.get_xlabel().startswith("accuracy")
    changes = table[table["variant"] != "dense"].rename(columns={"accuracy": "difference"})
    axis = figures.answer_differences(changes).axes[0]
    assert len(axis.containers) == 2
    ways = changes.assign(perplexity_ratio=[1.5, 1.1, 2.0, 1.2])
    axis = figures.perplexity_and_accuracy(ways).axes[0]
    assert axis.get_xscale() == "log" and "dense" in axis.get_xlabel()


def test_heatmap_frames_the_diagonal_and_brackets_what_is_unsure():
    rows = [
        [recovered, cut, text, 20.0 + (cut != text), gap, gap - spread, gap + spread]
        for recovered in (False, True)
        for cut in ("law", "games", "random")
        for text in ("law", "games")
        for gap, spread in [(0.0 if cut == text else 0.1, 0.2 if cut == "random" else 0.05)]
    ]
    columns = ["recovered", "cut", "text", "perplexity", "difference", "difference_low",
               "difference_high"]  # fmt: skip
    figure = figures.domain_heatmap(pd.DataFrame(rows, columns=columns), "made up")
    pruned, recovered = figure.axes[:2]
    words = [text.get_text() for text in pruned.texts]
    assert words[:2] == ["20.0\n×1.00", "21.0\n×1.11"] and words[4] == "(21.0\n×1.11)"
    assert [patch.get_xy() for patch in recovered.patches] == [(0, 0), (1, 1)]
    assert recovered.get_title(loc="left") == "recovered"

    known = ["mine", "tiny-law", "yours"]
    assert len({figures.colour(name, known) for name in known} - {"#000000"}) == 3
    assert figures.colour("mine") == "#000000"
