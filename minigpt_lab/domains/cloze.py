"""Cloze questions: the word that ends a clause of held-out text."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from hashlib import sha256

from ..checks import Instance, Integer, checked
from .domain import Domain
from .passages import SHINGLE, count_words, split_words
from .questions import CANDIDATES, PROMPT_WORDS, Question, Questions

#: A lower-case word of four letters or more that ends a clause, after another word and one space.
_CLAUSE_END = re.compile(r"(?<=[^\W\d_] )[^\W\d_]{4,}(?=[.,;:!?](?:\s|$))")
_STEM = 4  # words that begin with the same letters are forms of one word
_LENGTH = 3  # choices differ from the answer by at most so many letters


@checked(domain=Instance(Domain), n=Integer(1), seed=Integer(0))
def cloze_questions(domain: Domain, *, n: int = 1000, seed: int = 0) -> Questions:
    """Build questions on the test part: a passage up to the last word of a clause, and four words.

    Beside the sets of `domain.questions`, on which a small model may be at chance. Distractors end
    clauses elsewhere in the domain after the same word ("of the …"), are about as frequent in it,
    as often rarer as more frequent, and about as long. No choice is in the text shown.

    Parameters
    ----------
    domain : Domain
        Shipped or a user's own; the words of all parts are its vocabulary, but only text of its
        test part is shown, and no answer that ends the same eight words in another part.
    n : int
        Most questions. The first come from different passages: any first few are a fair sample.
    seed : int
        Seed of the choice of words.

    Returns
    -------
    Questions
        Fewer than `n` where the test part is short.
    """
    texts = [passage for part in domain.parts.values() for passage in part]
    counts = Counter(word for text in texts for word in split_words(text))
    pools = defaultdict(set)  # words that end a clause, by the word before them
    for text in texts:
        for before, word in _blanks(text):
            pools[_last(before)].add(word)
    ranked = {
        key: sorted(words, key=lambda word: (counts[word], sha256(word.encode()).digest()))
        for key, words in pools.items()
    }
    other = [part for part in domain.parts.values() if part is not domain.test]
    known = {run for part in other for text in part for run in _runs(split_words(text.lower()))}
    placed = []
    for passage in domain.test:
        blanks = list(_blanks(passage))
        random.Random(f"{seed}\n{passage}").shuffle(blanks)
        asked = 0  # questions on this passage so far
        for before, word in blanks:
            heard = [*split_words(before.lower())[1 - SHINGLE :], word]
            if count_words(before) < PROMPT_WORDS or tuple(heard) in known:
                continue
            rng = random.Random(f"{seed}\n{before}")
            choices = _choices(before, word, ranked[_last(before)], rng)
            if choices:
                source = f"cloze on {domain.name}"
                item = Question(before, choices, choices.index(word), source, domain.licence)
                placed.append((asked, rng.random(), item))
                asked += 1
    placed.sort(key=lambda entry: entry[:2])
    return Questions(item for _, _, item in placed[:n])


def _last(before: str) -> str:
    """The word before a blank."""
    return before.split()[-1].lower()


def _runs(words: list[str]) -> Iterator[tuple[str, ...]]:
    """Every `SHINGLE` words that follow one another."""
    return zip(*(words[i:] for i in range(SHINGLE)), strict=False)


def _blanks(passage: str) -> Iterator[tuple[str, str]]:
    """Text before the last word of each clause, and that word."""
    for match in _CLAUSE_END.finditer(passage):
        if match[0].islower():
            yield passage[: match.start() - 1], match[0]


def _choices(before: str, word: str, ranked: list[str], rng: random.Random) -> tuple[str, ...]:
    """The word and three others of its pool, near in frequency, shuffled; () if there are fewer."""
    shown = {each.lower() for each in split_words(before)}
    chosen, place = [word], ranked.index(word)

    def fits(other: str) -> bool:
        alike = any(other[:_STEM] == each[:_STEM] for each in chosen)
        return not alike and other not in shown and abs(len(other) - len(word)) <= _LENGTH

    rarer = 1 + rng.randrange(4)
    for side, total in ((ranked[:place][::-1], rarer), (ranked[place + 1 :], 4)):
        near = [other for other in side if fits(other)][:CANDIDATES]
        rng.shuffle(near)
        for other in near:
            if len(chosen) < total and fits(other):
                chosen.append(other)
    if len(chosen) < 4 or word in shown:
        return ()
    rng.shuffle(chosen)
    return tuple(chosen)
