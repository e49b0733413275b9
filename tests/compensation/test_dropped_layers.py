"""Whole blocks among what SlimGPT removes, and a map in place of dropped blocks."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import CONFIGS, random_model, windows
from transformers import AutoModelForCausalLM

import minigpt_lab as lab
from minigpt_lab.architectures import ATTENTION_UNITS
from minigpt_lab.calibration import run_decoder, watch
from minigpt_lab.models import Anatomy


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_slimgpt_drops_blocks_and_prunes_the_others(family):
    model, batches = random_model(family), windows()
    grouped = max(Anatomy(model).units("balanced_heads")) > 1
    units = "balanced_heads" if grouped else "kv_group"
    heads, channels = Anatomy(model).units(ATTENTION_UNITS[units]), Anatomy(model).units("ffn")
    counts = {ATTENTION_UNITS[units]: [heads[0], 0, 1], "ffn": [3, channels[1], 5]}
    options = {"counts": counts, "units": units, "progress": False, "dtype": torch.float64}
    mini, plan = lab.slimgpt(model, batches, **options)
    assert plan.removed == counts
    assert [n == 0 for n in Anatomy(mini).units("attention")] == [True, False, False]
    assert [n == 0 for n in Anatomy(mini).units("ffn")] == [False, True, False]
    assert lab.model_size(mini).stored == plan.predicted_size(model).stored
    plain, same = lab.slimgpt(model, batches, compensate=False, **options)
    pairs = zip(plain.parameters(), lab.shrink(model, same).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    errors, uncompensated = plan.origin["error"]["ffn"], same.origin["error"]["ffn"]
    assert errors[0] < uncompensated[0] and errors[1] <= uncompensated[1] == 1


def test_the_bias_makes_up_for_the_mean_of_a_dropped_block():
    model, batches = random_model("opt"), windows()
    counts = {"ffn": [0, 20, 0]}
    mini, plan = lab.slimgpt(model, batches, counts=counts, sites=("ffn",), progress=False)
    statistics = lab.collect_statistics(model, batches, progress=False)
    name = "model.decoder.layers.1.fc2"
    expected = statistics.mean(name, "output", "sum")
    bias = mini.get_submodule(name).bias.detach().double().numpy()
    assert bias == pytest.approx(expected, abs=1e-4)
    assert plan.origin["error"]["ffn"][1] == pytest.approx(1)


def whole_layers(model, layers) -> lab.PruningPlan:
    influence = lab.block_influence(model, windows(count=1))
    return lab.plan_dropping(model, influence.query(f"layer in {layers}"), count=len(layers))


def single_blocks(model, blocks) -> lab.PruningPlan:
    influence = lab.block_influence(model, windows(count=1), sites=("attention", "ffn"))
    chosen = [pair in blocks for pair in zip(influence["layer"], influence["site"], strict=True)]
    return lab.plan_dropping(model, influence[chosen], count=len(blocks))


def states_behind(model, layer: int, batches, site: str = "ffn") -> torch.Tensor:
    """The residual stream ``[token, feature]`` behind a block."""
    found = []
    note = partial(lambda found, *args: found.append(args[-1].flatten(0, 1)), found)
    anatomy = Anatomy(copy.deepcopy(model))
    if site == "attention":  # the layer's output when its FFN adds nothing
        for parameter in anatomy.module(layer, anatomy.family.consumes["ffn"]).parameters():
            parameter.data.zero_()
    with torch.no_grad(), watch({"": anatomy.layers[layer]}, after=note):
        for batch in batches:
            run_decoder(anatomy.model, batch["input_ids"])
    return torch.cat(found)


FAMILIES = ["llama", "mistral", "gemma", "opt", "phi", "phi3", "gpt2", "gpt_neox", "bloom"]
#: Dropped blocks, and those behind which the stream is to be nearer to the dense model's.
DROPPED = {
    "layers": ([(layer, s) for layer in (1, 2, 4) for s in ("attention", "ffn")],
               [(2, "ffn"), (4, "ffn")]),
    "attention": ([(1, "attention"), (3, "attention")], [(1, "attention"), (3, "attention")]),
    "ffn": ([(0, "ffn"), (2, "ffn")], [(0, "ffn"), (2, "ffn")]),
    "rows": ([(1, "ffn"), (2, "attention"), (3, "attention"), (3, "ffn")],
             [(2, "attention"), (3, "ffn")]),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", DROPPED)
def test_a_map_in_place_of_dropped_blocks_lowers_the_error(family, case):
    model, batches = random_model(family, layers=5), windows()
    blocks, ends = DROPPED[case]
    plan = single_blocks(model, blocks)
    updated = lab.linear_compensated(model, plan, batches, progress=False)
    plain, mini = lab.shrink(model, plan), lab.shrink(updated, plan)
    assert lab.model_size(mini).stored == plan.predicted_size(model).stored
    for layer, site in ends:
        dense = states_behind(model, layer, batches, site)
        errors = [
            float((states_behind(each, layer, batches, site) - dense).square().sum())
            for each in (mini, plain)
        ]
        assert errors[0] < 0.99 * errors[1]
    firm = lab.linear_compensated(model, plan, batches, damping=1e9, progress=False)
    if Anatomy(model).module(0, Anatomy(model).family.consumes["ffn"]).bias is None:
        assert all(map(torch.allclose, firm.parameters(), model.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_map_keeps_the_type_of_the_weights(dtype):
    model, batches = random_model("llama", layers=5).to(dtype), windows()
    plan = single_blocks(model, DROPPED["attention"][0])
    updated = lab.linear_compensated(model, plan, batches, progress=False)
    assert {parameter.dtype for parameter in updated.parameters()} == {dtype}
    dense = states_behind(model, 3, batches, "attention")
    behind = [
        states_behind(lab.shrink(each, plan), 3, batches, "attention") for each in (updated, model)
    ]
    assert (behind[0] - dense).norm() < (behind[1] - dense).norm()


def test_the_map_is_the_papers():
    """Without damping: ``T = (M'M)⁻¹ M' (Y - X + M)`` of the dense model, ``W ← T' W``."""
    config = copy.deepcopy(CONFIGS["llama"])
    config.intermediate_size = 64  # wider than the stream: its outputs are independent
    torch.manual_seed(0)
    model, batches = AutoModelForCausalLM.from_config(config), windows()
    updated = lab.linear_compensated(
        model, whole_layers(model, [1]), batches, damping=0, progress=False
    )
    X, Y = (states_behind(model, layer, batches).double() for layer in (0, 1))
    outputs = []
    down = model.model.layers[0].mlp.down_proj
    with watch({"": down}, after=lambda *args: outputs.append(args[-1].detach().flatten(0, 1))):
        states_behind(model, 1, batches)
    M = torch.cat(outputs).double()
    T = torch.linalg.solve(M.T @ M, M.T @ (Y - X + M))
    expected = T.T @ down.weight.double()
    found = updated.model.layers[0].mlp.down_proj.weight.double()
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_the_map_helps_a_trained_model(tiny, tiny_domain):
    model, tokenizer = tiny
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=4096)
    influence = lab.block_influence(model, batches).query("layer > 0")
    plan = lab.plan_dropping(model, influence, count=1)
    updated = lab.linear_compensated(model, plan, batches, progress=False)
    options = {"max_tokens": 2048, "seq_len": 64, "progress": False}
    loss = [
        lab.divergence(lab.shrink(each, plan), model, tokenizer, tiny_domain.test, **options).kl
        for each in (updated, model)
    ]
    assert loss[0] < 0.9 * loss[1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("shift", [0.5, 2.0])
def test_what_a_plan_shifts_stays_outside_the_map(family, shift):
    """The map with a shift is as good as without: the shift is added behind it."""
    model, batches = random_model(family, layers=3), windows()
    plan = single_blocks(model, [(0, "ffn")])
    anatomy = Anatomy(model)
    name = anatomy.name(0, anatomy.family.consumes["attention"])
    width = model.config.hidden_size
    shifted = replace(plan, shift={name: [shift] * width})
    dense = states_behind(model, 0, batches)

    def error(plan, updated) -> float:
        with lab.masked(updated, plan):
            return float((states_behind(updated, 0, batches) - dense).square().sum())

    updated = lab.linear_compensated(model, shifted, batches, progress=False)
    assert error(shifted, updated) < 0.9 * error(shifted, model)


def test_blocks_that_a_model_has_lost_are_no_blocks_of_a_plan():
    model, batches = random_model("llama", layers=4), windows()
    lost = lab.shrink(model, single_blocks(model, [(0, "attention"), (2, "ffn")]))
    scores = lab.score(lost, "magnitude", sites=("ffn",))
    with pytest.raises(ValueError, match="the plan drops no block"):
        lab.linear_compensated(lost, lab.plan_from_scores(lost, scores, ratio=0.2), batches)
    plan = single_blocks(lost, [(3, "ffn")])
    mini = lab.shrink(lab.linear_compensated(lost, plan, batches, progress=False), plan)
    dense = states_behind(lost, 3, batches)
    errors = [
        (states_behind(each, 3, batches) - dense).square().sum()
        for each in (mini, lab.shrink(lost, plan))
    ]
    assert errors[0] < errors[1]


def test_nan_is_named_before_the_map_is_solved_for():
    model = random_model("llama")
    plan = single_blocks(model, [(1, "ffn")])
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer 1 .*puts out NaN or infinite values"):
        lab.linear_compensated(model, plan, windows(), progress=False)


@pytest.mark.parametrize(
    ("family", "layers", "message"),
    [
        ("gemma2", [1], "a norm behind the FFN"),
        ("opt_350m", [1], "do_layer_norm_before=False"),
        ("llama", [0], "layer 0's attention, with no block before it"),
    ],
)
def test_where_no_map_fits_is_said(family, layers, message):
    model = random_model(family)
    with pytest.raises(ValueError, match=message):
        lab.linear_compensated(model, whole_layers(model, layers), windows())


def test_a_stream_of_norms_takes_no_map():
    model = random_model("bloom")
    model.config.apply_residual_connection_post_layernorm = True
    plan = single_blocks(model, [(1, "ffn")])
    with pytest.raises(ValueError, match="apply_residual_connection_post_layernorm=True"):
        lab.linear_compensated(model, plan, windows())


def test_a_plan_without_dropped_blocks_needs_no_map():
    model = random_model("llama")
    scores = lab.score(model, "magnitude", sites=("ffn",))
    with pytest.raises(ValueError, match="the plan drops no block"):
        lab.linear_compensated(model, lab.plan_from_scores(model, scores, ratio=0.5), windows())
