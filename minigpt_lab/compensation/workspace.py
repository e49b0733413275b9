"""Storage of a layer-by-layer run: hidden states, offloaded weights, finished layers."""

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
from .block_fitting import LOSSES
from .projection import part_of

STATE = "state.json"
_KIND = "finished"  # written into the tensor files of a run, to tell them from others

#: Words for facts in which two runs differ, where these are not named as an argument.
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
        For every finished layer, site to ``{"kept", "error"}``.

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
        self.folder, self.state = None, RunState(None)
        if out_dir is not None:
            self.folder = writable_folder(out_dir).absolute()
            make_folder(self.folder)
            self.state = RunState(self.folder / STATE, _DIFFERENCES)
            self._read_layers()

    def _read_layers(self) -> None:
        """Read the run in the folder; forget it if one of its files is missing or damaged."""
        # 1. The files that belong to the run, by its state file.
        progress = self.state.progress or {"layers": [], "hidden": False}
        layers = progress["layers"]
        paths = [self._weights(layer) for layer in range(len(layers))]
        paths += [self._hidden(len(layers))] * progress["hidden"]
        # 2. Refuse a folder that has files of the same names from something else.
        for path in {*_tensor_files(self.folder)} - {*paths}:
            if not holds_kind(path, _KIND):
                raise FileExistsError(
                    f"{path} exists and is of no run; it is left alone: choose another folder"
                )
        # 3. Read them all, so that damaged ones are set aside.
        if None in [read_cached(path, _read) for path in paths]:
            self.state.forget()
        else:
            self.finished = layers

    def weights_of(self, layer: nn.Module, index: int) -> AbstractContextManager:
        """Context in which all weights of a layer are on its device; see `materialized`."""
        return materialized(layer, self.folder and self.folder / f"offloaded-{index}")

    def restore_hidden(self) -> None:
        """Replace the first layer's inputs by those of the first layer that is not finished."""
        path = None if self.folder is None else self._hidden(len(self.finished))
        if path is not None and path.is_file():
            for window, states in _read(path).items():
                self.hidden[int(window)] = states.to(self.hidden[int(window)].device)

    def restore_layer(self, anatomy: Anatomy, layer: int) -> None:
        """Load a finished layer into the dense model."""
        tensors = _read(self._weights(layer))
        for site, result in self.finished[layer].items():
            rebuild_layer(anatomy, site, layer, result["kept"])
            for key, module in _changed_modules(anatomy, layer, site, result).items():
                if f"{key}.bias" in tensors and module.bias is None:
                    add_bias(module)
                for name, parameter in module.named_parameters():
                    parameter.copy_(tensors[f"{key}.{name}"])

    def finish_layer(self, anatomy: Anatomy, sites: Mapping[str, dict]) -> None:
        """Record the next finished layer; write its weights and the next layer's inputs.

        Raises
        ------
        OSError
            If it cannot be written, e.g. because the disk is full: earlier layers remain finished.
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
        self._hidden(layer).unlink(missing_ok=True)  # inputs of the finished layer: done with

    def _write_layer(self, anatomy: Anatomy, layer: int) -> None:
        """Write a layer's pruned projections, the next layer's inputs, and last the state file."""
        tensors = {
            f"{key}.{name}": parameter.detach()
            for site, result in self.finished[layer].items()
            for key, module in _changed_modules(anatomy, layer, site, result).items()
            for name, parameter in module.named_parameters()
        }
        write_tensors(self._weights(layer), _KIND, {}, tensors)
        has_next = layer + 1 < len(anatomy.layers)
        if has_next:
            states = {str(window): self.hidden[window] for window in self.hidden}
            write_tensors(self._hidden(layer + 1), _KIND, {}, states)
        self.state.write(layers=self.finished, hidden=has_next)

    def _weights(self, layer: int) -> Path:
        """File of a finished layer's weights."""
        return self.folder / f"layer-{layer}.safetensors"

    def _hidden(self, layer: int) -> Path:
        """File of a layer's inputs."""
        return self.folder / f"hidden-{layer}.safetensors"


def _changed_modules(
    anatomy: Anatomy, layer: int, site: str, result: Mapping[str, object]
) -> dict[str, nn.Module]:
    """The projections whose kept weights a run changed; all of a block that was reconstructed."""
    family = anatomy.family
    modules = {site: anatomy.module(layer, family.consumes[site])}
    if LOSSES in result:
        produces = family.produces[part_of(site)]
        modules |= {f"{site}.{each.path}": anatomy.module(layer, each) for each in produces}
    return modules


def _read(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(path, _KIND, lambda _header, tensors: tensors)


def discard(folder: str | os.PathLike) -> None:
    """Remove the files that `slimgpt` wrote into a folder, and the folder if it is then empty."""
    folder = Path(folder)
    tensors = [path for path in _tensor_files(folder) if holds_kind(path, _KIND)]
    for path in (folder / STATE, folder / "search.json", *tensors):
        path.unlink(missing_ok=True)
    remove_empty(folder)


def _tensor_files(folder: Path) -> list[Path]:
    return [*folder.glob("layer-*.safetensors"), *folder.glob("hidden-*.safetensors")]
