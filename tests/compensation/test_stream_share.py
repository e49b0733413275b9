"""Projections that also make up for what the layers before them have lost (α of the stream)."""

from __future__ import annotations

import pytest
import torch
from helpers import CONFIGS, logits, random_model, same, site_counts, windows

import minigpt_lab as lab

POST_NORM = ("gemma2", "gemma3", "opt_350m")
COUNTS = {"ffn": (8, 1, 0)}


def cut(model, **options):
    counts = site_counts(model, "kv_group", **COUNTS)
    given = {"counts": counts, "damping": 1e-3, "dtype": torch.float64, "progress": False}
    return lab.slimgpt(model, windows(), **given | options)[0]


def stream_errors(mini, model) -> list[torch.Tensor]:
    """Error of the residual stream behind layer 1 ``[token, feature]``, by window."""
    with torch.no_grad():
        streams = [
            [
                each.base_model(**batch, output_hidden_states=True, use_cache=False)
                for batch in windows()
            ]
            for each in (model, mini)
        ]
    return [
        (dense.hidden_states[2] - pruned.hidden_states[2]).flatten(0, 1)
        for dense, pruned in zip(*streams, strict=True)
    ]


def squared(errors) -> float:
    return float(sum(each.square().sum() for each in errors))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_projection_makes_up_for_the_layers_before_it(family):
    model = random_model(family)
    if family in POST_NORM:
        with pytest.raises(ValueError, match="leave stream_share at 0"):
            cut(model, stream_share=0.5)
        return
    with pytest.raises(ValueError, match="compensate is False, which keeps all weights"):
        cut(model, stream_share=0.5, compensate=False)
    found = [squared(stream_errors(cut(model, stream_share=a), model)) for a in (0.0, 0.5, 1.0)]
    assert found[2] < found[1] < found[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_their_type(dtype):
    model = random_model("llama").to(dtype)
    found = [cut(model, stream_share=share) for share in (0.0, 1.0)]
    assert {parameter.dtype for parameter in found[1].parameters()} == {dtype}
    errors = [squared(stream_errors(each, model)) for each in found]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # without and with a bias
def test_all_of_it_leaves_no_error_that_the_inputs_explain(family):
    """At α = 1 and no damping the error is orthogonal to what the projection reads."""
    model = random_model(family).double()
    mini = cut(model, stream_share=1.0, damping=1e-9)
    inputs = []
    name = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}[family]
    handle = mini.get_submodule(name).register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].flatten(0, 1))
    )
    errors = stream_errors(mini, model)
    handle.remove()
    x, error = torch.cat(inputs), torch.cat(errors)
    correlation = (error.T @ x) / error.norm() / x.norm()
    assert correlation.abs().max() < 1e-5
    if family == "gpt2":  # its bias takes the mean
        assert error.mean(0).abs().max() < 1e-5 * error.abs().max()
    plain = torch.cat(stream_errors(cut(model, damping=1e-9), model))
    assert ((plain.T @ x) / plain.norm() / x.norm()).abs().max() > 1e-2


def test_it_is_noted_and_a_run_with_another_share_is_refused(tmp_path):
    model = random_model("llama")
    counts = site_counts(model, "kv_group", **COUNTS)
    given = {"counts": counts, "out_dir": tmp_path, "progress": False}
    mini, plan = lab.slimgpt(model, windows(), stream_share=0.5, **given)
    assert plan.origin["stream_share"] == 0.5
    again, _ = lab.slimgpt(model, windows(), stream_share=0.5, **given)  # from the folder
    assert same(mini, again)
    with pytest.raises(ValueError, match="stream_share"):
        lab.slimgpt(model, windows(), stream_share=0.25, **given)
    with pytest.raises(ValueError, match="stream_share"):
        lab.slimgpt(model, windows(), **given)  # none is another share too
    ids = windows()[0]["input_ids"]
    assert not torch.equal(logits(mini, ids), logits(cut(model), ids))
