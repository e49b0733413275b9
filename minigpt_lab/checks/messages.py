"""Error messages in one form: name and value, what is allowed, what to do."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Real

import numpy as np
import torch

_PYTHON = (str, bytes, Real, Sequence, Mapping, set, os.PathLike, type, type(None))
_NUMERIC = (torch.Tensor, torch.dtype, torch.device, np.ndarray, np.generic)
_SHOWN = (*_PYTHON, *_NUMERIC)  # types whose repr tells a user what was passed


class InvalidArgument(ValueError, TypeError):
    """An argument of the wrong type or out of range."""


def invalid(name: str, value: object, expected: str, remedy: str = "") -> InvalidArgument:
    """Error for an argument: ``ratio is 1.5; expected a number below 1``, and what to do."""
    return InvalidArgument(
        f"{name} is {_shown(value)}; expected {expected}{remedy and '; '}{remedy}"
    )


def _shown(value: object) -> str:
    """A value in at most 60 characters; arrays, models and other objects by their type."""
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim:
        return f"a {type(value).__name__} of shape {[*value.shape]}"
    if isinstance(value, torch.nn.Module) or not isinstance(value, _SHOWN):
        return f"a {type(value).__name__}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def suggest(name: str, known: Sequence[str]) -> str:
    """``"did you mean …?"`` with the most similar known names, or the list of all of them."""
    return did_you_mean(name, known) or f"known: {', '.join(known)}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"did you mean …?"`` with the most similar known names; empty if none is similar."""
    similar = get_close_matches(name, [*known], n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, similar))}?" if similar else ""


def first_line(error: BaseException) -> str:
    """First line of an error's message; its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
