"""Checks of arguments, declared beside the signature: ``@checked(ratio=Number(above=0, below=1))``.

A check takes an argument's name and value and gives the value in the form that the function works
with (numbers of NumPy and torch become Python's), or refuses it in one sentence: what it is, what
is allowed, what to do.
"""

from .guards import (
    GLOBAL_STATE,
    Snapshot,
    hooked,
    locked,
    on_wait,
    restore_on_exit,
    safe_contextmanager,
    waits_for_this_thread,
)
from .objects import (
    COMPUTE_DTYPES,
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
    readable_file,
    require_creatable,
    to_path,
    writable_file,
    writable_folder,
)
from .python_values import as_json, to_python
from .values import (
    REFUSED,
    Array,
    DictOf,
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
    Text,
    invalid,
)
from .words import first_line, suggest

__all__ = [
    "COMPUTE_DTYPES",
    "GLOBAL_STATE",
    "REFUSED",
    "Array",
    "Batches",
    "Device",
    "DictOf",
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
    "Text",
    "Texts",
    "Tokenizer",
    "UnusablePath",
    "as_json",
    "check_batch",
    "check_fields",
    "checked",
    "first_line",
    "hooked",
    "invalid",
    "locked",
    "on_wait",
    "readable_file",
    "require_creatable",
    "restore_on_exit",
    "safe_contextmanager",
    "suggest",
    "to_path",
    "to_python",
    "waits_for_this_thread",
    "writable_file",
    "writable_folder",
]
