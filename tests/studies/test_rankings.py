"""Which methods are told apart: over passages, calibration samples and texts."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest

import minigpt_lab as lab
from minigpt_lab import studies
from minigpt_lab.studies import by_seed, gradient_methods, told_apart

CELL = {"sites": "ffn", "ratio": 0.5}


def made(per_token: np.ndarray, tokens: np.ndarray, **changes) -> lab.Perplexity:
    """A perplexity of given mean losses per passage."""
    table = np.stack([per_token * tokens, tokens, 4.0 * tokens], axis=1)
    facts = {"seq_len": 64, "stride": 64, "text": "law", "content": "abc"} | changes
    return lab.Perplexity(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, passages=table, **facts)


def sample(text: str = "law", **methods: lab.Perplexity) -> dict[tuple, lab.Perplexity]:
    return {(name, "ffn", 0.5, text): loss for name, loss in methods.items()}


def differ(gap: float, rounds: int) -> float:
    """How often two methods are told apart whose losses are `gap` apart, in three samples."""
    rng, found = np.random.default_rng(0), []
    tokens = rng.integers(60, 250, 60).astype(float)
    base = rng.normal(3.6, 0.5, 60)
    for _ in range(rounds):
        losses = []
        for _ in range(3):  # a calibration sample moves a method on all passages, and on each
            a, b = (base + rng.normal(0, 0.02) + rng.normal(0, 0.06, 60) for _ in range(2))
            losses.append(sample(a=made(a, tokens), b=made(b + gap, tokens)))
        row = told_apart(losses, **CELL, text="law").iloc[0]
        assert row["signs"] == f"{row['samples']} of 3"
        found.append((row["differ"], row["p_holm"] < 0.05, row["samples"]))
    told, p, samples = np.array(found).T
    assert (told == (p * (samples == 3))).all()
    return told.mean()


@pytest.fixture
def fewer_draws(monkeypatch):
    def fast(results, pairs, *, level):
        return paired(results, pairs, level=level, n_bootstrap=1, n_permutations=499)

    paired = studies.rankings.paired_differences
    monkeypatch.setattr(studies.rankings, "paired_differences", fast)


def test_the_noise_of_calibration_samples_is_no_difference(fewer_draws):
    """p over passages alone tells half of equal methods apart; that all signs agree is rarer."""
    assert differ(gap=0.0, rounds=100) < 0.3
    assert differ(gap=0.1, rounds=20) > 0.9


def test_p_is_corrected_over_all_texts(fewer_draws):
    rng = np.random.default_rng(1)
    tokens, base = np.full(40, 100.0), rng.normal(3, 0.5, 40)
    a, b, c = (base + rng.normal(gap, 0.1, 40) for gap in (0, 0.05, 0.1))
    losses = [
        sample("law", a=made(a, tokens), b=made(b, tokens), c=made(c, tokens))
        | sample("games", a=made(b, tokens), b=made(c, tokens), c=made(a, tokens))
    ]
    both = told_apart(losses, **CELL, text=["law", "games"])
    assert both["text"].tolist() == ["law"] * 2 + ["games"] * 2
    alone = [told_apart(losses, **CELL, text=name) for name in ("law", "games")]
    p = np.sort([*alone[0]["p"], *alone[1]["p"]])
    assert np.sort(both["p"]) == pytest.approx(p)
    assert both["p_holm"].min() == pytest.approx(4 * p[0])
    assert both["p_holm"].min() > min(each["p_holm"].min() for each in alone)


def test_too_little_text_is_said():
    tokens = np.full(5, 100.0)
    losses = [sample(a=made(np.arange(3, 8.0), tokens), b=made(np.arange(4, 9.0), tokens))]
    with pytest.warns(UserWarning, match="tell 1 pair.* at least 6 passages .there are 5"):
        assert not told_apart(losses, **CELL, text="law")["differ"].any()
    tokens = np.full(6, 100.0)
    losses = [sample(a=made(np.arange(3, 9.0), tokens), b=made(np.arange(4, 10.0), tokens))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert told_apart(losses, **CELL, text="law")["differ"].all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"precision": "bfloat16"}, "precision: float32 and bfloat16"),
        ({"seq_len": 512}, "seq_len: 64 and 512"),
        ({"content": "other"}, "different excerpts of law"),
    ],
)
def test_samples_of_other_protocols_are_not_averaged(change, named):
    tokens, base = np.full(20, 100.0), np.linspace(3, 4, 20)
    first = sample(a=made(base, tokens), b=made(base + 0.1, tokens))
    second = {cell: replace(loss, **change) for cell, loss in first.items()}
    with pytest.raises(ValueError, match=f"two calibration samples of a .*{named}"):
        told_apart([first, second], **CELL, text="law")


def test_every_method_is_in_every_sample():
    tokens, base = np.full(20, 100.0), np.linspace(3, 4, 20)
    first = sample(a=made(base, tokens), b=made(base + 0.1, tokens))
    with pytest.raises(ValueError, match="b is in 1 of 2 calibration samples; every method"):
        told_apart([first, sample(a=made(base, tokens))], **CELL, text="law")


def test_seeds_are_taken_apart(tiny, tiny_domain):
    loss = lab.perplexity(*tiny, tiny_domain.test, max_tokens=64, seq_len=32, progress=False)
    names = ["dense", *gradient_methods([1, 10], seeds=2)]
    losses = {(name, "ffn", 0.5, "text"): replace(loss, text=name) for name in names}
    first, second = by_seed(losses)
    shared = {name: name for name in ("dense", "backprop", "none")}
    for found, seed in ((first, 0), (second, 1)):
        own = {name: f"{name} (seed {seed})" for name in ("zeroth-order, 1", "zeroth-order, 10")}
        own["random"] = f"random (seed {seed})"
        expected = {(name, "ffn", 0.5, "text"): text for name, text in {**shared, **own}.items()}
        assert {cell: each.text for cell, each in found.items()} == expected
