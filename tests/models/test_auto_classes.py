"""Pruned models with plain transformers: it loads, saves, generates and trains them."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import as_format_1, logits, random_model, random_plan
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from peft.utils import constants
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)

import minigpt_lab as lab
from minigpt_lab.models import (
    FAMILIES,
    Anatomy,
    add_bias,
    fingerprint,
    pruned_classes,
    update_config,
)


@pytest.fixture
def uneven():
    """A Llama whose layers differ."""
    model = random_model("llama")
    return lab.shrink(model, random_plan(model, 3, vocabulary=False))


def same(a, b, ids) -> bool:
    return torch.equal(logits(a, ids), logits(b, ids))


def test_masked_shrunk_and_reloaded_agree(tmp_path, model, words, probe):
    plan = random_plan(model, 21, vocabulary=False)
    mini = lab.shrink(model, plan)
    folder = lab.save_model(mini, words, tmp_path / "mini")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with lab.masked(model, plan):
        torch.testing.assert_close(logits(model, probe), logits(mini, probe), atol=1e-4, rtol=1e-4)
    ours, _ = lab.load_model(folder, device="cpu")
    assert same(plain, mini, probe) and same(ours, mini, probe)
    assert type(plain) is type(mini) is type(ours) is not type(model)
    assert isinstance(plain, type(model)) and plain.config.model_type.startswith("minigpt-")
    assert fingerprint(plain) == fingerprint(mini)
    # transformers' own saving, and a second pruning
    plain.save_pretrained(tmp_path / "again")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), mini, probe)
    twice = lab.shrink(plain, random_plan(plain, 22, vocabulary=False))
    twice.save_pretrained(tmp_path / "twice")
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "twice"), twice, probe)


def test_folders_with_widths_in_the_sidecar_still_load(tmp_path, model, words, probe):
    mini = lab.shrink(model, random_plan(model, 21, vocabulary=False))
    folder = as_format_1(lab.save_model(mini, words, tmp_path / "mini"))
    again, tokenizer = lab.load_model(folder, device="cpu")
    assert same(again, mini, probe) and again.pruning_plans == mini.pruning_plans
    assert type(again) is type(mini) and fingerprint(again) == fingerprint(mini)
    lab.save_model(again, tokenizer, folder)  # brings the folder up to date
    assert same(AutoModelForCausalLM.from_pretrained(folder), mini, probe)
    assert "widths" not in json.loads((folder / "minigpt_lab.json").read_text())


def test_what_plain_transformers_describes_keeps_its_type(tmp_path, words):
    model = random_model("llama")
    keep = {"ffn": [[0, 3, 4, 9, 11]] * 3}
    plan = lab.PruningPlan("", {"ffn": [20] * 3}, keep)
    for subject in (model, lab.shrink(model, plan)):
        folder = lab.save_model(subject, words, tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        assert type(subject) is type(model) and config["model_type"] == "llama"
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert not [key for key in config if key in ("minigpt_lab_widths", "minigpt_lab_biases")]
    # a second pruning can make uneven layers even
    uneven = lab.shrink(model, lab.PruningPlan("", {"ffn": [20] * 3}, {"ffn": [[1], [1, 2], [3]]}))
    assert type(uneven) is not type(model)
    even = lab.shrink(uneven, lab.PruningPlan("", {"ffn": [1, 2, 1]}, {"ffn": [[0], [0], [0]]}))
    assert type(even) is type(model) and even.config.intermediate_size == 1


def test_added_biases_come_back(tmp_path, words, probe):
    model = random_model("llama")
    shift = {"model.layers.1.mlp.down_proj": [0.5] * 32}
    plan = lab.PruningPlan("", {"ffn": [20] * 3}, {"ffn": [[1], [1, 2], [3]]}, shift=shift)
    mini = lab.shrink(model, plan)
    plain = AutoModelForCausalLM.from_pretrained(lab.save_model(mini, words, tmp_path / "mini"))
    assert same(plain, mini, probe)
    assert plain.model.layers[1].mlp.down_proj.bias.mean() == 0.5
    with lab.masked(model, lab.PruningPlan("", {}, {}, shift=shift)):
        folder = lab.save_model(model, words, tmp_path / "masked")
        assert same(AutoModelForCausalLM.from_pretrained(folder), model, probe)
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.model_type == "llama"
    assert not any(name.startswith("minigpt") for name in vars(model.config))


def test_it_generates_trains_and_takes_adapters(tmp_path, uneven, words, probe):
    folder = lab.save_model(uneven, words, tmp_path / "mini")
    model = AutoModelForCausalLM.from_pretrained(folder)
    options = {"max_new_tokens": 4, "do_sample": False}
    written = uneven.generate(probe, **options)
    assert torch.equal(model.generate(probe, **options), written)
    assert pipeline("text-generation", str(folder))("a", max_new_tokens=2)[0]["generated_text"]
    # Trainer's checkpoints are folders like any other
    rows = [{"input_ids": row, "labels": row} for row in probe]
    settings = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, save_steps=2, use_cpu=True, report_to=[]
    )
    Trainer(model, settings, train_dataset=rows).train()
    checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert same(checkpoint, model, probe) and not same(model, uneven, probe)
    # adapters on its projections, saved and loaded over it
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(
            r=2,
            target_modules=["q_proj", "down_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        ),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert same(again, adapted, probe)
    merged, _ = lab.load_model(tmp_path / "adapter", device="cpu")
    torch.testing.assert_close(logits(merged, probe), logits(adapted, probe))


def test_peft_adapts_what_it_adapts_in_the_family(uneven, probe):
    """Without ``target_modules``, in LoRA and the tables of other methods."""
    plain = logits(uneven, probe)
    adapted = get_peft_model(uneven, LoraConfig(r=2, init_lora_weights=False))
    names = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "v_proj"} and len(names) == 6
    assert not torch.equal(logits(adapted, probe), plain)
    tables = [t for n, t in vars(constants).items() if n.startswith("TRANSFORMERS_MODELS_TO_")]
    known = [(t, family) for t in tables for family in FAMILIES if family in t]
    assert len(known) > 100 and all(t[f"minigpt-{family}"] == t[family] for t, family in known)


def test_it_can_be_copied_and_pickled(uneven, probe):
    for again in (copy.deepcopy(uneven), pickle.loads(pickle.dumps(uneven))):
        assert type(again) is type(uneven) and same(again, uneven, probe)
    config, model = pruned_classes("llama")
    assert pickle.loads(pickle.dumps((config, model))) == (config, model)


def test_the_auto_classes_make_one_from_its_config(uneven):
    fresh = AutoModelForCausalLM.from_config(copy.deepcopy(uneven.config))
    assert Anatomy(fresh).layer_widths() == Anatomy(uneven).layer_widths()
    uneven.config.minigpt_lab_widths["ffn"][0] = 21
    with pytest.raises(ValueError, match="minigpt_lab_widths of ffn are"):
        AutoModelForCausalLM.from_config(uneven.config)


def test_lm_eval_reads_a_folder(tmp_path, tiny, tiny_domain):
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = tiny
    mini = lab.shrink(model, random_plan(model, 3, vocabulary=False))
    folder = lab.save_model(mini, tokenizer, tmp_path / "mini")
    ours, plain = HFLM(mini, tokenizer=tokenizer), HFLM(str(folder), device="cpu", dtype="float32")
    for each in (ours, plain):
        assert each.tok_encode("a court") == ours.tok_encode("a court")
    ids = torch.tensor([tokenizer.encode(tiny_domain.test[0])[:32]])
    assert torch.equal(ours._model_call(ids), plain._model_call(ids))


@pytest.mark.slow
def test_import_minigpt_lab_is_enough(tmp_path, uneven, words):
    """Before transformers or after it; and until a pruned model is loaded it costs nothing."""
    folder = str(lab.save_model(uneven, words, tmp_path / "mini"))
    random_model("llama").save_pretrained(tmp_path / "dense")
    code = f"""import sys, minigpt_lab
assert not {{"torch", "transformers", "peft"}} & set(sys.modules)
from transformers import AutoConfig, AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(tmp_path / "dense")!r})
assert "minigpt_lab.models" not in sys.modules
print(AutoConfig.from_pretrained({folder!r}).model_type)
for name in [name for name in sys.modules if name.startswith("minigpt_lab")]: del sys.modules[name]
import minigpt_lab
assert "minigpt_lab.models" not in sys.modules
print(type(AutoModelForCausalLM.from_pretrained({folder!r})).__name__)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["minigpt-llama", "MinigptLlamaForCausalLM"]


@pytest.mark.slow
def test_a_folder_with_its_code_loads_without_this_package(tmp_path, words, probe):
    """In a process that cannot import minigpt_lab; then with it. Its classes do the same."""
    cases = []
    for family in ("llama", "phi3", "gpt2", "bloom"):
        model = random_model(family)
        plan = random_plan(model, 3, vocabulary=False)
        if family in ("gpt2", "bloom"):  # a block gone, and its bias left
            plan.keep["attention"][1] = plan.keep["balanced_heads"][1] = []
        mini = lab.shrink(model, plan)
        if family == "llama":
            add_bias(mini.model.layers[1].mlp.down_proj)
            mini.model.layers[1].mlp.down_proj.bias.data.fill_(0.5)
            update_config(Anatomy(mini))
        folder = lab.save_model(mini, words, tmp_path / family, remote_code=True)
        cases.append((str(folder), logits(mini, probe).tolist()))
    (tmp_path / "cases.json").write_text(json.dumps([probe.tolist(), cases]))
    code = f"""import json, sys, torch
sys.modules["minigpt_lab"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
ids, cases = json.loads(open({str(tmp_path / "cases.json")!r}).read())
for folder, wanted in cases:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(model(torch.tensor(ids)).logits, torch.tensor(wanted))
    assert len(AutoTokenizer.from_pretrained(folder)) == 97
model.save_pretrained(folder + "_again")
again = AutoModelForCausalLM.from_pretrained(folder + "_again", trust_remote_code=True)
assert torch.equal(again(torch.tensor(ids)).logits, model(torch.tensor(ids)).logits)
print(len(cases))"""
    outside = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=outside, cwd=tmp_path
    )
    assert done.stdout.split()[-1:] == ["4"], done.stderr[-2000:]
    # here the registered classes are used, and what they save names no file that is not there
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert type(plain).__module__.startswith("minigpt_lab.")
    plain.save_pretrained(tmp_path / "plain")
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    lab.save_model(plain, words, tmp_path / "llama")
    assert not (tmp_path / "llama" / "modeling_minigpt.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "llama" / "config.json").read_text())


def test_configs_and_tokenizers_load_alone(tmp_path, uneven, words):
    folder = lab.save_model(uneven, words, tmp_path / "mini")
    config = AutoConfig.from_pretrained(folder)
    assert config.minigpt_lab_widths == Anatomy(uneven).layer_widths()
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == words("ab")["input_ids"]


@pytest.mark.filterwarnings("ignore")
def test_torch_export_keeps_batch_size_and_length_free(probe):
    """Also BLOOM's, whose layers choose the slopes of the heads that they still have."""
    model = random_model("bloom", layers=2)
    mini = lab.shrink(model, random_plan(model, 3, vocabulary=False))
    assert all(layer.surviving_heads is not None for layer in mini.transformer.h)
    mini.config.use_cache = False
    shapes = {"input_ids": dict.fromkeys(range(2), torch.export.Dim.DYNAMIC)}  # refuses constants
    options = {"dynamic_shapes": shapes, "strict": False}
    program = torch.export.export(mini, (), {"input_ids": probe}, **options).module()
    for ids in (probe, probe[:1, :5], probe.repeat(2, 2)):
        torch.testing.assert_close(program(input_ids=ids).logits, logits(mini, ids))
