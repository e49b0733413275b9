"""Nothing that comes with a model's folder is ever run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from helpers import random_model
from peft import LoraConfig, get_peft_model

import minigpt_lab as lab

PLANTED = "__import__('pathlib').Path({!r}).touch()"


class Planted:
    """Runs when it is unpickled."""

    def __init__(self, code: str):
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


@pytest.fixture
def mark(tmp_path) -> Path:
    """A file that planted code would make."""
    return tmp_path / "planted code ran"


@pytest.fixture
def folder(tmp_path, tiny) -> Path:
    """A model with its tokenizer."""
    model, tokenizer = tiny
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(file: Path, **entries) -> None:
    """Write some entries of a JSON file anew."""
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**known, **entries}))


def use(folder: Path) -> None:
    """What a person does with a folder."""
    try:
        model, tokenizer = lab.load_model(folder, device="cpu")
    except (ValueError, OSError) as error:
        assert "\n" not in str(error)
        return
    lab.label(model)
    lab.generate(model, tokenizer, "the", max_new_tokens=2)
    lab.save_model(model, tokenizer, folder.parent / "saved")


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "model.pt", "model.safetensors", "training_args.bin", "optimizer.pt",
     "pytorch_model.bin.index.json", "tokenizer.json", "tokenizer.model", "minigpt_lab.json",
     "generation_config.json", "special_tokens_map.json", "added_tokens.json"],
)  # fmt: skip
@pytest.mark.parametrize("alone", [False, True])
def test_no_pickle_is_opened(folder, mark, name, alone):
    if alone:
        (folder / "model.safetensors").unlink()
    content = pickle.dumps(Planted(PLANTED.format(str(mark))))
    (folder / name).write_bytes(content)
    use(folder)
    torch.save(Planted(PLANTED.format(str(mark))), folder / name)
    use(folder)
    assert not mark.exists()


@pytest.mark.parametrize("known", [False, True])
def test_no_code_of_a_folder_is_imported(folder, mark, known, monkeypatch):
    code = f"{PLANTED.format(str(mark))}\nfrom transformers import *\n"
    for name in ("planted", "modeling_planted", "custom_generate/generate"):
        (folder / f"{name}.py").parent.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(code)
    auto = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    mapping = {name: "planted.Planted" for name in auto}
    change(folder / "config.json", auto_map=mapping, **({} if known else {"model_type": "planted"}))
    change(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["planted.Planted", "planted.Planted"]},
        **({} if known else {"tokenizer_class": "Planted"}),
    )
    change(folder / "generation_config.json", custom_generate="planted")
    monkeypatch.chdir(folder)
    use(folder)
    assert not mark.exists()


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_no_kernel_of_the_hub_is_loaded(folder, key):
    change(folder / "config.json", **{key: "somebody/kernels"})
    with pytest.raises(ValueError, match="code from the hub, which is never run"):
        lab.load_model(folder, device="cpu")


def test_no_chat_template_is_rendered(folder, mark):
    attack = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}" + "{% for i in range(10**9) %}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(attack)
    change(folder / "tokenizer_config.json", chat_template=attack)
    use(folder)
    assert not mark.exists()


def test_no_adapter_brings_code(folder, tmp_path, mark, monkeypatch):
    adapter = tmp_path / "adapter"
    model = get_peft_model(random_model("llama"), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(adapter)
    base, _ = lab.load_model(folder, device="cpu")
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    (tmp_path / "planted.py").write_text(PLANTED.format(str(mark)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    entries = [
        {"auto_mapping": {"base_model_class": "Planted", "parent_library": "planted"}},
        {"megatron_config": {"a": 1}, "megatron_core": "planted"},
        {"peft_type": "planted"},
        {"corda_config": {"cache_file": "planted.pt"}},
    ]
    whole = (adapter / "adapter_config.json").read_text()
    for changed in entries:
        (adapter / "adapter_config.json").write_text(whole)
        change(adapter / "adapter_config.json", base_model_name_or_path=str(folder), **changed)
        use(adapter)
    (adapter / "adapter_config.json").write_text(whole)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(Planted(PLANTED.format(str(mark))), adapter / "adapter_model.bin")
    use(adapter)
    assert not mark.exists()


@pytest.mark.parametrize("content", ["!!python/object/apply:os.system [touch {}]", "[" * 100_000])
def test_a_plan_is_data(tmp_path, mark, content):
    (tmp_path / "plan.json").write_text(content.format(mark))
    with pytest.raises(ValueError, match="is cut short or no JSON|nested too deeply"):
        lab.PruningPlan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_bytes(pickle.dumps(Planted(PLANTED.format(str(mark)))))
    with pytest.raises(ValueError, match="plan.json is "):
        lab.PruningPlan.load(tmp_path / "plan.json")
    assert not mark.exists()
