"""Pruning with compensation: the algebra, one pass through every family, and what it is worth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_surgery import logits
from torch.utils.flop_counter import FlopCounterMode

import minigpt_lab as lab
from minigpt_lab.elimination import ERRORS, SCHEDULES, eliminate, group_schedule
from minigpt_lab.families import ATTENTION_UNITS, Anatomy
from minigpt_lab.hessians import second_moments
from minigpt_lab.layerwise import LayerPass, enter
from minigpt_lab.runtime import inference
from minigpt_lab.shards import Shards


def problem(seed: int = 0, units: int = 6, features: int = 4, tokens: int = 200):
    """A linear layer ``W``, what it reads and the features of its units, shuffled; float64."""
    generator = torch.Generator().manual_seed(seed)
    width = units * features
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x = mixing @ torch.randn(width, tokens, generator=generator, dtype=torch.float64)
    weight = torch.randn(10, width, generator=generator, dtype=torch.float64)
    places = torch.randperm(width, generator=generator).reshape(units, features)
    return weight, x, x @ x.T / tokens, places


def column_loop(weight, hessian, units, count):
    """The paper's algorithm 1 as it is printed: heads to the front, then column by column."""
    weight, hessian, width = weight.clone(), hessian.clone(), units.shape[1]
    left, order = list(range(len(units))), []
    for _ in range(count):
        inverse = torch.linalg.inv(hessian)
        errors = []
        for unit in left:
            block = inverse[units[unit]][:, units[unit]]
            pivots = torch.linalg.cholesky(block).diagonal()
            errors.append(float((weight[:, units[unit]] / pivots).square().sum()))
        gone = left.pop(int(np.argmin(errors)))
        order.append(gone)
        others = [c for u in range(len(units)) if u != gone for c in units[u].tolist()]
        front = [*units[gone].tolist(), *others]
        root = torch.linalg.cholesky(inverse[front][:, front], upper=True)
        moved = weight[:, front].clone()
        for i in range(width):
            error = moved[:, i : i + 1] / root[i, i]
            moved[:, i:] -= error @ root[i : i + 1, i:]
        moved[:, :width] = 0
        weight[:, front] = moved
        columns = units[gone]
        hessian[columns], hessian[:, columns] = 0, 0
        hessian[columns, columns] = 1
    return weight, order


@given(st.integers(0, 10_000), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_the_closed_form_is_the_papers_loop(seed, count):
    weight, _, hessian, units = problem(seed)
    expected, order = column_loop(weight, hessian, units, count)
    found = eliminate(weight, hessian, units, count, "slimgpt", 1, damp=0)
    assert found.order == order
    columns = units[found.kept].ravel()
    torch.testing.assert_close(found.weight, expected[:, columns], atol=1e-8, rtol=1e-8)


@given(st.integers(0, 10_000), st.sampled_from(sorted(ERRORS)), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_the_loss_is_the_true_one(seed, error, size):
    weight, x, hessian, units = problem(seed)
    found = eliminate(weight, hessian, units, 4, error, size, damp=0)
    short = torch.zeros_like(weight)
    short[:, units[found.kept].ravel()] = found.weight
    true = ((weight - short) @ x).square().sum() / x.shape[1]
    assert found.loss == pytest.approx(float(true), rel=1e-6)
    assert found.scale == pytest.approx(float((weight @ x).square().sum() / x.shape[1]))


def test_exact_errors_are_what_removing_one_unit_costs():
    weight, x, hessian, units = problem()
    inverse = torch.linalg.inv(hessian)
    errors = {name: rule(weight, inverse, units) for name, rule in ERRORS.items()}
    for unit in range(len(units)):
        rest = [c for c in range(weight.shape[1]) if c not in units[unit]]
        best = torch.linalg.lstsq(x[rest].T, (weight @ x).T).solution.T
        true = (weight @ x - best @ x[rest]).square().sum() / x.shape[1]
        assert float(errors["exact"][unit]) == pytest.approx(float(true), rel=1e-6)
    # [H⁻¹]_jj is at least the squared pivot: without the grouped Cholesky errors look smaller
    assert (errors["diag"] <= errors["slimgpt"] * (1 + 1e-9)).all()
    single = torch.arange(weight.shape[1])[:, None]
    for rule in ERRORS.values():
        torch.testing.assert_close(
            rule(weight, inverse, single), exact := ERRORS["exact"](weight, inverse, single)
        )
    assert len(exact) == weight.shape[1]


def test_dead_units_leave_first_and_for_free():
    weight, _, hessian, units = problem()
    columns = units[[4, 1]].ravel()
    hessian[columns], hessian[:, columns] = 0, 0
    found = eliminate(weight, hessian, units, 2)
    assert (found.order, found.loss) == ([1, 4], 0)
    assert eliminate(weight, hessian, units, 3).order[:2] == [1, 4]
    torch.testing.assert_close(found.weight, weight[:, units[found.kept].ravel()])


def test_a_singular_moment_is_damped_more_with_a_warning():
    weight, _, _, units = problem()
    x = torch.randn(weight.shape[1], 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="singular"):
        found = eliminate(weight, x @ x.T, units, 3, damp=0)
    assert torch.isfinite(found.weight).all()
    with pytest.raises(ValueError, match="NaN"):
        eliminate(weight, x @ x.T * torch.nan, units, 3)


def test_schedules():
    def sizes(name, total):
        schedule, done = group_schedule(name), []
        while sum(done) < total:
            done.append(min(schedule(sum(done), total), total - sum(done)))
        return done

    assert sizes("released", 2752)[:4] == [1024, 304, 64, 64]  # papers.md works it out
    assert sizes("dynamic", 2752)[:3] == [1024, 864, 432]
    assert min(sizes("dynamic", 800)[:-1]) == 8
    assert sizes("constant", 300) == [128, 128, 44]
    assert sizes(7, 20) == [7, 7, 6]
    assert set(sizes("single", 5)) == {1}
    assert sorted(SCHEDULES) == ["constant", "dynamic", "released", "single"]
    with pytest.raises(ValueError, match="dynamc"):
        group_schedule("dynamc")
    with pytest.raises(ValueError, match="0 units"):
        group_schedule(0)


@pytest.mark.parametrize("options", [{"error": "exct"}, {"count": 6}, {"count": -1}, {"damp": -1}])
def test_bad_options(options):
    weight, _, hessian, units = problem()
    with pytest.raises(ValueError, match=r"exact|6 units|damp"):
        eliminate(weight, hessian, units, **{"count": 2, **options})


def windows(seed: int = 3, count: int = 4) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 97, (2, 12), generator=generator)} for _ in range(count)]


def site_counts(model, units: str, ffn=(5, 0, 7)) -> dict[str, list[int]]:
    """Channels, and one head or group of every layer that has two."""
    site = ATTENTION_UNITS[units]
    return {"ffn": [*ffn], site: [min(1, n - 1) for n in Anatomy(model).units(site)]}


def test_parts_of_a_layer_are_the_layer(model):
    """What is kept between the parts gives the same outputs, and no product runs twice."""
    anatomy, batches, hidden = Anatomy(model), windows(), Shards()
    readers = [anatomy.name(1, anatomy.family.consumes[site]) for site in ("attention", "ffn")]
    modules = {name: model.get_submodule(name) for name in readers}
    with inference(model):
        with second_moments(modules) as sums:
            for batch in batches:
                states = model.base_model(**batch, output_hidden_states=True, use_cache=False)
        calls = enter(model, batches, hidden)
        with FlopCounterMode(display=False) as whole:
            LayerPass(anatomy, 0, hidden, calls).run(0)
        with FlopCounterMode(display=False) as parts:
            for index in range(2):
                one = LayerPass(anatomy, index, hidden, calls)
                read = {site: list(one.inputs(site)) for site in ("attention", "ffn")}
                one.finish()
    torch.testing.assert_close(hidden[3], states.hidden_states[2], rtol=1e-4, atol=1e-4)
    for name, found in zip(readers, read.values(), strict=True):
        x = torch.cat([states.flatten(0, -2) for states in found]).double()
        torch.testing.assert_close(x.T @ x, sums[name], rtol=1e-4, atol=1e-3)
    assert parts.get_total_flops() == 2 * len(batches) * whole.get_total_flops() > 0


@pytest.mark.parametrize("units", sorted(ATTENTION_UNITS))
def test_every_family_is_cut_and_makes_up_for_it(family, units):
    model, batches = random_model(family), windows()
    before = logits(model, batches[0]["input_ids"])
    counts = site_counts(model, units)
    options = {"units": units, "progress": False, "dtype": torch.float64}
    mini, plan = lab.slimgpt(model, batches, counts=counts, **options)
    assert plan.removed == counts
    assert torch.equal(logits(model, batches[0]["input_ids"]), before)
    assert lab.model_size(mini).stored == plan.predicted_size(model).stored
    plain, same = lab.slimgpt(model, batches, counts=counts, compensate=False, **options)
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.parameters(), lab.shrink(model, same).parameters(), strict=True)
    )

    def error(cut) -> float:
        found = [
            logits(cut, batch["input_ids"]) - logits(model, batch["input_ids"]) for batch in batches
        ]
        return float(torch.cat(found).square().sum())

    assert error(mini) < error(plain)
