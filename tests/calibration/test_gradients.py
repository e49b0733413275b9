"""Gradients by backpropagation and by perturbation, and the criteria that use them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import random_model, spoil
from torch import nn

import minigpt_lab as lab
from minigpt_lab.architectures import SITES
from minigpt_lab.calibration import collect_gradients, estimate_gradients, spsa
from minigpt_lab.calibration.losses import window_losses
from minigpt_lab.criteria.units import scored_layers
from minigpt_lab.models.anatomy import Anatomy, weight_axis


def names(model) -> list[str]:
    return list(scored_layers(model, SITES))


def true_gradients(model, windows) -> list[dict[str, torch.Tensor]]:
    """Of every window's own loss, by transformers."""
    found = []
    for ids in windows:
        model.zero_grad()
        model(input_ids=ids[None], labels=ids[None]).loss.backward()
        found.append({n: model.get_submodule(n).weight.grad.clone() for n in names(model)})
    model.zero_grad()
    return found


def bits(model) -> dict[str, torch.Tensor]:
    kinds = {2: torch.int16, 4: torch.int32}
    return {
        name: p.detach().view(kinds[p.element_size()]).clone()
        for name, p in model.named_parameters()
    }


def same_bits(model, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(before[name], now) for name, now in bits(model).items())


def test_the_loss_is_transformers_own(model, probe):
    with torch.no_grad():
        found = window_losses(model, probe)
        for ids, loss in zip(probe, found, strict=True):
            expected = model(input_ids=ids[None], labels=ids[None]).loss
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_windows_add_up_to_the_gradient_of_the_mean(model, probe, checkpointing):
    options = {"squares": True, "gradient_checkpointing": checkpointing}
    found = collect_gradients(model, [{"input_ids": probe}], names(model), **options)
    each = true_gradients(model, probe)
    for name in names(model):
        stack = torch.stack([window[name] for window in each])
        torch.testing.assert_close(found[name], stack.mean(0), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found.square[name], stack.square().mean(0), rtol=1e-3, atol=1e-6)
    assert found.n_windows == len(probe)


def test_padding_changes_no_gradient(model, padded):  # noqa: F811
    rows = [ids[mask.bool()] for ids, mask in zip(*padded.values(), strict=True)]
    found = collect_gradients(model, [padded], names(model))
    alone = collect_gradients(model, [{"input_ids": row[None]} for row in rows], names(model))
    for name in names(model):
        torch.testing.assert_close(found[name], alone[name])
    assert found.n_windows == 2


def test_backpropagation_leaves_the_model_as_it_was(model, probe):
    before, frozen = bits(model), next(model.parameters())
    frozen.requires_grad_(False)
    kept = [p for p in model.parameters() if p is not frozen][0]
    kept.grad = torch.ones_like(kept)
    model.train()
    collect_gradients(model, [{"input_ids": probe}], names(model), gradient_checkpointing=True)
    assert same_bits(model, before) and model.training and not frozen.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)
    assert torch.equal(kept.grad, torch.ones_like(kept))
    assert all(p.grad is None for p in model.parameters() if p is not kept)
    assert not any("forward" in vars(layer) for layer in Anatomy(model).layers)


def structures(model, per_weight: dict[str, torch.Tensor], vector: bool = False):
    """``(site, layer)`` to the scores ``[unit, feature]`` of each structure."""
    anatomy, found = Anatomy(model), {}
    for site in SITES:
        for layer in range(len(anatomy.layers)):
            rows = []
            for projection, side in anatomy.coupled(site):
                matrix = per_weight[anatomy.name(layer, projection)].double().numpy()
                features = matrix.sum(1 - weight_axis(anatomy.module(layer, projection), side))
                features = np.abs(features) if vector else features
                for block in dict.fromkeys(projection.blocks):
                    of_unit = anatomy.unit_features(projection, layer, block=block)
                    rows.append(features[of_unit])
            found[site, layer] = rows
    return found


@pytest.mark.parametrize("variant", ["vector", "element1", "element2", "mix"])
@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_taylor_is_llm_pruners(model, probe, variant, reduce):
    scores = lab.score(model, "taylor", [{"input_ids": probe}], variant=variant, reduce=reduce
    )  # fmt: skip
    each, per_weight = true_gradients(model, probe), {}
    for name in names(model):
        weight = model.get_submodule(name).weight.detach()
        stack = torch.stack([window[name] for window in each])
        first, second = stack.mean(0) * weight, weight**2 * stack.square().mean(0)
        per_weight[name] = {
            "vector": first, "element1": first.abs(), "element2": second,
            "mix": (first - second / 2).abs(),
        }[variant]  # fmt: skip
    for (site, layer), rows in structures(model, per_weight, variant == "vector").items():
        width = min(row.shape[1] for row in rows)  # channel by channel, then a head's together
        channels = np.stack([row.reshape(len(row), -1, width).sum(1) for row in rows])
        expected = getattr(channels, reduce)(0).sum(1)
        np.testing.assert_allclose(scores.values[site][layer], expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("gradient", ["backprop", "zeroth-order", "none"])
def test_sensitivity_is_weight_times_input_times_gradient(model, probe, gradient):
    batches = [{"input_ids": probe}]
    scores = lab.score(model, "sensitivity", batches, gradient=gradient, n_directions=3, seed=4)
    norms = lab.collect_statistics(model, batches, progress=False)
    gradients = {
        "backprop": lambda: collect_gradients(model, batches, names(model)),
        "zeroth-order": lambda: estimate_gradients(
            model, batches, names(model), n_directions=3, per_sample=True, seed=4
        ),
        "none": lambda: {name: torch.ones(()) for name in names(model)},
    }[gradient]()
    per_weight = {}
    for name in names(model):
        module = model.get_submodule(name)
        norm = torch.tensor(norms.mean(name, "input", "square") * norms.n_tokens).sqrt()
        norm = norm.unsqueeze(1 - weight_axis(module, "input"))
        per_weight[name] = module.weight.detach().abs() * norm * gradients[name].abs()
    for (site, layer), rows in structures(model, per_weight).items():
        expected = np.max([row.sum(1) for row in rows], axis=0)
        np.testing.assert_allclose(scores.values[site][layer], expected, rtol=1e-4)


def direction(found: spsa.Estimate, name: str, k: int) -> torch.Tensor:
    z = torch.zeros_like(found.directions.weights[name])
    found.directions.add_(z, name, k, 1.0)
    return z


def test_directions_are_gaussian_and_uncorrelated(monkeypatch):
    """``E[z] = 0`` and ``E[z zᵀ] = I`` over seeds, over directions and over layers together."""
    monkeypatch.setattr(spsa, "STARTS", 2**12)
    weights = {"a": torch.zeros(3, 2), "b": torch.zeros(2, 3, dtype=torch.bfloat16)}
    for seeds, directions in ((800, 1), (1, 800), (40, 20)):
        z = []
        for each in (spsa.Directions(seed, weights) for seed in range(seeds)):
            for k in range(directions):
                z.append(torch.cat([each.add(W, n, k, 1.0).flatten() for n, W in weights.items()]))
        z = torch.stack(z).double()  # [draw, weight of both layers]
        error = 5 / len(z) ** 0.5
        assert z.mean(0).abs().max() < error
        assert (z.T @ z / len(z) - torch.eye(12)).abs().max() < 1.5 * error
        assert (z**4).mean() == pytest.approx(3, rel=0.1)  # a Gaussian's


@pytest.mark.parametrize("options", [{}, {"n_directions": 2}, {"per_sample": True}])
def test_the_estimate_is_the_mean_of_c_times_z(model, probe, options):
    found = estimate_gradients(model, [{"input_ids": probe}], names(model), seed=5, **options)
    expected = options.get("n_directions", 1) * (len(probe) if options.get("per_sample") else 1)
    assert len(found.coefficients) == expected
    name = names(model)[3]
    z = [direction(found, name, k) for k in range(expected)]
    total = sum(c * z for c, z in zip(found.coefficients, z, strict=True)) / expected
    torch.testing.assert_close(found[name], total.float(), rtol=1e-4, atol=1e-5)
    group = probe[:1] if options.get("per_sample") else probe
    shifted, losses = copy.deepcopy(model), []
    for sign in (1, -1):
        for name in names(model):
            weight = model.get_submodule(name).weight.detach()
            moved = found.directions.add(weight, name, 0, sign * 1e-3).clone()
            torch.testing.assert_close(
                moved - weight, sign * 1e-3 * direction(found, name, 0), rtol=0, atol=1e-6
            )
            shifted.get_submodule(name).weight.data = moved
        with torch.no_grad():
            losses.append(window_losses(shifted, group).double().mean().item())
    assert found.coefficients[0] == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_comes_back(model, probe, dtype):
    model.to(dtype)
    before = bits(model)
    scores = lab.score(model, "sensitivity", [{"input_ids": probe}], n_directions=3, eps=0.1)
    assert same_bits(model, before) and not any(m._forward_hooks for m in model.modules())
    assert scores.to_frame()["score"].gt(0).all()


def test_every_bit_comes_back_from_an_interrupted_pass(model, probe, monkeypatch):
    before, anatomy = bits(model), Anatomy(model)
    module = anatomy.module(1, anatomy.family.consumes["ffn"])

    def interrupt(_x):
        assert not same_bits(model, before)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        estimate_gradients(model, [{"input_ids": probe}], names(model))
    assert same_bits(model, before)


def test_one_layer_is_perturbed_at_a_time_and_no_direction_kept(model, probe, monkeypatch):
    originals = {name: model.get_submodule(name).weight.detach().clone() for name in names(model)}
    changed = []
    for name in names(model):
        module = model.get_submodule(name)

        def forward(x, name=name, own=module.forward):
            now = {
                n for n, w in originals.items() if not torch.equal(model.get_submodule(n).weight, w)
            }
            changed.append(now == {name})
            return own(x)

        monkeypatch.setattr(module, "forward", forward)
    found = estimate_gradients(model, [{"input_ids": probe}], names(model), n_directions=2)
    assert len(changed) == 4 * len(originals) and all(changed)
    assert found.coefficients.shape == (2,)
    for name, weight in found.directions.weights.items():
        assert weight.data_ptr() == model.get_submodule(name).weight.data_ptr()


@pytest.fixture
def quadratic(monkeypatch):
    """A linear layer whose loss is ``‖Wx‖² / 2``: central differences are exact there."""
    torch.manual_seed(0)
    model, x = nn.Module(), torch.randn(6)
    model.layer = nn.Linear(6, 4, bias=False)
    monkeypatch.setattr(spsa, "window_losses", lambda *_: model.layer(x).square().sum()[None] / 2)
    truth = torch.outer(model.layer(x).detach(), x)
    monkeypatch.setattr(spsa, "linear_modules", lambda *_: {"layer": model.layer})
    return model, truth


def test_the_estimate_is_unbiased_and_cosine_grows_with_draws(quadratic):
    model, truth = quadratic
    estimate = estimate_gradients.__wrapped__  # without its check: this is no language model
    batches, n = [{"input_ids": torch.zeros(1, 2, dtype=torch.long)}], truth.numel()
    gradients = spsa.Gradients({"layer": truth}, {}, 1)
    for draws in (1, 30, 300):
        found = [
            estimate(model, batches, ["layer"], eps=0.1, n_directions=draws, seed=seed)
            for seed in range(8)
        ]
        cosines = [each.cosine(gradients) for each in found]
        # E[cos] is about sqrt(K / (K + n)) for K directions in n dimensions
        assert np.mean(cosines) == pytest.approx(np.sqrt(draws / (draws + n)), abs=0.08)
    mean = torch.stack([each["layer"] for each in found]).mean(0)
    assert (mean - truth).norm() / truth.norm() < 3 * np.sqrt(n / 2400)


def test_the_cosine_is_a_diagnostic_of_any_model(probe):
    model, batches = random_model("llama"), [{"input_ids": probe}]
    few, many = (
        lab.gradient_cosine(model, batches, n_directions=k, sites=("ffn",)) for k in (1, 200)
    )
    assert abs(few) < 0.1 < many < 0.5


def test_seeds_decide_the_estimate(model, probe):
    a, b, c = (
        lab.score(model, "sensitivity", [{"input_ids": probe}], seed=seed).to_frame()["score"]
        for seed in (1, 1, 2)
    )
    assert a.equals(b) and not a.equals(c)


def test_mini_llms_preset_keeps_the_ends(tiny, tiny_statistics):
    model, _ = tiny
    setting = {**lab.MINI_LLM["score"], "gradient": "none"}
    scores = lab.score(model, "sensitivity", statistics=tiny_statistics, **setting)
    with pytest.raises(ValueError, match=r"keep_layers=\(4, 3\) leaves nothing of 4 layers"):
        lab.plan_from_scores(model, scores, ratio=0.5, **lab.MINI_LLM["plan"])


def test_block_influence_is_the_turn_of_the_hidden_states(model, padded):  # noqa: F811
    found = lab.block_influence(model, [padded])
    states = []
    for ids, mask in zip(*padded.values(), strict=True):
        with torch.no_grad():
            out = model(input_ids=ids[mask.bool()][None], output_hidden_states=True)
        states.append([h[0] for h in out.hidden_states])
    for layer in range(2):  # transformers normalises the last
        before, after = (torch.cat([s[i] for s in states]) for i in (layer, layer + 1))
        expected = 1 - torch.cosine_similarity(before, after, dim=-1).mean().item()
        assert found["influence"][layer] == pytest.approx(expected, abs=1e-5)
    assert found["layer"].tolist() == [0, 1, 2]


def test_what_is_not_finite_is_named(model, probe):
    batches = [{"input_ids": probe}]
    spoil(model, float("inf"))
    for name, options in {
        "taylor": {}, "sensitivity": {"gradient": "backprop"}, "wanda": {"sequential": 0.5}
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=r"(layers|h)\.1\..* NaN or infinite values"):
            lab.score(model, name, batches, **options)
    with pytest.raises(ValueError, match=r"(layers|h)\.1\..* NaN or infinite values"):
        estimate_gradients(model, batches, names(model))
    with pytest.raises(ValueError, match="layer 1 reads or writes NaN"):
        lab.block_influence(model, batches)


def test_gradients_that_overflow_are_named(model, probe, monkeypatch):
    name = names(model)[2]
    weight = model.get_submodule(name).weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(ValueError, match=f"{name} has NaN or infinite gradients"):
        lab.score(model, "taylor", [{"input_ids": probe}])


def test_bad_options(model, probe, tiny_statistics):
    batches = [{"input_ids": probe}]
    for name, options, words in (
        ("taylor", {"variant": "element3"}, "did you mean 'element"),
        ("taylor", {"reduce": "median"}, "reduce is 'median'"),
        ("sensitivity", {"gradient": "zeroth"}, "did you mean 'zeroth-order'"),
        ("sensitivity", {"eps": 0.0}, "eps is 0.0"),
        ("sensitivity", {"n_directions": 0}, "n_directions is 0"),
    ):
        with pytest.raises(ValueError, match=words):
            lab.score(model, name, batches, **options)
    for name in ("taylor", "sensitivity"):
        with pytest.raises(ValueError, match="needs batches"):
            lab.score(model, name)
    with pytest.raises(ValueError, match="no tokens"):
        lab.score(model, "taylor", [{"input_ids": probe[:, :1]}])
