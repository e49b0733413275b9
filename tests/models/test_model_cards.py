"""The card of a saved model: what is known, measured and allowed; nothing that is not known."""

from __future__ import annotations

import pandas as pd
import pytest
from helpers import random_model, random_plan
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import minigpt_lab as lab
from minigpt_lab.models import by_name
from minigpt_lab.models.by_name import registry
from minigpt_lab.models.model_cards import _licence_metadata

TABLE = pd.DataFrame(
    [
        ("medical/test", "dense", 20.123, 19.0, 21.0, 0.9, 3e6),
        ("medical | test", "mini", 24.5, 23.0, float("nan"), 1.1234, 1e6),
    ],
    columns=["text", "variant", "perplexity", "low", "high", "bits_per_character", "bytes"],
)


@pytest.fixture
def mini(tiny):
    """A pruned tiny Llama, as `load_model` found the dense one."""
    model, _ = lab.load_model("tiny-llama", device="cpu")
    return lab.shrink(model, random_plan(model, 3))


def saved_card(folder) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_every_folder_has_a_card_that_the_hub_reads(tmp_path, tiny, mini):
    folder = lab.save_model(mini, tiny[1], tmp_path / "mini")
    card, size = saved_card(folder), lab.model_size(mini)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["minigpt-lab", "pruning", "structured-pruning"],
        "license": "apache-2.0",
        "language": "en",
    }
    for fact in (f"{size.stored:,}", f"{size.dense:,}", f"{size.stored / size.dense:.1%}"):
        assert fact in card.text
    assert "trained in this project" in card.text and "Not measured" in card.text
    assert "import minigpt_lab  #" in card.text and "lab.export_gguf(model" in card.text
    assert "lab.export_vllm(model" in card.text and "was not run there" in card.text
    # what was known of the base model outlives another round
    again, words = lab.load_model(folder, device="cpu")
    twice = lab.save_model(lab.shrink(again, random_plan(again, 4, False)), words, tmp_path / "two")
    assert saved_card(twice).data.license == "apache-2.0"
    assert saved_card(twice).text.count("- pruned by") == 2
    assert f"{size.dense:,}" in saved_card(twice).text


def test_measured_losses_come_with_their_protocol(tmp_path, tiny, mini):
    card = lab.model_card(mini, table=TABLE, protocol="512 tokens", domain="law", notes="trained")
    folder = lab.save_model(mini, tiny[1], tmp_path / "mini", card=card)
    text = saved_card(folder).text
    assert "| medical/test | dense | 20.12 | 19.00–21.00 | 0.900 | 3.0 |" in text
    assert "| medical \\| test | mini | 24.50 | 23.00–? | 1.123 | 1.0 |" in text
    assert "\n512 tokens\n" in text and "- trained\n" in text and "Not measured" not in text
    assert "law" in card.data.tags and "for the domain *law*" in text
    with pytest.raises(ValueError, match="protocol is ''; expected how the table was measured"):
        lab.model_card(mini, table=TABLE)
    with pytest.raises(ValueError, match="table is .*; expected a DataFrame with columns 'text'"):
        lab.model_card(mini, table=TABLE.drop(columns="low"), protocol="512 tokens")


def test_nothing_is_invented(tmp_path, tiny):
    """A model without a name, a licence or a domain."""
    few = lab.trim_tokenizer(lab.trim_tokenizer(tiny[1], range(259)), range(97))
    folder = lab.save_model(random_model("llama"), few, tmp_path / "model")
    card = saved_card(folder)
    assert {"license", "base_model", "language"}.isdisjoint(card.data.to_dict())
    assert "Not known here" in card.text and "It is not pruned" in card.text
    # the licence that a local base model's own card states is passed on
    base = tmp_path / "base"
    random_model("llama").save_pretrained(base)
    few.save_pretrained(base)
    for head, licence in (
        ("license: mit", "mit"),
        ("license: other\nlicense_name: llama3.2\nlicense_link: https://a.b/c", "other"),
        ("license: [1, 2]", None),
        ("license: &a [*a, *a]", None),
        ("license: !!python/object/apply:os.system ['false']", None),
    ):
        (base / "README.md").write_text(f"---\n{head}\n---\nA model\n")
        model, _ = lab.load_model(base, device="cpu")
        assert lab.model_card(model).data.license == licence
    (base / "README.md").write_bytes(b"---\n\xff\xfe" + b"[" * 10**5)
    assert lab.model_card(lab.load_model(base, device="cpu")[0]).data.license is None


def test_a_users_readme_is_left(tmp_path, tiny, mini):
    folder = lab.save_model(mini, tiny[1], tmp_path / "mini")
    readme = folder / "README.md"
    own = readme.read_text()
    readme.write_text(own.replace("# tiny-llama", "# Mine"))
    lab.save_model(mini, tiny[1], folder)
    assert readme.read_text() == own  # the marker is still there
    own = "\n".join(line for line in own.splitlines() if "minigpt_lab. Without" not in line)
    for text in (own, "my notes", ""):
        readme.write_text(text)
        lab.save_model(mini, tiny[1], folder, card=lab.model_card(mini))
        assert readme.read_text() == text
        lab.load_model(folder, device="cpu")


def test_a_hostile_origin_is_passed_over(tiny, mini):
    for origin in (3, [1], {"title": 3, "note": None, "licence": ["x"], "hub": {}}):
        mini.config.minigpt_lab_origin = origin
        assert {"license", "base_model"}.isdisjoint(lab.model_card(mini).data.to_dict())
        assert "pruned to" in lab.label(mini)
    mini.config.minigpt_lab_origin = {"title": "a\n# b", "note": "<script>", "licence": "x\ny: z"}
    text = lab.model_card(mini).text
    assert "\n# b" not in text and "<script>" not in text


def test_licences_of_the_registry_are_known_to_the_hub():
    found = {name: _licence_metadata(entry["licence"]) for name, entry in registry().items()}
    assert found["smollm2-135m"] == {"license": "apache-2.0"}
    assert found["gemma-3-270m"] == {
        "license": "other",
        "license_name": "gemma-terms-of-use",
        "license_link": "https://ai.google.dev/gemma/terms",
    }


def test_a_mini_saved_by_plain_transformers_is_still_pruned(tmp_path, tiny, mini):
    """Its plans lie in minigpt_lab.json, which transformers does not copy."""
    folder = lab.save_model(mini, tiny[1], tmp_path / "mini")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "plain")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "plain")
    model, _ = lab.load_model(tmp_path / "plain", device="cpu")
    assert lab.label(model) == lab.label(mini) and "pruned to" in lab.label(mini)
    card = lab.model_card(model)
    assert "structured-pruning" in card.data.tags and "A smaller version of" in card.text
    assert "the plans are not kept with these files" in card.text
    size = str(lab.model_card(mini)).partition("## Size")[2].partition("## How")[0]
    assert size in card.text and "| tokens | 1,024 |" in size
    for odd in (3, {"parameters": "many"}, {"parameters": 10**9, "layers": 0}):
        model.config.minigpt_lab_dense = odd
        assert "It is not pruned" in lab.model_card(model).text


def test_a_local_base_keeps_its_name(tmp_path, tiny):
    """Also where a step's folder has another name, as those of make_mini have."""
    base = tmp_path / "CoolBase-1B"
    few = lab.trim_tokenizer(lab.trim_tokenizer(tiny[1], range(259)), range(97))
    random_model("llama").save_pretrained(base)
    few.save_pretrained(base)
    for name, card in (
        ("CoolBase-1B", ""),
        ("Cool", "---\nmodel-index:\n- name: Cool\n  results: []\n---\n"),
    ):
        (base / "README.md").write_text(card)
        dense, words = lab.load_model(base, device="cpu")
        assert lab.label(dense) == "CoolBase-1B"
        pruned = lab.shrink(dense, random_plan(dense, 3, False))
        folder = lab.save_model(pruned, words, tmp_path / name / "pruned")
        again, _ = lab.load_model(folder, device="cpu")
        assert lab.label(again).startswith(f"{name}, pruned to")
        assert f"A smaller version of {name}, made" in lab.model_card(again).text


def test_the_hubs_copy_of_a_mini_has_its_plans(tmp_path, tiny, mini, monkeypatch):
    folder = lab.save_model(mini, tiny[1], tmp_path / "mini")

    def download(name, file, **where):
        if not (folder / file).exists():
            raise FileNotFoundError(file)
        return str(folder / file)

    monkeypatch.setattr(by_name, "hf_hub_download", download)
    model, _ = by_name._load_hub(str(folder), "auto")
    assert model.pruning_plans == mini.pruning_plans
    assert lab.tokenizer_for(model, tiny[1]) is not tiny[1]
    (folder / "minigpt_lab.json").unlink()
    model, _ = by_name._load_hub(str(folder), "auto")
    assert "the plans are not kept" in lab.model_card(model).text
