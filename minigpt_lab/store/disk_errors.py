"""Errors of a disk that refuses what is written to it, in one sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..checks import UnusablePath

_FULL = (errno.ENOSPC, errno.EDQUOT)
#: What a disk or its permissions refuse; other errors while writing are not about the disk.
_OF_DISKS = (*_FULL, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)


class WriteFailed(OSError):
    """The disk refused what was to be written: full, read-only or at a limit."""


def write_failed(path: Path, number: int, remedy: str = "choose another path") -> WriteFailed:
    """Error for a path that could not be written, by the system's error number."""
    reason = os.strerror(number)
    if number in _FULL:
        folder = next(parent for parent in path.absolute().parents if parent.is_dir())
        reason = f"{reason}, {shutil.disk_usage(folder).free / 2**20:.1f} MiB free"
        remedy = f"make room or {remedy}"
    error = WriteFailed(f"{path} could not be written ({reason}); {remedy}")
    error.errno = number
    return error


@contextlib.contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Raise `WriteFailed` for what a disk refuses while a path is written.

    Raises
    ------
    WriteFailed
        With the errno of the cause.
    """
    try:
        yield
    except Exception as error:
        said = re.search(r"\(os error (\d+)\)", str(error))  # a library of Rust hides it there
        number = getattr(error, "errno", None) or int(said[1] if said else 0)
        if number not in _OF_DISKS or isinstance(error, WriteFailed | UnusablePath):
            raise
        raise write_failed(path, number) from error


@contextlib.contextmanager
def warn_if_unsaved() -> Iterator[None]:
    """Warn instead of raising where a finished result is only written for a later call."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"the result is returned, but not kept: {error}", stacklevel=4)
