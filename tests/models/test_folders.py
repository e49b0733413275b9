"""A folder gives the model that was saved in it, or one sentence: no weight is made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import as_format_1, logits, random_model, random_plan
from safetensors.torch import load_file, save_file

import minigpt_lab as lab

PROBE = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def words(tiny):
    """A tokenizer of 97 tokens, to go with the random models."""
    _, full = tiny
    return lab.trim_tokenizer(lab.trim_tokenizer(full, sorted(range(259))), range(97))


@pytest.fixture
def folder(tmp_path, words) -> Path:
    """A Llama as transformers saves it."""
    random_model("llama").save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_weights(folder: Path, change) -> None:
    """Write a folder's weights anew."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def change_json(file: Path, **entries) -> None:
    """Write some entries of a JSON file anew."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def refused(folder: Path, words: str, **options) -> str:
    """The one sentence that a folder is refused with."""
    with pytest.raises(ValueError, match=words) as error:
        lab.load_model(folder, device="cpu", **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    return str(error.value)


@pytest.mark.parametrize("shrunk", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
@pytest.mark.parametrize("part", ["norm", "att", "embed", "0"])
def test_weights_that_are_not_there_are_named(tmp_path, words, family, part, shrunk):
    """Whatever is taken out of a file: another load would have made up other numbers."""
    model = random_model(family)
    if shrunk:
        lab.save_model(lab.shrink(model, random_plan(model, 3, False)), words, tmp_path)
    else:
        model.save_pretrained(tmp_path)
        words.save_pretrained(tmp_path)
    gone = [name for name in load_file(tmp_path / "model.safetensors") if part in name]
    change_weights(tmp_path, lambda state: {k: v for k, v in state.items() if part not in k})
    sentence = refused(tmp_path, r"weights missing \(\d+\): ")
    assert f"(weights missing ({len(gone)})" in sentence


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"num_hidden_layers": 5}, r"weights missing \(18\): model.layers.3.input_layernorm"),
        ({"num_hidden_layers": 2}, r"weights of no layer \(9\): model.layers.2"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000 in config.json"),
        ({"tie_word_embeddings": False}, r"weights missing \(1\): lm_head.weight"),
        ({"model_type": "gpt2"}, r"model_type 'gpt2' and architectures \['LlamaForCausalLM'\]"),
        ({"model_type": "gpt2", "architectures": None}, "weights missing"),
        ({"model_type": "gemma"}, r"model_type 'gemma' and architectures"),
        ({"model_type": "evil"}, "does not recognize"),
        ({"vocab_size": 10**9}, r"config.json asks for [\d,]{14} parameters, the files"),
        ({"hidden_size": 10**7}, "config.json asks for"),
        ({"head_dim": 10**9}, "config.json asks for"),
        ({"intermediate_size": 19}, r"of another shape \(9\): .* \[20, 32\], by config.json \[19"),
        ({"num_labels": 10**9}, "num_labels is 1000000000"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_act": "os.system"}, "os.system"),
        ({"dtype": "int8"}, "dtype in config.json is torch.int8; expected a type of weights"),
        ({"dtype": "float8_e4m3fn"}, "dtype in config.json is torch.float8_e4m3fn; expected"),
        ({"_attn_implementation": "somebody/kernel"}, "code from the hub, which is never run"),
        ({"attn_implementation": "somebody/kernel"}, "code from the hub, which is never run"),
        ({"transformers_weights": "../weights.safetensors"}, "must reference a file inside"),
    ],
)
def test_a_config_of_another_model_is_refused(folder, entries, said):
    change_json(folder / "config.json", **entries)
    refused(folder, said)


WIDTHS = {site: [1] * 3 for site in ("ffn", "attention", "balanced_heads")}


@pytest.mark.parametrize(
    ("file", "entries", "said"),
    [
        ("config.json", {"minigpt_lab_widths": {"ffn": [10**10] * 3}}, "minigpt_lab_widths"),
        ("config.json", {"minigpt_lab_widths": {**WIDTHS, "ffn": [1] * 10**4}}, "expected at most"),
        ("config.json", {"minigpt_lab_widths": {"ffn": [1] * 3}}, "widths of attention are"),
        ("config.json", {"minigpt_lab_widths": None}, "minigpt_lab_widths is None"),
        ("config.json", {"minigpt_lab_widths": WIDTHS}, "of another shape"),
        ("config.json", {"minigpt_lab_biases": 3}, "minigpt_lab_biases is 3; expected a list"),
        ("config.json", {"minigpt_lab_biases": ["os.system"]}, "biases names 'os.system'"),
        (
            "config.json",
            {"minigpt_lab_biases": ["model.layers.1.mlp.up_proj"]},
            r"weights missing \(1\): model.layers.1.mlp.up_proj.bias",
        ),
        ("minigpt_lab.json", {"plans": 3}, "plans is 3; expected a list"),
        ("minigpt_lab.json", {"plans": [3]}, "damaged"),
        ("minigpt_lab.json", {"plans": [{"model_hash": "", "units": {}, "keep": 1}]}, "keep is 1"),
        ("minigpt_lab.json", {"vocabulary": {"size": 10**10, "rows": [*range(97)]}}, "vocabulary"),
        ("minigpt_lab.json", {"vocabulary": {"size": 99, "rows": [0]}}, "vocabulary is not"),
        ("minigpt_lab.json", {"format": 3}, "format 3, this version reads 1"),
        ("config.json", {"hidden_size": 10**7}, "config.json asks for"),
        ("config.json", {"intermediate_size": 10**9}, "units per layer.* is 1000000000; expected"),
        ("config.json", {"num_attention_heads": 10**9, "head_dim": 8}, "damaged"),
        ("config.json", {"vocab_size": 10**9}, "config.json asks for"),
        ("config.json", {"model_type": "llama", "architectures": None}, "of another shape"),
        ("config.json", {"model_type": "minigpt-gpt2"}, "model_type 'minigpt-gpt2' and archit"),
        ("config.json", {"model_type": "minigpt-evil"}, "does not recognize"),
    ],
)
def test_a_saved_mini_gpt_is_compared_with_its_weights_first(tmp_path, words, file, entries, said):
    model = random_model("llama")
    lab.save_model(lab.shrink(model, random_plan(model, 3, False)), words, tmp_path / "mini")
    change_json(tmp_path / "mini" / file, **entries)
    refused(tmp_path / "mini", said)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("site", ["ffn", "attention", "balanced_heads"])
def test_widths_are_numbers_that_the_weights_have(tmp_path, words, site, old):
    model = random_model("llama")
    lab.save_model(lab.shrink(model, random_plan(model, 3, False)), words, tmp_path / "mini")
    file, key = tmp_path / "mini" / "config.json", "minigpt_lab_widths"
    if old:
        file, key = as_format_1(tmp_path / "mini") / "minigpt_lab.json", "widths"
    widths = json.loads(file.read_text())[key]
    for value in (0, -1, 1.5, True, "3", None, 10**12, 21):
        widths[site][1] = value
        change_json(file, **{key: widths})
        refused(tmp_path / "mini", "widths|another shape|size mismatch")


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"widths": {"ffn": [10**10] * 3}}, "widths"),
        ({"widths": None}, "widths is None"),
        ({"format": 2}, "format 2, this version reads 1"),
        ({"plans": 3}, "plans is 3; expected a list"),
    ],
)
def test_a_sidecar_with_widths_is_compared_too(tmp_path, words, entries, said):
    model = random_model("llama")
    lab.save_model(lab.shrink(model, random_plan(model, 3, False)), words, tmp_path / "mini")
    change_json(as_format_1(tmp_path / "mini") / "minigpt_lab.json", **entries)
    refused(tmp_path / "mini", said)


def test_what_transformers_passes_over_is_no_fault(folder, words):
    """Frequencies that old checkpoints held, a base model's names, a head beside a tied one."""
    model = random_model("llama")
    change_weights(
        folder,
        lambda state: {
            **{k.removeprefix("model."): v for k, v in state.items()},
            "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        },
    )
    found, _ = lab.load_model(folder, device="cpu")
    assert torch.equal(logits(found, PROBE), logits(model, PROBE))
    head = torch.randn(97, 32)
    model.save_pretrained(folder)
    change_weights(folder, lambda state: {**state, "lm_head.weight": head})
    found, _ = lab.load_model(folder, device="cpu")
    assert torch.equal(found.lm_head.weight, head)
    again, _ = lab.load_model(lab.save_model(found, words, folder.parent / "two"), device="cpu")
    assert torch.equal(logits(found, PROBE), logits(again, PROBE))
    assert not torch.equal(logits(again, PROBE), logits(model, PROBE))


def test_weights_beside_the_models_own_are_named(folder):
    extra = {"model.layers.0.self_attn.q_proj.bias": torch.ones(32), "v_head.weight": torch.ones(1)}
    change_weights(folder, lambda state: {**state, **extra})
    refused(folder, r"weights of no layer \(2\): model.layers.0.self_attn.q_proj.bias, v_head")


def test_a_missing_shard_is_named(folder):
    random_model("llama").save_pretrained(folder, max_shard_size="10KB")
    (folder / "model.safetensors").unlink()
    (folder / "model-00002-of-00003.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[-1].unlink()
    refused(folder, rf"No such file.*{shards[-1].name}.*; save or download it again")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_named(folder, dtype):
    change_weights(folder, lambda state: {k: v.to(dtype) for k, v in state.items()})
    refused(folder, r"holds weights of type (I8|F8_E4M3) \(.*weight\); expected")


@pytest.mark.parametrize("name", ["config.json", "minigpt_lab.json", "generation_config.json"])
def test_json_of_any_kind_is_one_sentence(tmp_path, words, name):
    lab.save_model(random_model("llama"), words, tmp_path / "mini")
    for content in ("[" * 100_000, '{"a":' * 100_000, "[]", "3", "{", "\xff"):
        (tmp_path / "mini" / name).write_text(content, encoding="latin-1")
        refused(tmp_path / "mini", "damaged or incomplete|is damaged")


def test_everyday_mistakes_get_a_sentence(folder):
    for value in (None, "", 3, ["tiny-llama"]):
        with pytest.raises(TypeError, match=r"name_or_path is .*; expected a path"):
            lab.load_model(value)
    with pytest.raises(FileNotFoundError, match=r"config.json': there is no such folder"):
        lab.load_model(folder / "config.json")
    with pytest.raises(FileNotFoundError, match=r"did you mean its folder model\?"):
        lab.load_model(folder.parent)
    for missing in (folder.with_name("modle"), str(folder.with_name("modle")), "./modle"):
        with pytest.raises(FileNotFoundError, match=r"no model .*: there is no such folder"):
            lab.load_model(missing)
    for dtype in ("int8", "float8_e4m3fn", "float33", None, 3, torch.int64):
        with pytest.raises(ValueError, match=r"dtype is .*; expected a type of weights: 'float32'"):
            lab.load_model(folder, dtype=dtype)
    for device in ("gpu0", "cuda:99", 3, "", "meta"):
        with pytest.raises(ValueError, match=r"device is .*; expected a device of this machine"):
            lab.load_model(folder, device=device)
    for file in folder.glob("*token*"):
        file.unlink()
    refused(folder, r"model holds no tokenizer: expected tokenizer.json beside the weights; save")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"holds no model.safetensors; pickled weights .* are never opened")


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.3, "do_sample": False},
        {"top_p": 0.2, "length_penalty": 2.0, "early_stopping": True},
        {"output_scores": True},
    ],
)
def test_what_loads_saves(folder, words, settings):
    """Transformers refuses to write generation settings that do nothing, once they were changed."""
    change_json(folder / "generation_config.json", **settings)
    model, _ = lab.load_model(folder, device="cpu")
    tokens = [*range(60)]
    mini = lab.shrink(model, lab.PruningPlan("", {}, {}, vocabulary_size=97, vocabulary=tokens))
    mini.generation_config.update(**settings)
    before = mini.generation_config
    again, _ = lab.load_model(lab.save_model(mini, words, folder.parent / "mini"), device="cpu")
    assert mini.generation_config is before
    for name, value in settings.items():
        assert getattr(again.generation_config, name) == value
