"""Offloaded weights: kept in host memory or on disk by `accelerate` until a layer is called.

A model loaded with ``from_pretrained(…, device_map=…, offload_folder=…)`` may have such layers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import set_module_tensor_to_device
from torch import nn

from ..checks import safe_contextmanager


def is_offloaded(module: nn.Module) -> bool:
    """Whether some of a module's weights are offloaded between calls."""
    return any(parameter.is_meta for parameter in module.parameters())


def materialized_parameters(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over names and values of all parameters; reads one offloaded parameter at a time."""
    owners = dict(module.named_modules())
    for name, parameter in module.named_parameters():
        path, _, own = name.rpartition(".")
        yield name, owners[path]._hf_hook.weights_map[own] if parameter.is_meta else parameter


def execution_device(module: nn.Module) -> torch.device:
    """The device that a module computes on."""
    if not is_offloaded(module):
        return next(module.parameters()).device
    hooks = (getattr(each, "_hf_hook", None) for each in module.modules())
    return torch.device(next(hook.execution_device for hook in hooks if hook is not None))


@safe_contextmanager
def materialized(layer: nn.Module, folder: str | os.PathLike | None = None) -> Iterator[None]:
    """Hold all weights of a layer on its device inside the block, so that they can be changed.

    A layer that was offloaded is offloaded again afterwards, with the changed weights: to host
    memory, or to a folder.

    Parameters
    ----------
    layer : torch.nn.Module
        The layer; left as it is if it is not offloaded.
    folder : str or path, optional
        Folder for the weights of this one layer; by default they go to host memory. Required if the
        layer computes on the CPU, as host memory is what offloading saves there.

    Raises
    ------
    ValueError
        If the layer computes on the CPU, was offloaded to disk, and no folder is given.
    """
    if not is_offloaded(layer):
        yield
        return
    device = execution_device(layer)
    if folder is None and device.type == "cpu":
        raise ValueError(
            "the model's weights are offloaded to disk, as the pruned ones must be: give out_dir"
        )
    for module in layer.modules():
        hook = getattr(module, "_hf_hook", None)
        if hook is None:
            continue
        own = [name for name, each in module.named_parameters(recurse=False) if each.is_meta]
        # copies, because what comes from a file is a view that keeps the whole file mapped
        values = {name: hook.weights_map[name].clone() for name in own}
        remove_hook_from_module(module)
        for name, value in values.items():
            set_module_tensor_to_device(module, name, device, value=value)
    try:
        yield
    finally:
        if folder is None:
            cpu_offload(layer, device)
        else:
            Path(folder).mkdir(parents=True, exist_ok=True)
            disk_offload(layer, os.fspath(folder), device)
