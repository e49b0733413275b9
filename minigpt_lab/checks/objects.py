"""Checks of models, tokenizers, devices, texts and batches; the decorator that applies them."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .guards import locked
from .python_values import well_formed
from .values import REFUSED, AnyOf, Check, Instance, InvalidArgument, invalid


def checked(**checks: Check) -> Callable:
    """Check a function's arguments before it runs, and hold the models among them for this call.

    Defaults are not checked.

    Parameters
    ----------
    **checks : Check
        By the name of the argument.

    Raises
    ------
    InvalidArgument
        For the first argument that its check refuses.
    """

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)
        unknown = checks.keys() - signature.parameters.keys()
        assert not unknown, f"{function.__name__} takes no {unknown}"

        @functools.wraps(function)
        def call(*args, **options):
            bound = signature.bind(*args, **options)
            for name, check in checks.items():
                if name in bound.arguments:
                    bound.arguments[name] = check(name, bound.arguments[name])
            models = [
                value for name, value in bound.arguments.items() if _holds(checks.get(name), value)
            ]
            with locked(*models):
                return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def _holds(check: Check | None, value: object) -> bool:
    """Whether a value is a model that the call holds."""
    options = check.checks if isinstance(check, AnyOf) else [check]
    wanted = any(isinstance(option, Model) and option.hold for option in options)
    return wanted and isinstance(value, PreTrainedModel)


def check_fields(record: object, **checks: Check) -> None:
    """Check a dataclass's fields, in its ``__post_init__``; frozen or not, they become plain.

    Raises
    ------
    InvalidArgument
        For the first field that its check refuses.
    """
    for name, check in checks.items():
        object.__setattr__(record, name, check(name, getattr(record, name)))


class Model(Instance):
    """A transformers model with weights that can be computed with; held while the call runs.

    Parameters
    ----------
    hold : bool
        False for calls that only look at shapes, and so need not wait for others.
    """

    def __init__(self, hold: bool = True):
        super().__init__(PreTrainedModel, "lab.load_model returns a model and its tokenizer")
        self.hold = hold

    def __call__(self, name, value):
        """Refuse weights of a type that nothing can be computed with."""
        value = super().__call__(name, value)
        odd = {p.dtype for p in value.parameters() if p.dtype not in COMPUTE_DTYPES}
        if odd:
            kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in odd))
            raise InvalidArgument(
                f"{name} has weights of type {kinds}; expected float32, bfloat16, float16 or "
                "float64 (it is quantised); load the checkpoint it was made from, or dequantise it"
            )
        return value


COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Tokenizer(Instance):
    """A transformers tokenizer."""

    def __init__(self):
        super().__init__(
            PreTrainedTokenizerBase, "lab.load_model returns a model and its tokenizer"
        )


class Device(Check):
    """A device that this machine has, as a string or `torch.device`."""

    expected = "a device of this machine: " + ", ".join(
        repr(name)
        for name, there in (
            ("cpu", True), ("cuda", torch.cuda.is_available()),
            ("mps", torch.backends.mps.is_available()),
        )
        if there
    )  # fmt: skip
    remedy = "leave it out for the best one"

    def take(self, value):
        """A `torch.device` on which a tensor can be made."""
        if not isinstance(value, str | torch.device):
            return REFUSED
        with contextlib.suppress(RuntimeError, AssertionError, ImportError, NotImplementedError):
            device = torch.device(value)
            if device.type != "meta":
                torch.empty(0, device=device)
                return device
        return REFUSED


class Dtype(Check):
    """A type of weights that can be computed with, by its name or as torch has it."""

    expected = "a type of weights: 'float32', 'bfloat16', 'float16' or 'float64'"

    def take(self, value):
        """A `torch.dtype`."""
        found = getattr(torch, value, None) if isinstance(value, str) else value
        return found if isinstance(found, torch.dtype) and found in COMPUTE_DTYPES else REFUSED


class Texts(Check):
    """A part of a domain, a string, or several; never a whole domain."""

    expected = "texts: a Part such as domain.test, a string, or a list of strings"

    def __call__(self, name, value):
        """Say which part to pass where a whole domain is given."""
        if hasattr(value, "calibration"):
            remedy = "pass one of its parts, e.g. domain.test"
            raise InvalidArgument(
                f"{name} is the Domain {value.name!r}; expected one part; {remedy}"
            )
        return super().__call__(name, value)

    def take(self, value):
        """A string, or a sequence of them (other iterables become a list)."""
        if isinstance(value, str):
            return well_formed(value)
        odd = bytes | Mapping | Set | torch.Tensor | pd.DataFrame  # a set has no order
        if isinstance(value, odd) or not isinstance(value, Iterable):
            return REFUSED
        value = value if isinstance(value, Sequence) else list(value)
        if not all(isinstance(text, str) for text in value):
            return REFUSED
        same = all(well_formed(text) is text for text in value)
        return value if same else [well_formed(text) for text in value]


class Frame(Check):
    """A data frame.

    Parameters
    ----------
    names, numbers : sequence of str
        Columns that it needs: of anything, of numbers.
    """

    def __init__(self, names: Sequence[str] = (), numbers: Sequence[str] = ()):
        self.names, self.numbers = names, numbers
        columns = ", ".join(map(repr, (*self.names, *self.numbers)))
        self.expected = "a DataFrame" + (columns and f" with columns {columns:.200}")

    def take(self, value):
        """The frame itself."""
        if not isinstance(value, pd.DataFrame) or {*self.names, *self.numbers} - {*value.columns}:
            return REFUSED
        numeric = (pd.api.types.is_numeric_dtype(value[name]) for name in self.numbers)
        return value if value.empty or all(numeric) else REFUSED


class Batches(Check):
    """Batches of token ids, as `tokenize` gives them; an iterator is checked as it is read.

    Parameters
    ----------
    again : bool
        Whether they are read more than once: an iterator becomes a list.
    """

    expected = "an iterable of {'input_ids', 'attention_mask'} tensors [batch, token]"
    remedy = "lab.tokenize(domain.calibration, tokenizer) gives it"

    def __init__(self, again: bool = False):
        self.again = again

    def __call__(self, name, value):
        """Refuse what is no batch, naming its place."""
        odd = isinstance(value, str | bytes | Mapping | torch.Tensor | np.ndarray)
        if odd or hasattr(value, "calibration") or not isinstance(value, Iterable):
            remedy = "put it into a list" if isinstance(value, Mapping) else self.remedy
            raise invalid(name, value, self.expected, remedy)
        if not isinstance(value, Sequence) and self.again:
            value = list(value)
        if not isinstance(value, Sequence):
            return self._as_read(name, value)
        if not len(value):
            raise invalid(name, value, "at least one batch (there are no tokens)", self.remedy)
        for place, batch in enumerate(value):
            check_batch(f"{name}[{place}]", batch)
        return value

    def take(self, value):
        """As a call says; for lists of batches."""
        try:
            return self("it", value)
        except InvalidArgument:
            return REFUSED

    def _as_read(self, name: str, batches: Iterable) -> Iterator:
        for place, batch in enumerate(batches):
            check_batch(f"{name}[{place}]", batch)
            yield batch


def check_batch(name: str, batch: object) -> None:
    """Refuse a batch that is not ``{"input_ids": [batch, token], "attention_mask": of 0 and 1}``.

    Raises
    ------
    InvalidArgument
        Naming what is wrong with it.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise invalid(name, batch, "a mapping with input_ids [batch, token]", Batches.remedy)
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    whole = isinstance(ids, torch.Tensor) and ids.dtype in (torch.int64, torch.int32)
    if not whole or ids.ndim != 2 or ids.is_meta:
        expected = "a tensor of whole numbers (int64 or int32) [batch, token]"
        raise invalid(f"{name}['input_ids']", ids, expected, "one text alone is ids[None]")
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
        raise invalid(f"{name}['attention_mask']", mask, f"a tensor of shape {[*ids.shape]}")
    odd = mask[(mask != 0) & (mask != 1)]
    if len(odd):
        raise InvalidArgument(
            f"{name}['attention_mask'] holds {odd[0].item()}; expected 1 for tokens and 0 for "
            "padding, nothing else"
        )
