"""Context managers that Ctrl-C interrupts only inside their block, not while they make changes."""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType


class _Deferred:
    """Ctrl-C, deferred while a `safe_contextmanager` is entered or left."""

    def __init__(self) -> None:
        self.contexts = 0  # open in the main thread
        self.pending = False
        self.previous: Callable = signal.default_int_handler

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Defer the signal if a context is being entered or left, else pass it on."""
        self.pending = _in_transition(frame)
        if not self.pending:
            self.previous(number, frame)

    def begin(self) -> None:
        """Handle the signal, in the main thread and where it would raise an exception."""
        if threading.current_thread() is not threading.main_thread():
            return
        if self.contexts == 0:
            previous = signal.getsignal(signal.SIGINT)
            if not callable(previous):
                return
            self.previous = previous
            signal.signal(signal.SIGINT, self.handle)
        self.contexts += 1

    def raise_pending(self) -> None:
        """Raise what was deferred, where a context waits before it has changed anything."""
        if self.pending and threading.current_thread() is threading.main_thread():
            self.pending = False
            raise KeyboardInterrupt

    def end(self) -> None:
        """Restore the handler of the signal with the last context."""
        if threading.current_thread() is not threading.main_thread() or self.contexts == 0:
            return
        self.contexts -= 1
        if self.contexts == 0 and signal.getsignal(signal.SIGINT) == self.handle:
            signal.signal(signal.SIGINT, self.previous)


deferred = _Deferred()


class _Restoring(contextlib._GeneratorContextManager):
    """A generator's context manager that Ctrl-C interrupts only inside the ``with`` block."""

    entered = False

    def __enter__(self):
        deferred.begin()
        self.entered = True
        try:
            value = super().__enter__()
        except BaseException:
            self._ended()
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
            self._ended()
            if _due():
                raise KeyboardInterrupt

    def _ended(self) -> None:
        if self.entered:  # and not left twice
            self.entered = False
            deferred.end()


_TRANSITIONS = {_Restoring.__enter__.__code__, _Restoring.__exit__.__code__}


def _in_transition(frame: FrameType | None, outermost: int = 0) -> bool:
    """Whether more than `outermost` contexts of this stack are being entered or left."""
    while frame is not None:
        outermost -= frame.f_code in _TRANSITIONS
        frame = frame.f_back
    return outermost < 0


def _due() -> bool:
    """Whether an interrupt was deferred and no enclosing context defers it further."""
    if threading.current_thread() is not threading.main_thread() or not deferred.pending:
        return False
    if _in_transition(sys._getframe(1), 1):
        return False
    deferred.pending = False
    return True


def safe_contextmanager(function: Callable) -> Callable:
    """`contextlib.contextmanager` for changes that must be undone: Ctrl-C never leaves half of one.

    An interrupt that comes while the context is entered or left is raised right after, when what
    was changed has been restored.
    """

    @functools.wraps(function)
    def helper(*args, **options):
        return _Restoring(function, args, options)

    return helper
