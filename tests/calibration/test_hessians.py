"""Second moments, what SparseGPT makes of them, and the update of the weights that stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import consumer_inputs, logits, random_model, spoil, units

import minigpt_lab as lab
from minigpt_lab.architectures import SITES
from minigpt_lab.calibration import Moments, damped_inverse, refit
from minigpt_lab.models.anatomy import Anatomy, weight_axis


def consumers(model) -> list[str]:
    anatomy = Anatomy(model)
    return [
        anatomy.name(layer, anatomy.family.consumes[site])
        for site in SITES
        for layer in range(len(anatomy.layers))
    ]


def damped(x: np.ndarray, damp: float = 0.01) -> np.ndarray:
    hessian = x.T @ x / len(x)
    diagonal = hessian.diagonal().copy()
    hessian += np.diag(np.where(diagonal == 0, 1, damp * diagonal.mean()))
    return hessian


def test_sparsegpt_is_weights_over_the_inverse(model, probe):
    scores = lab.score(model, "sparsegpt", [{"input_ids": probe}])
    for (site, layer), (weight, x) in consumer_inputs(model, probe).items():
        columns = (weight**2).sum(0) / np.linalg.inv(damped(x)).diagonal() * (x**2).any(0)
        found = scores.values[site][layer]
        np.testing.assert_allclose(found, units(columns, len(found)), rtol=1e-3)


def test_a_layer_at_a_time_gives_the_same(model, probe):
    batches = [{"input_ids": probe}]
    for scope in ("consumer", "coupled"):
        whole = lab.score(model, "sparsegpt", batches, scope=scope).to_frame()
        parts = lab.score(model, "sparsegpt", batches, scope=scope, layers_per_pass=1).to_frame()
        np.testing.assert_allclose(parts["score"], whole["score"], rtol=1e-6)


def test_layers_that_read_one_tensor_share_a_matrix(probe):
    model = random_model("llama")
    names = [f"model.layers.1.self_attn.{block}_proj" for block in "qkv"]
    found = lab.collect_hessians(model, [{"input_ids": probe}], names, progress=False)
    assert found.n_tokens == probe.numel()
    x = {}
    module = model.get_submodule(names[2])
    module.register_forward_pre_hook(lambda _m, args: x.update(x=args[0].flatten(0, -2)))
    logits(model, probe)
    expected = (x["x"].T @ x["x"] / len(x["x"])).double()
    for name in names:
        torch.testing.assert_close(found.matrices[name], expected, atol=1e-5, rtol=1e-4)


def test_the_update_is_the_best_the_kept_columns_can_do(model, probe):
    batches = [{"input_ids": probe}]
    scores = lab.score(model, "sparsegpt", batches, sites=("ffn",))
    plan = lab.plan_from_scores(model, scores, ratio=0.5)
    hessians = lab.collect_hessians(model, batches, consumers(model), progress=False)
    updated = lab.weight_compensated(model, plan, hessians)
    name = consumers(model)[0]
    weight, x = consumer_inputs(model, probe)["ffn", 0]
    kept, hessian = plan.keep["ffn"][0], damped(x)
    root = np.linalg.cholesky(hessian)  # ‖(W - W') root‖ is the damped error of the outputs
    best = np.linalg.lstsq(root[kept].T, (weight @ root).T, rcond=None)[0].T
    module = updated.get_submodule(name)
    new = module.weight.detach().movedim(weight_axis(module, "input"), 1)
    np.testing.assert_allclose(new[:, kept], best, rtol=1e-2, atol=1e-4)
    with lab.masked(updated, plan):
        expected = logits(updated, probe)
    mini = lab.shrink(updated, plan)
    torch.testing.assert_close(logits(mini, probe), expected, atol=1e-4, rtol=1e-4)
    assert np.array_equal(consumer_inputs(model, probe)["ffn", 0][0], weight)


def test_a_singular_matrix_is_damped_until_it_can_be_inverted():
    vector = torch.randn(6, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="singular at damping=0"):
        matrix, inverse = damped_inverse(vector @ vector.T, 0)
    torch.testing.assert_close(matrix @ inverse, torch.eye(6, dtype=torch.float64))
    regular = torch.eye(3, dtype=torch.float64) * 4
    torch.testing.assert_close(damped_inverse(regular, 0), (regular, regular / 16))
    with pytest.raises(ValueError, match="not positive definite"):
        damped_inverse(-regular, 0.01)


def test_features_that_are_always_zero_cost_nothing(probe):
    model = random_model("opt")
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight[3] = 0
        model.model.decoder.layers[0].fc1.bias[3] = -1  # ReLU: never active
    scores = lab.score(model, "sparsegpt", [{"input_ids": probe}], sites=("ffn",))
    assert scores.values["ffn"][0][3] == 0 < scores.values["ffn"][0].max()
    found, _ = damped_inverse(torch.diag(torch.tensor([2.0, 0.0])), 0.0)
    assert torch.equal(found, torch.diag(torch.tensor([2.0, 1.0])))


def test_bad_input(model, probe):
    with pytest.raises(ValueError, match="needs batches"):
        lab.score(model, "sparsegpt")
    with pytest.raises(ValueError, match="damping is -1"):
        lab.score(model, "sparsegpt", [{"input_ids": probe}], damping=-1)
    with pytest.raises(ValueError, match="no tokens|at least one batch"):
        lab.score(model, "sparsegpt", [])
    plan = lab.plan_from_scores(model, lab.score(model, "random"), ratio=0.5)
    some = lab.collect_hessians(model, [{"input_ids": probe}], consumers(model)[:1], progress=False)
    with pytest.raises(ValueError, match="no Hessian of"):
        lab.weight_compensated(model, plan, some)
    spoil(model, float("nan"))
    with pytest.raises(ValueError, match=r"1\..* has NaN or infinite values at its input"):
        lab.score(model, "sparsegpt", [{"input_ids": probe}])
    with pytest.raises(ValueError, match="of another model"):
        lab.weight_compensated(model, plan, some)


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4, -1e6])
def test_moments_survive_a_large_mean(mean):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 8, generator=generator) + mean
    x[:, 3] = mean  # a constant
    moments = Moments()
    for part in x.split(100):
        moments.add(part)
    expected = np.cov(x.double().numpy().T, bias=True)
    scale = max(1.0, abs(mean) * 1e-3)  # of the values' own rounding
    np.testing.assert_allclose(moments.covariance(), expected, rtol=1e-3, atol=1e-4 * scale)
    assert moments.covariance()[3].count_nonzero() == 0
    np.testing.assert_allclose(moments.mean, x.double().mean(0), rtol=1e-6, atol=1e-6)


def test_the_update_is_at_least_as_good_as_sparsegpts():
    generator = np.random.default_rng(0)
    W, x = generator.normal(size=(5, 12)), generator.normal(size=(40, 12))
    H, gone = x.T @ x / 40, [1, 4, 7]
    kept = [j for j in range(12) if j not in gone]
    best = np.zeros_like(W)
    best[:, kept] = refit(torch.tensor(W), torch.tensor(H), torch.tensor(kept)).numpy()
    swept, U = W.copy(), np.linalg.cholesky(np.linalg.inv(H)).T
    for j in gone:  # SparseGPT: from left to right, only what is to the right makes up for it
        swept[:, j:] -= np.outer(swept[:, j] / U[j, j], U[j, j:])
    swept[:, gone] = 0
    losses = [np.trace((W - other) @ H @ (W - other).T) for other in (best, swept)]
    assert losses[0] < 0.99 * losses[1]
