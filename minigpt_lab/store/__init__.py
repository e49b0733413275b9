"""What is kept on disk, whole or not at all: pinned packages, cached results, tensors, shards."""

from .atomic import (
    Scratch,
    atomic_write,
    clear_scratch,
    make_folder,
    remove_empty,
    undo_interrupted_write,
)
from .cache import ResultCache, cache_folder, cache_key, cached, is_result, read_cached
from .disk_errors import WriteFailed, explain_disk_errors, write_failed
from .packages import (
    CACHE_REMEDY,
    DATA,
    SourceUnavailable,
    fetch,
    hub_reachable,
    pinned_packages,
    read_archive,
    read_toml,
    verify,
)
from .run_state import RunState
from .shards import Shards
from .tensor_files import holds_kind, read_tensors, write_tensors
from .text_files import (
    DamagedFile,
    content_hash,
    parse_json,
    read_json,
    read_text,
    sha256,
    write_json,
)
