"""`trim_vocabulary`: what a domain uses, and as much of the general vocabulary as its share."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import minigpt_lab as lab
from minigpt_lab.models.vocabulary import TrimmedVocabulary


@pytest.fixture(scope="module")
def general():
    return lab.load_domain("tiny-games")


def kept(model) -> np.ndarray:
    return np.array(TrimmedVocabulary.of(model).allowed)


def counts(domain, tokenizer) -> np.ndarray:
    return sum(lab.count_tokens(part, tokenizer) for part in (domain.calibration, domain.train))


@pytest.mark.parametrize("generality", [0.0, 0.1, 0.5])
def test_a_token_stays_by_its_share_of_the_mixed_text(tiny, tiny_domain, general, generality):
    """The equation, on shares; what else stays is a part of what does, or a special token."""
    trimmed = lab.trim_vocabulary(*tiny, tiny_domain, general=general, generality=generality)
    n_d, n_g = counts(tiny_domain, tiny[1]), counts(general, tiny[1])
    shares = (1 - generality) * n_d / n_d.sum() + generality * n_g / n_g.sum()
    wanted = np.flatnonzero(shares >= (1 - generality) / n_d.sum() * (1 - 1e-9))
    found = kept(trimmed)
    assert {*wanted} <= {*found} and len(found) < len(n_d)
    words = lab.tokenizer_for(trimmed, tiny[1])
    for text in tiny_domain.train[:20]:  # its own text splits as before
        assert len(words(text)["input_ids"]) == len(tiny[1](text)["input_ids"])


def test_more_general_text_keeps_more_of_its_tokens(tiny, tiny_domain, general):
    sizes = [
        len(kept(lab.trim_vocabulary(*tiny, tiny_domain, general=general, generality=share)))
        for share in (0.0, 0.1, 0.5, 0.9)
    ]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert sizes[0] == len(kept(lab.trim_vocabulary(*tiny, tiny_domain)))


def test_general_text_of_no_words_is_refused(tiny, tiny_domain, general):
    parts = {name: lab.Part("none", name, ()) for name in ("calibration", "train")}
    with pytest.raises(ValueError, match="calibration and train part are empty; give another"):
        lab.trim_vocabulary(
            *tiny, tiny_domain, general=dataclasses.replace(general, **parts), generality=0.3
        )


def test_a_trimmed_model_is_trimmed_again_with_the_tokenizer_of_the_dense_one(tiny, tiny_domain):
    once = lab.trim_vocabulary(*tiny, lab.load_domain("tiny-games"))
    twice = lab.trim_vocabulary(once, tiny[1], tiny_domain)
    assert {*kept(twice)} < {*kept(once)}


def test_a_masked_model_is_refused(tiny, tiny_domain):
    plan = lab.plan_from_scores(tiny[0], lab.score(tiny[0], "magnitude", sites=("ffn",)), ratio=0.2)
    with lab.masked(tiny[0], plan), pytest.raises(ValueError, match="mask"):
        lab.trim_vocabulary(*tiny, tiny_domain)
