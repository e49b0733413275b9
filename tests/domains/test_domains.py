"""Parts that never overlap, a user's own text in one line, and what is said when it will not do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import passage

import minigpt_lab as lab
from minigpt_lab.domains import sources
from minigpt_lab.domains.parts import PARTS
from minigpt_lab.domains.passages import near_duplicates, split_passages
from minigpt_lab.domains.tokens import unpadded


@pytest.mark.parametrize("name", lab.domain_names(tiny=True))
def test_shipped_parts_are_disjoint_and_sized(name):
    domain = lab.load_domain(name)
    lab.check_disjoint(domain.parts)
    words = domain.summary().set_index("part")["words"]
    for part, share in PARTS.items():
        assert words[part] / words.sum() == pytest.approx(share, abs=0.03)


def test_the_same_text_gives_the_same_parts(tmp_path):
    texts = [passage(i) for i in range(60)]
    first, again = (lab.make_domain("d", t) for t in (texts, texts[::-1]))
    assert first.parts == again.parts


def test_near_duplicates_are_dropped_before_the_cut():
    texts = [passage(i) for i in range(60)]
    copies = [texts[3].upper(), texts[7].replace("gold", "silver", 1)]
    domain = lab.make_domain("d", [*texts, *copies])
    assert domain.dropped == 2


def test_overlapping_parts_are_refused():
    texts = [passage(i) for i in range(8)]
    parts = {"calibration": texts[:2], "train": texts[2:4], "validation": texts[4:6]}
    lab.check_disjoint({**parts, "test": texts[6:]})
    for copy in (texts[0], texts[0].replace("gold", "silver", 1).upper()):
        with pytest.raises(ValueError, match="'calibration' and 'test' overlap"):
            lab.check_disjoint({**parts, "test": [*texts[6:], copy]})
    with pytest.raises(ValueError, match="overlap"):
        made = {name: lab.Part("d", name, tuple(texts[:2])) for name in PARTS}
        lab.Domain("d", "", "", "", **made)


def test_unrelated_passages_are_not_duplicates():
    assert near_duplicates([passage(i) for i in range(50)]) == {}
    assert near_duplicates(["Yes, my lord.", "No, my lord.", "yes my lord"]) == {2: 0}


def test_cutting_loses_no_word():
    text = "First sentence here. Second one!\n\nA line\nAnother line? " + passage(1, 400)
    assert " ".join(split_passages(text)).split() == text.split()
    assert all(p.strip() == p and p for p in split_passages(text))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_a_users_own_file(tmp_path, suffix):
    path, texts = tmp_path / f"mine{suffix}", [passage(i) for i in range(50)]
    if suffix == ".txt":
        path.write_text("\n\n".join(texts))
    elif suffix == ".jsonl":
        path.write_text("\n".join(f'{{"id": {i}, "text": "{t}"}}' for i, t in enumerate(texts)))
    else:
        path.write_text("id,text\n" + "\n".join(f'{i},"{t}"' for i, t in enumerate(texts)))
    domain = lab.load_domain(path)
    assert domain.name == "mine"
    joined = " ".join(text for part in domain.parts.values() for text in part)
    assert sorted(joined.split()) == sorted(" ".join(texts).split())


def test_a_folder_of_texts(tmp_path):
    for i in range(45):
        (tmp_path / f"{i}.txt").write_text(passage(i, 200))
    domain = lab.load_domain(tmp_path)
    assert all(len(part) >= 4 for part in domain.parts.values())


def test_different_texts_of_one_name_are_refused(tmp_path):
    for home, start in {"a": 0, "b": 90, "copy": 0}.items():
        (tmp_path / home).mkdir()
        texts = [passage(start + i) for i in range(40)]
        (tmp_path / home / "notes.txt").write_text("\n\n".join(texts))
    first, second, copy = (tmp_path / home / "notes.txt" for home in ("a", "b", "copy"))
    line = f"'{first}' and '{second}' are different texts.*both.*'notes'; rename one"
    with pytest.raises(ValueError, match=line):
        lab.load_domains(["tiny-law", str(first), str(second)])
    names = [domain.name for domain in lab.load_domains([first, "tiny-law", first, copy])]
    assert names == ["notes", "tiny-law", "notes", "notes"]  # the same text again is no other
    with pytest.raises(TypeError, match="names_or_paths is 'law'; expected a list"):
        lab.load_domains("law")


def test_notebooks_load_several_domains_at_once():
    for path in Path(__file__).parents[2].glob("notebooks/*.ipynb"):
        source = path.read_text()
        assert source.count("lab.load_domain(") + source.count("lab.load_domains(") <= 1, path


def test_bad_input_is_named(tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "two.csv").write_text("question,answer\na,b\n")
    (tmp_path / "numbers.csv").write_text("id,score\n1,0.5\n2,0.7\n")
    (tmp_path / "data.parquet").write_text("")
    (tmp_path / "void").mkdir()
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1") * 9)
    for name, words in {
        "short.txt": "1 passage.* at least 4",
        "empty.txt": "is empty",
        "two.csv": "which column .*question, answer",
        "numbers.csv": r"is empty.*tables without a column of texts \(1: numbers.csv\)",
        "data.parquet": "expected a file of .txt, .*.jsonl",
        "broken.jsonl": "broken.jsonl cannot be read as .jsonl",
        "latin.txt": "latin.txt cannot be read as .txt in UTF-8",
    }.items():
        with pytest.raises(ValueError, match=words):
            lab.load_domain(tmp_path / name)
    with pytest.raises(ValueError, match="is empty: no text found"):
        lab.load_domain(tmp_path / "void")
    with pytest.raises(ValueError, match="no column 'anser'; did you mean 'answer'"):
        lab.load_domain(tmp_path / "two.csv", column="anser")
    with pytest.raises(ValueError, match="unknown domain 'medicl'.*'medical'"):
        lab.load_domain("medicl")
    with pytest.raises(ValueError, match="unknown domain 'my_texts/'"):
        lab.load_domain("my_texts/")
    with pytest.raises(ValueError, match="unknown domain 'tiny-law'"):
        lab.load_domain(sources.Path("tiny-law"))  # a path is a folder, never a name


def test_hub_domains_go_through_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"Answer": [passage(i) for i in range(50)], "n": [0] * 50})
    seen = []

    def load_dataset(path, config, split):
        seen.append((path, config, split))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    assert len(lab.load_domain("medical", online=True).test) > 4
    assert lab.load_domain("someone/texts").name == "someone-texts"
    assert seen[0] == ("Laurent1/MedQuad-MedicalQnADataset", None, "train")
    assert seen[1] == ("someone/texts", None, "train")

    def refused(*_args, **_kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refused)
    with pytest.raises(OSError, match="'someone/texts' could not be loaded: no route"):
        lab.load_domain("someone/texts")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(sources, "hub_reachable", lambda: False)
    with pytest.raises(OSError, match="out of reach"):
        lab.load_domain("someone/texts")


def test_texts_are_clean_of_what_they_came_through():
    raw = 'He said ""yes"" &amp; <a href="x">left</a>.\xa0If a < b, go.'
    assert sources.plain(raw) == 'He said "yes" & left. If a < b, go.'


def test_tokenize_packs_full_windows(tiny, tiny_domain):
    _, tokenizer = tiny
    batches = lab.tokenize(
        tiny_domain.calibration, tokenizer, seq_len=32, max_tokens=200, batch_size=4
    )
    assert [tuple(b["input_ids"].shape) for b in batches] == [(4, 32), (2, 32)]
    text = tokenizer.decode(batches[0]["input_ids"][0])
    assert tiny_domain.calibration[0].startswith(text[:40])
    first, second = batches.samples()
    assert batches[:2].tokenizer is batches.tokenizer and batches[:2].source == batches.source
    assert sum(len(b["input_ids"]) for b in first) == 3 == sum(len(b["input_ids"]) for b in second)
    with pytest.raises(ValueError, match="less than one window of seq_len=4096"):
        lab.tokenize(tiny_domain.validation, tokenizer, seq_len=4096)
    with pytest.raises(ValueError, match="seq_len is 0"):
        lab.tokenize(tiny_domain.validation, tokenizer, seq_len=0)


@pytest.mark.parametrize("mask", [2, -1, 0.5])
def test_a_mask_of_something_else_is_refused_where_padding_is_left_out(mask):
    ids = torch.ones(1, 4, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[mask, 1, 1, 1]])}
    with pytest.raises(ValueError, match="expected 1 for tokens and 0 for padding"):
        list(unpadded([batch]))
    assert [x.shape[1] for x in unpadded([{**batch, "attention_mask": ids.clone()}])] == [4]


def test_counts_of_tokens_and_windows_are_checked(tiny, tiny_domain):
    _, tokenizer = tiny
    texts = tiny_domain.validation
    for call, wrong in (
        (lab.tokenize, {"seq_len": None}), (lab.tokenize, {"batch_size": 0}),
        (lab.tokenize, {"max_tokens": -5}), (lab.tokenize, {"seq_len": True}),
        (lab.tokenize, {"text": 7}), (lab.count_tokens, {"tokenizer": "gpt2"}),
        (lab.excerpt, {"max_characters": 1}), (lab.excerpt, {"tokenizer": None, "max_tokens": 9}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*; expected"):
            call(**{"text": texts, "tokenizer": tokenizer, **wrong})
    batches = lab.tokenize(texts, tokenizer, seq_len=np.int64(32), max_tokens=torch.tensor(128))
    assert sum(len(batch["input_ids"]) for batch in batches) == 4
    with pytest.raises(ValueError, match="count is 0"):
        batches.samples(0)
