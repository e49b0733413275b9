"""What statistics and a sweep say about a threshold, against counting by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from minigpt_lab.studies.lookups import COMPONENTS, Magnitudes, read_sweep, threshold_range


def test_shares_are_those_counted_by_hand(tiny_statistics):
    found = Magnitudes(tiny_statistics)
    frame = tiny_statistics.to_frame()
    activation = frame.loc[frame["side"] == "activation", "mean_abs"]
    for epsilon in (0.0, 0.03, 0.1, float(activation.iloc[7])):
        assert found.share("activation", epsilon) == pytest.approx((activation <= epsilon).mean())
    linear = frame[frame["side"] != "activation"]
    smaller = linear[["mean_abs", "mean_abs_unbiased"]].min(axis=1)
    assert found.share("linear", 0.1) == pytest.approx((smaller <= 0.1).mean())
    counts = tiny_statistics.token_counts
    assert found.share("embedding", 0.0) == pytest.approx((counts == 0).mean())


def test_more_text_counts_for_the_embedding(tiny_statistics):
    counts = np.ones_like(tiny_statistics.token_counts)
    assert Magnitudes(tiny_statistics, counts).share("embedding", 0.0) == 0


def test_layer_thresholds_cut_their_share(tiny_statistics):
    found = Magnitudes(tiny_statistics)
    cut = [
        (values <= limit).mean()
        for values, limit in zip(found.layers, found.layer_thresholds(0.25), strict=True)
    ]
    assert cut == pytest.approx([0.25] * len(found.layers), abs=0.01)


def test_the_range_holds_what_is_alive_and_the_start(tiny_statistics):
    magnitudes = {"law": Magnitudes(tiny_statistics)}
    for component in COMPONENTS:
        low, high = threshold_range(magnitudes, component)
        values = magnitudes["law"].pooled[component]
        live = values[values > 0]
        assert 10**low < live.min() and 10**high > np.quantile(live, 0.999)
    assert threshold_range(magnitudes, "linear", 1e-9)[0] < -9


SWEEP = pd.DataFrame(
    {
        "component": ["activation"] * 3 + ["embedding", "activation"],
        "method": ["contextual"] * 4 + ["random"],
        "epsilon": [0.1, 0.001, 0.01, 0.0, 0.01],
        "perplexity_ratio": [16.0, 1.0, 4.0, 1.1, 99.0],
    }
)


def test_a_reading_lies_on_the_line_between_points():
    between = read_sweep(SWEEP, "activation", 10**-2.5)
    assert between.value == pytest.approx(2.0)
    assert (between.low, between.high) == (0.001, 0.01)
    assert "×2.00, between ε = 0.001 and 0.01" in str(between)


def test_a_measured_point_is_read_as_it_is():
    point = read_sweep(SWEEP, "activation", 0.01)
    assert (point.value, str(point)) == (4.0, "×4.00")
    assert read_sweep(SWEEP, "embedding", 0.0).value == 1.1


@pytest.mark.parametrize(
    ("sweep", "component", "epsilon"),
    [
        (None, "activation", 0.01),
        (SWEEP, "activation", 0.2),
        (SWEEP, "activation", 1e-4),
        (SWEEP, "linear", 0.01),
        (SWEEP, "embedding", 0.1),
    ],
)
def test_outside_the_sweep_nothing_is_claimed(sweep, component, epsilon):
    assert read_sweep(sweep, component, epsilon) is None
