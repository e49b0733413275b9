"""Change one layer: its widths, biases, attributes and the config values that it reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from .anatomy import head_features, weight_axis


class LayerConfig:
    """The model's config as one layer sees it: with a few values of the layer's own.

    All other values are looked up in the model's config at every access, so that later changes (of
    the attention implementation, say) reach the layer.
    """

    def __init__(self, shared: PretrainedConfig):
        self.shared = shared

    def __getattr__(self, name: str):
        if name == "shared" or name.startswith("__"):  # copy.deepcopy asks before `shared` is set
            raise AttributeError(name)
        return getattr(self.shared, name)


def set_attribute(layer: nn.Module, path: str, value: int) -> None:
    """Set an attribute below a layer by its dotted path.

    A config along the path is first replaced by a `LayerConfig`, so that other layers' values stay.
    """
    *parents, name = path.split(".")
    owner = layer
    for parent in parents:
        child = getattr(owner, parent)
        if isinstance(child, PretrainedConfig):
            child = LayerConfig(child)
            setattr(owner, parent, child)
        owner = child
    setattr(owner, name, value)


def select_heads(argument: str, layer: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
    """Forward pre-hook that selects the layer's own heads in an argument with one entry per head.

    The model still builds the argument (ALiBi's slopes, say) for all heads of its config. The
    buffer ``surviving_heads`` lists those that the layer still has; it is saved and loaded with the
    weights, so that every head keeps its own slope.
    """
    if layer.surviving_heads is None:
        return None
    all_heads: torch.Tensor = kwargs[argument]  # [batch * heads, …]
    batch = args[0].shape[0]  # not len(): torch.export would take it for a constant
    by_head = all_heads.unflatten(0, (batch, -1))  # [batch, heads, …]
    own = by_head.index_select(1, layer.surviving_heads).flatten(0, 1)
    return args, {**kwargs, argument: own}


def choose_heads(layer: nn.Module, argument: str, heads: Sequence[int] | None) -> None:
    """Let a layer select these heads of an argument (`select_heads`); None for all."""
    if not hasattr(layer, "surviving_heads"):
        layer.register_buffer("surviving_heads", None)
        layer.register_forward_pre_hook(partial(select_heads, argument), with_kwargs=True)
    device = next(layer.parameters()).device
    chosen = None if heads is None else torch.tensor(heads, dtype=torch.int64, device=device)
    layer.surviving_heads = chosen


@torch.no_grad()
def set_widths(model: nn.Module, parts: dict, widths: dict) -> None:
    """Give the layers of a new model other numbers of units, in place.

    Which of its weights are kept does not matter: those of a file are loaded next.

    Parameters
    ----------
    parts : dict
        ``layers`` (path of their list), ``outputs`` and ``inputs`` (path of a linear layer to the
        blocks along its output or input), ``reader`` (path of attention's last projection),
        ``attributes`` and ``per_head`` as in `Family`.
    widths : dict
        Site to the number of units in every layer.
    """
    head_dim = head_features(model.config)
    for index, layer in enumerate(model.get_submodule(parts["layers"])):
        sites = ("ffn", "attention", "balanced_heads")
        channels, groups, heads = (widths[site][index] for site in sites)
        features = {"key": groups * head_dim, "value": groups * head_dim}
        features["query"] = groups * heads * head_dim
        for side in ("output", "input"):
            for path, blocks in parts[f"{side}s"].items():
                width = sum(features.get(block, channels) for block in blocks)
                first = np.arange(width)
                set_features(layer.get_submodule(path), side, first, first, width)
        set_heads(layer, parts["attributes"], parts["reader"], (groups, heads, head_dim))
        if parts["per_head"] and groups != model.config.num_attention_heads:
            choose_heads(layer, parts["per_head"], range(groups))


def set_heads(
    layer: nn.Module, attributes: dict[str, str], reader: str, grid: tuple[int, int, int]
) -> None:
    """Set the numbers of heads that the forward pass of a layer's attention reads.

    Parameters
    ----------
    attributes : dict
        As in `Family`.
    reader : str
        Path of attention's last projection.
    grid : tuple of int
        Key/value groups, query heads per group, features per head.
    """
    groups, heads, head_dim = grid
    values = {"query": groups * heads, "key": groups, "per_key": heads}
    values["features"] = groups * heads * head_dim
    for path, held in attributes.items():
        set_attribute(layer, path, values[held])
    path, _, name = reader.rpartition(".")
    attention = layer.get_submodule(path)
    forward = partial(without_heads, attention, name)
    set_forward(attention, None if values["query"] else forward)


def set_features(
    module: nn.Module, side: str, old: np.ndarray, new: np.ndarray, width: int
) -> None:
    """Resize a linear layer to `width` inputs or outputs; feature ``old[i]`` becomes ``new[i]``.

    Features of the new layer that are not in `new` are zero.
    """
    module.weight = _moved(module.weight, weight_axis(module, side), old, new, width)
    if isinstance(module, Conv1D) and side == "input":  # which cannot view inputs without features
        set_forward(module, None if width else partial(_constant, module))
    if side == "output":
        if module.bias is not None:
            module.bias = _moved(module.bias, 0, old, new, width)
        setattr(module, "nf" if isinstance(module, Conv1D) else "out_features", width)
    else:
        setattr(module, "nx" if isinstance(module, Conv1D) else "in_features", width)


def _moved(
    tensor: torch.Tensor, axis: int, old: np.ndarray, new: np.ndarray, width: int
) -> nn.Parameter:
    """Copy slices ``old`` of an axis to places ``new`` of a zero tensor with so wide an axis."""
    shape = list(tensor.shape)
    shape[axis] = width
    moved = tensor.new_zeros(shape)
    source, target = (
        torch.as_tensor(index, dtype=torch.int64, device=tensor.device) for index in (old, new)
    )
    moved.index_copy_(axis, target, tensor.index_select(axis, source))
    return nn.Parameter(moved, requires_grad=tensor.requires_grad)


def set_forward(module: nn.Module, forward: Callable | None) -> None:
    """Give a module this forward of its own; None for that of its class."""
    vars(module).pop("forward", None)
    if forward is not None:
        module.forward = forward


def _constant(module: Conv1D, x: torch.Tensor) -> torch.Tensor:
    """Output ``[…, out]`` of a linear layer without inputs: its bias."""
    return x.new_zeros(*x.shape[:-1], module.nf) + module.bias  # no view of a parameter


def without_heads(attention: nn.Module, reader: str, *args, **kwargs) -> tuple[torch.Tensor, None]:
    """Forward pass of attention without heads: the bias of its last projection, or zeros.

    Transformers reads the number of cached tokens from a layer's cache, so that gets one number for
    every token.

    Parameters
    ----------
    reader : str
        Path of the last projection below `attention`.
    """
    signature = inspect.signature(type(attention).forward)
    given = signature.bind(attention, *args, **kwargs).arguments
    states = given["hidden_states"]  # [batch, token, feature]
    cache = given.get("past_key_values", given.get("layer_past"))
    if cache is not None:
        token = states[:, None, :, :1].detach()  # [batch, 1, token, 1]
        cache.update(token, token, attention.layer_idx)
    output = attention.get_submodule(reader)(states[..., :0])
    residual = given.get("residual")  # which BLOOM's attention adds itself
    return output if residual is None else output + residual, None


def add_bias(module: nn.Module) -> None:
    """Give a linear layer a bias of zeros, and mark the layer (its architecture has no bias)."""
    outputs = module.weight.shape[weight_axis(module, "output")]
    zeros = module.weight.new_zeros(outputs)
    module.bias = nn.Parameter(zeros, requires_grad=module.weight.requires_grad)
    module.added_bias = True


def remove_bias(module: nn.Module) -> None:
    """Undo `add_bias`."""
    module.bias = None
    del module.added_bias


def has_added_bias(model: nn.Module) -> bool:
    """Whether `add_bias` gave some layer a bias that its architecture lacks."""
    return any(hasattr(module, "added_bias") for module in model.modules())
