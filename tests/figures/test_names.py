"""Names of any kind are shown as they are written, and a frame that cannot be drawn is named."""

from __future__ import annotations

import inspect
import itertools
import warnings

import numpy as np
import pandas as pd
import pytest

import minigpt_lab as lab
from minigpt_lab import figures
from minigpt_lab.figures.frames import literal
from minigpt_lab.widgets.base import Chooser
from minigpt_lab.widgets.jobs import ModelJob
from minigpt_lab.widgets.pruning import RatioExplorer
from minigpt_lab.widgets.threshold_explorer import ThresholdExplorer

DOMAINS = ["law", "games"]
TEXTS = ["law/test", "games/test"]
NAMES = [
    r"$\frac{$", "$x$", "_hidden", "a_b^c{", "<script>alert(1)</script>", "100 %", "two\nlines",
    "\t", "x" * 200, "عربي", "法律", "back\\slash", "{braces}", "'\"",
]  # fmt: skip


def rows(**axes) -> pd.DataFrame:
    return pd.DataFrame(list(itertools.product(*axes.values())), columns=list(axes))


def drawable() -> dict[str, tuple[pd.DataFrame, dict]]:
    """Figure function to a small frame that it draws, and further arguments."""
    neurons = rows(domain=DOMAINS, layer=[0, 1], neuron=[0, 1, 2])
    neurons["mean_abs"] = 0.1 + 0.1 * neurons["neuron"] + neurons["layer"]
    accuracy = {"low": 0.2, "high": 0.4, "items": 100}
    runs = rows(model=["m"], protocol=["p"], domain=DOMAINS, method=["dense", "pruned"])
    runs = runs.assign(text=runs["domain"] + "/test", stored=[9, 8, 9, 7], front=True)
    runs = runs.assign(perplexity=[10.0, 12, 11, 13], perplexity_ratio=[1, 1.2, 1, 1.2])
    matrix = rows(recovered=[False, True], cut=[*DOMAINS, "random"], text=DOMAINS)
    matrix["difference"] = 0.1 * (matrix["cut"] != matrix["text"])
    return {
        "activation_histograms": (neurons, {"epsilon": 0.2}),
        "activation_depth": (neurons, {"epsilon": 0.2}),
        "magnitude_scatter": (neurons, {"domain": "law", "other": "games"}),
        "overlap_matrix": (rows(domain=DOMAINS, other=DOMAINS).assign(jaccard=0.5, chance=0.2), {}),
        "calibration_curve": (
            rows(domain=DOMAINS, tokens=[256, 512]).assign(jaccard=0.9, chance=0.5), {}
        ),
        "pareto_front": (runs, {}),
        "method_curves": (
            rows(method=["dense", "wanda"], sites=["ffn"], text=TEXTS).assign(
                ratio=0.5, stored=8, perplexity=[10.0, 11, 12, 13]
            ), {}
        ),
        "cosine_curve": (
            pd.DataFrame({"directions": [1, 4], "cosine": [0.1, 0.2], "expected": [0.1, 0.2]}), {}
        ),
        "influence_bars": (pd.DataFrame({"layer": [0, 1], "influence": [0.1, 0.2]}), {}),
        "recovery_curves": (
            rows(regime=["mild"], method=["full", "lora"], tokens=[0, 10]).assign(
                perplexity=[30.0, 20, 30, 21], other_perplexity=40.0
            ), {"dense": {"law": 18.0, "games": 35.0}}
        ),
        "restore_or_adapt": (
            rows(text=TEXTS, variant=["dense", "mild, slimgpt", "mild, slimgpt, kl"]).assign(
                perplexity=[10.0, 20, 15, 11, 21, 16]
            ), {"domain": TEXTS[0], "other": TEXTS[1]}
        ),
        "format_curves": (
            rows(text=TEXTS, model=["100%"], kind=["F16", "Q4_0"]).assign(
                bytes=[2.0, 1, 2, 1], bits_per_character=[1.0, 1.1, 1.2, 1.3]
            ), {}
        ),
        "size_and_loss": (
            rows(text=TEXTS, variant=["dense", "mini"]).assign(
                bytes=[2.0, 1, 2, 1], bits_per_character=1.0, bits_low=0.9, bits_high=1.1
            ), {}
        ),
        "answer_dots": (
            rows(domain=DOMAINS, variant=["dense", "cut"]).assign(
                accuracy=0.3, chance=0.25, **accuracy
            ), {}
        ),
        "answer_differences": (
            rows(domain=DOMAINS, variant=["cut"]).assign(difference=0.3, **accuracy), {}
        ),
        "perplexity_and_accuracy": (
            rows(domain=DOMAINS, variant=["dense", "cut"]).assign(
                perplexity_ratio=[1, 2, 1, 3], difference=[0, -0.1, 0, -0.2]
            ), {}
        ),
        "domain_heatmap": (
            matrix.assign(perplexity=20.0, difference_low=matrix["difference"] - 0.05,
                          difference_high=matrix["difference"] + 0.05), {}
        ),
        "threshold_sweep": (
            rows(component=["activation"], method=["contextual", "random"], epsilon=[0.01, 0.1])
            .assign(stored_ratio=0.8, nonzero_ratio=0.7, perplexity_ratio=[1.1, 2, 1, 3]), {}
        ),
        "pruning_heatmap": (
            rows(domain=DOMAINS, site=["ffn"], layer=[0, 1]).assign(units=9, kept=[8, 7, 6, 5]), {}
        ),
        "budget_bars": (
            rows(variant=["dense", "cut"], part=["embeddings", "ffn"]).assign(parameters=2e6), {}
        ),
        "perplexity_dots": (
            rows(variant=["dense", "cut"], text=TEXTS).assign(
                bits_per_character=1.1, bits_low=0.9, bits_high=1.5, characters=100
            ), {}
        ),
        "throughput": (
            rows(variant=["dense", "cut"], kind=["prefill"]).assign(
                stored=[1e8, 5e7], tokens_per_second=[30.0, 40], low=9, high=50, batch=1,
                device="CPU", runs=7
            ), {}
        ),
        "layer_losses": (
            rows(site=["ffn"], choice=["SlimGPT"], compensated=[True, False], share=[0.2, 0.5])
            .assign(units=100, loss=[0.1, 0.2, 0.3, 0.4]), {}
        ),
        "one_layer_curves": (
            rows(text=TEXTS, layer=[0, 1], ratio=[0.2]).assign(perplexity_ratio=[1.1, 1.2, 1.3, 2]),
            {}
        ),
        "reconstruction_curve": (
            rows(text=["calibration", "held-out"], epoch=[0, 1]).assign(loss=[0.2, 0.1, 0.3, 0.2]),
            {}
        ),
        "limit_curves": (
            rows(text=TEXTS, way=["plain", "mixed"], stored=[100, 50]).assign(
                increase=[0.0, 0.5] * 4, limit=0.2, within=[1, 0] * 4
            ), {}
        ),
        "generality_front": (
            rows(text=TEXTS, generality=[0.0, 0.5], ratio=[0.3, None]).assign(
                perplexity=[10.0, 11, 12, 13, 14, 15, 16, 17]
            ), {"domain": TEXTS[0], "other": TEXTS[1]}
        ),
        "layer_budgets": (
            rows(variant=["uniform", "search"], site=["ffn"], layer=[0, 1]).assign(
                units=10, removed=5, cost=100, error=[0.1, 0.2, 0.3, 0.2]
            ), {}
        ),
        "variant_dots": (
            rows(variant=["dense", "a"], text=TEXTS).assign(
                compensated=True, perplexity=[10.0, 11, 12, 13], low=9.0, high=16.0
            ), {}
        ),
        "calibration_settings": (
            rows(setting=["tokens"], value=[64, 128], text=TEXTS).assign(perplexity=20.0, dense=18),
            {}
        ),
    }  # fmt: skip


FIGURES = drawable()
FREE = ("domain", "other", "text", "cut", "variant", "method", "model", "protocol", "sites", "site",
        "setting", "kind", "device", "component", "part", "regime")  # fmt: skip


def test_every_figure_is_in_the_table():
    functions = {name for name, each in vars(figures).items() if inspect.isfunction(each)}
    assert FIGURES.keys() == functions - {"caption_for", "png_bytes", "save_figure", "style_for"}


@pytest.mark.parametrize("function", FIGURES)
def test_names_are_drawn_as_they_are_written(function, monkeypatch):
    """All names of a frame at once; the second name is a plain one, so that both must be told."""
    frame, options = FIGURES[function]
    fixed = {"dense", "contextual", "ffn", "SlimGPT", "random", "embeddings"}
    taken = [v for c in FREE if c in frame for v in frame[c].unique()]
    values = [value for value in dict.fromkeys(taken) if value not in fixed]
    for start in range(0, len(NAMES), 3):
        odd = itertools.cycle(NAMES[start:] + NAMES[:start])
        new = dict(zip(values, odd, strict=False))
        texts = [column for column in FREE if column in frame]
        renamed = frame.assign(**{c: frame[c].map(lambda v: new.get(v, v)) for c in texts})  # noqa: B023
        given = {key: {new.get(k, k): x for k, x in value.items()} if isinstance(value, dict)
                 else new.get(value, value) for key, value in options.items()}  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph|constrained_layout|.*[Tt]ight")
            figure = getattr(figures, function)(renamed, **given, caption="$ and $ is no formula")
            assert figures.png_bytes(figure)[:4] == b"\x89PNG"


def test_names_are_short_and_a_legend_lists_them_all():
    for name in NAMES:
        words = literal(name)
        assert words.isprintable() and 0 < len(words) < 80 and not words.startswith("_")
        assert words.count("$") == words.count(r"\$")
    frame = FIGURES["activation_depth"][0].replace({"law": "_law", "games": "$g$"})
    axis = figures.activation_depth(frame, epsilon=0.2).axes[-1]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [" _law", r"\$g\$"]


@pytest.mark.parametrize("function", FIGURES)
def test_what_cannot_be_drawn_is_one_sentence(function):
    frame, options = FIGURES[function]
    draw = getattr(figures, function)
    wrong = [None, 3, {}, [frame], pd.DataFrame()]
    if function != "pareto_front":
        wrong.append(frame.iloc[:0])
    for column in frame:
        if frame[column].dtype.kind == "f" and column not in ("low", "high", "error"):
            wrong.append(frame.assign(**{column: "abc"}))
        if column in ("domain", "variant", "text", "method"):
            wrong.append(frame.assign(**{column: np.nan}))
    for table in wrong:
        with pytest.raises(ValueError, match="expected|no column|no rows|holds") as error:
            draw(table, **options)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    for table in (frame.iloc[:1], frame.drop(columns=frame.columns[0]), frame * 2):
        try:
            figures.png_bytes(draw(table, **options))
        except ValueError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("function", FIGURES)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_left_out_of_the_picture(function, value):
    frame, options = FIGURES[function]
    last = [c for c in frame if frame[c].dtype.kind == "f" and c not in ("directions", "low")]
    for column in last:
        holed = frame.copy()
        holed.loc[holed.index[-1], column] = value
        figures.png_bytes(getattr(figures, function)(holed, **options))


def test_a_figures_stem_keeps_its_dots(tmp_path):
    frame, _ = FIGURES["influence_bars"]
    figures.save_figure(figures.influence_bars(frame), tmp_path / "v1.2", frame)
    assert {path.name for path in tmp_path.iterdir()} == {"v1.2.png", "v1.2.svg", "v1.2.csv"}


@pytest.mark.parametrize("names", [("a b", "a\nb"), ("x" * 99 + "y" * 99, "x" * 98 + "y" * 99)])
def test_names_that_would_look_alike_are_refused(names):
    frame = FIGURES["activation_depth"][0].replace(dict(zip(DOMAINS, names, strict=True)))
    with pytest.raises(ValueError, match="several names that look like .* expected shorter"):
        figures.activation_depth(frame)


TAG = "<img src=x onerror=alert(1)> $a$"


def test_widgets_show_names_and_run_none(tiny, tiny_statistics):
    model, _ = tiny
    ratios = RatioExplorer(model, {TAG: lab.score(model, "magnitude")})
    job = ModelJob(TAG, lambda tick: TAG)
    job.start()
    job.wait()
    table = Chooser(lambda name: pd.DataFrame({"a": [name]}), name=[TAG])
    explorer = ThresholdExplorer(
        model, {TAG: tiny_statistics, "b": tiny_statistics}, TAG, epsilon=0.05
    )
    failing = Chooser(lambda name: 1 / 0 if name else None, name=[TAG])
    page = ratios.show(interactive=False)._repr_mimebundle_()["text/html"]
    for words in (ratios.shown.value, page, job.result.value, job.show(False).data,
                  table.shown.value, explorer.to_html(), failing.shown.value):  # fmt: skip
        assert "<img src=x" not in words
    assert "ZeroDivisionError" in failing.shown.value
    assert "$a$" not in ratios.shown.value


def test_widgets_take_numbers_of_any_kind_and_refuse_what_they_cannot_show(tiny, tiny_statistics):
    model, _ = tiny
    scores = {"magnitude": lab.score(model, "magnitude")}
    for ratio in (0.95, np.float32(0.5), 0, 0.99):
        assert RatioExplorer(model, scores, ratio=ratio).ratio.value == pytest.approx(float(ratio))
    for ratio in (1, 0.995, -0.1, np.nan, None, "0.2", True):
        with pytest.raises(ValueError, match="ratio is .*; expected a number of at least 0 and of"):
            RatioExplorer(model, scores, ratio=ratio)
    for wrong in ({}, None, {"a": 1}, [scores]):
        with pytest.raises(ValueError, match="scores.* is .*; expected a "):
            RatioExplorer(model, wrong)
        with pytest.raises(ValueError, match="statistics.* is .*; expected a "):
            ThresholdExplorer(model, wrong, "a", epsilon=0.1)
    given = {"a": tiny_statistics}
    assert ThresholdExplorer(model, given, "a", epsilon=np.float32(0.05)).epsilon == 0.05
    with pytest.raises(ValueError, match="model is None; expected"):
        ThresholdExplorer(None, given, "a", epsilon=0.1)
    for choices in ([], "law", None, 3, [3]):
        with pytest.raises(ValueError, match=r"domain.* is .*; expected"):
            Chooser(lambda domain: None, domain=choices)
    with pytest.raises(ValueError, match="draw is None; expected a function"):
        Chooser(None, domain=["law"])
    assert "what draw returned is None" in Chooser(lambda n: None, n=["three"]).shown.value
