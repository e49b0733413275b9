"""Checks of arguments, declared beside the signature: ``@checked(ratio=Number(above=0, below=1))``.

A check takes an argument's name and value and gives the value in the form that the function works
with (numbers of NumPy and torch become Python's), or refuses it in one sentence: what it is, what
is allowed, what to do.
"""

from .guards import (
    FACTORY,
    Snapshot,
    hooked,
    in_use,
    restoring,
    unchanged,
    waits_for_me,
    when_waiting,
)
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
from .paths import (
    UnusablePath,
    file_to_read,
    file_to_write,
    folder_to_write,
    located,
    require_makeable,
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
from .words import first_line, nearest

__all__ = [
    "COMPUTED",
    "FACTORY",
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
    "Snapshot",
    "Table",
    "Text",
    "Texts",
    "Tokenizer",
    "UnusablePath",
    "as_json",
    "check_batch",
    "check_fields",
    "checked",
    "file_to_read",
    "file_to_write",
    "first_line",
    "folder_to_write",
    "hooked",
    "in_use",
    "located",
    "nearest",
    "plain",
    "refuse",
    "require_makeable",
    "restoring",
    "unchanged",
    "waits_for_me",
    "when_waiting",
]
