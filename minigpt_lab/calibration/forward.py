"""Run a model over text; watch or replace what its modules do meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checks import hooked, safe_contextmanager
from ..models import check_token_ids, execution_device, set_forward


def run_decoder(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states ``[window, token, feature]`` of windows of tokens; the head is not run."""
    check_token_ids(model, ids)
    device = execution_device(model.get_input_embeddings())
    return model.base_model(input_ids=ids.to(device), use_cache=False)[0]


@safe_contextmanager
def watch(
    modules: Mapping[str, nn.Module],
    *,
    before: Callable[[str, torch.Tensor], torch.Tensor | None] | None = None,
    after: Callable[[str, torch.Tensor, torch.Tensor], None] | None = None,
) -> Iterator[None]:
    """Call functions around every run of some modules, for as long as the block lasts.

    Parameters
    ----------
    modules : mapping
        Modules by the names that the functions get.
    before : callable, optional
        ``(name, input)``; a tensor that it returns takes the input's place.
    after : callable, optional
        ``(name, input, output)``.
    """
    registrations = []
    for name, module in modules.items():
        if before is not None:
            pre_hook = partial(_pre_hook, partial(before, name))
            registrations.append(
                partial(module.register_forward_pre_hook, pre_hook, with_kwargs=True)
            )
        if after is not None:
            post_hook = partial(_post_hook, partial(after, name))
            registrations.append(partial(module.register_forward_hook, post_hook, with_kwargs=True))
    with hooked(*registrations):
        yield


def _pre_hook(before: Callable, _module: nn.Module, args: tuple, kwargs: dict):
    changed = before(_input(args, kwargs))
    return None if changed is None else ((changed, *args[1:]), kwargs)


def _post_hook(after: Callable, _module: nn.Module, args: tuple, kwargs: dict, output) -> None:
    after(_input(args, kwargs), first_output(output))


def _input(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def first_output(output: torch.Tensor | tuple) -> torch.Tensor:
    """The hidden states that a module returns, alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@safe_contextmanager
def patched_forward(modules: Iterable[nn.Module], forward: Callable) -> Iterator[None]:
    """Let modules run ``forward(own_forward, *args, **kwargs)`` for as long as the block lasts."""
    with contextlib.ExitStack() as undo:
        for module in modules:
            undo.callback(set_forward, module, vars(module).get("forward"))
            module.forward = partial(forward, module.forward)
        yield
