"""Searched layer budgets: levels in one run, the supernet, the search, the smallest model."""

from __future__ import annotations

import contextlib
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from helpers import logits, problem, random_model, same, site_counts, windows
from hypothesis import given, settings
from hypothesis import strategies as st

import minigpt_lab as lab
from minigpt_lab.calibration.hessians import damped_inverse, refit
from minigpt_lab.compensation import Solver, eliminate, layer_by_layer
from minigpt_lab.compensation.budget_search import STARTS
from minigpt_lab.compensation.budgets import Budgets
from minigpt_lab.compensation.calibration_windows import CalibrationWindows
from minigpt_lab.compensation.descent import Descent
from minigpt_lab.compensation.layer_counts import unscored_sites
from minigpt_lab.compensation.obs import eliminate_levels
from minigpt_lab.compensation.supernetwork import Supernet, supernet
from minigpt_lab.models.anatomy import Anatomy
from minigpt_lab.planning import LayerSite
from minigpt_lab.studies import smallest

CASES = [("llama", "balanced_heads"), *((name, "kv_group") for name in ("llama", "gpt2", "bloom"))]
QUICK = {"levels": 4, "steps": 6}


def groups_of(model, sites=("ffn", "attention")) -> list[LayerSite]:
    return unscored_sites(Anatomy(model), sites, (0, 0))


# one elimination, several levels


@given(st.integers(0, 10_000), st.sampled_from(["slimgpt", "exact", "diag"]))
@settings(max_examples=15, deadline=None)
def test_levels_are_what_a_run_to_each_gives(seed, saliency):
    W, _, H, units = problem(seed)
    counts = [1, 2, 5]
    levels = eliminate_levels(W, H, units, counts, Solver(saliency, 1))
    for count, found in zip(counts, levels, strict=True):
        fresh = eliminate(W, H, units, count=count, saliency=saliency, block_size=1)
        assert (found.kept, found.order) == (fresh.kept, fresh.order)
        assert found.loss == pytest.approx(fresh.loss)
        torch.testing.assert_close(found.W, fresh.W)


def test_levels_are_refitted_from_the_whole_and_nested():
    weight, _, hessian, _ = problem(units=40, features=1)
    units = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:, None]
    columns = units[3]
    hessian[columns], hessian[:, columns] = 0, 0  # a dead unit leaves first
    levels = eliminate_levels(weight, hessian, units, [0, 1, 12, 30, 39], Solver(damping=0.1))
    assert [len(level.kept) for level in levels] == [40, 39, 28, 10, 1]
    assert all(a.order == b.order[: len(a.order)] for a, b in itertools.pairwise(levels))
    assert levels[1].order == [3] and levels[1].loss == 0
    alive = units[levels[1].kept].ravel()
    damped, _ = damped_inverse(hessian[alive][:, alive], 0.1, "feature")
    for level in levels[2:]:
        places = torch.tensor([levels[1].kept.index(unit) for unit in level.kept])
        torch.testing.assert_close(level.W, refit(weight[:, alive], damped, places))
    with pytest.raises(ValueError, match=r"\[2, 1\]; expected them ascending"):
        eliminate_levels(weight, hessian, units, [2, 1], Solver())


# the supernet


@contextlib.contextmanager
def filled(model, groups, levels, base, options, offload="device"):
    with supernet(model, groups, options, offload) as net:
        net.fill(CalibrationWindows(windows()), levels, base, progress=False)
        yield net


@pytest.mark.parametrize("bias", ["refit", "add"])
@pytest.mark.parametrize(("name", "units"), CASES)
def test_at_its_base_a_supernet_is_slimgpt(name, bias, units):
    model, batches = random_model(name), windows()
    ids, before = batches[0]["input_ids"], dict(model.named_parameters())
    counts = site_counts(model, units)
    options = {"bias": bias, "dtype": torch.float64}
    mini, _ = lab.slimgpt(model, batches, counts=counts, units=units, progress=False, **options)
    groups = groups_of(model, list(counts))
    levels = [sorted({0, counts[g.site][g.layer]}) for g in groups]
    base = tuple(level[-1] for level in levels)
    whole = logits(model, ids)
    with filled(model, groups, levels, base, Solver(**options), "disk") as net:
        torch.testing.assert_close(logits(model, ids), logits(mini, ids), rtol=1e-4, atol=1e-4)
        net.set((0,) * len(groups))
        assert torch.equal(logits(model, ids), whole)
        net.set(base)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)


@pytest.mark.parametrize("bias", ["refit", "add"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_slopes_are_differences_where_levels_are_near(name, bias):
    model = random_model(name).double()
    groups = groups_of(model)
    rows = [batch["input_ids"] for batch in windows()]
    weight = torch.randn(model.config.vocab_size, generator=torch.Generator().manual_seed(0))
    counts, dense, base = [[0, 1]] * len(groups), (0,) * len(groups), (1,) * len(groups)
    options = Solver(bias=bias, dtype=torch.float64)

    def loss():
        return (model(input_ids=rows[0]).logits.log_softmax(-1) * weight).mean()

    list(model.parameters())[3].requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with filled(model, groups, counts, base, options) as net:
        for each in net.projections:  # a hundredth of the way to the level
            each.set(1)
            near = each.W.lerp(each.module.weight, 1e-2).detach().movedim(each.axis, 1)
            each.add(1, torch.arange(near.shape[1]), near, 1e-2 * each.bias_update[1])
        for start in (dense, base):
            net.set(start)
            rises = net.rises(loss, dense, base)
            differences = []
            for each, level in zip(net.projections, start, strict=True):
                ends = []
                for end in (0, 1):
                    each.set(end)
                    ends.append(float(loss()))
                differences.append(ends[1] - ends[0])
                each.set(level)
            np.testing.assert_allclose(rises, differences, rtol=0.1, atol=1e-12)
            assert net.rises(loss, dense, base).tolist() == rises.tolist()  # nothing is left behind
        assert not net.rises(loss, base, base).any()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_slopes_in_bfloat16():
    rows, found = [batch["input_ids"] for batch in windows()], []
    for dtype in (torch.float64, torch.bfloat16):
        model = random_model("llama").to(dtype)
        groups = groups_of(model)
        counts, budget = [[0, 1]] * len(groups), (0,) * len(groups)
        with filled(model, groups, counts, budget, Solver()) as net:
            above = (1,) * len(groups)

            def loss(model=model):
                return model(input_ids=rows[0]).logits.float().square().sum()

            found.append(net.rises(loss, budget, above))
    assert np.corrcoef(*found)[0, 1] > 0.98


def test_an_error_leaves_the_model_as_it_was():
    model = random_model("llama")
    before = {key: p.clone() for key, p in model.named_parameters()}
    groups = groups_of(model)
    counts, base = [[0, 1]] * 6, (1,) * 6
    with pytest.raises(KeyboardInterrupt), filled(model, groups, counts, base, Solver()):
        raise KeyboardInterrupt
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())
    for place, match in [("down_proj", "has NaN.* weights"), ("up_proj", "reads NaN")]:
        weight = getattr(model.model.layers[1].mlp, place).weight
        kept = weight.clone()
        with torch.no_grad():
            weight[0, 0] = torch.nan
        with (
            pytest.raises(ValueError, match=rf"layers\.1\.mlp\.down_proj {match}"),
            filled(model, groups, counts, (0,) * 6, Solver()),
        ):
            pass
        with torch.no_grad():
            weight.copy_(kept)
    assert model.model.layers[0].mlp.down_proj.weight.requires_grad


# budgets


def some_budgets(target: float, drop_blocks: bool = False) -> Budgets:
    groups = [LayerSite("ffn", i, 3, np.zeros(16), 10) for i in range(3)]
    groups += [LayerSite("attention", i, 3, np.zeros(3), 45) for i in range(3)]
    return Budgets.around([[5] * 3 + [1] * 3], groups, [1] * 6, 4, target, drop_blocks)


@given(st.integers(0, 10_000), st.floats(0.05, 0.8))
@settings(max_examples=30, deadline=None)
def test_the_nearest_budget_of_enough(seed, share):
    rng = np.random.default_rng(seed)
    budgets = some_budgets(target := share * 885)
    assert budgets.levels[0] == [0, 4, 5, 8, 12, 15] and budgets.levels[3] == [0, 1, 2]
    wish = rng.random(6) * budgets.sizes

    def distance(budget):
        return ((budgets.removed(budget) - wish) ** 2 / budgets.sizes).sum()

    every = itertools.product(*budgets.levels)
    best = min(distance(b) for b in every if budgets.removed(b).sum() >= target * 1.001)
    found = budgets.nearest(wish)
    assert budgets.removed(found).sum() >= target and distance(found) <= best + 1e-9
    counts = budgets.trimmed(found)
    gone = sum(g.cost * n for g, n in zip(budgets.layer_sites, counts, strict=True))
    assert gone >= target and (gone < target + 10 or not any(counts[:3]))


@given(st.integers(0, 10_000), st.floats(0.05, 0.8))
@settings(max_examples=30, deadline=None)
def test_budgets_between_levels(seed, share):
    rng = np.random.default_rng(seed)
    budgets = some_budgets(target := share * 885)
    gone = budgets.projected(rng.random(6) * 2 * budgets.sizes)
    assert gone.sum() == pytest.approx(target)
    assert (gone >= 0).all() and (gone <= budgets.largest).all()
    np.testing.assert_allclose(budgets.projected(gone), gone, atol=1e-6)
    below, above = budgets.neighbours(gone)
    gaps = budgets.removed(above) - budgets.removed(below)
    assert (budgets.removed(below) <= gone).all() and (gone <= budgets.removed(above)).all()
    drawn = [budgets.sampled(gone, rng.random(6)) for _ in range(400)]
    assert all(x in pair for each in drawn for x, *pair in zip(each, below, above, strict=True))
    mean = np.mean([budgets.removed(levels) for levels in drawn], axis=0)
    np.testing.assert_allclose(mean, gone, atol=0.15 * gaps.max())


def test_whole_blocks_may_be_levels_and_stay_dropped():
    budgets = some_budgets(200, drop_blocks=True)
    assert budgets.levels[0] == [0, 4, 5, 8, 12, 15, 16] and budgets.levels[3] == [0, 1, 2, 3]
    assert budgets.trimmed((16, 5, 0, 3, 0, 0)) == (16, 0, 0, 3, 0, 0)
    assert budgets.trimmed((16, 12, 0, 3, 0, 0)) == (16, 0, 0, 3, 0, 0)


def test_a_search_drops_a_block_that_does_nothing(monkeypatch):
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    setting = {"ratio": 0.3, "rounds": 1, "steps": 24, "progress": False}
    for drop_blocks, expected in ((False, 1), (True, 2)):
        counts = lab.search_counts(model, windows(), **setting, drop_blocks=drop_blocks)
        assert counts["attention"][1] == expected
    mini, plan = lab.slimgpt(model, windows(), counts=counts, progress=False)
    assert Anatomy(mini).units("attention")[1] == 0 and plan.origin["search"]["drop_blocks"]
    quick = partial(lab.search_counts, rounds=1, steps=24)
    monkeypatch.setattr(layer_by_layer, "search_counts", quick)
    options = {"allocation": "search", "drop_blocks": True, "progress": False}
    assert lab.slimgpt(model, windows(), ratio=0.3, **options)[1] == plan
    with pytest.raises(ValueError, match="allocation is 'uniform'; only a search chooses which"):
        lab.slimgpt(model, windows(), ratio=0.3, **{**options, "allocation": "uniform"})
    with pytest.raises(ValueError, match="drop_blocks is True, but has no effect with counts"):
        lab.slimgpt(model, windows(), counts=counts, drop_blocks=True, progress=False)


def test_a_group_of_one_level_is_never_moved():
    group = LayerSite("ffn", 0, 1, np.zeros(16), 10)
    budgets = Budgets([group, group], [1, 1], [[0], [0, 8]], 40)
    gone = budgets.projected(np.array([30.0, 10.0]))
    assert gone.tolist() == pytest.approx([0, 40])
    assert budgets.neighbours(gone) == ((0, 0), (0, 8))
    assert {budgets.sampled(gone, np.full(2, x)) for x in (0, 0.4, 0.6)} == {(0, 0), (0, 8)}


def test_windows_take_turns_and_draws_mirror_each_other():
    budgets = some_budgets(400)
    descent = Descent(budgets, budgets.nearest(budgets.sizes / 2), [0])
    seen, chances = [], []
    for _ in range(6):
        seen.append(descent.sample(3)[0])
        chances.append(descent.uniform)
        descent.step(np.zeros(6), 0.1)  # no group is dearer: nothing moves
    assert sorted(seen[:3]) == sorted(seen[3:]) == [0, 1, 2]
    np.testing.assert_allclose(np.add(chances[::2], chances[1::2]), 1)
    assert not np.allclose(chances[0], chances[2])
    np.testing.assert_allclose(descent.removed, budgets.projected(descent.removed), atol=1e-6)


def test_a_descent_finds_where_parameters_cost_alike():
    budgets = some_budgets(400)
    dear = np.array([4.0, 1.0, 0.5, 8.0, 0.2, 0.05])  # of the square of a group's share

    def cost(budget):
        return (dear * (budgets.removed(budget) / budgets.sizes) ** 2).sum()

    descent = Descent(budgets, budgets.nearest(budgets.sizes / 2), [0])
    rng = np.random.default_rng(1)
    for step in range(300):
        _, drawn = descent.sample(1)
        slopes = 2 * dear * budgets.removed(drawn) / budgets.sizes**2
        descent.step(slopes * rng.lognormal(0, 0.3, 6), 0.05 * (1 - step / 300))
        assert descent.removed.sum() == pytest.approx(400)
    every = itertools.product(*budgets.levels)
    best = min(cost(b) for b in every if budgets.removed(b).sum() >= 400)
    assert cost(budgets.nearest(descent.removed)) < best * 1.15
    assert best < 0.5 * cost(budgets.nearest(budgets.projected(budgets.sizes / 2)))


@pytest.mark.parametrize(("slope", "moves"), [(1e6, False), (0, True)])
def test_a_group_at_its_limit_counts_if_it_would_leave_it(slope, moves):
    budgets = some_budgets(400)
    descent = Descent(budgets, budgets.nearest(budgets.sizes / 2), [0])
    descent.removed = before = np.array([0, 150, 60, 40, 90, 60.0])  # of the first nothing is gone
    descent.step(np.array([slope, 1, 1, 1, 1, 1.0]), 0.1)
    assert descent.removed.sum() == pytest.approx(400)
    assert (descent.removed[0] > 0) == moves != np.allclose(descent.removed, before)


# the search


@pytest.fixture(scope="module")
def batches(tiny, tiny_domain):
    return lab.tokenize(tiny_domain.calibration, tiny[1], seq_len=64, max_tokens=2048)


@pytest.fixture(scope="module")
def searched(tiny, batches):
    """At half of the decoder's weights: the search, uniform and log-increase."""
    model = tiny[0]
    before = {key: p.clone() for key, p in model.named_parameters()}
    cuts = {
        name: lab.slimgpt(
            model, batches, ratio=0.5, ratio_of="decoder", allocation=name, progress=False
        )
        for name in ("search", "uniform", "log-increase")
    }
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())
    return cuts


@pytest.mark.slow
def test_the_budget_that_is_found(searched, tiny, tiny_domain):
    mini, plan = searched["search"]
    search = plan.origin["search"]
    assert plan.origin["allocation"] == "search" and search["levels"] == 16
    assert search["kl"]["best"] < min(search["kl"]["uniform"], search["kl"]["log-increase"])
    assert plan.origin["removed"]["decoder"] == pytest.approx(0.5, abs=384 / 787_456)
    assert lab.model_size(mini).stored == plan.predicted_size(tiny[0]).stored
    found, uniform = (
        lab.perplexity(searched[name][0], tiny[1], tiny_domain.test, seq_len=64)
        for name in ("search", "uniform")
    )
    assert found.value < uniform.value


def test_a_round_gains_on_where_it_starts(tiny, batches):
    model = tiny[0]
    counts = lab.search_counts(
        model, batches, ratio=0.5, ratio_of="decoder", rounds=1, steps=30, progress=False
    )
    history = counts.history
    starts = history[history["stage"].isin(STARTS)]
    later = history.drop(starts.index)
    assert starts["enough"].all()  # whatever part of a parameter is asked for
    assert later["stage"].tolist() == [f"step {n}" for n in (8, 15, 23, 30)]
    best = later[later["enough"]]["kl"].min()
    assert best < 0.9 * starts["kl"].min() and starts["kl"].nunique() == 2
    mini, plan = lab.slimgpt(model, batches, counts=counts, progress=False)
    assert plan.removed == counts and plan.origin["search"]["kl"]["best"] == round(best, 6)
    target = 0.5 * lab.model_size(model).layers_dense
    removed = lab.model_size(model).stored - lab.model_size(mini).stored
    assert target <= removed < target + Anatomy(model).unit_parameters("ffn", 0) + 1
    assert counts.to_frame()["remove"].sum() == sum(map(sum, counts.values()))
    assert len(repr(counts)) < 200 and "<table" in counts._repr_html_()


@pytest.mark.slow
def test_an_interrupted_search_goes_on(tiny, batches, tmp_path, monkeypatch):
    model, arguments = tiny[0], {"ratio": 0.4, **QUICK, "progress": False}
    expected = lab.search_counts(model, batches, **arguments)
    measure, measured = Supernet.rises, []

    def interrupted(self, *given):
        measured.append(given)
        if len(measured) == 8:  # the second step of the second round
            raise KeyboardInterrupt
        return measure(self, *given)

    arguments["out_dir"] = tmp_path
    monkeypatch.setattr(Supernet, "rises", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lab.search_counts(model, batches, **arguments)
    again = lab.search_counts(model, batches, **arguments)
    assert again == expected and len(measured) == 8 + 6  # the first round is not searched again
    assert again.history.equals(expected.history) and len(again.history) > 7
    monkeypatch.setattr(Supernet, "rises", None)  # all is known: nothing is computed
    again = lab.search_counts(model, iter(batches), **arguments)
    assert again == expected and again.history.equals(expected.history)


@pytest.mark.parametrize(("name", "units"), CASES)
def test_other_families_and_units(name, units):
    model, batches = random_model(name), windows()
    limit = int(0.8 * lab.model_size(model).stored)
    options = {"units": units, "offload": "cpu", "progress": False}
    counts = lab.search_counts(
        model, iter(batches), parameters=limit, multiple_of=2, **QUICK, **options
    )
    mini, plan = lab.slimgpt(model, batches, counts=counts, **options)
    stored = lab.model_size(mini).stored
    cost = Anatomy(model).unit_parameters("ffn", 0)
    assert limit - 2 * cost < stored <= limit
    assert not any(len(kept) % 2 for kept in plan.keep["ffn"])


@pytest.fixture
def quick_search(monkeypatch):
    """`slimgpt` searches, but not for long."""
    search = partial(lab.search_counts, **QUICK)
    monkeypatch.setattr(layer_by_layer, "search_counts", search)


def test_a_search_with_an_out_dir_is_one_run(tmp_path, quick_search):
    model, batches = random_model("llama"), windows()
    arguments = {"ratio": 0.4, "progress": False}
    first, plan = lab.slimgpt(model, batches, **arguments, allocation="search", out_dir=tmp_path)
    again, same_plan = lab.slimgpt(
        model, iter(batches), **arguments, allocation="search", out_dir=tmp_path
    )
    assert (tmp_path / "search.json").is_file()
    assert plan == same_plan and same(first, again)
    counts = lab.search_counts(model, batches, **arguments, **QUICK)
    assert lab.slimgpt(model, batches, counts=counts, progress=False)[1] == plan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": 0}, "levels is 0; expected a whole number of at least 1"),
        ({"round": 3}, "did you mean 'rounds'"),
        ({"steps": 2.5}, "steps is 2.5; expected a whole number"),
        ({"seed": -1}, "seed is -1; expected a whole number"),
        ({"ratio": 0.99}, "cannot be met"),
        ({"ratio": 1.5}, "expected a number of at least 0 and below 1"),
    ],
)
def test_bad_arguments_of_a_search(arguments, message):
    with pytest.raises(ValueError, match=message):
        lab.search_counts(
            random_model("llama"), windows(), **{"ratio": 0.3, "progress": False, **arguments}
        )


def test_another_run_is_refused_before_its_search(tmp_path, monkeypatch, quick_search):
    model = random_model("llama")
    arguments = {"allocation": "search", "out_dir": tmp_path, "progress": False}
    lab.slimgpt(model, windows(), ratio=0.4, **arguments)
    monkeypatch.setattr(layer_by_layer, "search_counts", None)
    for other, match in [
        ({"ratio": 0.3}, "another size or search"),
        ({"batches": windows()[:1]}, "other calibration tokens"),
        ({"damping": 0.1}, "another damping"),
        ({"drop_blocks": True}, "another drop_blocks"),
    ]:
        given = {"batches": windows(), "ratio": 0.4, **arguments, **other}
        with pytest.raises(ValueError, match=f"holds a run with {match}"):
            lab.slimgpt(model, **given)


def test_predictions_that_are_not_finite():
    model = random_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="predictions are not finite: check the model"):
        lab.search_counts(model, windows(), ratio=0.3, **QUICK, progress=False)
    with torch.inference_mode(), pytest.raises(ValueError, match="a search needs gradients"):
        lab.search_counts(model, windows(), ratio=0.3)


def test_a_search_needs_all_weights_at_hand():
    model = random_model("llama").to("meta")  # as where accelerate has offloaded it
    with pytest.raises(ValueError, match="use another allocation, or a device that holds"):
        lab.search_counts(model, windows(), ratio=0.3)


def test_budgets_are_compared_on_windows_that_were_set_aside():
    def split(windows, fraction):
        text = CalibrationWindows([{"input_ids": ids} for ids in windows])
        return [part.windows for part in text.split(fraction)]

    windows = list(torch.arange(160).reshape(5, 2, 16))  # ten windows in batches of two
    chosen, others = split(windows, 0.3)
    rows = [row.tolist() for part in (*chosen, *others) for row in part]
    assert sum(len(part) for part in chosen) == 3
    assert sorted(rows) == torch.cat(windows).tolist()  # each once
    mixed = [torch.zeros(1, n, dtype=torch.long) for n in (300, 100, 300, 100, 300)]
    assert [tuple(part.shape) for part in split(mixed, 1.0)[0]] == [
        (2, 100), (1, 300), (1, 300), (1, 300)
    ]  # fmt: skip
    chosen, others = split(windows[:1], 1.0)
    assert torch.equal(chosen[0], others[0])  # nothing else is left


def test_general_text_is_set_aside_by_its_share():
    text = CalibrationWindows(windows(), windows(9, count=2), 0.25)
    for part in text.split(0.5):
        own = sum(ids.numel() for ids in part.texts[0])
        total = sum(ids.numel() for ids in part.windows)
        assert part.weights[0] * own == pytest.approx(0.75 * total)
        assert part.weights[-1] * (total - own) == pytest.approx(0.25 * total)


def test_a_search_on_general_text_finds_another_budget(tiny, tiny_domain):
    model, tokenizer = tiny
    texts = [tiny_domain, lab.load_domain("tiny-games")]
    own, other = (
        lab.tokenize(each.calibration, tokenizer, seq_len=64, max_tokens=512) for each in texts
    )
    options = {"ratio": 0.4, "sites": ["ffn"], "levels": 4, "rounds": 1, "steps": 4}
    options |= {"progress": False}
    plain = lab.search_counts(model, own, **options)
    for share, expected in ((0.0, own), (1.0, other)):
        mixed = lab.search_counts(model, own, general=other, generality=share, **options)
        assert mixed == lab.search_counts(model, expected, **options)
    assert plain.origin["search"]["kl"] != mixed.origin["search"]["kl"]


# the smallest model within a limit


def test_the_smallest_model_within_a_limit(tiny, tiny_domain, batches, tmp_path, monkeypatch):
    model, tokenizer = tiny
    arguments = {"tolerance": 0.15, "seq_len": 64, "out_dir": tmp_path, "progress": False}
    mini, plan, curve = lab.smallest_within(
        model, tokenizer, tiny_domain, batches=iter(batches), **arguments
    )
    assert curve["ratio"].is_monotonic_increasing and curve["stored"].is_monotonic_decreasing
    assert len(curve) == 4 and curve["increase"][0] == 0
    best = curve[curve["within"]].iloc[-1]
    assert 0 < best["increase"] <= 0.05
    assert best["stored"] == lab.model_size(mini).stored == plan.predicted_size(model).stored
    value = lab.perplexity(mini, tokenizer, tiny_domain.validation, seq_len=64).value
    assert value == pytest.approx(best["perplexity"])
    (folder,) = (path.name for path in tmp_path.iterdir() if path.is_dir())
    assert folder.startswith(f"ratio-{best['ratio']:.6f}-")
    monkeypatch.setattr("minigpt_lab.studies.held_out.diverging", None)  # all is known
    again, same_plan, same_curve = lab.smallest_within(
        model, tokenizer, tiny_domain, batches=batches, **arguments
    )
    assert same_curve.equals(curve) and same_plan == plan and same(again, mini)


def test_another_text_may_have_a_limit_of_its_own(tiny, tiny_domain, batches):
    games = lab.load_domain("tiny-games")
    general = lab.tokenize(games.calibration, tiny[1], seq_len=64, max_tokens=256)
    arguments = {"batches": batches, "general": general, "increase": 9.0, "tolerance": 0.3}
    arguments |= {"other": games, "seq_len": 64, "progress": False}
    _, _, curve = lab.smallest_within(*tiny, tiny_domain, **arguments, other_increase=9.0)
    assert curve["within"].all() and (curve["other_increase"][1:] > 0).all()
    with pytest.warns(UserWarning, match=r"tiny-law.* or tiny-games.* by more than 900.0% or 0.0%"):
        _, _, curve = lab.smallest_within(*tiny, tiny_domain, **arguments, other_increase=0)
    assert curve["within"].sum() == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"reconstruct": 1}, {"stream_share": 0.5}, {"allocation": "search", "drop_blocks": True}],
    ids=str,
)
def test_the_smallest_model_by_every_option_of_slimgpt(
    options, tiny, tiny_domain, batches, tmp_path, monkeypatch
):
    """It is the model that slimgpt makes at that ratio by the same options."""
    quick = partial(lab.search_counts, rounds=1, steps=24)
    monkeypatch.setattr(layer_by_layer, "search_counts", quick)
    how = {"batches": batches, "tolerance": 0.3, "seq_len": 64, "increase": 9.0, "max_tokens": 512}
    how |= {"out_dir": tmp_path, "progress": False, **options}
    mini, plan, curve = lab.smallest_within(*tiny, tiny_domain, **how)
    ratio = curve[curve["within"]]["ratio"].iloc[-1]
    given = {"allocation": "log-increase", "ratio_of": "decoder", "progress": False, **options}
    alone, same_plan = lab.slimgpt(tiny[0], batches, ratio=ratio, **given)
    assert same(mini, alone) and plan.keep == same_plan.keep
    assert lab.smallest_within(*tiny, tiny_domain, **how)[2].equals(curve)


def test_the_smallest_model_stops_at_what_can_be_removed(tiny, tiny_domain, batches):
    """All FFN channels but one are less than 80 % of a decoder; general text is a generator."""
    how = {"batches": batches, "tolerance": 0.02, "seq_len": 64, "increase": 1e9, "progress": False}
    how |= {"max_tokens": 512, "sites": ["ffn"], "general": (each for each in batches)}
    mini, plan, curve = lab.smallest_within(*tiny, tiny_domain, **how)
    assert curve["within"].all() and curve["ratio"].max() < 0.8
    units = sum(len(units) for layers in plan.keep.values() for units in layers)
    assert mini.num_parameters() < tiny[0].num_parameters() and units


def test_blocks_are_dropped_where_narrowing_is_not_enough():
    """Attention of one key/value group cannot be narrowed: half of the units is out of reach."""
    model, how = random_model("gemma", layers=4), {"rounds": 1, "steps": 8, "progress": False}
    with pytest.raises(ValueError, match="the target cannot be met"):
        lab.search_counts(model, windows(), ratio=0.5, **how)
    counts = lab.search_counts(model, windows(), ratio=0.5, drop_blocks=True, **how)
    mini, plan = lab.slimgpt(model, windows(), counts=counts, progress=False)
    assert plan.origin["removed"]["units"] >= 0.5
    assert any(not units for layers in plan.keep.values() for units in layers)
    with pytest.raises(ValueError, match="cannot be met|of every layer"):
        lab.slimgpt(
            model, windows(), ratio=0.999, allocation="search", drop_blocks=True, progress=False
        )


@pytest.mark.parametrize("units", ["kv_group", "balanced_heads"])
def test_what_is_removed_with_a_dropped_block_counts(units):
    """Keys and values too, where query heads are the units."""
    model = random_model("llama")
    site = "attention" if units == "kv_group" else units
    counts = {"ffn": [3, 0, 20], site: [1, Anatomy(model).units(site)[1], 0]}
    mini, plan = lab.slimgpt(model, windows(), counts=counts, units=units, progress=False)
    gone = 1 - mini.num_parameters() / model.num_parameters()
    assert plan.origin["removed"]["model"] == pytest.approx(gone, abs=1e-6)
    layer_sites = groups_of(model, ("ffn", site))
    start = tuple(n for layers in counts.values() for n in layers)
    around = Budgets.around([start], layer_sites, [1] * 6, 4, 10.0, drop_blocks=True)
    assert around.removed(start).sum() == model.num_parameters() - mini.num_parameters()
    below, above = around.neighbours(around.removed(start))
    assert all(n in pair for n, *pair in zip(start, below, above, strict=True))


def test_sizes_tried_with_a_function_are_kept(tiny, tiny_domain, batches, tmp_path, monkeypatch):
    """A function is known by the shares that it gives, not by its place in memory."""

    def spread(first: float):
        return lambda ratio, layer_sites: [ratio * first, *[ratio] * (len(layer_sites) - 1)]

    how = {"batches": batches, "tolerance": 0.4, "seq_len": 64, "increase": 9.0, "max_tokens": 512}
    how |= {"out_dir": tmp_path, "progress": False}
    curve = lab.smallest_within(*tiny, tiny_domain, **how, allocation=spread(1.0))[2]
    calls, real = [], smallest.HeldOut.measure

    def counted(*arguments):
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(smallest.HeldOut, "measure", counted)
    again = lab.smallest_within(*tiny, tiny_domain, **how, allocation=spread(1.0))[2]
    assert again.equals(curve) and not calls
    lab.smallest_within(*tiny, tiny_domain, **how, allocation=spread(0.5))
    assert calls


def test_a_trimmed_model_is_held_to_the_dense_one(tiny, tiny_domain, batches):
    """Its tokens are more, so the perplexity is that of the same text over the dense tokens."""
    model, tokenizer = tiny
    trimmed = lab.trim_vocabulary(model, tokenizer, tiny_domain)
    words = lab.tokenizer_for(trimmed, tokenizer)
    own = lab.tokenize(tiny_domain.calibration, words, seq_len=64, max_tokens=512)
    how = {"batches": own, "dense": model, "tolerance": 0.3, "seq_len": 64, "max_tokens": 1024}
    _, _, curve = lab.smallest_within(*tiny, tiny_domain, **how | {"batches": batches})
    assert curve["increase"].iloc[0] == 0
    mini, _, curve = lab.smallest_within(trimmed, tokenizer, tiny_domain, **how, increase=9.0)
    text = lab.excerpt(tiny_domain.validation, tokenizer, max_tokens=1024)
    bits = [
        lab.perplexity(each, tokenizer, text, seq_len=64, max_characters=None).bits_per_character
        for each in (model, mini)
    ]
    dense = lab.perplexity(model, tokenizer, text, seq_len=64, max_characters=None)
    expected = dense.value ** (bits[1] / bits[0])
    assert curve[curve["within"]]["perplexity"].iloc[-1] == pytest.approx(expected, rel=1e-4)
    assert curve["within"].all() and mini.num_parameters() < trimmed.num_parameters()
    elsewhere = lab.load_domain("tiny-games")  # which uses tokens that were lost
    with pytest.warns(UserWarning, match="above what is allowed already: nothing is pruned"):
        mini, _, curve = lab.smallest_within(trimmed, tokenizer, elsewhere, **how, increase=0)
    assert len(curve) == 1 and curve["increase"].iloc[0] > 0 and not curve["within"].any()
    assert mini.num_parameters() == trimmed.num_parameters()
    for dense in (random_model("llama"), lab.load_model("tiny-gpt2")[0], trimmed):
        start = model if dense is trimmed else trimmed
        with pytest.raises(ValueError, match="give the model that it was trimmed from"):
            lab.smallest_within(start, tokenizer, tiny_domain, **how | {"dense": dense})


def test_no_cut_within_the_limit(tiny, tiny_domain, batches):
    model = tiny[0]
    with pytest.warns(UserWarning, match=r"even pruning .* allow a larger increase"):
        mini, plan, curve = lab.smallest_within(
            *tiny,
            tiny_domain,
            batches=batches,
            increase=0,
            tolerance=0.3,
            seq_len=64,
            progress=False,
        )
    assert curve["within"].sum() == 1 and same(mini, model) and mini is not model
    assert not any(map(any, plan.removed.values()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"increase": -0.1}, "increase is -0.1"),
        ({"most": 1.2}, "most is 1.2"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"ratio": 0.3}, "ratio: chosen by smallest_within"),
    ],
)
def test_bad_limits(tiny, tiny_domain, batches, arguments, message):
    with pytest.raises(ValueError, match=message):
        lab.smallest_within(*tiny, tiny_domain, batches=batches, **arguments)
