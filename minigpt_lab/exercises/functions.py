"""A reader's function, run on small inputs and compared with the right one."""

from __future__ import annotations

import contextlib
import copy
import inspect
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..checks import first_line

LIMIT = 10.0  #: seconds that a reader's function may run on one small input


class Unanswered(Exception):
    """The function returns ``...``, as the notebook's stub does."""


class Problem(Exception):
    """What is off about a function, in words."""


class _OutOfTime(BaseException):
    """No `Exception`, which a reader's own ``except`` would catch."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """End a block that runs too long, by the signal of an interval timer.

    A notebook's cells run in the main thread, which gets the signal. In another thread, and on
    Windows, there is no limit: the kernel's interrupt ends the block.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        yield
        return
    inside = True

    def stop(*_) -> None:
        if inside:
            raise _OutOfTime

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        try:
            yield
        finally:
            inside = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normally distributed numbers of a shape, the same in every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def function_problem(
    function: Callable,
    right: Callable,
    mistakes: Mapping[str, Callable],
    cases: Mapping[str, Sequence],
    tolerance: float,
) -> str | None:
    """What is off about a function, in words; None if it is right.

    Parameters
    ----------
    function, right : callable
        The reader's, and one that is right.
    mistakes : mapping
        Description of a mistake to a function that makes it.
    cases : mapping
        Description of some small inputs to these, in the order of the parameters of `right`.
    tolerance : float
        Relative to the right values.

    Raises
    ------
    Unanswered
        If the function returns ``...``.
    """
    expected = {case: right(*copy.deepcopy([*inputs])) for case, inputs in cases.items()}
    found = {}
    for case, inputs in cases.items():
        try:
            found[case] = _as_arrays(_call(function, right, inputs, expected[case]), expected[case])
        except Problem as problem:
            return f"{problem} (input: {case})" if len(cases) > 1 else str(problem)
    wanted = {case: _as_arrays(values, values) for case, values in expected.items()}
    wrong = [case for case in cases if not _same(found[case], wanted[case], tolerance)]
    if not wrong:
        return None
    for mistake, wrong_function in mistakes.items():
        with contextlib.suppress(Exception):  # it may not exist for some inputs
            outputs = {
                case: _as_arrays(wrong_function(*copy.deepcopy([*inputs])), expected[case])
                for case, inputs in cases.items()
            }
            if all(_same(found[case], outputs[case], tolerance) for case in cases):
                return f"this is {mistake}"
    difference = _difference([found[c] for c in cases], [wanted[c] for c in cases], tolerance)
    if len(wrong) < len(cases):
        good = " and ".join(case for case in cases if case not in wrong)
        return f"right for {good}; for {wrong[0]}, {difference}"
    return difference


def _call(function: Callable, right: Callable, inputs: Sequence, expected: Any) -> Any:
    """What a function returns for copies of the inputs, which it must leave as they are."""
    names = [*inspect.signature(right).parameters]
    with contextlib.suppress(ValueError):  # some functions in C do not tell their parameters
        own = inspect.signature(function)
        try:
            own.bind(*inputs)
        except TypeError:
            raise Problem(f"it takes {own}; expected the arguments {', '.join(names)}") from None
    given, before = copy.deepcopy([*inputs]), copy.deepcopy([*inputs])
    try:
        with _time_limit(LIMIT):
            output = function(*given)
    except _OutOfTime:
        raise Problem(
            f"it ran for more than {LIMIT:g} s on a small input; does a loop never end?"
        ) from None
    except (Exception, SystemExit) as error:
        raise Problem(f"it raises {_named(error, function)}") from None
    if output is ...:
        raise Unanswered
    for name, after, as_it_was in zip(names, given, before, strict=True):
        if change := _change(name, as_it_was, after):
            raise Problem(change)
    if output is None:
        raise Problem(f"it returns None; return {_described(expected, the=True)}")
    return output


def _named(error: BaseException, function: Callable) -> str:
    """An error in a few words, with the line of the function that it comes from."""
    code = getattr(function, "__code__", None)
    lines = [
        frame.lineno - code.co_firstlineno + 1
        for frame in traceback.extract_tb(error.__traceback__)
        if code and frame.filename == code.co_filename and frame.lineno
    ]
    words = f"{type(error).__name__}: {first_line(error)}"
    hint = "; change weights within `with torch.no_grad():`" * ("in-place" in words)
    where = f" (its line {lines[-1]})" if lines else ""
    return f"{words[:120]}{'…' * (len(words) > 120)}{hint}{where}"


def _change(name: str, before: Any, after: Any) -> str | None:
    """How an input was changed, in words; None if it was not."""
    if isinstance(before, nn.Module):
        hooks = [
            sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
            for model in (before, after)
        ]
        if hooks[0] != hooks[1]:
            return f"it leaves a hook on {name}; keep its handle, and call handle.remove()"
        old, new = before.state_dict(), after.state_dict()
        same = old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
        how = "put them back at the end, from a clone, as a slice is a view"
        return None if same else f"it changes the weights of {name}; {how}"
    if isinstance(before, torch.Tensor | np.ndarray):
        same = before.shape == after.shape and bool((before == after).all())
        how = "clone" if isinstance(before, torch.Tensor) else "copy"
        return None if same else f"it changes its input {name}; work on {name}.{how}()"
    if isinstance(before, list | dict):
        keys = range(len(before)) if isinstance(before, list) else before
        if len(before) != len(after) or any(_change(name, before[k], after[k]) for k in keys):
            return f"it changes its input {name}; work on a copy"
    return None


def _described(expected: Any, the: bool = False) -> str:
    """The kind of a right output: a tensor of a shape, a number, several values."""
    article = "the" if the else "a"
    if isinstance(expected, tuple):
        return f"{'the ' if the else ''}{len(expected)} values"
    if isinstance(expected, torch.Tensor | np.ndarray) and expected.ndim:
        kind = "tensor" if isinstance(expected, torch.Tensor) else "array"
        return f"{article} {kind} of shape {[*expected.shape]}"
    return f"{article} number"


def _as_arrays(output: Any, expected: Any) -> list[np.ndarray]:
    """What a function returns as arrays, as many as it should return."""
    several = isinstance(expected, tuple)
    if several and not (isinstance(output, tuple | list | torch.Tensor | np.ndarray)):
        raise Problem(f"it returns a {type(output).__name__}; expected {_described(expected)}")
    if several and len(output) != len(expected):
        raise Problem(f"it returns {len(output)} values; expected {len(expected)}")
    arrays = []
    for part in output if several else [output]:
        try:
            if isinstance(part, torch.Tensor):
                part = part.detach().cpu()  # NumPy has no bfloat16
                part = part if part.dtype == torch.bool else part.double()
            array = np.asarray(part)
            arrays.append(array if array.dtype.kind == "b" else array.astype(np.float64))
        except (TypeError, ValueError, RuntimeError):
            what = type(part).__name__
            raise Problem(f"it returns a {what}; expected {_described(expected)}") from None
    return arrays


def _same(found: list[np.ndarray], wanted: list[np.ndarray], tolerance: float) -> bool:
    """Whether all arrays have the same shapes and, within the tolerance, the same values."""
    return all(
        one.shape == other.shape
        and np.allclose(one, other, rtol=tolerance, atol=tolerance * 1e-3 * np.abs(other).max())
        for one, other in zip(found, wanted, strict=True)
    )


def _difference(
    found: Sequence[list[np.ndarray]], wanted: Sequence[list[np.ndarray]], tolerance: float
) -> str:
    """The first property that fails: shape, finite values, sign, scale, order, single values."""
    pairs = [pair for case in zip(found, wanted, strict=True) for pair in zip(*case, strict=True)]
    several = len(wanted[0])
    for number, (one, other) in enumerate(pairs):
        if one.shape != other.shape:
            turned = one.shape == other.shape[::-1]
            which = f" as value {number % several + 1} of {several}" * (several > 1)
            return (
                f"it returns shape {[*one.shape]}{which}; expected {[*other.shape]}"
                f"{'; transpose it' if turned else ''}"
            )
    for one, _ in pairs:
        if not np.isfinite(one).all():
            bad = one.size - int(np.isfinite(one).sum())
            return f"{bad} of {one.size} values are NaN or infinite"
    if all(_same([one], [-1.0 * other], tolerance) for one, other in pairs):
        return "the values have the right size and the wrong sign"
    factors = [factor for pair in pairs if (factor := _factor(*pair, tolerance))]
    if len(factors) == len(pairs):
        shown = [*dict.fromkeys(f"{factor:.3g}" for factor in factors)]
        if len(shown) == 1:
            return f"the scale is off: every value is {shown[0]} times the right one"
        return f"the scale is off, by another factor for each input: {', '.join(shown)}"
    one, other = next((x, y) for x, y in pairs if not _same([x], [y], tolerance))
    if np.allclose(np.sort(one, None), np.sort(other, None), rtol=tolerance):
        return "the right values, in another order"
    off = ~np.isclose(one, other, rtol=tolerance, atol=tolerance * 1e-3 * np.abs(other).max())
    place = tuple(int(i) for i in np.argwhere(off)[0])
    side = "large" if one[place] > other[place] else "small"
    where = f"the first, at {[*place]}, is" if place else "it is"
    if other.dtype == bool:
        return f"{int(off.sum())} of {off.size} values are off; {where} {bool(one[place])}"
    return f"{int(off.sum())} of {off.size} values are off; {where} too {side}"


def _factor(one: np.ndarray, other: np.ndarray, tolerance: float) -> float | None:
    """The number that the right values are multiplied by; None if it is not the same for all."""
    if one.dtype.kind == "b" or other.dtype.kind == "b" or not np.abs(other).max():
        return None
    factor = float((one * other).sum() / (other * other).sum())
    return factor if factor and _same([one], [factor * other], tolerance) else None
