"""Models in the formats of llama.cpp: sizes are the files', cells are kept by what they measure."""

from __future__ import annotations

import copy

import pytest
from helpers import random_model

import minigpt_lab as lab
from minigpt_lab import studies
from minigpt_lab.studies import formats

HOW = {"kinds": ["F16", "Q4_0"], "max_tokens": 256, "seq_len": 64, "progress": False}


def test_a_row_for_every_model_format_and_text(tiny, tiny_domain, tmp_path):
    texts = [tiny_domain.test, lab.load_domain("tiny-games").test]
    table = studies.format_losses(*tiny, models={"100%": tiny[0]}, texts=texts, **HOW)
    assert table[["kind", "text"]].drop_duplicates().shape[0] == len(table) == 4
    for kind, bytes_ in table.drop_duplicates("kind").set_index("kind")["bytes"].items():
        path = lab.export_gguf(*tiny, tmp_path / f"{kind}.gguf", kind=kind)
        assert path.stat().st_size == bytes_
    assert "accuracy" not in table


def test_every_row_is_compared_with_the_best_file_pruned_less_and_rounded_more(tiny, tiny_domain):
    text = tiny_domain.test
    plan = lab.plan_from_scores(tiny[0], lab.score(tiny[0], "random"), ratio=0.5)
    half = lab.shrink(tiny[0], plan)
    models = {"dense": tiny[0], "half": half}
    how = HOW | {"max_tokens": 1024}  # several passages
    table = studies.format_losses(*tiny, models=models, texts=[text], **how)
    table = table.set_index(["model", "kind"])
    assert list(table.dropna(subset=["coarser"]).index) == [("half", "F16")]
    row, other = table.loc["half", "F16"], table.loc["dense", "Q4_0"]
    assert row["coarser"] == "dense Q4_0" and other["bytes"] <= row["bytes"]
    gap = row["bits_per_character"] - other["bits_per_character"]
    assert row["difference"] == pytest.approx(gap)
    assert row["difference_low"] < gap < row["difference_high"]


def test_finished_cells_are_kept_by_the_questions_asked(tiny, tiny_domain, tmp_path, monkeypatch):
    asked, real = [], formats.answer_questions

    def answer_questions(model, tokenizer, questions, **options):
        asked.append(questions)
        return real(model, tokenizer, questions, **options)

    monkeypatch.setattr(formats, "answer_questions", answer_questions)
    how = {**HOW, "kinds": ["Q8_0"], "models": {"100%": tiny[0]}, "texts": [tiny_domain.test]}
    first, second = tiny_domain.questions[:3], tiny_domain.questions[3:6]
    for questions in (first, first, second):  # as many, but others: measured anew
        table = studies.format_losses(*tiny, questions=questions, out_dir=tmp_path, **how)
        assert table["accuracy"].between(0, 1).all()
        wrote = lab.write_answers(lab.quantised(tiny[0], "Q8_0"), tiny[1], questions)
        assert (table["written"] == wrote.accuracy).all()
    assert asked == [first, second]
    with pytest.raises((TypeError, ValueError), match="questions"):
        studies.format_losses(*tiny, questions=["What?"], **how)
    monkeypatch.setattr(formats.HeldOut, "measure", None)
    models = {"good": tiny[0], "odd": random_model("opt")}
    with pytest.raises(ValueError, match="family 'opt', which is not written as GGUF"):
        studies.format_losses(*tiny, **{**how, "models": models})


def test_models_stored_in_bfloat16_are_read_in_float32(tiny, tiny_domain):
    """Or the rounded copy would be rounded once more, or not be compared at all."""
    model = copy.deepcopy(tiny[0]).bfloat16()
    how = {**HOW, "models": {"dense": model}, "texts": [tiny_domain.test]}
    table = studies.format_losses(model, tiny[1], **how)
    assert {*table["precision"]} == {"float32"} and (table["kl"] < 0.05).all()
