"""Sub-module reconstruction: its loss, every family, general text, resumption, bad input."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from helpers import CONFIGS, logits, random_model, same, site_counts, windows

import minigpt_lab as lab
from minigpt_lab import Reconstruction
from minigpt_lab.calibration import LayerRunner, Moments, catch_inputs
from minigpt_lab.compensation import block_fitting
from minigpt_lab.compensation.block_fitting import DenseStream, stream_loss
from minigpt_lab.compensation.calibration_windows import CalibrationWindows
from minigpt_lab.models.anatomy import Anatomy
from minigpt_lab.models.runtime import inference
from minigpt_lab.store.shards import Shards


def cut(model, batches=None, **options):
    counts = site_counts(model, "kv_group", ffn=(8, 8, 8))
    options = {"counts": counts, "progress": False} | options
    return lab.slimgpt(model, windows() if batches is None else batches, **options)


def squared_error(mini, model, batches) -> float:
    """Of the hidden states before the head, which reconstruction aims at."""
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            states = [each.base_model(**batch, use_cache=False)[0] for each in (mini, model)]
            total += float((states[0] - states[1]).square().sum())
    return total


def test_the_residual_stream_behind_both_blocks(model):
    """Behind the FFN it is the next layer's input; behind attention, that of a silent FFN."""
    batches, hidden = windows(), Shards()
    silent = copy.deepcopy(model)
    for index in range(3):
        down = Anatomy(silent).module(index, Anatomy(silent).family.consumes["ffn"])
        torch.nn.init.zeros_(down.weight)
        if down.bias is not None:
            torch.nn.init.zeros_(down.bias)
    with inference(model), inference(silent):
        calls = catch_inputs(model, batches, hidden)
        dense = DenseStream(hidden, calls)
        for layer in range(2):
            inputs = {window: dense.behind["ffn"][window] for window in dense.behind["ffn"]}
            dense.advance(Anatomy(model), layer)
            expected = model.base_model(**batches[4], output_hidden_states=True, use_cache=False)
            torch.testing.assert_close(
                dense.behind["ffn"][4], expected.hidden_states[layer + 1], rtol=1e-4, atol=1e-4
            )
            other = Shards()
            other[0] = inputs[4]
            runner = LayerRunner(Anatomy(silent), layer, other, [calls[4]])
            torch.testing.assert_close(runner.run(0), dense.behind["attention"][4])


def test_the_loss_is_the_error_relative_to_each_tokens_energy():
    model, batches, hidden = random_model("llama"), windows(), Shards()
    anatomy = Anatomy(model)
    with inference(model):
        calls = catch_inputs(model, batches, hidden)
        dense = DenseStream(hidden, calls)
        dense.advance(anatomy, 0)
        weights = [1.0, 3.0, *[1.0] * 4]
        runner = LayerRunner(anatomy, 0, hidden, calls, weights)
        targets = Shards()
        for window in hidden:
            targets[window] = 2 * dense.behind["ffn"][window]  # a quarter of its energy is lacking
        targets[1] = dense.behind["ffn"][1]  # three of eight parts of the weight have no error
        found = stream_loss(runner, "ffn", targets)
    assert found == pytest.approx(0.25 * 5 / 8, rel=0.02)


def test_every_family_is_fitted_to_the_dense_stream(family):
    model, batches = random_model(family), windows()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    plain, _ = cut(model)
    mini, plan = cut(model, reconstruct=Reconstruction(epochs=8, learning_rate=0.003))
    losses = plan.origin["reconstruction"]["loss"]
    assert {*losses} == {"attention", "ffn"} and len(losses["ffn"]) == 3
    assert all(after <= first for pairs in losses.values() for first, after in pairs)
    assert sum(after < first for pairs in losses.values() for first, after in pairs) > 3
    assert squared_error(mini, model, batches) < squared_error(plain, model, batches)
    assert lab.model_size(mini).stored == plan.predicted_size(model).stored
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.requires_grad and p.grad is None for p in mini.parameters())
    # the same, begun from the pruned model
    alone = lab.reconstruct(plain, model, batches, epochs=8, learning_rate=0.003, progress=False)
    assert squared_error(alone, model, batches) < squared_error(plain, model, batches)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_alibi_parallel_blocks_fused_projections_and_post_norms(name):
    model, batches = random_model(name), windows()
    plain, _ = cut(model)
    mini, _ = cut(model, reconstruct=Reconstruction(epochs=8, learning_rate=0.003))
    assert squared_error(mini, model, batches) < squared_error(plain, model, batches)


@pytest.mark.parametrize("name", ["llama", "phi3"])
@pytest.mark.parametrize("bias", ["refit", "add"])
def test_balanced_heads_and_biases_are_fitted_and_resumed(name, bias, tmp_path, monkeypatch):
    model, batches = random_model(name), windows()
    counts = site_counts(model, "balanced_heads", ffn=(8, 8, 8))
    options = {"counts": counts, "units": "balanced_heads", "bias": bias}
    plain, _ = cut(model, **options)
    options["reconstruct"] = Reconstruction(epochs=4, learning_rate=0.003)
    mini, _ = cut(model, **options)
    assert squared_error(mini, model, batches) < squared_error(plain, model, batches)
    real, left = block_fitting.fit_block, [None] * 3

    def interrupted(*arguments):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(block_fitting, "fit_block", interrupted)
        cut(model, out_dir=tmp_path, **options)
    assert same(cut(model, out_dir=tmp_path, **options)[0], mini)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_type(dtype):
    model = random_model("llama").to(dtype)
    mini, plan = cut(model, reconstruct=2)
    assert {parameter.dtype for parameter in mini.parameters()} == {dtype}
    assert all(after <= before for before, after in plan.origin["reconstruction"]["loss"]["ffn"])


def test_a_block_that_diverges_keeps_its_closed_form():
    model = random_model("gpt2")
    plain, _ = cut(model)
    with pytest.warns(UserWarning, match=r"does not improve layer 0's ffn .* lower the"):
        mini, plan = cut(model, reconstruct=Reconstruction(2, learning_rate=1e4))
    for fitted, closed in zip(mini.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(fitted, closed, rtol=1e-3, atol=1e-4)
    assert all(before == after for before, after in plan.origin["reconstruction"]["loss"]["ffn"])


def test_a_step_weighs_a_window_by_its_tokens(monkeypatch):
    """The general text's share of an epoch's gradients is μ, whatever the windows' lengths."""
    model, hidden = random_model("llama"), Shards()
    own = [{"input_ids": torch.randint(3, 97, (1, n))} for n in (24, 24, 10, 3)]
    general = [{"input_ids": torch.randint(3, 97, (1, n))} for n in (5, 40)]
    both, anatomy = CalibrationWindows(own, general, 0.3), Anatomy(model)
    loss = torch.zeros(len(both.windows), requires_grad=True)
    weight = block_fitting.block_modules(anatomy, 0, "ffn")[0].weight
    touched = lambda _, __, window, ___: loss[window] + 0 * weight.sum()  # noqa: E731
    monkeypatch.setattr(block_fitting, "_window_loss", touched)
    with inference(model):
        calls = catch_inputs(model, both.batches(), hidden)
        dense = DenseStream(hidden, calls)
        dense.advance(anatomy, 0)
        runner = LayerRunner(anatomy, 0, hidden, calls, both.weights)
        modules = block_fitting.block_modules(anatomy, 0, "ffn")
        monkeypatch.setattr(block_fitting, "block_modules", lambda *_: modules[:1])
        settings = Reconstruction(1)
        [*block_fitting.fit_block(anatomy, runner, 0, "ffn", dense.behind["ffn"], settings)]
    assert loss.grad[len(own) :].sum() / loss.grad.sum() == pytest.approx(0.3)


def test_zeros_stay_zero():
    model, batches = random_model("llama"), windows()
    plain, _ = cut(model)
    for module in (plain.model.layers[0].mlp.down_proj, plain.model.layers[1].self_attn.q_proj):
        module.weight.data[:, ::3] = 0
    fitted = lab.reconstruct(plain, model, batches, epochs=2, progress=False)
    for before, after in zip(plain.parameters(), fitted.parameters(), strict=True):
        assert torch.equal(before == 0, after == 0)
    assert not same(plain, fitted)
    assert "reconstruction" in fitted.pruning_plans[-1].origin


def test_weights_that_are_not_finite_are_named():
    model, batches = random_model("llama"), windows()
    plain, _ = cut(model)
    plain.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer 1's ffn gives outputs that are not finite"):
        lab.reconstruct(plain, model, batches, epochs=1, progress=False)


def test_a_small_error_of_float32_is_fitted():
    """Where the residual stream is large beside what a block adds."""
    model, batches = random_model("llama"), windows()
    model.get_input_embeddings().weight.data *= 300
    plain, _ = cut(model)
    mini = lab.reconstruct(plain, model, batches, epochs=2, progress=False)
    losses = mini.pruning_plans[-1].origin["reconstruction"]["loss"]["ffn"]
    assert losses[0][0] < 1e-4 and not same(plain, mini)


def test_where_nothing_is_pruned_nothing_changes():
    model = random_model("llama")
    mini = lab.reconstruct(copy.deepcopy(model), model, windows(), epochs=1, progress=False)
    assert same(mini, model)


def test_general_text_is_mixed_in_by_its_share():
    batches, general = windows(), windows(9, count=3)
    model = random_model("llama")
    moments = {}
    for name, text in {"domain": batches, "general": general, "both": None}.items():
        found = CalibrationWindows(batches, general, 0.3)
        if text is not None:
            found = CalibrationWindows(text)
        moments[name] = Moments()
        for ids, weight in zip(found.windows, found.weights, strict=True):
            moments[name].add(model.get_input_embeddings()(ids), weight)
    for part in ("second", "covariance"):
        H = {name: getattr(each, part)() for name, each in moments.items()}
        if part == "second":
            torch.testing.assert_close(H["both"], 0.7 * H["domain"] + 0.3 * H["general"])
    mean = 0.7 * moments["domain"].mean + 0.3 * moments["general"].mean
    torch.testing.assert_close(moments["both"].mean, mean)
    # the ends of the dial are the texts alone
    assert same(cut(model, general=general, generality=0)[0], cut(model)[0])
    assert same(cut(model, general=general, generality=1)[0], cut(model, general)[0])


def test_the_dial_trades_one_text_for_the_other(tiny, tiny_domain):
    model, tokenizer = tiny
    texts = [tiny_domain, lab.load_domain("tiny-games")]
    own, other = (
        lab.tokenize(each.calibration, tokenizer, seq_len=64, max_tokens=512) for each in texts
    )
    options = {"ratio": 0.7, "sites": ["ffn"], "reconstruct": 1, "progress": False}
    errors = []
    for share in (0.1, 0.9):
        mini, plan = lab.slimgpt(model, own, general=other, generality=share, **options)
        assert plan.origin["generality"] == share
        errors.append([squared_error(mini, model, text) for text in (own, other)])
    assert errors[0][0] < errors[1][0] and errors[0][1] > errors[1][1]


@pytest.mark.parametrize("name", ["bloom", "llama"])
def test_an_interrupted_run_continues(name, tmp_path, monkeypatch):
    model = random_model(name)
    options = {"reconstruct": 2, "general": windows(9), "generality": 0.4}
    expected, plan = cut(model, **options)
    real, done = block_fitting.fit_block, []

    def interrupted(*arguments):
        done.append(arguments[2])
        if len(done) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(block_fitting, "fit_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cut(model, out_dir=tmp_path, **options)
    found, again = cut(model, out_dir=tmp_path, **options)
    assert done == [0, 0, 1, 1, 1, 1, 2, 2]  # the first layer was finished
    assert same(found, expected) and again == plan
    with pytest.raises(ValueError, match="another reconstruct"):
        cut(model, out_dir=tmp_path, **(options | {"reconstruct": 3}))
    with pytest.raises(ValueError, match="another generality"):
        cut(model, out_dir=tmp_path, **(options | {"generality": 0.3}))
    # alone
    options = {"epochs": 2, "progress": False}
    expected = lab.reconstruct(found, model, windows(), **options)
    del done[:]
    with pytest.raises(KeyboardInterrupt):
        lab.reconstruct(found, model, windows(), out_dir=tmp_path / "alone", **options)
    assert same(
        lab.reconstruct(found, model, windows(), out_dir=tmp_path / "alone", **options), expected
    )
    for other in ({"epochs": 3}, {"learning_rate": 0.1}):
        with pytest.raises(ValueError, match="another"):
            lab.reconstruct(found, model, windows(), out_dir=tmp_path / "alone", **options | other)


def test_a_fitted_model_is_saved_and_its_hidden_states_may_be_elsewhere(tmp_path, tiny):
    model, tokenizer = tiny
    batches = [{"input_ids": ids["input_ids"]} for ids in windows()]
    options = {"ratio": 0.5, "sites": ["ffn"], "reconstruct": 1, "progress": False}
    mini, _ = lab.slimgpt(model, batches, **options)
    elsewhere, _ = lab.slimgpt(model, batches, offload="disk", **options)
    assert same(mini, elsewhere)
    lab.save_model(mini, tokenizer, tmp_path / "mini")
    loaded, _ = lab.load_model(tmp_path / "mini")
    assert torch.equal(
        logits(loaded, batches[0]["input_ids"]), logits(mini, batches[0]["input_ids"])
    )


def test_bad_input(tiny, tiny_domain):
    model, batches = random_model("llama"), windows()
    with pytest.raises(ValueError, match="same object"):
        lab.reconstruct(model, model, batches)
    with pytest.raises(ValueError, match=r"has \(type, layers.*give the model that it was pruned"):
        lab.reconstruct(random_model("gpt2"), model, batches)
    with pytest.raises(ValueError, match="generality is 1.5"):
        cut(model, general=batches, generality=1.5)
    for prune in (cut, partial(lab.search_counts, ratio=0.3)):
        with pytest.raises(ValueError, match="generality is 0.3, but has no effect with general=N"):
            prune(model, batches=batches, generality=0.3)
    with pytest.raises(ValueError, match="generality is 0.3, but has no effect with general=None"):
        lab.reconstruct(cut(model)[0], model, batches, generality=0.3)
    with pytest.raises(ValueError, match="reconstruct is 0"):
        cut(model, reconstruct=0)
    with pytest.raises(ValueError, match="epochs is 0"):
        Reconstruction(epochs=0)
    with pytest.raises(ValueError, match="sites"):
        Reconstruction(sites=["mlp"])
    tokenizer = lab.trim_tokenizer(tiny[1], list(range(300)))
    own = lab.tokenize(tiny_domain.calibration, tiny[1], seq_len=64, max_tokens=256)
    other = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=256)
    with pytest.raises(ValueError, match=r"tokenize both with the model's tokenizer"):
        lab.slimgpt(tiny[0], own, ratio=0.3, general=other)
