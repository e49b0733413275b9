"""Precision of passes that only read a model: bfloat16 where the device multiplies it fast."""

from __future__ import annotations

import contextlib
import functools
import os

import torch
from torch import nn

from ..checks import InvalidArgument, OneOf, invalid

PRECISIONS = ("auto", "bfloat16", "float32")
#: Environment variable that stands for ``"auto"`` everywhere: ``float32`` turns bfloat16 off.
PRECISION_VARIABLE = "MINIGPT_LAB_PRECISION"
PRECISION = OneOf(PRECISIONS)


def has_fast_bfloat16(device: torch.device | str) -> bool:
    """Whether a device multiplies bfloat16 faster than float32.

    CUDA from Ampere on, Apple silicon from macOS 14 on, CPUs with AMX or AVX512-BF16.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return kind == "cpu" and _cpu_has_fast_bfloat16()


@functools.cache
def _cpu_has_fast_bfloat16() -> bool:
    units = torch.cpu.get_capabilities()
    return bool(units.get("amx_bf16") or units.get("avx512_bf16"))


def reading_dtype(model: nn.Module, precision: str = "auto") -> torch.dtype:
    """The type in which a pass that only reads a model runs.

    Parameters
    ----------
    model : torch.nn.Module
        Its device and the type of its weights count.
    precision : {"auto", "bfloat16", "float32"}
        ``"auto"``: float32 weights are read as bfloat16 where the device is fast at it, all others
        as they are; the environment variable ``MINIGPT_LAB_PRECISION`` replaces it.

    Raises
    ------
    ValueError
        If the variable has no known value, or the device has no bfloat16.
    """
    weights = [p for p in model.parameters() if p.is_floating_point()]
    stored = weights[0].dtype
    if any(weight.is_meta for weight in weights):  # offloaded: read as stored
        return stored
    if asked_precision(precision) == "auto" and stored != torch.float32:
        return stored
    chosen = product_dtype(weights[0].device, precision)
    return chosen if chosen == torch.bfloat16 else torch.promote_types(stored, chosen)


def product_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """The type of matrix products in training on a device: bfloat16 or float32.

    Raises
    ------
    ValueError
        As for `reading_dtype`.
    """
    precision, fast = asked_precision(precision), has_fast_bfloat16(device)
    if precision == "bfloat16" and not fast and device.type != "cpu":
        raise InvalidArgument(
            f"precision is 'bfloat16', which {device} does not have; use 'auto' or 'float32'"
        )
    use = precision == "bfloat16" or (precision == "auto" and fast)
    return torch.bfloat16 if use else torch.float32


def asked_precision(precision: str) -> str:
    """``"auto"`` replaced by what the environment variable says, if it is set."""
    if precision != "auto":
        return precision
    precision = os.environ.get(PRECISION_VARIABLE) or "auto"
    if precision not in PRECISIONS:
        raise invalid(PRECISION_VARIABLE, precision, "auto, bfloat16 or float32")
    return precision


def cast_weights(model: nn.Module, dtype: torch.dtype, undo: contextlib.ExitStack) -> None:
    """Let a model compute in a type until `undo` ends; its own weights are put aside, untouched."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype and not parameter.is_meta:
            undo.callback(setattr, parameter, "data", parameter.data)
            parameter.data = parameter.data.to(dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
