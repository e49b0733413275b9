"""What the figures draw: labels, artists, limits; not pixels."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from minigpt_lab import figures
from minigpt_lab.figures.axes import log_labels, luminance
from minigpt_lab.studies import analysis


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


def test_histograms_mark_epsilon(activations):
    figure = figures.activation_histograms(
        activations, epsilon=0.3, n_layers=4, caption="tiny model"
    )
    axes = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title(loc="left") for axis in axes] == [f"layer {i}" for i in (0, 2, 5, 7)]
    for axis in axes:
        assert axis.lines[-1].get_xdata()[0] == pytest.approx(np.log10(0.3))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["law", "medical", "ε = 0.3"]
    caption = figure._supxlabel.get_text()
    assert "tiny model" in caption and "n = 50 neurons per layer" in caption


def test_histograms_say_what_lies_below_epsilon_and_leave_nothing_out(activations):
    figure = figures.activation_histograms(activations, epsilon=0.3, n_layers=2)
    for axis, layer in zip(figure.axes, (0, 7), strict=True):
        words = axis.texts[-1].get_text().splitlines()
        assert words[0] == "% ≤ ε / never on:"
        for domain, line in zip(("law", "medical"), axis.lines, strict=False):
            chosen = (activations["domain"] == domain) & (activations["layer"] == layer)
            part = activations.loc[chosen, "mean_abs"]
            assert f"{domain} {100 * (part <= 0.3).mean():.1f} / 10.0" in words  # 5 of 50
            assert sum(line.get_ydata()) == pytest.approx(0.9)  # all but those never on


@pytest.mark.parametrize(("sign", "side"), [(1, "right"), (-1, "left")])
def test_shares_stand_where_the_distributions_leave_room(activations, sign, side):
    live = activations[activations["mean_abs"] > 0]
    skewed = live.assign(mean_abs=np.exp(sign * np.log(live["mean_abs"]) ** 2))
    axis = figures.activation_histograms(skewed, epsilon=1.0).axes[0]
    assert axis.texts[-1].get_ha() == side


def test_histograms_of_one_domain_show_the_highest_step(activations):
    alone = activations[activations["domain"] == "law"]
    axes = figures.activation_histograms(alone, epsilon=0.3).axes
    highest = max(max(axis.lines[0].get_ydata()) for axis in axes)
    assert axes[0].get_ylim()[0] == 0 and axes[0].get_ylim()[1] > highest


def test_depth_shows_every_layer_and_what_one_epsilon_cuts(activations):
    figure = figures.activation_depth(activations, epsilon=0.3, caption="tiny model")
    law, medical, cut = figure.axes
    assert [axis.get_title(loc="left") for axis in (law, medical)] == ["law", "medical"]
    assert law.get_yscale() == "log" and law.get_ylim() == medical.get_ylim()
    assert len(law.collections) == 2 and len(law.lines) == 2  # two bands; median and ε
    assert list(cut.get_xticks()) == list(range(8)) and "0.3" in cut.get_ylabel()
    shares = activations.query("domain == 'law'").groupby("layer")["mean_abs"]
    expected = shares.apply(lambda values: (values <= 0.3).mean())
    assert list(cut.lines[0].get_ydata()) == pytest.approx(list(expected))
    assert len(figures.activation_depth(activations).axes) == 2  # no ε, nothing to cut


def test_calibration_curve_stands_between_chance_and_the_full_set():
    rows = [
        (domain, tokens, overlap, 0.54)
        for domain in ("law", "games")
        for tokens, overlap in ((256, 0.8), (512, 0.9), (1024, 1.0))
    ]
    frame = pd.DataFrame(rows, columns=["domain", "tokens", "jaccard", "chance"])
    figure = figures.calibration_curve(frame, caption="tiny model")
    axis = figure.axes[0]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["256", "512", "1,024"]
    assert axis.get_ylim()[0] < 0.54 and axis.get_ylim()[1] > 1
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["law", "games", "by chance 0.54"]
    assert axis.get_xlabel() == "calibration tokens"


def test_histograms_say_how_many_are_never_on_and_thin_the_decades(activations):
    figure = figures.activation_histograms(activations, n_layers=2)
    (words,) = (text.get_text() for text in figure.axes[0].texts)
    assert words == "% never on:\nlaw 10.0\nmedical 10.0"
    wide = activations.assign(mean_abs=activations["mean_abs"] ** 6)
    for frame in (activations, wide):
        ticks = figures.activation_histograms(frame, n_layers=2).axes[0].get_xticklabels()
        assert 3 <= len(ticks) <= 8
    live = activations[activations["mean_abs"] > 0]
    assert not figures.activation_histograms(live, n_layers=2).axes[0].texts


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
    axis = figures.magnitude_scatter(activations, "law", "medical", epsilon=0.3).axes[0]
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
    figure = figures.threshold_sweep(sweep, marks=[1e-5, 1e-3, 1e-1], knees={"activation": 1e-2})
    size, loss = figure.axes
    assert len(size.lines) == 2 + 2 + 1  # stored and non-zero, two marks in range, the knee
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        *("stored", "non-zero", "knee", "paper's ε", "contextual", "random", "magnitude")
    ]
    assert "knee at ε = 0.01" in size.get_title(loc="left")
    signs = {(line.get_color(), line.get_marker()) for line in size.lines[:2]}
    assert not signs & {(line.get_color(), line.get_marker()) for line in loss.lines}
    assert {colour for colour, _ in signs} == {"black"} and len(signs) == 2


def test_sweep_names_what_each_threshold_is_compared_with(sweep):
    parts = [sweep.assign(component=name) for name in analysis.SWEEPS]
    figure = figures.threshold_sweep(pd.concat(parts))
    words = [axis.get_xlabel().split("(")[1] for axis in figure.axes[len(analysis.SWEEPS) :]]
    linear, activation, embedding, both = words
    assert "|input|, |output|" in linear and "activation" not in linear
    assert activation == "mean |activation|)" and embedding == "share of tokens)"
    assert "|input|, |output|" in both and "|activation|" in both
    figures.png_bytes(figure)  # lays it out
    boxes = [axis.xaxis.label.get_window_extent() for axis in figure.axes[len(words) :]]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_sweep_shows_every_seed(sweep):
    other = sweep[sweep["method"] == "random"]
    other = other.assign(perplexity_ratio=other["perplexity_ratio"] * 2)
    figure = figures.threshold_sweep(pd.concat([sweep, other]))
    loss = figure.axes[1]
    random = next(line for line in loss.lines if line.get_label() == "random")
    assert random.get_ydata()[0] == pytest.approx(1.5)  # between 1 and 2
    (seeds,) = (line for line in loss.lines if line.get_label() == "one seed")
    assert len(seeds.get_ydata()) == 6 and seeds.get_color() == random.get_color()
    assert figure.legends[0].get_texts()[-1].get_text() == "one seed"


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
    words = [text.get_text() for text in axis.texts]
    assert [word for word in words if word.startswith(" ")] == [" 5 M", " 3 M"]
    assert sorted(words)[2:] == ["1", "2", "2", "3"]  # each part says its own
    thin = pd.DataFrame([*rows, ("dense", "other", 1e4)], columns=frame.columns)
    legend = figures.budget_bars(thin).legends[0]
    assert [text.get_text() for text in legend.texts] == ["embeddings", "ffn", "other (0.01 M)"]


def test_speed_stands_beside_size_with_its_spread():
    rows = [
        (variant, stored, kind, speed, 0.9 * speed, 1.2 * speed, 1, "CPU", 7)
        for variant, stored, gain in (("dense", 100e6, 1), ("mine", 50e6, 1.5))
        for kind, speed in (("prefill", 300 * gain), ("decode", 10 * gain))
    ]
    names = "variant stored kind tokens_per_second low high batch device runs".split()
    figure = figures.throughput(pd.DataFrame(rows, columns=names), caption="tiny model")
    prefill, decode = figure.axes
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["prefill", "decode"]
    assert len(prefill.containers) == 2 and prefill.get_ylim()[0] == 0
    assert prefill.get_ylim()[1] > 1.2 * 450 and decode.get_ylim()[1] > 1.2 * 15
    line = next(line for line in prefill.lines if line.get_linestyle() == ":")
    assert line.get_ydata()[[0, -1]] == pytest.approx([600, 300])  # half the size, twice as fast
    assert "batch 1, on CPU, n = 7 runs each" in figure._supxlabel.get_text()
    assert "tokens per second" in prefill.get_ylabel() and "parameters" in prefill.get_xlabel()


@pytest.fixture
def kept():
    rows = [("ffn", i, 1000, 1000 - 30 * i) for i in range(30)]
    rows += [("attention", i, 3, 2 if i == 5 else 3) for i in range(30)]
    return pd.DataFrame(rows, columns=["site", "layer", "units", "kept"])


def test_pruning_heatmap_numbers_every_layer_and_every_cut(kept):
    figure = figures.pruning_heatmap(kept, caption="made up")
    cells, bar = figure.axes
    assert [tick.get_text() for tick in cells.get_xticklabels()] == [str(i) for i in range(30)]
    assert [tick.get_text() for tick in cells.get_yticklabels()] == [
        *("ffn (mean 43.5 %)", "attention (mean 1.11 %)")
    ]
    words = [text.get_text() for text in cells.texts]
    assert words[:3] == ["", "3", "6"] and words[30:].count("33") == 1
    assert cells.collections[0].get_clim() == (0, pytest.approx(0.87))
    assert bar.get_ylabel() == "removed"
    assert [tick.get_text() for tick in bar.get_yticklabels()] == ["0 %", "87 %"]
    assert "ffn 1,000; attention 3" in figure._supxlabel.get_text()


def test_a_share_that_all_layers_lose_is_said_once(kept):
    figure = figures.pruning_heatmap(kept.assign(kept=kept["units"] * 0.9))
    cells = figure.axes[0]
    assert [tick.get_text() for tick in cells.get_yticklabels()] == [
        *("ffn (10 % each)", "attention (10 % each)")
    ]
    assert {text.get_text() for text in cells.texts} == {""}
    assert "in the cells" not in figure._supxlabel.get_text()


def test_a_plan_that_cuts_no_unit_says_so(kept):
    whole = figures.pruning_heatmap(kept.assign(kept=kept["units"]))
    assert "no unit is removed" in whole._supxlabel.get_text()
    assert "no unit is removed" not in figures.pruning_heatmap(kept)._supxlabel.get_text()


def test_pruning_heatmaps_share_a_scale_and_two_have_a_difference(kept):
    more = kept.assign(kept=kept["kept"] * 0.5)
    two = pd.concat([kept.assign(domain="law"), more.assign(domain="games")])
    axes = figures.pruning_heatmap(two).axes
    titles = [axis.get_title(loc="left") for axis in axes if axis.get_title(loc="left")]
    assert titles == ["law", "games", "games − law"]
    limits = [axis.collections[0].get_clim() for axis in axes[:3]]
    assert limits[0] == limits[1] and limits[2][0] == -limits[2][1]
    assert axes[2].texts[0].get_text() == "+50"  # a sign, for grey
    three = pd.concat([two, kept.assign(domain="medical")])
    assert len(figures.pruning_heatmap(three).axes) == 3 * 2


def test_loss_dots_have_intervals_and_numbers():
    rows = [
        ("dense", "law/test", 1.0, 0.9, 1.2), ("shrunk", "law/test", 1.2, 1.0, 1.4),
        ("dense", "games/test", 1.1, 1.0, 1.3), ("shrunk", "games/test", 1.5, 1.3, 1.6),
    ]  # fmt: skip
    names = "variant text bits_per_character bits_low bits_high".split()
    figure = figures.perplexity_dots(pd.DataFrame(rows, columns=names).assign(characters=1234))
    assert [axis.get_title(loc="left") for axis in figure.axes] == [
        f"{text}, n = 1,234 characters" for text in ("law/test", "games/test")
    ]
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.000", "1.200"]
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()


def test_loss_dots_say_when_there_is_no_interval():
    names = "variant text bits_per_character bits_low bits_high".split()
    rows = [("dense", "law/test", 1.0, np.nan, np.nan), ("dense", "games/test", 1.1, 1.0, 1.3)]
    axes = figures.perplexity_dots(pd.DataFrame(rows, columns=names).assign(characters=99)).axes
    assert axes[0].get_title(loc="left").endswith("one passage, no interval")
    assert [axis.get_xlabel() for axis in axes] == [
        "bits per character", "bits per character (95 % interval)",
    ]  # fmt: skip


def test_saving_writes_picture_vector_and_data(tmp_path, sweep):
    figure = figures.threshold_sweep(sweep)
    assert figures.save_figure(figure, tmp_path / "f" / "sweep", sweep) is figure
    assert sorted(p.suffix for p in (tmp_path / "f").iterdir()) == [".csv", ".png", ".svg"]
    assert pd.read_csv(tmp_path / "f" / "sweep.csv").shape == sweep.shape
    with pytest.raises(TypeError, match="data"):
        figures.save_figure(figure, tmp_path / "f" / "no_numbers")
    assert figures.png_bytes(figures.threshold_sweep(sweep)) == figures.png_bytes(
        figures.threshold_sweep(sweep)
    )


@pytest.mark.parametrize("table", ["DOMAIN_STYLE", "METHOD_STYLE", "VARIANT_STYLE", "PART_STYLE"])
def test_every_colour_has_a_second_sign_for_grey(table):
    looks = list(getattr(figures, table).values())
    assert len({tint for tint, _ in looks}) == len({sign for _, sign in looks}) == len(looks)
    assert all(luminance(tint) < 0.5 for tint, _ in looks)  # each stands out from white


def test_colours_are_one_per_domain():
    for name in ("law", "tiny-law", "law/test"):
        assert figures.style_for(name) == figures.DOMAIN_STYLE["law"]
    known = ["mine", "tiny-law", "yours"]
    assert len({figures.style_for(name, known)[0] for name in known} - {"#000000"}) == 3
    assert figures.style_for("mine") == ("#000000", "o")
    many = [f"domain {i}" for i in range(15)] + list(figures.DOMAIN_STYLE)
    assert len({figures.style_for(name, many) for name in many}) == len(many)


def test_words_stand_out_from_their_cells():
    overlap = pd.DataFrame(
        [(a, b, value, 0.1) for a, row in zip("ab", ((0.95, 0.1), (0.5, 0.95)), strict=True)
         for b, value in zip("ab", row, strict=True)],
        columns="domain other jaccard chance".split(),
    )  # fmt: skip
    axis = figures.overlap_matrix(overlap).axes[0]
    for text, face in zip(axis.texts, axis.collections[0].get_facecolors(), strict=True):
        dark, light = sorted([luminance(text.get_color()), luminance(face[:3])])
        assert (light + 0.05) / (dark + 0.05) > 4.5  # WCAG's contrast for small print


@pytest.fixture
def histories():
    rows = [
        [regime, method, tokens, 30 - tokens / 100 - 5 * (regime == "mild"), 40 + tokens / 100]
        for regime in ("mild", "aggressive")
        for method in ("slimgpt, label", "slimgpt, kl")
        for tokens in (0, 512, 1024)
    ]
    return pd.DataFrame(
        rows, columns=["regime", "method", "tokens", "perplexity", "other_perplexity"]
    )


def test_recovery_curves_mark_where_dense_was_reached(histories):
    figure = figures.recovery_curves(
        histories, dense={"law": 18.0, "games": 35.0}, caption="two runs"
    )
    mild, aggressive = figure.axes
    stars = [
        [len(line.get_xdata()) for line in axis.lines if line.get_marker() == "*"]
        for axis in (mild, aggressive)
    ]
    assert stars == [[1, 1], [0, 0]]  # only the mild cut comes back
    rings = [line.get_xdata()[0] for line in mild.lines if line.get_markersize() == 11]
    assert rings == [1024, 1024]  # the best checkpoint of each method
    levels = [set(line.get_ydata()) for line in mild.lines if len(line.get_xdata()) == 2]
    assert {18.0} in levels and {35.0} in levels
    words = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"slimgpt, label", "slimgpt, kl", "on law", "dense on games", "best checkpoint"} <= words
    hollow = [
        line for line in mild.lines if line.get_linestyle() == ":" and line.get_marker() in "^v"
    ]
    assert len(hollow) == 2 and all(line.get_markerfacecolor() == "white" for line in hollow)


def test_recovery_curves_show_the_level_of_the_fine_tuned_dense_model(histories):
    tuned = {"law": 12.0, "games": 33.0}
    figure = figures.recovery_curves(histories, dense={"law": 18.0, "games": 35.0}, tuned=tuned)
    for axis in figure.axes:
        levels = [line.get_ydata()[0] for line in axis.lines if line.get_color() == "tab:green"]
        assert levels == [12.0, 33.0]


def test_restoring_and_adapting_are_directions():
    variants = {"dense": (10, 20), "dense, label": (8, 22), "mild, slimgpt": (20, 60),
                "mild, slimgpt, kl": (15, 40), "mild, slimgpt, label": (12, 70),
                "mild, slimgpt, mix, general, tuned teacher": (14, 50)}  # fmt: skip
    rows = [
        (text, name, value[i])
        for name, value in variants.items()
        for i, text in ((0, "a"), (1, "b"))
    ]
    table = pd.DataFrame(rows, columns=["text", "variant", "perplexity"], index=[0] * len(rows))
    axis = figures.restore_or_adapt(table, domain="a", other="b").axes[0]
    arrows = {
        tuple(np.round([*line.get_xdata(), *line.get_ydata()], 6))
        for line in axis.lines
        if len(line.get_xdata()) == 2 and line.get_color() != "black"
    }
    assert arrows == {(2.0, 1.5, 3.0, 2.0), (2.0, 1.2, 3.0, 3.5), (2.0, 1.4, 3.0, 2.5)}
    marked = {line.get_marker(): (line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines}
    assert marked["P"] == (0.8, 1.1) and marked["v"] == (1.5, 2.0) and marked["^"] == (1.2, 3.5)


def test_parts_of_names_that_would_look_alike_are_refused():
    names = ["dense", *("a" * 39 + digit + "a" * 60 + ", slimgpt" for digit in "12")]
    rows = [(text, name, 2.0) for name in names for text in "ab"]
    table = pd.DataFrame(rows, columns=["text", "variant", "perplexity"])
    with pytest.raises(ValueError, match="several names that look like"):
        figures.restore_or_adapt(table, domain="a", other="b")


def test_recovery_of_several_seeds_has_dots_and_new_methods_a_look(histories):
    seeds = [histories, histories.assign(perplexity=histories["perplexity"] + 2)]
    dense = {"law": 18.0, "games": 35.0}
    axis = figures.recovery_curves(pd.concat(seeds), dense=dense).axes[0]
    dots = [line for line in axis.lines if line.get_label() == "one seed"]
    assert [len(line.get_ydata()) for line in dots] == [6] * 4  # two methods on two texts
    assert axis.lines[0].get_ydata()[0] == histories["perplexity"][0] + 1  # the mean
    figures.recovery_curves(histories.replace("slimgpt, kl", "prefix"), dense=dense)


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
    assert "percentage points" in axis.get_ylabel()
    assert {"law", "medical"} <= {text.get_text() for text in axis.figure.legends[0].get_texts()}


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
    figure = figures.domain_heatmap(pd.DataFrame(rows, columns=columns), caption="made up")
    pruned, recovered = figure.axes[:2]
    words = [text.get_text() for text in pruned.texts]
    assert words[:2] == ["20.0\n×1.00", "21.0\n×1.11"] and words[4] == "(21.0\n×1.11)"
    assert [patch.get_xy() for patch in recovered.patches] == [(0, 0), (1, 1)]
    assert recovered.get_title(loc="left") == "recovered"
    scales = [axis.get_yticklabels() for axis in figure.axes[2:]]
    assert all("×1" in [tick.get_text() for tick in ticks] for ticks in scales)


def test_every_method_has_a_look_of_its_own_and_its_seeds_are_dots():
    names = [*figures.METHOD_STYLE, "mine", "yours"]
    rows = [
        (name, "ffn", ratio, 100 - 50 * ratio + 0.1 * seed, "law/test", 30 + seed, seed)
        for name in names
        for ratio in (0.2, 0.5)
        for seed in range(3)
    ]
    columns = "method sites ratio stored text perplexity seed".split()
    figure = figures.method_curves(pd.DataFrame(rows, columns=columns))
    (axis,) = figure.axes
    lines = {line.get_label(): line for line in axis.lines if line.get_label() in names[:-1]}
    assert len({(line.get_color(), line.get_marker()) for line in lines.values()}) == len(lines)
    tints = {line.get_color() for line in axis.lines if line.get_label() in figures.METHOD_STYLE}
    assert len(tints) == len(figures.METHOD_STYLE)
    line = lines["wanda"]
    assert line.get_ydata() == pytest.approx([31, 31])  # the mean of 30, 31, 32
    dots = [each for each in axis.lines if each.get_label() == "one seed"]
    assert len(dots) == len(names) - 1 and not axis.texts  # no words over the points
    assert sorted(set(dots[0].get_ydata())) == [30, 31, 32]


def test_methods_at_one_size_are_rows_of_dots():
    values = {"wanda": 40.0, "slimgpt": 30.0, "random": 900.0}
    rows = [
        (name, "ffn", 0.3, 70, text, value + seed, value - 5, value + 5, seed)
        for name, value in values.items() for text in ("law", "games") for seed in range(3)
    ]  # fmt: skip
    rows += [("dense", "none", 0.0, 100, text, 20.0, 18, 22, 0) for text in ("law", "games")]
    columns = "method sites ratio stored text perplexity low high seed".split()
    figure = figures.method_curves(pd.DataFrame(rows, columns=columns), caption="tiny")
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["ffn: law", "ffn: games"]
    axis = figure.axes[0]
    names = [tick.get_text() for tick in axis.get_yticklabels()]
    assert names == ["slimgpt", "wanda", "random"] and axis.yaxis_inverted()  # the best on top
    means = {tuple(np.r_[line.get_xdata(), line.get_ydata()]) for line in axis.lines}
    assert {(31.0, 0.0), (41.0, 1.0)} <= means  # of three samples
    samples = [line for line in axis.lines if line.get_label() == "one calibration sample"]
    assert [list(line.get_xdata()) for line in samples] == [[40, 41, 42], [30, 31, 32]][::-1]
    assert [text.get_text() for text in axis.texts] == ["901 →"]  # it would press the others
    assert axis.get_xlim()[1] < 60


@pytest.mark.parametrize(("low", "high"), [(0.9, 1.1), (1, 3.1), (70, 540), (0.9, 14), (15, 900)])
def test_ticks_of_a_log_axis_are_evenly_far_apart(low, high):
    axis = Figure().subplots()
    margin = (high / low) ** 0.05
    ends = (low / margin, high * margin)
    axis.set(yscale="log", ylim=ends)
    log_labels(axis.yaxis, [low, high], words="× {x:g}")
    axis.figure.draw_without_rendering()
    ticks = sorted(tick for tick in axis.get_yticks() if ends[0] <= tick <= ends[1])
    steps = np.diff(np.log([ends[0], *ticks, ends[1]]))
    assert 3 <= len(ticks) <= 7 and steps.max() < 0.45 * steps.sum()
    assert axis.get_yticklabels()[0].get_text().startswith("× ")


def test_formats_are_lines_over_bytes():
    rows = [
        (text, f"{size}", kind, size * bits, 1 / bits + 1 / size)
        for text in ("a", "b") for kind, bits in (("F16", 16), ("Q4_0", 4)) for size in (1, 2, 3)
    ]  # fmt: skip
    columns = ["text", "model", "kind", "bytes", "bits_per_character"]
    table = pd.DataFrame(rows, columns=columns).sample(frac=1, random_state=0)
    figure = figures.format_curves(table, caption="six models")
    assert [axis.get_title(loc="left") for axis in figure.axes] == list(table["text"].unique())
    for axis in figure.axes:
        drawn = {tuple(np.round(line.get_xdata() * 1e6)) for line in axis.lines}
        assert drawn == {(16, 32, 48), (4, 8, 12)}
    dense = table.assign(model=table["model"].replace("3", "dense"))
    for axis in figures.format_curves(dense).axes:
        drawn = {tuple(np.round(line.get_xdata() * 1e6)) for line in axis.lines}
        assert drawn == {(16, 32), (48,), (4, 8), (12,)}
