"""Surgery, saving and loading hold for every family."""

from __future__ import annotations

import pytest
from helpers import CONFIGS


@pytest.fixture(params=sorted(CONFIGS))
def family(request) -> str:
    return request.param
