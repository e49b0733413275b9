"""Where a layer-by-layer run keeps what does not fit on the device, and what it has finished."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from ..checks import writable_folder
from ..models import Anatomy, add_bias, materialized, rebuild_layer
from ..store import (
    RunState,
    Shards,
    holds_kind,
    make_folder,
    read_cached,
    read_tensors,
    remove_empty,
    write_tensors,
)

STATE = "state.json"
_KIND = "finished"  # layers, of the files beside it

#: How runs differ in facts that are not named as an argument.
_DIFFERENCES = {
    "model": "another model",
    "tokens": "other calibration tokens",
    "counts": "another size or allocation",
    "search": "another size or search",
}


class Workspace:
    """Hidden states, offloaded weights and finished layers of one run.

    A run that was interrupted is continued at the layer where it stopped, if there is a folder.
    Damaged files are set aside, and the run begins anew.

    Parameters
    ----------
    offload : {"device", "cpu", "disk"}
        Place of the hidden states; see `Shards`.
    out_dir : str or path, optional
        Folder of the finished layers; made if need be.

    Attributes
    ----------
    finished : list of dict
        Of every finished layer, site to ``{"kept", "error"}``.

    Raises
    ------
    FileExistsError
        If a file in the folder has the name of one of ours and is something else: it is left alone.
    OSError
        If the folder cannot be made or written.
    """

    def __init__(self, offload: str = "device", out_dir: str | os.PathLike | None = None):
        self.hidden = Shards(offload)
        self.finished: list[dict[str, dict]] = []
        self.folder = None if out_dir is None else writable_folder(out_dir).absolute()
        if self.folder is not None:
            make_folder(self.folder)
        self.state = RunState(self.folder and self.folder / STATE, _DIFFERENCES)
        if self.folder is not None:
            self._read_layers()

    def _read_layers(self) -> None:
        """Read the run in the folder, if all of its files are there and readable."""
        progress = self.state.progress or {}
        layers = progress.get("layers", [])
        weights = [self._weights(layer) for layer, sites in enumerate(layers) if sites]
        hidden = self._hidden(len(layers))
        for path in {*_tensor_files(self.folder)} - {*weights, hidden}:
            if not holds_kind(path, _KIND):
                raise FileExistsError(
                    f"{path} exists and is of no run; it is left alone: choose another folder"
                )
        needed = weights + [hidden] * progress.get("hidden", hidden.exists())
        if [path for path in needed if read_cached(path, _read) is None]:
            self.state.forget()
        else:
            self.finished = layers

    def require(self, facts: Mapping[str, object]) -> None:
        """Refuse to continue a run with other arguments; see `RunState.require`."""
        self.state.require(facts)

    def weights_of(self, layer: nn.Module, index: int) -> AbstractContextManager:
        """A layer with all its weights on its device while inside; see `materialized`."""
        return materialized(layer, self.folder and self.folder / f"offloaded-{index}")

    def restore_hidden(self) -> None:
        """Replace the first layer's inputs by those of the first layer that is not finished."""
        path = None if self.folder is None else self._hidden(len(self.finished))
        if path is not None and path.is_file():
            for window, states in _read(path).items():
                self.hidden[int(window)] = states.to(self.hidden[int(window)].device)

    def restore_layer(self, anatomy: Anatomy, layer: int) -> dict[str, dict]:
        """Prune a finished layer of the dense model again; returns its entry of `finished`."""
        sites = self.finished[layer]
        tensors = _read(self._weights(layer)) if sites else {}
        for site, result in sites.items():
            module = anatomy.module(layer, anatomy.family.consumes[site])
            rebuild_layer(anatomy, site, layer, result["kept"])
            if f"{site}.bias" in tensors and module.bias is None:
                add_bias(module)
            for name, parameter in module.named_parameters():
                parameter.copy_(tensors[f"{site}.{name}"])
        return sites

    def finish_layer(self, anatomy: Anatomy, sites: Mapping[str, dict]) -> None:
        """Keep the next finished layer, and the hidden states behind it.

        Raises
        ------
        OSError
            If it cannot be written, e.g. because the disk is full: layers before it stay finished.
        """
        layer = len(self.finished)
        self.finished.append(dict(sites))
        if self.folder is None:
            return
        try:
            self._write_layer(anatomy, layer)
        except OSError as error:
            raise OSError(
                f"layer {layer} could not be written to {self.folder} ({error}); the layers "
                "before it are kept: make room and call again with the same arguments"
            ) from error
        self._hidden(layer).unlink(missing_ok=True)

    def _write_layer(self, anatomy: Anatomy, layer: int) -> None:
        modules = {
            site: anatomy.module(layer, anatomy.family.consumes[site])
            for site in self.finished[layer]
        }
        tensors = {
            f"{site}.{name}": parameter.detach()
            for site, module in modules.items()
            for name, parameter in module.named_parameters()
        }
        if tensors:
            write_tensors(self._weights(layer), _KIND, {}, tensors)
        goes_on = layer + 1 < len(anatomy.layers)
        if goes_on:
            states = {str(window): self.hidden[window] for window in self.hidden}
            write_tensors(self._hidden(layer + 1), _KIND, {}, states)
        self.state.write(layers=self.finished, hidden=goes_on)

    def _weights(self, layer: int) -> Path:
        return self.folder / f"layer-{layer}.safetensors"

    def _hidden(self, depth: int) -> Path:
        return self.folder / f"hidden-{depth}.safetensors"


def _read(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(path, _KIND)[1]


def discard(folder: str | os.PathLike) -> None:
    """Remove what `slimgpt` keeps in a folder of its own, and the folder if that was all."""
    folder = Path(folder)
    tensors = [path for path in _tensor_files(folder) if holds_kind(path, _KIND)]
    for path in (folder / STATE, folder / "search.jsonl", *tensors):
        path.unlink(missing_ok=True)
    remove_empty(folder)


def _tensor_files(folder: Path) -> list[Path]:
    return [*folder.glob("layer-*.safetensors"), *folder.glob("hidden-*.safetensors")]
