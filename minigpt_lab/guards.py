"""One model is used by one call at a time, and what a call changes is put back whatever happens."""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType

_locks: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_making = threading.Lock()


@contextlib.contextmanager
def in_use(*models: object) -> Iterator[None]:
    """Hold models for this thread; a call of another thread that needs one of them waits.

    The thread that holds a model may call further functions on it.

    Parameters
    ----------
    *models : torch.nn.Module
        Repeats count once.
    """
    with _making:
        locks = {id(model): _locks.setdefault(model, threading.RLock()) for model in models}
    with contextlib.ExitStack() as held:
        for _, lock in sorted(locks.items()):  # one order for all threads: none waits in a circle
            held.enter_context(lock)
        yield


class _Deferred:
    """Ctrl-C, put off while a `restoring` context is entered or left."""

    def __init__(self):
        self.contexts = 0  # open in the main thread
        self.pending = False
        self.previous: Callable | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal if a context is being entered or left, else let it through."""
        self.pending = _in_transition(frame)
        if not self.pending:
            self.previous(number, frame)

    def begin(self) -> None:
        """Take the signal over, in the main thread and where it would raise an exception."""
        if threading.current_thread() is not threading.main_thread():
            return
        if self.contexts == 0:
            previous = signal.getsignal(signal.SIGINT)
            if not callable(previous):
                return
            self.previous = previous
            signal.signal(signal.SIGINT, self.handle)
        self.contexts += 1

    def end(self) -> None:
        """Give the signal back with the last context; raise what was put off."""
        if threading.current_thread() is not threading.main_thread() or self.contexts == 0:
            return
        self.contexts -= 1
        if self.contexts == 0 and signal.getsignal(signal.SIGINT) == self.handle:
            signal.signal(signal.SIGINT, self.previous)


_deferred = _Deferred()


class _Restoring(contextlib._GeneratorContextManager):
    """A generator's context manager that Ctrl-C interrupts only inside the ``with`` block."""

    def __enter__(self):
        _deferred.begin()
        try:
            value = super().__enter__()
        except BaseException:
            _deferred.end()
            raise
        if _due():
            interrupt = KeyboardInterrupt()
            self.__exit__(KeyboardInterrupt, interrupt, None)
            raise interrupt
        return value

    def __exit__(self, *exception):
        try:
            return super().__exit__(*exception)
        finally:
            _deferred.end()
            if _due():
                raise KeyboardInterrupt


_TRANSITIONS = {_Restoring.__enter__.__code__, _Restoring.__exit__.__code__}


def _in_transition(frame: FrameType | None, outermost: int = 0) -> bool:
    """Whether more than `outermost` contexts of this stack are being entered or left."""
    while frame is not None:
        outermost -= frame.f_code in _TRANSITIONS
        frame = frame.f_back
    return outermost < 0


def _due() -> bool:
    """Whether an interrupt was put off and no enclosing context puts it off further."""
    if threading.current_thread() is not threading.main_thread() or not _deferred.pending:
        return False
    if _in_transition(sys._getframe(1), 1):
        return False
    _deferred.pending = False
    return True


def restoring(function: Callable) -> Callable:
    """`contextlib.contextmanager` for changes that must be undone: Ctrl-C never leaves half of one.

    An interrupt that comes while the context is entered or left is raised right after; what was
    changed is then put back.
    """

    @functools.wraps(function)
    def helper(*args, **options):
        return _Restoring(function, args, options)

    return helper
