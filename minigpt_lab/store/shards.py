"""Tensors offloaded one by one: stored on the device, in host memory or on disk."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..checks import Location, OneOf, checked, writable_folder
from .atomic import Scratch
from .disk_errors import explain_disk_errors


class Shards(MutableMapping):
    """Mapping of numbers to offloaded tensors; each is returned on the device it came from.

    Parameters
    ----------
    place : {"device", "cpu", "disk"}
        Where they are offloaded to. ``"cpu"`` uses pinned memory beside a CUDA device, so that
        copies overlap with the computation; ``"disk"`` a temporary folder, removed with the mapping
        (after a kill, by the next call).
    folder : str or path, optional
        In which to make that folder; by default the system's.
    """

    PLACES = ("device", "cpu", "disk")

    @checked(place=OneOf(PLACES), folder=Location() | None)
    def __init__(self, place: str = "device", folder: str | os.PathLike | None = None):
        self.place, self.folder = place, folder
        self._stored: dict[int, torch.Tensor | Path] = {}
        self._devices: dict[int, torch.device] = {}
        self._disk = Path()  # of the tensors, where they go to disk
        if place == "disk":
            scratch = Scratch(writable_folder(folder or tempfile.gettempdir()), "shards")
            self._disk = scratch.path
            weakref.finalize(self, scratch.close)

    def __setitem__(self, key: int, tensor: torch.Tensor) -> None:
        self._devices[key] = tensor.device
        if self.place == "cpu" and tensor.is_cuda:
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            tensor = host.copy_(tensor, non_blocking=True)
        elif self.place == "cpu":
            tensor = tensor.cpu()
        elif self.place == "disk":
            path = self._disk / f"{key}.safetensors"
            with explain_disk_errors(path):
                save_file({"tensor": tensor.contiguous()}, path)
            tensor = path
        self._stored[key] = tensor

    def __getitem__(self, key: int) -> torch.Tensor:
        stored = self._stored[key]
        if isinstance(stored, Path):
            stored = load_file(stored)["tensor"]
        return stored.to(self._devices[key], non_blocking=True)

    def __delitem__(self, key: int) -> None:
        stored = self._stored.pop(key)
        if isinstance(stored, Path):
            stored.unlink()

    def __iter__(self) -> Iterator[int]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
