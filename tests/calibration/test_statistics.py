"""One pass: right numbers, right model, nothing left behind."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import random_model

import minigpt_lab as lab
from minigpt_lab.models.anatomy import Anatomy


def naive(model, batch):
    """Every linear layer's input and output rows, from ordinary hooks, without any padding."""
    seen, handles = {}, []
    for _, name, module in Anatomy(model).linears():
        seen[name] = ([], [])

        def hook(_module, args, output, name=name):
            for rows, tensor in zip(seen[name], (args[0], output), strict=True):
                rows.append(tensor.reshape(-1, tensor.shape[-1]).double().numpy())

        handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            model(ids[mask][None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: [np.concatenate(rows) for rows in pair] for name, pair in seen.items()}


def test_moments_equal_a_naive_computation(model, padded):
    found = lab.collect_statistics(model, [padded], progress=False)
    assert found.n_tokens == int(padded["attention_mask"].sum())
    assert repr(found).startswith(f"Statistics of {found.n_tokens} tokens of")
    for name, (x, y) in naive(model, padded).items():
        for side, values in (("input", x), ("output", y)):
            expected = [np.abs(values).mean(0), values.mean(0), (values**2).mean(0)]
            for moment, numbers in zip(("absolute", "sum", "square"), expected, strict=True):
                np.testing.assert_allclose(
                    found.mean(name, side, moment), numbers, rtol=1e-5, atol=1e-5
                )
        bias = model.get_submodule(name).bias
        if bias is not None:
            numbers = np.abs(y - bias.detach().double().numpy()).mean(0)
            np.testing.assert_allclose(
                found.mean(name, "output", "unbiased"), numbers, rtol=1e-5, atol=1e-5
            )


def test_frame_has_every_neuron_and_a_true_variance(model, padded):
    frame = lab.collect_statistics(model, [padded], progress=False).to_frame()
    linears = [module for _, _, module in Anatomy(model).linears()]
    ffn = sum(Anatomy(model).units("ffn"))
    assert len(frame) == sum(sum(m.weight.shape) for m in linears) + ffn
    rows = frame.query("layer == 1 and side == 'activation'")
    name = Anatomy(model).name(1, Anatomy(model).family.consumes["ffn"])
    np.testing.assert_allclose(
        rows["variance"], naive(model, padded)[name][0].var(0), rtol=1e-5, atol=1e-5
    )


def test_batches_add_up_and_draws_too(model, padded):
    rows = [{key: value[i : i + 1] for key, value in padded.items()} for i in range(2)]
    whole = lab.collect_statistics(model, [padded], progress=False)
    split = lab.collect_statistics(model, rows, progress=False)
    first, second = (lab.collect_statistics(model, [row], progress=False) for row in rows)
    summed = first + second
    for key in whole.sums:
        for other in (split, summed):
            np.testing.assert_allclose(other.sums[key], whole.sums[key], rtol=1e-4, atol=1e-5)
    assert summed.n_tokens == whole.n_tokens


def test_the_model_is_left_as_it_was(model, padded):
    model.train()
    before = copy.deepcopy(model.state_dict())
    lab.collect_statistics(model, [padded], progress=False)
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_saved_statistics_are_the_same_and_know_their_model(tmp_path, tiny, tiny_domain):
    model, tokenizer = tiny
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=512)
    found = lab.collect_statistics(model, batches, path=tmp_path / "s.safetensors", progress=False)
    again = lab.Statistics.load(tmp_path / "s.safetensors")
    assert again.domain == "tiny-law/calibration"
    assert (again.model_hash, again.content_hash) == (found.model_hash, found.content_hash)
    assert again.to_frame().equals(found.to_frame())
    with pytest.raises(ValueError, match="not of"):
        lab.contextual_plan(random_model("llama"), again, epsilon_activation=0.1)
    with pytest.raises(ValueError, match="not of"):
        lab.score(random_model("llama"), "contextual", statistics=again)


def test_a_kept_file_is_used_only_for_the_same_tokens(tmp_path, tiny, tiny_domain, monkeypatch):
    model, tokenizer = tiny
    path = tmp_path / "s.safetensors"
    short = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=256)
    longer = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=512)
    lab.collect_statistics(model, short, path=path, progress=False)
    assert lab.collect_statistics(model, longer, path=path, progress=False).n_tokens == 512
    other_windows = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=32, max_tokens=512)
    other = lab.collect_statistics(model, other_windows, path=path, progress=False)
    found = lab.collect_statistics(model, longer, path=path, progress=False)
    assert not other.to_frame()["mean_abs"].equals(found.to_frame()["mean_abs"])
    monkeypatch.setattr(type(model), "forward", None)  # a second pass would now fail
    assert lab.collect_statistics(model, longer, path=path, progress=False).n_tokens == 512


def test_a_loader_is_read_as_often_as_it_takes(tmp_path, model, probe):
    path, rows = tmp_path / "s.safetensors", [{"input_ids": row} for row in probe]
    lab.collect_statistics(model, [{"input_ids": probe[:1]}], path=path, progress=False)
    for _ in range(2):
        loader = torch.utils.data.DataLoader(rows)
        found = lab.collect_statistics(model, loader, path=path, progress=False)
        assert found.n_tokens == probe.numel()


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "s.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ValueError, match="no readable statistics"):
        lab.Statistics.load(tmp_path / "s.safetensors")


def test_bad_input(model, probe):
    with pytest.raises(ValueError, match="no tokens|at least one batch"):
        lab.collect_statistics(model, [], progress=False)
    with pytest.raises(ValueError, match="token id 97 is outside"):
        lab.collect_statistics(model, [{"input_ids": probe.clone().fill_(97)}], progress=False)
    with pytest.raises(ValueError, match=r"windows of 80 tokens .* 64"):
        lab.collect_statistics(model, [{"input_ids": probe[:1, :1].expand(1, 80)}], progress=False)
    with torch.no_grad():
        next(iter(Anatomy(model).linears()))[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        lab.collect_statistics(model, [{"input_ids": probe}], progress=False)


def test_bfloat16_models_work(probe):
    model = random_model("llama").bfloat16()
    found = lab.collect_statistics(model, [{"input_ids": probe}], progress=False)
    assert model.dtype == torch.bfloat16 and np.isfinite(found.to_frame()["mean_abs"]).all()


def test_statistics_own_their_memory(tiny, tiny_domain):
    """Sums that lie scattered between activations would keep a CPU's memory from being reused."""
    model, tokenizer = tiny
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=256)
    found = lab.collect_statistics(model, batches, progress=False)
    assert all(table.flags.owndata for table in found.sums.values())


@pytest.mark.parametrize("mean", [0.0, 1e4, -3e5])
def test_the_variance_of_large_and_nearly_constant_activations(mean, probe):
    model, seen = random_model("phi"), []
    module = model.model.layers[0].mlp.fc1
    with torch.no_grad():
        module.bias += mean
    module.register_forward_hook(lambda _m, _args, y: seen.append(y.flatten(0, -2).double()))
    with torch.no_grad():
        model(probe)
    batches = [{"input_ids": probe[:1]}, {"input_ids": probe[1:]}]
    found = lab.collect_statistics(model, batches, progress=False)
    expected = torch.cat(seen[:1]).var(0, correction=0).numpy()
    slack = 1e-4 + (abs(mean) * 1e-6) ** 2  # rounding of the activations themselves
    variance = found.variance("model.layers.0.mlp.fc1", "output")
    np.testing.assert_allclose(variance, expected, rtol=1e-2, atol=slack)


def test_nan_of_low_precision_is_read_again_in_float32(tiny, tiny_domain, tmp_path):
    model = copy.deepcopy(tiny[0])
    batches = lab.tokenize(tiny_domain.calibration, tiny[1], seq_len=64, max_tokens=256)

    def overflow(module, args, output):
        return output * float("nan") if output.dtype == torch.bfloat16 else output

    model.model.layers[1].mlp.down_proj.register_forward_hook(overflow)
    path, how = tmp_path / "statistics.safetensors", {"precision": "bfloat16", "progress": False}
    with pytest.warns(UserWarning, match=r"down_proj .* in bfloat16; all is read again in float32"):
        found = lab.collect_statistics(model, batches, path=path, **how)
    passes, model_passes = [], model.model.layers[0].register_forward_pre_hook
    with model_passes(lambda *_: passes.append(1)):
        again = lab.collect_statistics(model, batches, path=path, **how)
    assert not passes and again.precision == "float32"  # read from the file
    wanted = lab.collect_statistics(tiny[0], batches, precision="float32", progress=False)
    assert found.precision == "float32"
    for key, table in wanted.sums.items():
        np.testing.assert_array_equal(found.sums[key], table)


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), None, 1.5])
def test_statistics_of_no_tokens_give_nothing(wrong, tiny, tiny_statistics):
    with pytest.raises(ValueError, match="n_tokens is"):
        replace(tiny_statistics, n_tokens=wrong)
    broken = copy.copy(tiny_statistics)
    broken.n_tokens = wrong
    with pytest.raises(ValueError, match="n_tokens is"):
        lab.contextual_plan(tiny[0], broken, quantile=0.1)
    key = next(iter(tiny_statistics.sums))
    tables = {**tiny_statistics.sums, key: tiny_statistics.sums[key] * np.nan}
    with pytest.raises(ValueError, match="NaN or infinite"):
        lab.score(tiny[0], "wanda", statistics=replace(tiny_statistics, sums=tables))
