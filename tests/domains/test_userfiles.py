"""A person's folder: what is a text is read whole, and what is not is said."""

from __future__ import annotations

import json
import os
import warnings

import pytest
from helpers import passage
from hypothesis import given, settings
from hypothesis import strategies as st

import minigpt_lab as lab
from minigpt_lab.domains.passages import split_passages, split_words
from minigpt_lab.domains.user_texts import read_path
from minigpt_lab.store import RunState

TEXTS = [passage(i, 160) for i in range(8)]
TEXT = "\n\n".join(TEXTS)


def words(documents) -> list[str]:
    return sorted(split_words(" ".join(documents)))


def rows(*values) -> str:
    return "\n".join(map(json.dumps, values))


CHAT = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": TEXTS[1]}]
SHARED = [{"from": "human", "value": TEXTS[0]}, {"from": "gpt", "value": TEXTS[1]}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": TEXTS[0]}, {"type": "image"}]}]
QUOTED = "\n".join(f'{i};"{text}"' for i, text in enumerate(TEXTS[:2]))
READ = {  # name, content, the texts in it
    "a.TXT": (TEXT, TEXTS),
    "a.md": (TEXT, TEXTS),
    "mark.txt": (b"\xef\xbb\xbf" + TEXT.encode(), TEXTS),
    "wide.txt": (TEXT.encode("utf-16"), TEXTS),
    "windows.txt": (TEXT.replace("\n", "\r\n").encode(), TEXTS),
    "lines.jsonl": (rows(*({"text": t} for t in TEXTS)) + "\r\n", TEXTS),
    "separator.jsonl": (json.dumps({"text": "one\u2028two"}, ensure_ascii=False), ["one", "two"]),
    "array.json": (json.dumps([{"text": t} for t in TEXTS], indent=1), TEXTS),
    "strings.json": (json.dumps(TEXTS), TEXTS),
    "inside.json": (json.dumps({"data": [{"id": "x", "text": t} for t in TEXTS]}), TEXTS),
    "chat.jsonl": (rows({"messages": CHAT, "id": "x"}), TEXTS[:2]),
    "shared.jsonl": (rows({"conversations": SHARED}), TEXTS[:2]),
    "parts.jsonl": (rows({"messages": PARTS}), TEXTS[:1]),
    "pairs.jsonl": (rows({"prompt": TEXTS[0], "response": TEXTS[1], "n": 3}), TEXTS[:2]),
    "tuned.json": (
        json.dumps([{"instruction": TEXTS[0], "input": "", "output": TEXTS[1]}]), TEXTS[:2]
    ),
    "semicolons.csv": ("id;Text\n" + QUOTED, TEXTS[:2]),
    "tabs.tsv": ("id\ttext\n1\t" + TEXTS[0], TEXTS[:1]),
    "none.csv": ("id,text\n1,NA\n2,null", ["NA", "null"]),  # words, not numbers that are missing
    "marked.csv": (b"\xef\xbb\xbftext\r\n" + TEXTS[0].encode(), TEXTS[:1]),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_files_are_read_as_a_person_means_them(name, tmp_path):
    content, texts = READ[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    documents, notes = read_path(tmp_path / name, None)
    assert words(documents) == words(texts)
    assert not any("\ufeff" in text or "\r" in text for text in documents)
    joined = [note for note in notes if "as one text" in note]
    assert bool(joined) == (name in ("pairs.jsonl", "tuned.json")) and notes == joined


LEFT_OUT = {
    "files of other kinds": ["notes.pdf", "archive.csv.gz", "table.xlsx", "deep/questions.jsonl"],
    "hidden files, folders and backups": [
        ".DS_Store", "._a.txt", "a.txt~", "#a.txt#", ".a.txt.swp", "~$a.txt", ".git/x.txt",
        ".ipynb_checkpoints/a-checkpoint.txt", "__MACOSX/a.txt", "deep/.hidden.txt",
    ],
    "files without text": ["empty.txt", "blank.md", "empty.csv"],
    "tables without a column of texts": ["settings.json"],
}  # fmt: skip


def test_a_folder_is_read_to_its_depth_and_says_what_it_left_out(tmp_path):
    texts = {"a.txt": TEXTS[0], "deep/er/b.Md": TEXTS[1], "with space/ü.txt": TEXTS[2]}
    rest = {name: "secret words" for reason in LEFT_OUT for name in LEFT_OUT[reason]}
    rest |= {"empty.txt": "", "blank.md": " \n", "empty.csv": "", "settings.json": '{"a": [1]}'}
    asked = {"question": "One?", "choices": ["1", "2"], "answer": 1}
    rest |= {"Questions.JSONL": json.dumps(asked), "deep/questions.jsonl": json.dumps(asked)}
    holes = {"t.jsonl": rows({"text": TEXTS[3]}, {"text": None}, {"id": 3}, {"text": " "})}
    for name, content in (texts | rest | holes).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "deep" / "round").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    documents, [note] = read_path(tmp_path, None)
    assert words(documents) == words([*texts.values(), TEXTS[3]])
    for reason, names in LEFT_OUT.items():
        assert f"{reason} ({10 if 'hidden' in reason else len(names)}: " in note
    for said in ("rows without text (3: t.jsonl)", "pipes or devices (2: gone.txt, pipe.txt)"):
        assert said in note
    with pytest.warns(UserWarning, match=r"skipped .*files of other kinds \(4: .*notes.pdf"):
        domain = lab.load_domain(tmp_path)
    assert domain.notes == (note,) and [q.answer for q in domain.questions] == [1]


def test_repeats_are_counted_and_a_clean_folder_is_read_in_silence(tmp_path, monkeypatch):
    (tmp_path / "mine.v2").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "mine.v2" / f"{i}.txt").write_text(text)
    monkeypatch.chdir(tmp_path / "mine.v2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        domain = lab.load_domain(".")
    assert domain.name == "mine.v2" and domain.notes == ()
    (tmp_path / "mine.v2" / "copy.txt").write_text(TEXTS[0])
    with pytest.warns(UserWarning, match="dropped 1 of 9 passages, which nearly repeat"):
        assert lab.load_domain(".").dropped == 1


WRONG = {
    "latin.txt": ("naïve".encode("latin-1") * 9, "latin.txt cannot be read .*; save it as UTF-8"),
    "wide.txt": (TEXT.encode("utf-16-le"), "holds NUL characters: it is not text; save it as"),
    "long.csv": ("id,text\n1,a\n2,b,c\n", r"\(.*2 fields in line 3, saw 3\); put a text"),
    "open.csv": ('id,text\n1,"a\n', "cannot be read as .csv .*EOF inside string"),
    "first.csv": ("id,text\n1,a,b\n", "cannot be read as .csv .*header.*put a text"),
    "headless.csv": (TEXTS[0] + "\n" + TEXTS[1], "its first line is no header"),
    "broken.jsonl": ('{"text": "a"}\n{"text": ', "line 2: "),
    "deep.json": ("[" * 100_000, "nested too deeply"),
    "choose.jsonl": (rows({"a": "x", "b": "y"}), r"say which column .*\(column=…\): a, b"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_read_is_named_and_never_skipped(name, tmp_path):
    content, line = WRONG[name]
    (tmp_path / "good.txt").write_text(TEXT)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=line) as error:
            lab.load_domain(path)
        assert "\n" not in str(error.value) and name in str(error.value)


def test_models_and_runs_of_this_package_are_no_texts(tmp_path, tiny):
    """A user who works in her folder of texts leaves both there."""
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "of a user").mkdir()
    for name in ("state.json", "minutes.txt"):
        (tmp_path / "of a user" / name).write_text(rows({"text": TEXTS[0]}))
    before, _ = read_path(tmp_path, None)
    lab.save_model(*tiny, tmp_path / "models" / "mini")
    run = tmp_path / "runs" / "mini" / "texts"
    RunState(run / "state.json").write(seconds=1.0)
    (run / "table.csv").write_text("text,variant\nmedical/test,mini\n")
    (run / "model").mkdir()
    (run / "model" / "README.md").write_text(TEXT)
    documents, notes = read_path(tmp_path, None)
    assert documents == before and len(documents) == 3
    assert "folders that this package wrote (2: models/mini, runs/mini/texts)" in notes[0]


def test_a_column_needs_a_table(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(ValueError, match="column is 'body', but .* holds no table"):
            lab.load_domain(path, column="body")
    (tmp_path / "b.jsonl").write_text(rows({"body": TEXTS[0], "id": "x"}))
    documents, _ = read_path(tmp_path, "body")
    assert words(documents) == words([*TEXTS, TEXTS[0]])


@pytest.mark.parametrize("separator", ["", " ", "\u3000"])
@settings(max_examples=30)
@given(st.sampled_from(["word", "漢", "あい", "x" * 700]), st.integers(500, 2000))
def test_a_text_that_never_ends_a_sentence_is_cut_all_the_same(separator, word, count):
    text = separator.join([word] * count)
    pieces = split_passages(text)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert max(map(len, pieces)) <= 9100


def test_half_a_character_and_nul_are_no_text(tmp_path):
    texts = [f"{text} \ud800 \0 end" for text in TEXTS]
    for domain in (lab.make_domain("d", texts), lab.make_domain("\ud800 $\n", texts)):
        joined = "".join(text for part in domain.parts.values() for text in part)
        assert "\ufffd" in joined and "\0" not in joined and joined.encode()


ASKED = {"question": "One?", "choices": ["x", "y", "z"], "answer": 1}
ANSWERS = [
    ({"answer": "y"}, 1), ({"answer": "B"}, 1), ({"answer": "c"}, 2), ({"answer": " y "}, 1),
    ({"choices": ["B", "A"], "answer": "A"}, 1),  # the text of a choice goes before its letter
    ({"choices": {"A": "x", "C": "z"}, "answer": "C"}, 1),
    ({"choices": {"1": "x", "2": "z"}, "answer": "2"}, 1),
]  # fmt: skip


@pytest.mark.parametrize("form", ["lines", "array", "windows"])
def test_questions_in_everyday_forms(form, tmp_path):
    asked = [ASKED | change for change, _ in ANSWERS]
    text = json.dumps(asked, indent=2) if form == "array" else rows(*asked)
    text = "\ufeff" + text.replace("\n", "\r\n") if form == "windows" else text
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "questions.jsonl").write_bytes(text.encode())
    found = lab.load_domain(tmp_path).questions
    assert [q.answer for q in found] == [answer for _, answer in ANSWERS]


@pytest.mark.parametrize("answer", ["D", "w", "", None, 3, 1.0, True, ["y"], "AB", "1"])
def test_an_answer_is_never_guessed(answer, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "questions.jsonl").write_text(json.dumps(ASKED | {"answer": answer}))
    with pytest.raises(ValueError, match=r"line 1: the answer to .*; expected a whole number"):
        _ = lab.load_domain(tmp_path).questions
