"""Folders for vLLM: the form that its DeciLM reads, and the logits of one who reads only that."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import full_disk, random_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import minigpt_lab as lab
from minigpt_lab.models import Anatomy, add_bias

KEEP = {"ffn": [[1, 2, 5], [*range(20)], [0]]}
# Entries of config.json, their types, as vLLM's nemotron_nas.py and the config of
# nvidia/Llama-3_1-Nemotron-51B-Instruct have them.
FORM = {
    "architectures": list, "model_type": str, "auto_map": dict, "hidden_size": int,
    "num_hidden_layers": int, "num_attention_heads": int, "head_dim": int,
    "intermediate_size": type(None), "num_key_value_heads": type(None), "block_configs": list,
    "hidden_act": str, "rms_norm_eps": float, "rope_parameters": dict, "rope_theta": float,
    "max_position_embeddings": int, "attention_bias": bool, "mlp_bias": bool, "vocab_size": int,
    "tie_word_embeddings": bool, "bos_token_id": int, "eos_token_id": int, "pad_token_id": int,
    "attention_dropout": float, "initializer_range": float, "pretraining_tp": int,
    "use_cache": bool, "torch_dtype": str,
}  # fmt: skip
_COMMON = {"no_op": False, "replace_with_linear": False, "sparsify": None}


@pytest.fixture(scope="module")
def words(tiny):
    """A tokenizer of 97 tokens, to go with the random models."""
    return lab.trim_tokenizer(lab.trim_tokenizer(tiny[1], sorted(range(259))), range(97))


def uneven(family: str, keep=KEEP):
    model = random_model(family)
    units = {site: Anatomy(model).units(site) for site in keep}
    return lab.shrink(model, lab.PruningPlan("", units, keep))


def read(folder) -> tuple[SimpleNamespace, dict[str, torch.Tensor]]:
    config = json.loads((folder / "config.json").read_text())
    return SimpleNamespace(**config), load_file(folder / "model.safetensors")


def norm(x, weight, config):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)


def attention(x, project, heads, groups, config):
    """Causal attention with rotary embedding; layer 0's groups need not be layer 1's."""
    rotation = {"head_dim": config.head_dim, "rope_parameters": config.rope_parameters}
    frequencies = LlamaRotaryEmbedding(LlamaConfig(**rotation)).inv_freq
    angles = torch.arange(x.shape[1])[:, None] * frequencies  # [token, dim / 2]
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def turned(name, count):
        values = project(name, x).unflatten(-1, (count, config.head_dim)).transpose(1, 2)
        if name == "v_proj":
            return values.repeat_interleave(heads // groups, 1)
        first, second = values.chunk(2, -1)
        values = values * cos + torch.cat([-second, first], -1) * sin
        return values.repeat_interleave(heads // count, 1)

    q, k, v = turned("q_proj", heads), turned("k_proj", groups), turned("v_proj", groups)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return project("o_proj", mixed.transpose(1, 2).flatten(-2))


def deci_logits(folder, ids):
    """Logits by someone who knows vLLM's form, and nothing of this package."""
    config, weights = read(folder)
    used = set()

    def tensor(name, *shape):
        used.add(name)
        assert [*weights[name].shape] == [*shape], name
        return weights[name]

    width, dim, heads = config.hidden_size, config.head_dim, config.num_attention_heads
    x = tensor("model.embed_tokens.weight", config.vocab_size, width)[ids]
    qkv_bias = getattr(config, "qkv_bias", config.attention_bias)
    for i, block in enumerate(config.block_configs):
        parts = {name: SimpleNamespace(**entries) for name, entries in block.items()}
        channels = parts["ffn"].intermediate_size
        outputs = {"q_proj": heads * dim, "o_proj": width}
        outputs |= {"gate_proj": channels, "up_proj": channels, "down_proj": width}

        def project(name, x, part="self_attn", bias=None, i=i, outputs=outputs):
            path, out = f"model.layers.{i}.{part}.{name}", outputs[name]
            bias = (
                (config.attention_bias if name == "o_proj" else qkv_bias) if bias is None else bias
            )
            added = tensor(f"{path}.bias", out) if bias else None
            return F.linear(x, tensor(f"{path}.weight", out, x.shape[-1]), added)

        if not parts["attention"].no_op:
            groups = heads // parts["attention"].n_heads_in_group
            outputs |= {"k_proj": groups * dim, "v_proj": groups * dim}
            first = norm(x, tensor(f"model.layers.{i}.input_layernorm.weight", width), config)
            x = x + attention(first, project, heads, groups, config)
        if parts["ffn"].no_op:
            continue
        second = norm(x, tensor(f"model.layers.{i}.post_attention_layernorm.weight", width), config)
        how = {"part": "mlp", "bias": config.mlp_bias}
        gated = F.silu(project("gate_proj", second, **how)) * project("up_proj", second, **how)
        x = x + project("down_proj", gated, **how)
    x = norm(x, tensor("model.norm.weight", width), config)
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    logits = F.linear(x, tensor(name, config.vocab_size, width))
    assert weights.keys() == used  # vLLM loads by name, and has no place for others
    return logits


def agree(model, folder, probe):
    with torch.no_grad():
        wanted = model(input_ids=probe).logits
    torch.testing.assert_close(deci_logits(folder, probe), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_the_form_alone_gives_the_models_logits(family, words, probe, tmp_path):
    model = uneven(family)
    agree(model, lab.export_vllm(model, words, tmp_path / "folder"), probe)


def test_every_entry_of_the_form(words, tmp_path):
    config, _ = read(lab.export_vllm(uneven("llama"), words, tmp_path / "folder"))
    entries = vars(config)
    assert {name: type(value) for name, value in entries.items()} == FORM
    assert entries["architectures"] == ["DeciLMForCausalLM"]
    assert entries["model_type"] == "nemotron-nas" and entries["torch_dtype"] == "float32"
    assert entries["block_configs"] == [
        {
            "attention": {**_COMMON, "n_heads_in_group": 2},
            "ffn": {**_COMMON, "intermediate_size": width},
        }
        for width in (3, 20, 1)
    ]
    assert entries["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    config, _ = read(lab.export_vllm(uneven("qwen2"), words, tmp_path / "qwen2"))
    assert {*vars(config)} - {*FORM} == {"qkv_bias"}
    assert config.qkv_bias and not config.attention_bias


def test_transformers_gives_vllm_a_config_with_attributes(words, tmp_path, monkeypatch):
    """vLLM gets it by ``AutoConfig`` with the folder's own class, and asks ``hasattr`` of parts."""
    model = uneven("llama")
    folder = lab.export_vllm(model, words, tmp_path / "folder")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    monkeypatch.syspath_prepend(tmp_path / "c")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert [block.ffn.intermediate_size for block in config.block_configs] == [3, 20, 1]
    block = config.block_configs[0]
    assert block.attention.n_heads_in_group == 2 and block.ffn.no_op is False
    assert not hasattr(block.ffn, "ffn_mult") and not hasattr(block.ffn, "hidden_act")
    assert config.rope_parameters == dict(model.config.rope_parameters)
    again = json.loads(config.to_json_string())
    assert again["block_configs"] == read(folder)[0].block_configs
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == words("ab")["input_ids"]


def test_groups_heads_and_scaled_rotation(words, probe, tmp_path):
    """As many query heads in every layer, in other groups; Llama 3's rotation; a window."""
    heads = {"attention": [[1], [0, 1], [0, 1]], "balanced_heads": [[0, 1], [0], [1]]}
    model = uneven("llama", {**heads, **KEEP})
    agree(model, lab.export_vllm(model, words, tmp_path / "heads"), probe)
    config, _ = read(tmp_path / "heads")
    groups = [block["attention"]["n_heads_in_group"] for block in config.block_configs]
    assert config.num_attention_heads == 2 and groups == [2, 1, 1]
    llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 4.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
    scaled = random_model("llama")
    scaled.config.rope_parameters = llama3
    scaled.model.rotary_emb = type(scaled.model.rotary_emb)(scaled.config)
    agree(scaled, lab.export_vllm(scaled, words, tmp_path / "scaled"), probe)
    windowed = random_model("mistral")
    windowed.config.sliding_window = 16
    folder = lab.export_vllm(windowed, words, tmp_path / "window")
    assert read(folder)[0].max_position_embeddings == 16 < config.max_position_embeddings


def test_biases_that_some_layers_have(words, probe, tmp_path):
    model = uneven("qwen2")
    for linear in (model.model.layers[1].self_attn.o_proj, model.model.layers[2].mlp.up_proj):
        add_bias(linear)
        linear.bias.data.normal_()
    agree(model, lab.export_vllm(model, words, tmp_path / "biased"), probe)


def test_dropped_blocks(words, probe, tmp_path):
    """Left out; but the first attention, and where a bias is left, units of zeros."""
    model = uneven("llama", {"attention": [[], [0, 1], []], "ffn": [[1], [], []]})
    folder = lab.export_vllm(model, words, tmp_path / "dropped")
    agree(model, folder, probe)
    blocks = read(folder)[0].block_configs
    first, *others = (block["attention"] for block in blocks)
    assert first["n_heads_in_group"] == 4 and not first["no_op"]  # one group
    assert [(part["no_op"], part["n_heads_in_group"]) for part in others] == [
        (False, 2),
        (True, None),
    ]
    ffns = [(block["ffn"]["no_op"], block["ffn"]["intermediate_size"]) for block in blocks]
    assert ffns == [(False, 1), (True, None), (True, None)]
    for linear in (model.model.layers[2].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        add_bias(linear)
        linear.bias.data.normal_()
    folder = lab.export_vllm(model, words, tmp_path / "biased")
    agree(model, folder, probe)
    assert [block["ffn"]["no_op"] for block in read(folder)[0].block_configs] == [
        False,
        False,
        True,
    ]
    assert Anatomy(model).units("ffn") == [1, 0, 0]  # not changed


def test_a_trimmed_vocabulary_and_a_card(tiny, tiny_statistics, tmp_path):
    model, tokenizer = tiny
    kept = sorted({*tokenizer("the court")["input_ids"], *range(300)})
    plan = lab.PruningPlan(
        tiny_statistics.model_hash, {}, {}, vocabulary_size=1024, vocabulary=kept
    )
    mini = lab.shrink(model, plan)
    card = lab.model_card(mini, notes="trained")
    folder = lab.export_vllm(mini, tokenizer, tmp_path / "folder", card=card)
    text = (folder / "README.md").read_text()
    assert "- trained\n" in text and "vllm serve" in text and "**was not run in vLLM here**" in text
    assert "AutoModelForCausalLM" not in text and "## What it should not be used for" in text
    words = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([words("the court of the court")["input_ids"]])
    agree(mini, folder, ids)
    assert len(words) == len(kept) == read(folder)[0].vocab_size


def test_what_the_form_cannot_say_is_refused(words, tmp_path):
    heads = uneven("llama", {"attention": [[0], [0, 1], [1]]})
    rotated = random_model("llama")
    rotated.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    active = random_model("llama")
    active.config.hidden_act = "gelu"
    for model, message in (
        (heads, "layer 0 has 2 query heads and layer 1 has 4.*portable=True"),
        (random_model("qwen3"), "of the family 'qwen3'.*expected one of llama, mistral, qwen2"),
        (rotated, "rotary embedding is of type 'yarn'; expected one of default, linear, llama3"),
        (active, "hidden_act is 'gelu'"),
    ):
        with pytest.raises(ValueError, match=message):
            lab.export_vllm(model, words, tmp_path / "folder")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        lab.export_vllm(random_model("llama"), words, tmp_path / "mine")
    with full_disk(20_000), pytest.raises(OSError):
        lab.export_vllm(random_model("llama"), words, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    # what the message says would work
    folder = lab.save_model(heads, words, tmp_path / "portable", portable=True)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
