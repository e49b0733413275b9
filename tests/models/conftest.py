"""Surgery, saving and loading hold for every family."""

from __future__ import annotations

import pytest
from helpers import CONFIGS

import minigpt_lab as lab


@pytest.fixture(params=sorted(CONFIGS))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def words(tiny):
    """A tokenizer of 97 tokens, to go with the random models."""
    _, full = tiny
    return lab.trim_tokenizer(lab.trim_tokenizer(full, sorted(range(259))), range(97))
