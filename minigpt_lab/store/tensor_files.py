"""Tensors in one safetensors file, with what they are and a hash of their content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..checks import readable_file, to_python, writable_file
from .atomic import atomic_write
from .text_files import DamagedFile, damaged_file

_HASH = "content_sha256"
Result = TypeVar("Result")


def write_tensors(
    path: str | os.PathLike,
    kind: str,
    header: Mapping[str, object],
    tensors: Mapping[str, torch.Tensor],
) -> Path:
    """Write tensors whole or not at all; an existing file is replaced if it is of the same kind.

    Parameters
    ----------
    path : str or path
        Of the file.
    kind : str
        What they are: the name of the header in the file.
    header : mapping
        Plain data beside them.
    tensors : mapping
        By name.

    Raises
    ------
    FileExistsError
        If `path` holds something else.
    WriteFailed
        If the disk refuses.
    """
    path = writable_file(path)
    if path.exists() and not holds_kind(path, kind):
        raise FileExistsError(
            f"{path} exists and holds no {kind}; it is left alone: choose another path"
        )
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    # one entry: the order of several is random, and so would be the file
    metadata = json.dumps({**header, _HASH: _digest(tensors)}, default=to_python)
    with atomic_write(path) as staging:
        save_file(tensors, staging, {kind: metadata})
    return path


def read_tensors(
    path: Path, kind: str, build: Callable[[dict, dict[str, torch.Tensor]], Result]
) -> Result:
    """Build what a file of `write_tensors` holds from its header and tensors.

    Parameters
    ----------
    path : pathlib.Path
        The file.
    kind : str
        What it should hold.
    build : callable
        ``(header, tensors)`` to the result; fails if an entry is missing or wrong.

    Raises
    ------
    DamagedFile
        If it cannot be read or built from, or its content is no longer what was written.
    ValueError
        If it holds something else.
    """
    path = readable_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if kind not in metadata:
                raise ValueError(f"{path} is no readable {kind} file: it holds something else")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = json.loads(metadata[kind])
    except (SafetensorError, json.JSONDecodeError, RecursionError) as error:
        message = f"{path} is no readable {kind} file ({error})"
        raise damaged_file(path, ".safetensors", message) from error
    digest = _digest(tensors)
    if not isinstance(header, dict) or header.pop(_HASH, digest) != digest:
        raise DamagedFile(f"{path} is no readable {kind} file (its content has changed)")
    try:
        return build(header, tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFile(f"{path} is no readable {kind} file ({error})") from error


def holds_kind(path: Path, kind: str) -> bool:
    """Whether a file is empty or holds tensors of a kind, as far as its first bytes tell."""
    with path.open("rb") as file:
        head = file.read(4096)  # it may be damaged further on
    return not head or f'"{kind}":'.encode() in head


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        content.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        if tensor.numel():
            content.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()
