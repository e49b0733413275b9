"""The domain matrix: equal sizes, honest differences, and a run that goes on where it stopped."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

import minigpt_lab as lab
from minigpt_lab.store import ResultCache
from minigpt_lab.studies import matrix

NAMES = ("tiny-law", "tiny-games")
SMALL = {"max_tokens": 512, "seq_len": 64}


@pytest.fixture(scope="module")
def domains():
    return [lab.load_domain(name) for name in NAMES]


@pytest.fixture(scope="module")
def plans(tiny, domains, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    return lab.domain_plans(
        *tiny, domains, ratio=0.3, samples=3, calibration_tokens=1024, seq_len=64, out_dir=folder
    )


def test_every_plan_stores_the_same_and_draws_differ(tiny, plans):
    cuts = [*NAMES, "mix", "random"]
    assert set(plans) == {(cut, i) for cut in cuts for i in range(3)} | {("magnitude", 0)}
    assert len({plan.predicted_size(tiny[0]).stored for plan in plans.values()}) == 1
    for cut in cuts:
        assert plans[cut, 0].keep != plans[cut, 1].keep


def test_own_text_is_what_a_cut_knows(tiny, domains, plans):
    table = lab.domain_matrix(*tiny, domains, plans=plans, **SMALL)
    assert len(table) == 2 * (len(NAMES) + len(matrix.CONTROLS) + 1)
    diagonal = table[table["cut"] == table["text"]]
    assert (diagonal[["difference", "difference_low", "difference_high"]] == 0).all(axis=None)
    rest = table[table["cut"] != table["text"]]
    assert (rest["difference_low"] < rest["difference"]).all()
    assert (rest["difference"] < rest["difference_high"]).all()
    assert (table["lowest"] <= table["perplexity"] * (1 + 1e-12)).all()
    random = table.set_index(["cut", "text"]).loc["random"]
    assert (random["difference_low"] > 0).all() and (random["draws"] == 3).all()
    assert table.attrs["wins"][0]["won"] == 2
    assert table.attrs["verdict"].startswith("without recovery: a domain's own cut is the best")
    # one cell by hand: the mean over draws of log perplexities on the same excerpt
    model, tokenizer = tiny
    text = lab.excerpt(domains[1].test, tokenizer, max_tokens=512)
    logs = []
    for draw in range(3):
        with lab.masked(model, plans["tiny-law", draw]):
            logs.append(np.log(lab.perplexity(model, tokenizer, text, seq_len=64).value))
    cell = table.set_index(["cut", "text"]).loc[("tiny-law", "tiny-games")]
    assert cell["perplexity"] == pytest.approx(np.exp(np.mean(logs)), rel=1e-4)
    assert cell["highest"] == pytest.approx(np.exp(np.max(logs)), rel=1e-4)


@pytest.mark.slow
def test_an_interrupted_matrix_goes_on_where_it_was(tiny, domains, plans, tmp_path, monkeypatch):
    few = {key: plan for key, plan in plans.items() if key[1] == 0}
    arguments = {**SMALL, "out_dir": tmp_path, "recovery_tokens": 512, "learning_rate": 1e-3}
    recover, calls = matrix.recover, []

    def killed_later(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return recover(*args, **kwargs)

    monkeypatch.setattr(matrix, "recover", killed_later)
    with pytest.raises(KeyboardInterrupt):
        lab.domain_matrix(*tiny, domains, plans=few, **arguments)
    table = lab.domain_matrix(*tiny, domains, plans=few, **arguments)
    assert len(calls) == 3 + len(few) + 1 - 2  # the two finished ones are not trained again
    assert set(table["recovered"]) == {True, False}
    # nothing is measured twice
    monkeypatch.setattr("minigpt_lab.studies.held_out.diverging", None)
    again = lab.domain_matrix(*tiny, domains, plans=few, **arguments)
    pd.testing.assert_frame_equal(again, table)
    pruned, recovered = (table[table["recovered"] == state] for state in (False, True))
    gain = recovered["perplexity"].to_numpy() / pruned["perplexity"].to_numpy()
    assert gain[2:].mean() < 0.99  # dense first; cuts get better


def test_recovered_on_the_same_or_on_its_own_text(tiny, domains, plans, monkeypatch):
    few = {key: plan for key, plan in plans.items() if key[1] == 0}
    seen = []

    def trained(model, tokenizer, domain, **how):
        seen.append(domain.name)
        return pd.DataFrame()

    monkeypatch.setattr(matrix, "recover", trained)
    for choice in ("mix", "own"):
        lab.domain_matrix(
            *tiny, domains, plans=few, **SMALL, recovery_tokens=512, recover_on=choice
        )
    assert seen == ["mix"] * 6 + ["mix", *NAMES, *["mix"] * 3]


def test_the_mix_takes_equal_shares(domains):
    mix = matrix.mixed(domains)
    for part in ("train", "validation"):
        sizes = [
            sum(len(p.encode()) for p in mix.parts[part] if p in set(domain.parts[part]))
            for domain in domains
        ]
        longest = max(len(p.encode()) for p in mix.parts[part])
        assert abs(sizes[0] - sizes[1]) <= longest and sum(sizes) > 1000
    assert set(mix.train[:8]) & set(domains[0].train) and set(mix.train[:8]) & set(domains[1].train)


def test_verdict_counts_columns():
    def cells(cut, text, level):
        passages = np.stack([np.full(5, level * 10), np.full(5, 10.0), np.full(5, 40.0)], 1)
        passages[:, 0] += np.arange(5) / 10
        facts = {"recovered": False, "cut": cut, "text": text, "stored": 1, "kl": 0.1}
        return {**facts, "passages": passages}

    levels = {("a", "a"): 2, ("a", "b"): 3, ("b", "a"): 2.5, ("b", "b"): 3.5}
    levels |= {(name, text): 4 for name in matrix.CONTROLS for text in "ab"}
    table = matrix._compared(pd.DataFrame([cells(*key, v) for key, v in levels.items()]), 0)
    (wins,) = table.attrs["wins"]
    assert (wins["columns"], wins["won"], wins["surely"], wins["beats_mix"]) == (2, 1, 1, 2)
    found = table.set_index(["cut", "text"])["difference"]
    assert found["b", "a"] == pytest.approx(0.5) and found["a", "b"] == pytest.approx(-0.5)


def test_a_single_passage_is_no_sure_win():
    """Its resamples are all alike: an interval of no width."""
    for scored in (1, 2):
        tokens = np.where(np.arange(4) < scored, 10.0, 0.0)  # the others have no token
        cells = []
        for cut, text in itertools.product("ab", repeat=2):
            losses = tokens * (2 if cut == text else 3 + np.arange(4))
            facts = {"recovered": False, "cut": cut, "text": text, "stored": 1, "kl": 0.1}
            cells.append({**facts, "passages": np.stack([losses, tokens, 4 * tokens], 1)})
        table = matrix._compared(pd.DataFrame(cells), 0)
        (wins,) = table.attrs["wins"]
        assert (wins["won"], wins["surely"]) == (2, 2 * (scored > 1))
        low, high = table["difference_low"], table["difference_high"]
        assert (low.isna() & high.isna()).all() == (scored == 1)


def test_bad_input(tiny, domains, plans):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="two or more, of different names"):
        lab.domain_plans(model, tokenizer, [domains[0]] * 2)
    with pytest.raises(ValueError, match="samples is 0"):
        lab.domain_plans(model, tokenizer, domains, samples=0)
    with pytest.raises(ValueError, match="tiny-law/calibration has .* tokens, 3 samples of 8192"):
        lab.domain_plans(model, tokenizer, domains)
    with pytest.raises(ValueError, match=r"no plan for \['tiny-medical'\]"):
        lab.domain_matrix(
            model, tokenizer, [*domains, lab.load_domain("tiny-medical")], plans=plans
        )
    with pytest.raises(ValueError, match="recover_on is 'all'"):
        lab.domain_matrix(model, tokenizer, domains, plans=plans, recover_on="all")


def test_a_damaged_ledger_is_made_anew(tmp_path):
    path = tmp_path / "deep" / "ledger.json"
    first = ResultCache(path)
    assert first.get(["a", 1], lambda: {"x": 1}) == {"x": 1}
    assert ResultCache(path).get(["a", 1], lambda: {"x": 2}) == {"x": 1}
    path.write_text(path.read_text()[:-3])
    with pytest.warns(UserWarning, match="is damaged"):
        second = ResultCache(path)
    assert second.get(["a", 1], lambda: {"x": 2}) == {"x": 2}
    assert second.get(["b"], lambda: {"x": 3}) == {"x": 3}
    assert ResultCache(path).get(["b"], dict) == {"x": 3}
    assert ResultCache().get(["b"], lambda: {"x": 4}) == {"x": 4}


def test_overlap_of_kept_units(plans):
    table = matrix.kept_overlap(plans).set_index(["domain", "other"])
    assert set(table.index.get_level_values(0)) == {*NAMES, "mix", "random"}
    assert table["size"].between(0.69, 0.71).all()
    own, foreign = table.loc[("tiny-law", "tiny-law")], table.loc[("tiny-law", "tiny-games")]
    assert own["jaccard"] > foreign["jaccard"] > foreign["chance"] + 0.02
    random = table.loc[("random", "tiny-law")]
    assert random["jaccard"] == pytest.approx(random["chance"], abs=0.03)
