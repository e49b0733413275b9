"""How a ratio is spread over layers, sites and units, on every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import random_model
from hypothesis import given, settings
from hypothesis import strategies as st

import minigpt_lab as lab
from minigpt_lab.compensation.layer_counts import unscored_sites
from minigpt_lab.models.anatomy import Anatomy
from minigpt_lab.models.sizes import layer_parameters
from minigpt_lab.planning.allocations import ALLOCATIONS, RANKINGS, LayerSite, allocation_rule
from minigpt_lab.planning.counts import RATIOS, unit_counts

PROBE = torch.arange(60).view(4, 15)


def groups(widths, depth=None, cost=1, seed=0):
    rng = np.random.default_rng(seed)
    depth = depth or len(widths)
    return [LayerSite("ffn", i, depth, rng.random(n), cost) for i, n in enumerate(widths)]


@given(
    name=st.sampled_from(sorted(ALLOCATIONS)),
    ratio=st.floats(0, 0.99),
    widths=st.lists(st.integers(20, 200), min_size=1, max_size=12),
)
@settings(max_examples=80, deadline=None)
def test_every_allocation_spends_the_ratio(name, ratio, widths):
    layers = groups(widths)
    shares = ALLOCATIONS[name](ratio, layers)
    assert all(0 <= share <= 1 for share in shares)
    spent = sum(share * n for share, n in zip(shares, widths, strict=True)) / sum(widths)
    assert spent == pytest.approx(ratio, abs=1 / sum(widths))


def test_increasing_schedules_are_the_papers():
    layers = groups([100] * 32)
    shares = ALLOCATIONS["log-increase"](0.2004, layers)
    assert (shares[0], shares[-1]) == pytest.approx((0.0625, 0.25), rel=5e-3)  # SlimGPT's pair
    expected = 0.0625 + 0.1875 * np.log(11) / np.log(32)
    assert shares[10] == pytest.approx(expected, rel=5e-3)
    linear = ALLOCATIONS["linear-increase"](0.3, layers)
    assert np.diff(linear) == pytest.approx((linear[-1] - linear[0]) / 31)
    deep = ALLOCATIONS["log-increase"](0.9, layers)  # where the last layers are full, others pay
    assert max(deep) == 1 and np.mean(deep) == pytest.approx(0.9)


def test_a_ranking_across_sites_counts_what_units_cost():
    cheap = LayerSite("ffn", 0, 1, np.array([3.0, 8.0, 9.0]), cost=1)
    dear = LayerSite("attention", 0, 1, np.array([10.0, 90.0]), cost=10)
    # per parameter the first head (1.0) is worth less than any channel
    shares = ALLOCATIONS["global"](10 / 23, [cheap, dear])
    assert shares == [0, 0.5]
    # by z-score the lowest channel goes before it
    shares = ALLOCATIONS["global-standardised"](1 / 23, [cheap, dear])
    assert shares == [1 / 3, 0]
    # as scored two channels do, and the head between counts as ten of them
    assert ALLOCATIONS["global-as-scored"](2 / 23, [cheap, dear]) == [2 / 3, 0]
    assert ALLOCATIONS["global-as-scored"](13 / 23, [cheap, dear]) == [1, 0.5]


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3])
def test_flaps_scores_are_cut_at_one_threshold_for_all_layers_and_sites(model, probe, ratio):
    scores, anatomy = lab.score(model, "fluctuation", [{"input_ids": probe}]), Anatomy(model)
    plan = lab.plan_from_scores(model, scores, ratio=ratio, allocation="global-as-scored")
    ranked = scores.to_frame().sort_values("score", kind="stable")
    units = list(ranked[["site", "layer", "unit"]].itertuples(index=False, name=None))
    cost = np.array([anatomy.unit_parameters(site, layer) for site, layer, _ in units])
    stays = {site: plan.kept_mask(site) for site in plan.keep}
    gone = [not stays[site][layer][unit] for site, layer, unit in units]
    assert gone == sorted(gone, reverse=True)  # the lowest of one ranking
    assert abs(cost[gone].sum() - ratio * cost.sum()) <= cost.max()
    values = ranked["score"].to_numpy()
    fit = values[cost.cumsum() <= ratio * cost.sum()].max(initial=-np.inf)
    whole = (values <= fit).sum()  # what scores the same leaves together: a ReLU's dead channels
    assert whole <= sum(gone) <= whole + 1  # one more if over half of it fits


def test_a_layer_below_all_others_keeps_its_best_unit_of_each_site(model, probe):
    scores = lab.score(model, "fluctuation", [{"input_ids": probe}])
    for layers in scores.values.values():
        layers[0] -= 1e3
    plan = lab.plan_from_scores(model, scores, ratio=0.5, allocation="global-as-scored")
    for site, layers in scores.values.items():
        assert plan.keep[site][0] == [layers[0].argmax()]


@pytest.mark.parametrize("allocation", sorted(ALLOCATIONS))
def test_no_layer_is_left_without_units(model, allocation):
    scores = lab.score(model, "magnitude")
    plan = lab.plan_from_scores(model, scores, ratio=0.97, allocation=allocation)
    assert all(len(units) >= 1 for layers in plan.keep.values() for units in layers)
    lab.shrink(model, plan)


@pytest.mark.parametrize("ratio_of", RATIOS)
@pytest.mark.parametrize("allocation", sorted(ALLOCATIONS))
def test_a_ratio_means_what_it_says(model, ratio_of, allocation):
    sites = ("ffn",) if model.config.model_type != "llama" else ("ffn", "attention")
    scores = lab.score(model, "random", sites=sites)
    arguments = {"allocation": allocation, "ratio_of": ratio_of}
    plan = lab.plan_from_scores(model, scores, ratio=0.1, **arguments)
    mini, anatomy = lab.shrink(model, plan), Anatomy(model)
    gone = lab.model_size(model).stored - lab.model_size(mini).stored
    units = sum(
        count * anatomy.unit_parameters(site, layer)
        for site in sites
        for layer, count in enumerate(anatomy.units(site))
    )
    bases = {"units": units, "decoder": layer_parameters(model)}
    bases["model"] = lab.model_size(model).stored
    slack = sum(anatomy.unit_parameters(site, layer) for site in sites for layer in range(3))
    assert gone == pytest.approx(0.1 * bases[ratio_of], abs=slack)
    for meaning, base in bases.items():
        assert plan.origin["removed"][meaning] == pytest.approx(gone / base, abs=1e-6)


def test_a_callable_decides(model):
    scores = lab.score(model, "random", sites=("ffn",))

    def last_only(ratio, groups):
        return [ratio * (group.layer == group.depth - 1) for group in groups]

    plan = lab.plan_from_scores(model, scores, ratio=0.5, allocation=last_only)
    assert plan.removed["ffn"] == [0, 0, Anatomy(model).units("ffn")[2] // 2]
    assert plan.origin["allocation"] == "last_only"
    with pytest.raises(ValueError, match=r"takes 1.5 of layer 0's ffn"):
        lab.plan_from_scores(model, scores, ratio=0.5, allocation=lambda r, g: [1.5] * len(g))


def test_widths_in_multiples():
    model = random_model("llama")
    scores = lab.score(model, "random")
    plan = lab.plan_from_scores(model, scores, ratio=0.33, multiple_of=4)
    assert {len(units) for units in plan.keep["ffn"]} == {12}  # 13.4 of 20
    assert {len(units) for units in plan.keep["attention"]} <= {1, 3}
    target = lab.model_size(model).stored - 5 * Anatomy(model).unit_parameters("ffn", 0)
    plan = lab.plan_from_scores(model, scores, parameters=target, multiple_of={"ffn": 5})
    assert all(len(units) % 5 == 0 for units in plan.keep["ffn"])
    assert plan.predicted_size(model).stored <= target
    with pytest.raises(ValueError, match="multiple_of is 7.*20 ffn units of layer 0"):
        lab.plan_from_scores(model, scores, ratio=0.3, multiple_of=7)


def test_targets_out_of_reach_say_what_can_be_reached():
    model = random_model("llama")
    scores = lab.score(model, "random", sites=("ffn",))
    with pytest.raises(ValueError, match=r"still stores [\d,]+ of [\d,]+, \d+\.\d% less"):
        lab.plan_from_scores(model, scores, ratio=0.9, ratio_of="model")
    for first in (1, 0.1):  # a third of the units is in the first layer
        for cut in (
            lambda a: lab.plan_from_scores(model, scores, ratio=0.5, allocation=a),
            lambda a: lab.slimgpt(model, [{"input_ids": PROBE}], ratio=0.5, allocation=a),
        ):
            with pytest.raises(ValueError, match="ratio is 0.5, .* hold only 0.333 of the units"):
                cut([first, 0, 0])
    with pytest.raises(ValueError, match="ratio_of is 'layers'"):
        lab.plan_from_scores(model, scores, ratio=0.9, ratio_of="layers")


@pytest.mark.parametrize("allocation", sorted(RANKINGS))
def test_equal_scores_that_exceed_a_ratio_say_so(allocation):
    model = random_model("llama")
    scores = lab.score(model, "random", sites=("ffn",))
    for layer in scores.values["ffn"]:
        layer[:] = 0.5
    with pytest.warns(UserWarning, match=r"100.0% of the units are removed, not 10.0%"):
        lab.plan_from_scores(model, scores, ratio=0.1, allocation=allocation)


def test_a_cut_of_nothing_says_so():
    model = random_model("llama")
    scores = lab.score(model, "random", sites=("attention",))
    with pytest.warns(UserWarning, match="removes no units: .* less than half a unit"):
        plan = lab.plan_from_scores(model, scores, ratio=0.1, allocation="uniform")
    assert not any(plan.removed["attention"])


@pytest.mark.parametrize("heads", [2, 3, 8, 12])
@pytest.mark.parametrize("ratio", [0.04, 0.13, 0.2, 1 / 3, 0.47, 0.5, 0.81, 0.95])
@pytest.mark.parametrize("allocation", ["uniform", "log-increase"])
def test_few_heads_leave_in_turns_and_channels_balance_them(tiny, heads, ratio, allocation):
    """The heads that layers lose sum up to their share, and all of it to the ratio.

    Where every layer's channels suffice for the balance, each loses what it should.
    """
    depth, channel, head = 30, 2, 300
    layer_sites = [
        LayerSite(site, layer, depth, np.zeros(units), cost)
        for site, units, cost in (("attention", heads, head), ("ffn", 1500, channel))
        for layer in range(depth)
    ]
    counts = unit_counts(tiny[0], layer_sites, ratio, None, allocation, even_out=True)
    removed, channels = np.array(counts[:depth]), np.array(counts[depth:])
    wanted = np.array(allocation_rule(allocation)(ratio, layer_sites[:depth])) * heads
    assert (removed >= 0).all() and (removed < heads).all()
    if heads <= 8 and (wanted <= heads - 1).all():  # in turns: never off by more than a half
        assert (np.abs(np.cumsum(removed - wanted)) <= 0.5 + 1e-6).all()
        assert (np.abs(removed - wanted) < 1).all()
    if heads > 8:
        expected = heads - np.maximum(np.round(heads - wanted), 1)
        assert (removed == expected).all()
    lost = removed * head + channels * channel
    target = wanted * head + wanted / heads * 1500 * channel
    if (channels < 1499).any():  # else nothing is left to remove but the last head
        assert abs(lost.sum() - target.sum()) <= depth * channel
    if ((channels > 0) & (channels < 1499)).all():
        assert (np.abs(lost - target) <= channel).all()


@pytest.mark.parametrize("allocation", ["uniform", "log-increase", "log-decrease"])
def test_a_size_is_met_where_heads_leave_in_turns(tiny, allocation):
    model = tiny[0]
    sites = unscored_sites(Anatomy(model), ("ffn", "attention"), (0, 0))
    units = sum(each.parameters for each in sites)
    for share in np.linspace(0.02, 0.55, 30):
        size = int(model.num_parameters() - share * units)
        counts = unit_counts(model, sites, None, size, allocation)
        removed = sum(n * each.cost for n, each in zip(counts, sites, strict=True))
        excess = removed - (model.num_parameters() - size)
        assert 0 <= excess <= sum(each.cost for each in sites if each.site == "ffn")


@pytest.mark.parametrize("allocation", sorted(ALLOCATIONS))
def test_every_size_can_be_asked_for(model, allocation):
    """Heads that cost as much as a layer's channels too, and shares near none and all."""
    scores = lab.score(model, "random")
    stored = model.num_parameters()
    for share in np.linspace(0.005, 0.2, 12):
        size = int(stored * (1 - share))
        plan = lab.plan_from_scores(model, scores, parameters=size, allocation=allocation)
        assert lab.shrink(model, plan).num_parameters() <= size
