"""Changes of a model that are undone: snapshots of its parts, hooks for a block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from .interrupts import safe_contextmanager
from .model_locks import locked


class Snapshot:
    """References to all parts of a model: modules, parameters, attributes, hooks, flags.

    Values of parameters are not copied: `restore` restores which tensors a model has, not their
    values.

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
        """Restore the model; may be called again."""
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
    """Lock a model, and restore its parts at the end (see `Snapshot`)."""
    with locked(model):
        before = Snapshot(model)
        try:
            yield before
        finally:
            before.restore()


@safe_contextmanager
def hooked(*registrations: Callable[[], Any]) -> Iterator[None]:
    """Register hooks for as long as the block runs.

    Parameters
    ----------
    *registrations : callable
        ``partial(module.register_forward_hook, hook)`` and the like: returns a handle.
    """
    with contextlib.ExitStack() as handles:
        for register in registrations:
            handles.callback(register().remove)
        yield
