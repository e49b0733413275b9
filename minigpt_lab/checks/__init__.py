"""Checks of arguments, declared beside the signature: ``@checked(ratio=Number(above=0, below=1))``.

A check takes an argument's name and value and gives the value in the form that the function works
with (numbers of NumPy and torch become Python's), or refuses it in one sentence: what it is, what
is allowed, what to do.
"""

from .objects import Batches, Device, Model, Texts, Tokenizer, check_batch, checked
from .values import (
    Array,
    Flag,
    Function,
    Instance,
    Integer,
    InvalidArgument,
    ListOf,
    Location,
    MappingOf,
    Number,
    OneOf,
    Text,
    plain,
    refuse,
)

__all__ = [
    "Array",
    "Batches",
    "Device",
    "Flag",
    "Function",
    "Instance",
    "Integer",
    "InvalidArgument",
    "ListOf",
    "Location",
    "MappingOf",
    "Model",
    "Number",
    "OneOf",
    "Text",
    "Texts",
    "Tokenizer",
    "check_batch",
    "checked",
    "plain",
    "refuse",
]
