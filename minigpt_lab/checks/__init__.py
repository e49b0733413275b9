"""Checks of arguments, declared beside the signature: ``@checked(ratio=Number(above=0, below=1))``.

A check takes an argument's name and value and gives the value in the form that the function works
with (numbers of NumPy and torch become Python's), or refuses it in one sentence: what it is, what
is allowed, what to do.
"""

from .objects import (
    COMPUTED,
    Batches,
    Device,
    Dtype,
    Frame,
    Model,
    Texts,
    Tokenizer,
    check_batch,
    check_fields,
    checked,
)
from .python_values import as_json, plain
from .values import (
    REFUSED,
    Array,
    Flag,
    Function,
    Instance,
    Integer,
    InvalidArgument,
    Items,
    ListOf,
    Location,
    Number,
    OneOf,
    Table,
    Text,
    refuse,
)

__all__ = [
    "COMPUTED",
    "REFUSED",
    "Array",
    "Batches",
    "Device",
    "Dtype",
    "Flag",
    "Frame",
    "Function",
    "Instance",
    "Integer",
    "InvalidArgument",
    "Items",
    "ListOf",
    "Location",
    "Model",
    "Number",
    "OneOf",
    "Table",
    "Text",
    "Texts",
    "Tokenizer",
    "as_json",
    "check_batch",
    "check_fields",
    "checked",
    "plain",
    "refuse",
]
