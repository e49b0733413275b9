"""What the explorer's picture draws: lines, steps, bars and marks where they belong."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import minigpt_lab as lab
from minigpt_lab.figures import ThresholdPicture
from minigpt_lab.studies import COMPONENTS, Magnitudes, read_sweep

SWEEP = pd.DataFrame(
    [["activation", "contextual", e, r] for e, r in ((0.02, 1.1), (0.05, 2.0), (0.1, 9.0))],
    columns=["component", "method", "epsilon", "perplexity_ratio"],
)


@pytest.fixture(scope="module")
def drawn(tiny, tiny_statistics):
    """A picture, and a function that draws thresholds on it."""
    magnitudes = {"tiny-law": Magnitudes(tiny_statistics)}
    picture = ThresholdPicture(magnitudes, "tiny-law", sweep=SWEEP)

    def draw(marks, quantile=None, readings=None, **epsilons):
        plan = lab.contextual_plan(tiny[0], tiny_statistics, quantile=quantile, **epsilons)
        size = plan.predicted_size(tiny[0])
        picture.draw(marks, removed=plan.to_frame(), size=size, readings=readings or {})
        return picture.figure, plan

    return draw


def axis_of(figure, title):
    return next(axis for axis in figure.axes if axis.get_title("left").startswith(title))


def test_one_epsilon_is_one_line_everywhere(drawn):
    marks = {"activation": 0.05, "linear": 0.1, "embedding": 0.0}
    figure, plan = drawn(marks, epsilon_activation=0.05, epsilon_linear=0.1, epsilon_embedding=0.0)
    for name, value in (("activation", 0.05), ("linear", 0.1)):
        line = axis_of(figure, name).lines[-1]
        assert line.get_xdata()[0] == pytest.approx(np.log10(value))
    embedding = axis_of(figure, "embedding")
    assert embedding.get_xlim()[0] < embedding.lines[-1].get_xdata()[0]  # zero has a place
    path = axis_of(figure, "Where does").lines[-1].get_xdata()
    assert path == pytest.approx(np.log10(0.05))
    assert len(path) == 2 * len(plan.units["ffn"])


def test_shares_of_each_layer_are_steps(drawn, tiny_statistics):
    limits = Magnitudes(tiny_statistics).layer_thresholds(0.3)
    figure, plan = drawn({"activation": limits}, quantile=0.3)
    assert axis_of(figure, "Where does").lines[-1].get_xdata()[::2] == pytest.approx(
        np.log10(limits)
    )
    assert np.isnan(axis_of(figure, "activation").lines[-1].get_xdata()[0])  # not drawn
    steps = axis_of(figure, "Which layers").patches[0].get_data()
    frame = plan.to_frame().query("site == 'ffn'")
    assert steps.values == pytest.approx((frame["removed"] / frame["units"]).to_numpy())


def test_histograms_hold_every_neuron(drawn, tiny_statistics):
    figure, _ = drawn({})
    for name in COMPONENTS:
        axis = axis_of(figure, name)
        steps = next(p for p in axis.patches if hasattr(p, "get_data")).get_data().values
        zero = next(p for p in axis.patches if hasattr(p, "get_height")).get_height()
        assert steps.sum() + zero == pytest.approx(1)
        assert f"{len(Magnitudes(tiny_statistics).pooled[name]):,}" in axis.get_title("left")
    assert "512 calibration tokens" in figure.texts[0].get_text()


def test_the_sweep_and_its_reading(drawn):
    reading = read_sweep(SWEEP, "activation", 0.05)
    marks = {"activation": 0.05}
    figure, _ = drawn(marks, epsilon_activation=0.05, readings={"activation": reading})
    axis = axis_of(figure, "What does it cost")
    curve, star = axis.lines[:2]
    assert list(curve.get_xdata()) == [0.02, 0.05, 0.1] and axis.get_yscale() == "log"
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (0.05, 2.0)
    figure, _ = drawn({"activation": 0.2}, epsilon_activation=0.2)
    assert np.isnan(axis_of(figure, "What does it cost").lines[1].get_ydata()[0])  # not drawn


def test_without_a_sweep_sizes_stand_there(tiny, tiny_statistics):
    picture = ThresholdPicture({"tiny-law": Magnitudes(tiny_statistics)}, "tiny-law")
    plan = lab.contextual_plan(tiny[0], tiny_statistics, epsilon_activation=0.1)
    size = plan.predicted_size(tiny[0])
    picture.draw({"activation": 0.1}, removed=plan.to_frame(), size=size, readings={})
    widths = [bar.get_width() for bar in axis_of(picture.figure, "How large").patches]
    expected = [size.stored / size.dense, size.nonzero / size.dense]
    assert widths == pytest.approx([*expected, size.layers_stored / size.layers_dense])


def test_words_stay_off_the_bars_and_in_their_panels(tiny, tiny_statistics):
    picture = ThresholdPicture({"tiny-law": Magnitudes(tiny_statistics)}, "tiny-law")
    plan = lab.contextual_plan(tiny[0], tiny_statistics, epsilon_activation=0.1)
    size, figure = plan.predicted_size(tiny[0]), picture.figure
    picture.draw({}, removed=plan.to_frame(), size=size, readings={})
    axis = axis_of(figure, "embedding")
    (note,) = (text for text in axis.texts if "exactly 0" in text.get_text())
    bar = next(patch for patch in axis.patches if hasattr(patch, "get_height"))
    assert bar.get_height() > 0 and note.get_window_extent().x0 > bar.get_window_extent().x1
    sizes, beside = axis_of(figure, "How large"), axis_of(figure, "Which layers")
    edge = max(label.get_window_extent().x1 for label in beside.get_xticklabels())
    assert min(label.get_window_extent().x0 for label in sizes.get_yticklabels()) > edge
