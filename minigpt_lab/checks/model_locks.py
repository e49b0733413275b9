"""Locks of models: one model is used by one call at a time."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterator

from .interrupts import deferred, safe_contextmanager

_POLL = 0.1  # seconds between two attempts to lock a model
_callbacks = threading.local()
_locks: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_making = threading.Lock()
_waiting: dict[threading.Thread, _ModelLock] = {}


class _ModelLock:
    """Lock of one model: its thread may acquire it again, another one waits."""

    def __init__(self, name: str):
        self.name = name
        self.lock = threading.Lock()
        self.owner: threading.Thread | None = None
        self.depth = 0

    def acquire(self) -> None:
        """Wait until it is free; Ctrl-C and exceptions of the `on_wait` callback end the wait."""
        me = threading.current_thread()
        if self.owner is not me:
            self._wait(me)
            self.owner = me
        self.depth += 1

    def release(self) -> None:
        """Undo one `acquire`."""
        self.depth -= 1
        if self.depth == 0:
            self.owner = None
            self.lock.release()

    def _wait(self, me: threading.Thread) -> None:
        _waiting[me] = self
        try:
            waited = 0.0
            while not self.lock.acquire(timeout=_POLL if waited else 0.02):
                deferred.raise_pending()
                waited += _POLL
                getattr(_callbacks, "on_wait", _log_wait)(self.name, waited)
                self._raise_on_deadlock(me)
        finally:
            del _waiting[me]

    def _raise_on_deadlock(self, me: threading.Thread) -> None:
        """Raise a RuntimeError if the wait would never end."""
        owner, seen = self.owner, set()
        if owner is not None and not owner.is_alive():
            raise RuntimeError(
                f"the {self.name} is held by a thread that has ended inside a with block (masked, "
                "for instance); load the model anew"
            )
        while owner is not me and owner in _waiting and owner not in seen:
            seen.add(owner)
            owner = _waiting[owner].owner
        if owner is me:
            raise RuntimeError(
                f"two threads wait for each other's models (here for the {self.name}); let one "
                "finish before the other begins"
            )


def _log_wait(name: str, waited: float) -> None:
    """Log once, after two seconds, why nothing happens."""
    if waited - _POLL < 2 <= waited:
        logging.getLogger(__name__).warning(
            "waiting: the %s is used by another thread (a widget's job, say)", name
        )


def on_wait(callback: Callable[[str, float], None]) -> None:
    """Have a function called about ten times a second while this thread waits for a model.

    Parameters
    ----------
    callback : callable
        Takes the model's class and the seconds waited so far; an exception ends the wait.
    """
    _callbacks.on_wait = callback


def waits_for_this_thread(thread: threading.Thread) -> bool:
    """Whether a thread waits for a model that the calling thread has locked."""
    lock = _waiting.get(thread)
    return lock is not None and lock.owner is threading.current_thread()


@safe_contextmanager
def locked(*models: object) -> Iterator[None]:
    """Lock models for this thread; a call of another thread that needs one of them waits.

    The thread itself may call further functions on them.

    Parameters
    ----------
    *models : torch.nn.Module
        Repeats count once.

    Raises
    ------
    RuntimeError
        If the wait would never end: two threads wait for each other, or a thread ended without
        leaving its ``with`` block.
    """
    with _making:
        locks = {id(m): _locks.setdefault(m, _ModelLock(type(m).__name__)) for m in models}
    with contextlib.ExitStack() as stack:
        for _, lock in sorted(locks.items()):  # one order for all threads: no circle of waits
            lock.acquire()
            stack.callback(lock.release)
        yield


class GlobalState:
    """State that transformers and peft change for all threads while they build a model.

    Part of it are torch's default type and its functions that initialise weights: two threads that
    build at once would leave those replaced by functions that do nothing.
    """


#: Locked, like a model, for as long as one is built.
GLOBAL_STATE = GlobalState()
