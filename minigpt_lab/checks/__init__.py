"""Checks of arguments, declared beside the signature: ``@checked(ratio=Number(above=0, below=1))``.

A check takes an argument's name and value and returns the value in the form that the function
works with (numbers of NumPy and torch become Python's), or raises an error of one sentence: what
it is, what is allowed, what to do.
"""

from .arguments import check_fields, checked, refuse_unused
from .interrupts import deferred, safe_contextmanager
from .messages import InvalidArgument, first_line, invalid, suggest
from .model_locks import GLOBAL_STATE, locked, on_wait, waits_for_this_thread
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
from .snapshots import Snapshot, hooked, restore_on_exit
from .values import (
    Array,
    DictOf,
    Flag,
    Function,
    Instance,
    Integer,
    ListOf,
    Location,
    Number,
    OneOf,
    Text,
)
