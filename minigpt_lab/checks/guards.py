"""One model is used by one call at a time, and what a call changes is put back whatever happens."""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_POLL = 0.1  # seconds between two looks at a model that is in use
_told = threading.local()
_turns: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_making = threading.Lock()
_waiting: dict[threading.Thread, _Turn] = {}


class _Deferred:
    """Ctrl-C, put off while a `safe_contextmanager` context is entered or left."""

    def __init__(self):
        self.contexts = 0  # open in the main thread
        self.pending = False
        self.previous: Callable = signal.default_int_handler

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

    def raise_pending(self) -> None:
        """Raise what was put off, where a context waits before it has changed anything."""
        if self.pending and threading.current_thread() is threading.main_thread():
            self.pending = False
            raise KeyboardInterrupt

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

    entered = False

    def __enter__(self):
        _deferred.begin()
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
            _deferred.end()


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


def safe_contextmanager(function: Callable) -> Callable:
    """`contextlib.contextmanager` for changes that must be undone: Ctrl-C never leaves half of one.

    An interrupt that comes while the context is entered or left is raised right after; what was
    changed is then put back.
    """

    @functools.wraps(function)
    def helper(*args, **options):
        return _Restoring(function, args, options)

    return helper


class _Turn:
    """Whose turn it is with one model: a thread may take it again, another one waits."""

    def __init__(self, name: str):
        self.name = name
        self.lock = threading.Lock()
        self.owner: threading.Thread | None = None
        self.depth = 0

    def take(self) -> None:
        """Wait until nobody else holds it; Ctrl-C and what `on_wait` was given end that."""
        me = threading.current_thread()
        if self.owner is not me:
            self._wait(me)
            self.owner = me
        self.depth += 1

    def give(self) -> None:
        """Undo one `take`."""
        self.depth -= 1
        if self.depth == 0:
            self.owner = None
            self.lock.release()

    def _wait(self, me: threading.Thread) -> None:
        _waiting[me] = self
        try:
            waited = 0.0
            while not self.lock.acquire(timeout=_POLL if waited else 0.02):
                _deferred.raise_pending()
                waited += _POLL
                getattr(_told, "call", _say)(self.name, waited)
                self._refuse_for_ever(me)
        finally:
            del _waiting[me]

    def _refuse_for_ever(self, me: threading.Thread) -> None:
        """Raise a RuntimeError where waiting would never end."""
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


def _say(name: str, waited: float) -> None:
    """Say once, after two seconds, why nothing happens."""
    if waited - _POLL < 2 <= waited:
        logging.getLogger(__name__).warning(
            "waiting: the %s is used by another thread (a widget's job, say)", name
        )


def on_wait(call: Callable[[str, float], None]) -> None:
    """Call this, in this thread, about ten times a second while it waits for a model.

    Parameters
    ----------
    call : callable
        Takes the model's kind and the seconds waited so far; an exception ends the wait.
    """
    _told.call = call


def waits_for_this_thread(thread: threading.Thread) -> bool:
    """Whether another thread waits for a model that this one holds."""
    turn = _waiting.get(thread)
    return turn is not None and turn.owner is threading.current_thread()


@safe_contextmanager
def locked(*models: object) -> Iterator[None]:
    """Hold models for this thread; a call of another thread that needs one of them waits.

    The thread that holds a model may call further functions on it.

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
        turns = {id(m): _turns.setdefault(m, _Turn(type(m).__name__)) for m in models}
    with contextlib.ExitStack() as held:
        for _, turn in sorted(turns.items()):  # one order for all threads: none waits in a circle
            turn.take()
            held.callback(turn.give)
        yield


class GlobalState:
    """What transformers and peft change for all threads while they build a model.

    Among it are torch's default type and its functions that initialise weights: two threads that
    build at once would leave those replaced by functions that do nothing.
    """


#: Held, like a model, for as long as something is built.
GLOBAL_STATE = GlobalState()


class Snapshot:
    """What a model is made of, by reference: modules, parameters, attributes, hooks, flags.

    Values of parameters are not copied: `restore` puts back which tensors a model has, not what is
    written into them.

    Parameters
    ----------
    model : torch.nn.Module
        Its configs (``config``, ``generation_config``) belong to it.
    """

    def __init__(self, model):
        configs = [getattr(model, name, None) for name in ("config", "generation_config")]
        self.owners = [
            (owner, {name: (value, _entries(value)) for name, value in vars(owner).items()})
            for owner in [*model.modules(), *configs]
            if owner is not None
        ]
        self.parameters = [(each, each.requires_grad, each.grad) for each in model.parameters()]

    def restore(self) -> None:
        """Make the model what it was; may be called again."""
        for owner, attributes in self.owners:
            own = vars(owner)
            for name in own.keys() - attributes.keys():
                del own[name]
            for name, (value, entries) in attributes.items():
                if entries is not None:  # the same dict: handles of hooks refer to it
                    value.clear()
                    value.update(entries)
                own[name] = value
        for parameter, required, gradient in self.parameters:
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _entries(value: object) -> dict | set | None:
    """A copy of what a dict or set holds."""
    return value.copy() if isinstance(value, dict | set) else None


@safe_contextmanager
def restore_on_exit(model) -> Iterator[Snapshot]:
    """Hold a model, and put back what it is made of on leaving (see `Snapshot`)."""
    with locked(model):
        before = Snapshot(model)
        try:
            yield before
        finally:
            before.restore()


@safe_contextmanager
def hooked(*registrations: Callable[[], Any]) -> Iterator[None]:
    """Have hooks for as long as the block runs.

    Parameters
    ----------
    *registrations : callable
        ``partial(module.register_forward_hook, hook)`` and the like: gives a handle to remove.
    """
    with contextlib.ExitStack() as handles:
        for register in registrations:
            handles.callback(register().remove)
        yield
