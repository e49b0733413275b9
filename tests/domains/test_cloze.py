"""Cloze questions: of the test part alone, and nothing but the text tells the answer."""

from __future__ import annotations

from collections import Counter

import pytest

import minigpt_lab as lab
from minigpt_lab.domains.passages import split_words


@pytest.mark.parametrize("name", ["tiny-law", "law", "medical"])
def test_cloze_questions_are_of_the_test_part(name):
    domain = lab.load_domain(name)
    asked = lab.cloze_questions(domain)
    assert len(asked) >= (40 if name == "tiny-law" else 500)
    assert asked == lab.cloze_questions(domain) != lab.cloze_questions(domain, seed=1)
    assert lab.cloze_questions(domain, n=20) == asked[:20]
    parts = [part for part in domain.parts.values() if part is not domain.test]
    other = " ".join(" ".join(split_words(text.lower())) for part in parts for text in part)
    for question in asked:
        answer = question.choices[question.answer]
        [home] = {p for p in domain.test if p.startswith(f"{question.question} {answer}")}
        shown = {word.lower() for word in split_words(question.question)}
        assert not shown & set(question.choices)
        assert all(choice.islower() and choice.isalpha() for choice in question.choices)
        assert max(abs(len(choice) - len(answer)) for choice in question.choices) <= 3
        end = " ".join([*split_words(question.question.lower())[-7:], answer])
        assert f" {end} " not in other


@pytest.mark.parametrize("name", ["law", "medical"])
def test_frequency_length_and_place_do_not_tell(name):
    domain = lab.load_domain(name)
    counts = Counter(w for p in domain.parts.values() for t in p for w in split_words(t))
    asked = lab.cloze_questions(domain)
    for key in (lambda word: counts[word], len):
        for pick in (min, max):
            hits = [pick(q.choices, key=key) == q.choices[q.answer] for q in asked]
            assert 0.15 < sum(hits) / len(hits) < 0.35
    for place in range(4):
        assert 0.2 < sum(q.answer == place for q in asked) / len(asked) < 0.3
