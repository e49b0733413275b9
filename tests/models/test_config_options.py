"""Options of a family's config: each is pruned, counted, saved and loaded right."""

from __future__ import annotations

import pytest
import torch
from helpers import CONFIGS, logits, random_model, random_plan
from transformers import AutoModelForCausalLM, BloomConfig

import minigpt_lab as lab
from minigpt_lab.models import Anatomy

PROBE = torch.randint(3, 20, (2, 12), generator=torch.Generator().manual_seed(1))
_SLIDING = ["full_attention", "sliding_attention", "sliding_attention"]
OPTIONS = {
    "llama": [
        {"attention_bias": True}, {"mlp_bias": True}, {"pretraining_tp": 2}, {"head_dim": 10},
        {"tie_word_embeddings": False}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1},
        {"hidden_act": "relu"},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ],
    "mistral": [
        {"head_dim": 10}, {"sliding_window": 4}, {"sliding_window": None},
        {"tie_word_embeddings": True},
    ],
    "qwen2": [
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        {"layer_types": _SLIDING, "sliding_window": 4, "use_sliding_window": True},
        {"tie_word_embeddings": True},
    ],
    "qwen3": [
        {"attention_bias": True}, {"head_dim": 8}, {"tie_word_embeddings": True},
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ],
    "gemma": [{"attention_bias": True}, {"num_key_value_heads": 4}, {"tie_word_embeddings": False}],
    "gemma2": [
        {"attn_logit_softcapping": None}, {"final_logit_softcapping": None}, {"sliding_window": 4},
        {"attention_bias": True}, {"layer_types": _SLIDING}, {"tie_word_embeddings": False},
    ],
    "gemma3": [
        {"attention_bias": True}, {"layer_types": _SLIDING}, {"final_logit_softcapping": 5.0},
        {"num_key_value_heads": 2}, {"attn_logit_softcapping": 3.0},
    ],
    "opt": [
        {"enable_bias": False}, {"do_layer_norm_before": False}, {"word_embed_proj_dim": 16},
        {"layer_norm_elementwise_affine": False}, {"_remove_final_layer_norm": True},
        {"tie_word_embeddings": False}, {"activation_function": "gelu"},
    ],
    "phi": [
        {"qk_layernorm": True}, {"qk_layernorm": True, "num_key_value_heads": 2},
        {"num_key_value_heads": 2}, {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                             "partial_rotary_factor": 0.25}},
    ],
    "phi3": [
        {"sliding_window": 4}, {"num_key_value_heads": 4}, {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                             "partial_rotary_factor": 0.5}},
    ],
    "gpt2": [
        {"n_inner": None}, {"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False},
        {"reorder_and_upcast_attn": True}, {"add_cross_attention": True},
        {"tie_word_embeddings": False}, {"activation_function": "relu"},
    ],
    "gpt_neox": [
        {"use_parallel_residual": False}, {"attention_bias": False},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                             "partial_rotary_factor": 1.0}},
    ],
    "bloom": [
        {"apply_residual_connection_post_layernorm": True},
        {"pretraining_tp": 2}, {"tie_word_embeddings": False},
    ],
}  # fmt: skip
TABLE = [(family, options) for family, listed in OPTIONS.items() for options in listed]


@pytest.fixture(scope="module")
def words(tiny):
    """A tokenizer of 97 tokens, to go with the random models."""
    _, full = tiny
    return lab.trim_tokenizer(lab.trim_tokenizer(full, sorted(range(259))), range(97))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "options"), TABLE)
def test_every_option_is_pruned_counted_saved_and_loaded(
    tmp_path, words, monkeypatch, family, options
):
    config = type(CONFIGS[family])(**{**CONFIGS[family].to_dict(), **options})
    monkeypatch.setitem(CONFIGS, family, config)
    model = random_model(family).double()
    counts = Anatomy(model).layer_widths()
    uniform = {site: [[*range(n - (n > 1))] for n in widths] for site, widths in counts.items()}
    plans = {"uneven": random_plan(model, 1, False), "even": lab.PruningPlan("", counts, uniform)}
    for name, plan in plans.items():
        with lab.masked(model, plan):
            masked = logits(model, PROBE)
        mini = lab.shrink(model, plan)
        torch.testing.assert_close(logits(mini, PROBE), masked, atol=1e-6, rtol=1e-6)
        assert plan.predicted_size(model) == lab.model_size(mini, model)
        portable = name == "even"
        folder = lab.save_model(mini, words, tmp_path / name, portable=portable)
        again, _ = lab.load_model(folder, device="cpu")
        # what is computed anew in double differs from what was cast to it (Gemma's √hidden)
        torch.testing.assert_close(logits(again, PROBE), masked, atol=1e-4, rtol=1e-4)
        if portable:
            plain = AutoModelForCausalLM.from_pretrained(folder).double()
            torch.testing.assert_close(logits(plain, PROBE), masked, atol=1e-4, rtol=1e-4)
        else:
            assert Anatomy(again).layer_widths() == Anatomy(mini).layer_widths()
    plan = random_plan(model, 3)
    kept = torch.tensor(plan.vocabulary)
    places = PROBE % len(kept)
    with lab.masked(model, plan):
        masked = logits(model, kept[places])[..., kept]
    mini = lab.shrink(model, plan)
    torch.testing.assert_close(logits(mini, places), masked, atol=1e-6, rtol=1e-6)


def test_heads_stay_where_attention_computes_with_all_of_them(monkeypatch):
    config = BloomConfig(**{**CONFIGS["bloom"].to_dict(), "slow_but_exact": True})
    config.pretraining_tp = 2
    monkeypatch.setitem(CONFIGS, "bloom", config)
    model = random_model("bloom")
    plan = lab.PruningPlan("", {"attention": [4] * 3}, {"attention": [[0, 1]] * 3})
    with pytest.raises(ValueError, match=r"removes heads, .* slow_but_exact=True; load it with"):
        lab.shrink(model, plan)
    narrow = lab.PruningPlan("", {"ffn": [128] * 3}, {"ffn": [[*range(50)]] * 3})
    with lab.masked(model, narrow):
        masked = logits(model, PROBE)
    mini = lab.shrink(model, narrow)
    torch.testing.assert_close(logits(mini, PROBE), masked, atol=1e-4, rtol=1e-4)
