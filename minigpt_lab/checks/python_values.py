"""Values of NumPy and torch as Python's own, for functions and for JSON."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch


def to_python(value: object) -> Any:
    """A scalar of NumPy or torch as Python's; everything else as it is."""
    if isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0:
        return value.item()
    return value.item() if isinstance(value, np.generic) else value


def well_formed(text: str) -> str:
    """A text that can be written as UTF-8: half a surrogate pair becomes U+FFFD."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _by_name(value: object) -> str:
    return getattr(value, "__name__", str(value))


def as_json(value: object, unknown: Callable = _by_name) -> Any:
    """A value as JSON has it: numbers and arrays as Python's, paths as strings.

    Parameters
    ----------
    value : object
        Of a record, or of a plan's origin.
    unknown : callable, optional
        What becomes of anything else; by default its name.
    """
    value = to_python(value)
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(to_python(key)): as_json(item, unknown) for key, item in value.items()}
    if isinstance(value, Sequence | Set) and not isinstance(value, str | bytes):
        return [as_json(item, unknown) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return unknown(value)
