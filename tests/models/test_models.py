"""Saving and loading: same logits, plain transformers where it can, clear words where it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import as_format_1, logits, random_model, random_plan
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import minigpt_lab as lab
from minigpt_lab.models import Anatomy, fingerprint, saving
from minigpt_lab.models.auto_classes import config_widths
from minigpt_lab.models.by_name import registry
from minigpt_lab.store import DATA, pinned_packages


@pytest.fixture
def tokenizer(tiny):
    """A tokenizer of 97 tokens, to go with the random models."""
    _, full = tiny
    kept = lab.trim_tokenizer(full, sorted(range(259)))
    return lab.trim_tokenizer(kept, range(97))


def same(a, b, ids) -> bool:
    return torch.equal(logits(a, ids), logits(b, ids))


def test_save_equals_load_for_uneven_layers(tmp_path, model, tokenizer, probe):
    mini = lab.shrink(model, random_plan(model, 11, vocabulary=False))
    again, _ = lab.load_model(lab.save_model(mini, tokenizer, tmp_path / "mini"), device="cpu")
    assert same(mini, again, probe)
    assert again.pruning_plans == mini.pruning_plans
    assert Anatomy(again).layer_widths() == Anatomy(mini).layer_widths()


def test_uniform_widths_load_with_plain_transformers(tmp_path, model, tokenizer, probe):
    keep = {"ffn": [[0, 3, 4, 9, 11]] * 3}
    plan = lab.PruningPlan("", {"ffn": Anatomy(model).units("ffn")}, keep)
    mini = lab.shrink(model, plan)
    folder = lab.save_model(mini, tokenizer, tmp_path / "mini")
    again, _ = lab.load_model(folder, device="cpu")
    assert same(again, mini, probe)
    if "channel" in Anatomy(model).family.config:
        assert same(again, AutoModelForCausalLM.from_pretrained(folder), probe)
    else:
        assert config_widths(Anatomy(mini)) == Anatomy(model).layer_widths()


def test_a_pruned_model_knows_its_dense_size(tmp_path, tokenizer):
    model = random_model("llama")
    dense = lab.model_size(model)
    once = lab.shrink(model, random_plan(model, 12))
    twice = lab.shrink(once, random_plan(once, 13, vocabulary=False))
    assert fingerprint(twice) == fingerprint(lab.shrink(once, random_plan(once, 13, False)))
    for folder, portable in (("mini", False), ("portable", True)):
        saved = lab.save_model(twice, tokenizer, tmp_path / folder, portable=portable)
        again, _ = lab.load_model(saved, device="cpu")
        size = lab.model_size(again)
        assert size.stored < size.dense == dense.stored and size.layers_dense == dense.layers_dense
    assert lab.model_size(twice) == lab.model_size(twice, model)
    assert lab.model_size(twice, once).dense == lab.model_size(once).stored


def test_portable_folders_load_with_plain_transformers(tmp_path, model, tokenizer, probe):
    mini = lab.shrink(model, random_plan(model, 12, vocabulary=False))
    folder = lab.save_model(mini, tokenizer, tmp_path / "mini", portable=True)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(plain, probe), logits(mini, probe), atol=1e-5, rtol=1e-5)
    assert mini.num_parameters() < plain.num_parameters() <= model.num_parameters()


def test_heads_keep_their_slopes_on_disk(tmp_path, tokenizer, probe):
    model = random_model("bloom")
    keep = {"attention": [[1, 3], [0, 1, 2, 3], [2]]}
    mini = lab.shrink(model, lab.PruningPlan("", {"attention": [4] * 3}, keep))
    again, _ = lab.load_model(lab.save_model(mini, tokenizer, tmp_path / "mini"), device="cpu")
    assert again.transformer.h[0].surviving_heads.tolist() == [1, 3]
    assert again.transformer.h[1].state_dict().get("surviving_heads") is None
    # what plain transformers loads has every head at its place, those that left silent
    folder = lab.save_model(mini, tokenizer, tmp_path / "portable", portable=True)
    assert not [key for key in load_file(folder / "model.safetensors") if "surviving" in key]
    plain = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(plain, probe), logits(mini, probe), atol=1e-5, rtol=1e-5)


def test_quantised_models_are_refused_with_a_way_out(tmp_path, tokenizer):
    model = random_model("llama")
    folder = lab.save_model(model, tokenizer, tmp_path / "model")
    (folder / "minigpt_lab.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"quantised \(bitsandbytes\).*expected float32.*dequantise"
    ):
        lab.load_model(folder, device="cpu")
    weight = model.model.layers[0].mlp.gate_proj.weight
    weight.requires_grad_(False)
    weight.data = weight.data.to(torch.int8)
    with pytest.raises(ValueError, match="expected .* float32.* its weights are torch.int8"):
        lab.describe(model)
    adapted = get_peft_model(random_model("llama"), LoraConfig(target_modules=["o_proj"]))
    with pytest.raises(ValueError, match=r"o_proj is Linear.*merge an adapter into its base"):
        lab.describe(adapted.base_model.model)


def test_a_shrunk_model_can_be_saved_in_bfloat16(tmp_path, tokenizer, probe):
    mini = lab.shrink(random_model("llama"), random_plan(random_model("llama"), 13, False))
    folder = lab.save_model(mini.bfloat16(), tokenizer, tmp_path / "mini")
    again, _ = lab.load_model(folder, device="cpu")
    assert again.dtype == torch.bfloat16
    assert all(map(torch.equal, mini.state_dict().values(), again.state_dict().values()))
    assert lab.load_model(folder, dtype="float32", device="cpu")[0].dtype == torch.float32


def test_trimmed_pair_reloads_with_plain_transformers(tmp_path, tiny, tiny_domain, tiny_statistics):
    model, tokenizer = tiny
    plan = lab.contextual_plan(model, tiny_statistics, quantile=0.25, epsilon_embedding=0.0)
    mini = lab.shrink(model, plan)
    folder = lab.save_model(mini, tokenizer, tmp_path / "mini")
    plain, words = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    text = tiny_domain.test[0]
    ids = words(text, return_tensors="pt")["input_ids"]
    assert words.decode(ids[0]) == text and ids.max() < len(plan.vocabulary) < 1024
    assert same(plain, mini, ids)
    expected = lab.perplexity(
        mini, tokenizer, tiny_domain.test, seq_len=64, max_characters=2000
    ).value
    found = lab.perplexity(plain, words, tiny_domain.test, seq_len=64, max_characters=2000)
    assert found.value == expected and found.characters <= 2000


def test_masked_models_can_be_saved_and_stay_masked(tmp_path, tokenizer, probe):
    model = random_model("opt")
    plan = random_plan(model, 14, vocabulary=False)
    with lab.masked(model, plan):
        folder = lab.save_model(model, tokenizer, tmp_path / "masked")
        expected = logits(model, probe)
    assert torch.equal(logits(lab.load_model(folder, device="cpu")[0], probe), expected)


def test_a_mask_over_tokens_is_not_saved(tmp_path, tokenizer):
    model = random_model("llama")
    with (
        lab.masked(model, random_plan(model, 14)),
        pytest.raises(ValueError, match="forbidden, not gone"),
    ):
        lab.save_model(model, tokenizer, tmp_path / "masked")


def test_other_attention_implementations_save_too(tmp_path, tokenizer):
    model = random_model("llama")
    model.set_attn_implementation("eager")
    assert lab.save_model(model, tokenizer, tmp_path / "eager").is_dir()


def test_padded_and_masked_saves_can_be_cut_again(tmp_path, tokenizer, probe):
    model = random_model("opt")
    mini = lab.shrink(model, random_plan(model, 16, vocabulary=False))
    folder = lab.save_model(mini, tokenizer, tmp_path / "mini", portable=True)
    again, _ = lab.load_model(folder, device="cpu")
    assert lab.shrink(again, random_plan(again, 17))(input_ids=probe % 20).logits.isfinite().all()


def test_saving_replaces_models_only_and_leaves_no_halves(tmp_path, tokenizer, monkeypatch, probe):
    model = random_model("llama")
    folder = lab.save_model(model, tokenizer, tmp_path / "mini")
    other = lab.save_model(random_model("llama", 1), tokenizer, folder)
    assert same(lab.load_model(other, device="cpu")[0], random_model("llama", 1), probe)
    (tmp_path / "empty").mkdir()
    assert lab.load_model(lab.save_model(model, tokenizer, tmp_path / "empty"), device="cpu")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.json").touch()
    with pytest.raises(FileExistsError, match="not written by save_model"):
        lab.save_model(model, tokenizer, tmp_path / "thesis")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "load_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lab.save_model(model, tokenizer, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mini", "thesis"]


def test_a_difference_after_reloading_is_an_error(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(saving, "load_model", lambda *_, **__: (random_model("llama", 1), None))
    with pytest.raises(RuntimeError, match="differs from the one in memory"):
        lab.save_model(random_model("llama"), tokenizer, tmp_path / "mini")
    assert not (tmp_path / "mini").exists()


@pytest.mark.parametrize("damage", ["truncate", "widths", "old widths", "config", "weights"])
def test_damaged_folders_get_one_clear_line(tmp_path, tokenizer, damage):
    model = random_model("llama")
    folder = lab.save_model(
        lab.shrink(model, random_plan(model, 15, False)), tokenizer, tmp_path / "mini"
    )
    weights = folder / "model.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage.endswith("widths"):
        file, key = folder / "config.json", "minigpt_lab_widths"
        if damage == "old widths":
            file, key = as_format_1(folder) / "minigpt_lab.json", "widths"
        content = json.loads(file.read_text())
        content[key]["ffn"][0] += 1
        file.write_text(json.dumps(content))
    elif damage == "config":
        (folder / "config.json").write_text("{")
    else:
        weights.unlink()
    with pytest.raises(ValueError, match=r"mini is damaged or incomplete \(.*; save "):
        lab.load_model(folder)


def test_non_finite_weights_are_refused(tmp_path, tokenizer):
    model = random_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "bad")
    tokenizer.save_pretrained(tmp_path / "bad")
    with pytest.raises(ValueError, match=r"NaN or infinite weights in model.layers.1.mlp.up_proj"):
        lab.load_model(tmp_path / "bad")


def test_an_adapter_of_a_layer_that_is_gone_is_refused(tmp_path, tokenizer):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    lab.save_model(random_model("llama"), tokenizer, base)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    get_peft_model(lab.load_model(base, device="cpu")[0], config).save_pretrained(adapter)
    lab.load_model(adapter, device="cpu")
    narrow = lab.shrink(random_model("llama"), random_plan(random_model("llama"), 11, False))
    shallow = random_model("llama")
    del shallow.model.layers[2]
    shallow.config.num_hidden_layers = 2
    for pruned, words in (
        (narrow, r"size mismatch for .*; if its base .* was changed since \(pruned, say\)"),
        (shallow, r"weights of no layer \(4\): model.layers.2.mlp.up_proj"),
    ):
        lab.save_model(pruned, tokenizer, base)
        with pytest.raises(ValueError, match=words):
            lab.load_model(adapter, device="cpu")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="adapter is damaged or incomplete"):
        lab.load_model(adapter, device="cpu")
    get_peft_model(random_model("llama"), config).save_pretrained(adapter)
    with pytest.raises(ValueError, match="adapter in .* names no base model"):
        lab.load_model(adapter, device="cpu")


def test_unknown_names_are_offered_the_nearest(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="did you mean 'smollm2-135m'"):
        lab.load_model("smollm-135m")
    with pytest.raises(FileNotFoundError, match="no model: expected config.json"):
        lab.load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model 'tiny-llama'"):
        lab.load_model(Path("tiny-llama"))  # a path is a folder, never a name
    with pytest.raises(
        ValueError, match="dtype is 'float33'; expected a type of weights: 'float32'"
    ):
        lab.load_model("tiny-llama", dtype="float33")


@pytest.mark.parametrize("name", [name for name in registry() if name.startswith("tiny-")])
def test_tiny_models_have_learnt_something(name):
    model, tokenizer = lab.load_model(name, device="cpu")
    assert 7e5 < model.num_parameters() < 1.5e6
    test = lab.load_domain("tiny-medical").test
    assert lab.perplexity(model, tokenizer, test, seq_len=64, max_tokens=1024).value < 150
    assert "trained in this project" in lab.label(model)


def test_the_fingerprint_sees_weights_and_config():
    model = random_model("llama")
    before = fingerprint(model)
    assert fingerprint(random_model("llama")) == before
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    changed = fingerprint(model)
    assert changed != before
    other = random_model("llama")
    other.config.rms_norm_eps = 0.1
    assert fingerprint(other) != before


def test_models_to_fetch_are_pinned_and_state_their_licence():
    readme = (DATA.parent / "README.md").read_text()
    pinned = pinned_packages()
    for name, entry in registry().items():
        assert f"`{name}`" in readme and entry["licence"]
        for package, _ in entry.get("parts", []):
            assert entry["licence"].startswith(pinned[package].licence)
            assert len(pinned[package].sha256) == len(entry["sha256"]) == 64
    assert "ai.google.dev/gemma/terms" in registry()["gemma-3-270m"]["licence"]
