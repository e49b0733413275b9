"""An adapter's folder gives the logits that peft gives, or is refused: never something between."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import logits, random_model
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import minigpt_lab as lab

PROBE = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))
_LAYERS = {
    "llama": ("q_proj", "down_proj", "lm_head", "embed_tokens"),  # tied
    "mistral": ("q_proj", "down_proj", "lm_head", "embed_tokens"),  # untied
    "gpt2": ("c_attn", "mlp.c_proj", "lm_head", "wte"),  # tied, transposed
    "opt": ("q_proj", "fc2", "lm_head", "model.decoder.embed_tokens"),
}


def kinds(family: str) -> dict[str, LoraConfig]:
    """Adapters that people make, by what is special about them."""
    attention, ffn, head, embedding = _LAYERS[family]
    layers = [attention, ffn]
    lora = {"r": 2, "init_lora_weights": False, "fan_in_fan_out": family == "gpt2"}
    return {
        "plain": LoraConfig(target_modules=layers, **lora),
        "head": LoraConfig(target_modules=[*layers, head], **lora),
        "embedding": LoraConfig(target_modules=[*layers, embedding], **lora),
        "both": LoraConfig(target_modules=[head, embedding], **lora),
        "saved head": LoraConfig(target_modules=layers, modules_to_save=[head], **lora),
        "saved embedding": LoraConfig(target_modules=layers, modules_to_save=[embedding], **lora),
        "saved both": LoraConfig(target_modules=layers, modules_to_save=[head, embedding], **lora),
        "dora": LoraConfig(target_modules=layers, use_dora=True, **lora),
        "rslora": LoraConfig(target_modules=layers, use_rslora=True, **lora),
        "ranks": LoraConfig(
            target_modules=layers, rank_pattern={ffn: 5}, alpha_pattern={attention: 31}, **lora
        ),
        "bias": LoraConfig(target_modules=layers, bias="all", **lora),
        "tokens": LoraConfig(target_modules=layers, trainable_token_indices=[5, 90, 96], **lora),
        "layers": LoraConfig(target_modules=layers, layers_to_transform=[1], **lora),
    }


def saved_adapter(home: Path, family: str, config, words) -> tuple[Path, torch.Tensor]:
    """The folder of a trained adapter, and the logits that it gives in peft."""
    random_model(family).save_pretrained(home / "base")
    words.save_pretrained(home / "base")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(home / "base"), config)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            assert parameter.requires_grad or "lora" not in name
    adapted.save_pretrained(home / "adapter")
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    return home / "adapter", logits(PeftModel.from_pretrained(base, home / "adapter"), PROBE)


@pytest.fixture(scope="module")
def words(tiny):
    """A tokenizer of 97 tokens, to go with the random models."""
    _, full = tiny
    return lab.trim_tokenizer(lab.trim_tokenizer(full, sorted(range(259))), range(97))


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("llama", kind) for kind in kinds("llama")),
        *(("gpt2", kind) for kind in kinds("gpt2")),
        *(("mistral", kind) for kind in ("head", "embedding", "both", "saved both")),
        *(("opt", kind) for kind in ("plain", "bias", "embedding")),
    ],
)
def test_merged_logits_are_pefts_also_after_saving(tmp_path, words, family, kind):
    folder, expected = saved_adapter(tmp_path, family, kinds(family)[kind], words)
    merged, _ = lab.load_model(folder, device="cpu")
    torch.testing.assert_close(logits(merged, PROBE), expected, atol=1e-3, rtol=1e-3)
    assert (expected - logits(random_model(family), PROBE)).abs().max() > 0.01
    assert all(parameter.requires_grad for parameter in merged.parameters())
    again, _ = lab.load_model(lab.save_model(merged, words, tmp_path / "saved"), device="cpu")
    assert torch.equal(logits(again, PROBE), logits(merged, PROBE))
    keep = {"ffn": [[0, 3, 4, 9, 11]] * 3}
    plan = lab.PruningPlan("", {"ffn": [20] * 3}, keep)
    with lab.masked(merged, plan):
        masked = logits(merged, PROBE)
    torch.testing.assert_close(
        logits(lab.shrink(merged, plan), PROBE), masked, atol=1e-3, rtol=1e-3
    )


def test_a_merged_model_can_be_recovered_in_full(tmp_path, words):
    folder, _ = saved_adapter(tmp_path, "llama", kinds("llama")["plain"], words)
    merged, _ = lab.load_model(folder, device="cpu")
    merged(input_ids=PROBE, labels=PROBE).loss.backward()
    assert all(parameter.grad is not None for parameter in merged.parameters())


def test_the_adapters_own_tokenizer_is_used(tmp_path, tiny):
    """A token added in a row of the base that no token of its tokenizer had."""
    _, words = tiny
    words = lab.trim_tokenizer(lab.trim_tokenizer(words, sorted(range(259))), range(90))
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[90])
    folder, _ = saved_adapter(tmp_path, "llama", config, words)
    _, found = lab.load_model(folder, device="cpu")
    assert len(found) == 90
    words.add_tokens(["<turn>"])
    words.save_pretrained(folder)
    _, found = lab.load_model(folder, device="cpu")
    assert found("<turn>", add_special_tokens=False)["input_ids"] == [90]


def test_an_embedding_that_grew_comes_with_the_adapter(tmp_path, words):
    random_model("mistral").save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(99)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    adapted = get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    merged, _ = lab.load_model(tmp_path / "adapter", device="cpu")
    assert merged.config.vocab_size == 99
    torch.testing.assert_close(logits(merged, PROBE), logits(adapted, PROBE))


def test_an_adapter_on_an_adapter_is_merged_after_it(tmp_path, words):
    first, _ = saved_adapter(tmp_path, "llama", kinds("llama")["plain"], words)
    once, _ = lab.load_model(first, device="cpu")
    second = get_peft_model(once, LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    expected = logits(second, PROBE)
    second.save_pretrained(tmp_path / "second")
    change(tmp_path / "second", base_model_name_or_path=str(first))
    found, _ = lab.load_model(tmp_path / "second", device="cpu")
    torch.testing.assert_close(logits(found, PROBE), expected, atol=1e-3, rtol=1e-3)


def change(folder: Path, **entries) -> None:
    """Write some entries of an adapter's config anew."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def refused(folder: Path, words: str) -> None:
    """One sentence."""
    with pytest.raises(ValueError, match=words) as error:
        lab.load_model(folder, device="cpu")
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_an_adapter_is_never_its_own_base(tmp_path, words):
    folder, _ = saved_adapter(tmp_path, "llama", kinds("llama")["plain"], words)
    other = tmp_path / "other"
    (tmp_path / "link").symlink_to(folder)
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    for base in (folder, f"{other}/../adapter", tmp_path / "link"):
        change(folder, base_model_name_or_path=str(base))
        refused(folder, r"the adapter in .* is, through .*, its own base; write the name")
    change(folder, base_model_name_or_path=str(other))
    change(other, base_model_name_or_path=str(folder))
    refused(folder, "its own base")
    for nothing in ("", None, 3, []):
        change(folder, base_model_name_or_path=nothing)
        refused(folder, "names no base model")


@pytest.mark.parametrize("part", ["layers.1.", "lora_A", "q_proj"])
def test_an_adapter_that_lacks_weights_is_refused(tmp_path, words, part):
    folder, _ = saved_adapter(tmp_path, "llama", kinds("llama")["plain"], words)
    file = folder / "adapter_model.safetensors"
    whole = load_file(file)
    save_file({k: v for k, v in whole.items() if part not in k}, file)
    refused(folder, r"weights missing \(\d+\): ")
    name = next(iter(whole))
    save_file({**whole, f"{name}.more": whole[name].clone()}, file)
    refused(folder, r"weights of no layer \(1\): ")


@pytest.mark.parametrize(
    "entries", [{"r": 10**10}, {"rank_pattern": {"q_proj": 10**10}}, {"r": 3}, {"r": "2"}]
)
def test_ranks_are_those_of_the_weights(tmp_path, words, entries):
    folder, _ = saved_adapter(tmp_path, "llama", kinds("llama")["plain"], words)
    change(folder, **entries)
    refused(folder, "damaged or incomplete")


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{", '{"a":' * 100_000])
def test_an_adapters_json_is_read_with_care(tmp_path, words, content):
    folder, _ = saved_adapter(tmp_path, "llama", kinds("llama")["plain"], words)
    (folder / "adapter_config.json").write_text(content)
    refused(folder, "damaged or incomplete")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "PROMPT_TUNING"),
        (LoraConfig(target_modules=["q_proj"], lora_bias=True, init_lora_weights=False), "bias"),
    ],
)
def test_what_cannot_be_merged_is_said(tmp_path, words, config, said):
    folder, _ = saved_adapter(tmp_path, "llama", config, words)
    refused(folder, said)


def test_other_adapters_that_merge_do(tmp_path, words):
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    folder, expected = saved_adapter(tmp_path, "llama", config, words)
    merged, _ = lab.load_model(folder, device="cpu")
    torch.testing.assert_close(logits(merged, PROBE), expected, atol=1e-3, rtol=1e-3)


def test_of_several_adapters_the_first_is_merged_and_others_by_their_folder(tmp_path, words):
    folder, expected = saved_adapter(tmp_path, "llama", kinds("llama")["plain"], words)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    both = PeftModel.from_pretrained(base, folder)
    torch.manual_seed(9)
    both.add_adapter("law", LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    both.save_pretrained(tmp_path / "two")
    found, _ = lab.load_model(tmp_path / "two", device="cpu")
    torch.testing.assert_close(logits(found, PROBE), expected, atol=1e-3, rtol=1e-3)
    both.set_adapter("law")
    found, _ = lab.load_model(tmp_path / "two" / "law", device="cpu")
    torch.testing.assert_close(logits(found, PROBE), logits(both, PROBE), atol=1e-3, rtol=1e-3)
