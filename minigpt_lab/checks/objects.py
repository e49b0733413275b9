"""Checks of models, tokenizers, devices, texts, tables and batches of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .messages import InvalidArgument, invalid
from .python_values import well_formed
from .values import Check, Instance, Mismatch, require

#: Types of weights that can be computed with.
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Model(Instance):
    """A transformers model with weights that can be computed with.

    Parameters
    ----------
    lock : bool
        Lock it for the thread of the call; False for calls that only look at shapes.
    """

    def __init__(self, lock: bool = True):
        super().__init__(PreTrainedModel, "lab.load_model returns a model and its tokenizer")
        self.expected += " with weights of float32, bfloat16, float16 or float64"
        self.locks = lock

    def _convert(self, name, value):
        model = super()._convert(name, value)
        odd = {str(p.dtype) for p in model.parameters() if p.dtype not in COMPUTE_DTYPES}
        kinds = ", ".join(sorted(odd))
        require(not odd, f"its weights are {kinds}; dequantise it, or load what it was made from")
        return model


class Tokenizer(Instance):
    """A transformers tokenizer."""

    def __init__(self):
        super().__init__(
            PreTrainedTokenizerBase, "lab.load_model returns a model and its tokenizer"
        )


class Device(Check):
    """A device that this machine has, as a string or `torch.device`."""

    expected = "a device of this machine: " + ", ".join(
        repr(device)
        for device in ("cpu", "cuda", "mps")
        if device == "cpu" or getattr(torch, device).is_available()
    )
    remedy = "leave it out for the best one"

    def _convert(self, name, value):
        require(isinstance(value, str | torch.device))
        try:
            device = torch.device(value)
            require(device.type != "meta")
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, ImportError, NotImplementedError):
            raise Mismatch from None
        return device


class Dtype(Check):
    """A type of weights that can be computed with, by its name or as torch has it."""

    expected = "a type of weights: 'float32', 'bfloat16', 'float16' or 'float64'"

    def _convert(self, name, value):
        dtype = getattr(torch, value, None) if isinstance(value, str) else value
        require(isinstance(dtype, torch.dtype) and dtype in COMPUTE_DTYPES)
        return dtype


class Texts(Check):
    """A part of a domain, a string, or several; never a whole domain."""

    expected = "texts: a Part, a string, or a list of strings"
    remedy = "of a domain, pass one of its parts, e.g. domain.test"

    def _convert(self, name, value):
        if isinstance(value, str):
            return well_formed(value)
        not_texts = bytes | Mapping | Set | torch.Tensor | pd.DataFrame  # a set has no order
        require(isinstance(value, Iterable) and not isinstance(value, not_texts))
        value = value if isinstance(value, Sequence) else list(value)
        require(all(isinstance(text, str) for text in value))
        valid = [well_formed(text) for text in value]
        return value if all(map(str.__eq__, valid, value)) else valid


class Frame(Check):
    """A data frame.

    Parameters
    ----------
    names, numbers : sequence of str
        Columns that it needs: of anything, of numbers.
    """

    def __init__(self, names: Sequence[str] = (), numbers: Sequence[str] = ()):
        self.names, self.numbers = names, numbers
        columns = ", ".join(map(repr, (*names, *numbers)))
        self.expected = "a DataFrame" + (columns and f" with columns {columns:.200}")

    def _convert(self, name, value):
        require(isinstance(value, pd.DataFrame))
        require({*self.names, *self.numbers} <= {*value.columns})
        numeric = (pd.api.types.is_numeric_dtype(value[column]) for column in self.numbers)
        require(value.empty or all(numeric))
        return value


class Batches(Check):
    """Batches of token ids, as `tokenize` gives them; an iterator becomes a list."""

    expected = "an iterable of {'input_ids', 'attention_mask'} tensors [batch, token]"
    remedy = "lab.tokenize(domain.calibration, tokenizer) gives it"

    def _convert(self, name, value):
        require(not isinstance(value, Mapping), "put it into a list")
        not_batches = isinstance(value, str | bytes | torch.Tensor | np.ndarray)
        require(isinstance(value, Iterable) and not not_batches)
        batches = value if isinstance(value, Sequence) else list(value)
        require(len(batches) > 0, f"it holds no tokens; {self.remedy}")
        for i, batch in enumerate(batches):
            check_batch(f"{name}[{i}]", batch)
        return batches


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
