"""Files and folders written whole or not at all, and never over what the package did not write.

What is being written stands in a scratch folder beside its place and takes its name in one step,
so a call that is interrupted or killed leaves the old or the new, never half. A scratch folder is
locked by the process that writes it: the next call removes those whose process is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..checks import require_creatable, to_path, writable_file, writable_folder
from .disk_errors import explain_disk_errors, write_failed

_LOCK, _NEW, _OLD = "owner.lock", "new", "old"
_SUFFIX = ".writing"


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises
    ------
    WriteFailed
        If the system refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failed(folder, error.errno or errno.EIO) from error


class Scratch:
    """A folder beside what is written, locked while this process uses it.

    Parameters
    ----------
    parent : pathlib.Path
        Where to make it; scratch folders of processes that are gone are removed there.
    name : str
        What it is for.

    Attributes
    ----------
    path : pathlib.Path
        To write in.
    """

    def __init__(self, parent: Path, name: str):
        make_folder(parent)
        clear_scratch(parent)
        here = parent.absolute()  # the working folder may be another one when it is closed
        while True:
            folder = tempfile.mkdtemp(prefix=f".{name[:40]}-", suffix=_SUFFIX, dir=here)
            self.folder = Path(folder)
            self._lock = FileLock(self.folder / _LOCK, thread_local=False)
            # another process may clear it before it is locked
            with contextlib.suppress(FileNotFoundError, FileExistsError):
                self._lock.acquire()
                if (self.folder / _LOCK).exists():
                    break
                self._lock.release()
        self.path = self.folder / _NEW
        self.path.mkdir()

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder."""
        _put_back(self.folder)
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.rmtree(self.folder / _OLD, ignore_errors=True)
        self._lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)


def clear_scratch(parent: Path) -> None:
    """Remove scratch folders of processes that are gone; put back what they had moved away."""
    with contextlib.suppress(OSError):
        for folder in [*parent.glob(f".*{_SUFFIX}")]:
            if folder.is_dir() and not folder.is_symlink():
                _clear(folder)


def _clear(folder: Path) -> None:
    with contextlib.suppress(OSError, NotImplementedError, RuntimeError, Timeout):
        content = {path.name for path in folder.iterdir()}
        if content and not {_LOCK} <= content <= {_LOCK, _NEW, _OLD}:
            return  # of somebody else
        if not content:
            folder.rmdir()  # killed before it was locked
            return
        with FileLock(folder / _LOCK, timeout=0):  # or its process still runs
            _put_back(folder)
            shutil.rmtree(folder, ignore_errors=True)


def _put_back(scratch: Path) -> None:
    """Return what was moved away for a replacement that did not come."""
    with contextlib.suppress(OSError):
        for old in (scratch / _OLD).iterdir():
            if not os.path.lexists(scratch.parent / old.name):
                old.rename(scratch.parent / old.name)


def undo_interrupted_write(path: Path) -> Path:
    """The same path, after a killed call that was replacing it has been undone."""
    if not os.path.lexists(path):
        clear_scratch(path.parent)
    return path


@contextlib.contextmanager
def atomic_write(path: Path, ours: Callable[[Path], set[str]] | None = None) -> Iterator[Path]:
    """Yield a scratch path that takes the name of `path`, in one step, on success.

    On an exception (Ctrl-C too) `path` is left as it was. A link is followed. A file replaces a
    file, never a folder. A folder replaces a folder, whose other files (a user's) are kept.

    Parameters
    ----------
    path : pathlib.Path
        Of the file or folder.
    ours : callable, optional
        Gives, for the old folder, the files (paths from it) that earlier calls wrote: they go.
        Files that the new folder has too are replaced in any case.

    Raises
    ------
    WriteFailed
        If the disk refuses.
    UnusablePath
        If the path cannot be written.
    """
    final = to_path(path).resolve()
    require_creatable(final)
    with explain_disk_errors(final), Scratch(final.parent, final.name) as scratch:
        staging = scratch.path / final.name
        yield staging
        if not staging.is_dir():
            staging.replace(writable_file(final))
        else:
            _give_name(final, staging, scratch.folder / _OLD, ours or (lambda _: set()))


def _give_name(final: Path, new: Path, old: Path, ours: Callable[[Path], set[str]]) -> None:
    """Give a folder its name; again if another writer has made or removed one there meanwhile."""
    for turns_left in reversed(range(100)):
        try:
            if os.path.lexists(final):
                _keep_others(writable_folder(final), new, ours(final))
                _swap(final, new, old)
            else:
                new.rename(final)
            return
        except OSError as error:
            meanwhile = error.errno in (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY)
            if not meanwhile or not turns_left:
                raise


def _swap(final: Path, new: Path, old: Path) -> None:
    """Give a new folder the name of an old one; there is one under the name at any moment.

    Where the system cannot exchange two names in one step, the old one waits in the scratch folder
    for an instant, from where `undo_interrupted_write` would bring it back.
    """
    if _exchange(final, new):
        return
    shutil.rmtree(old, ignore_errors=True)  # of a turn that another writer forestalled
    old.mkdir()
    final.rename(old / final.name)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)  # not to be put back when `final` is removed


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where system or file system cannot."""
    if sys.platform != "linux":
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    paths = os.fsencode(one), os.fsencode(other)
    system = ctypes.CDLL(None, use_errno=True)
    if system.renameat2(here, paths[0], here, paths[1], exchange) == 0:
        return True
    if ctypes.get_errno() == errno.ENOENT:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(one))
    return False


def _keep_others(old: Path, new: Path, ours: set[str], above: str = "") -> None:
    """Give a new folder what the old one holds beside our files: links to the same content."""
    for entry in old.iterdir():
        twin, name = new / entry.name, above + entry.name
        folder = entry.is_dir() and not entry.is_symlink()
        if name in ours or (os.path.lexists(twin) and not (folder and twin.is_dir())):
            continue
        if folder:
            twin.mkdir(exist_ok=True)
            _keep_others(entry, twin, ours, f"{name}/")
            if any(entry.iterdir()):
                remove_empty(twin)  # all in it was ours
        elif entry.is_symlink():
            twin.symlink_to(entry.readlink())
        else:
            try:
                os.link(entry, twin)
            except OSError:  # no links on this file system
                shutil.copy2(entry, twin)


def remove_empty(folder: Path) -> None:
    """Remove a folder that holds nothing; any other is left."""
    with contextlib.suppress(OSError):
        folder.rmdir()
