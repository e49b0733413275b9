"""Tensors kept one by one where there is room for them: on the device, in host memory, on disk."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..checks import Location, OneOf, checked, writable_folder
from .storage import Scratch, explain_disk_errors

PLACES = ("device", "cpu", "disk")


class Shards(MutableMapping):
    """A mapping of numbers to tensors that come back on the device they were given from.

    Parameters
    ----------
    place : {"device", "cpu", "disk"}
        Where they wait. ``"cpu"`` uses pinned memory beside a CUDA device, so that copies overlap
        with the computation; ``"disk"`` a temporary folder, removed with the mapping (after a kill,
        by the next call).
    folder : str or path, optional
        In which to make that folder; by default the system's.
    """

    @checked(place=OneOf(PLACES), folder=Location() | None)
    def __init__(self, place: str = "device", folder: str | os.PathLike | None = None):
        self.place, self.folder = place, folder
        self._kept: dict[int, torch.Tensor | Path] = {}
        self._devices: dict[int, torch.device] = {}
        self._disk: Path | None = None
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
        self._kept[key] = tensor

    def __getitem__(self, key: int) -> torch.Tensor:
        kept = self._kept[key]
        if isinstance(kept, Path):
            kept = load_file(kept)["tensor"]
        return kept.to(self._devices[key], non_blocking=True)

    def __delitem__(self, key: int) -> None:
        kept = self._kept.pop(key)
        if isinstance(kept, Path):
            kept.unlink()

    def __iter__(self) -> Iterator[int]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)
