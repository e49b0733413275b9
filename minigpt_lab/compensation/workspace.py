"""Where a layer-by-layer run keeps what does not fit on the device, and what it has finished."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from ..checks import writable_folder
from ..models import Anatomy, add_bias, materialized, rebuild_layer
from ..store import (
    DamagedFile,
    Shards,
    holds_kind,
    make_folder,
    read_cached,
    read_json,
    read_tensors,
    remove_empty,
    write_json,
    write_tensors,
)

STATE = "state.json"
_KIND = "finished"  # layers, of the files beside it

#: Names of arguments whose facts have other names.
_ARGUMENTS = {
    "model": "another model",
    "tokens": "other calibration tokens",
    "counts": "another size or allocation",
    "search": "another size or search",
}


class Workspace:
    """Hidden states, offloaded weights and finished layers of one run.

    A run that was interrupted is continued at the layer where it stopped, if there is a folder.
    DamagedFile files are set aside, and the run begins anew.

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
        self.facts: dict[str, object] = {}
        self._known: dict[str, object] | None = None  # facts of the run in the folder
        self.folder = None if out_dir is None else writable_folder(out_dir).absolute()
        if self.folder is not None:
            make_folder(self.folder)
            self._read_state()

    def _read_state(self) -> None:
        """Read the run in the folder, if all of its files are there and readable."""
        state = read_cached(self.folder / STATE, _read_state) or {}
        layers = state.get("layers", [])
        weights = [self._weights(layer) for layer, sites in enumerate(layers) if sites]
        hidden = self._hidden(len(layers))
        for path in {*_tensor_files(self.folder)} - {*weights, hidden}:
            if not holds_kind(path, _KIND):
                raise FileExistsError(
                    f"{path} exists and is of no run; it is left alone: choose another folder"
                )
        needed = weights + [hidden] * state.get("hidden", hidden.exists())
        if not [path for path in needed if read_cached(path, _read) is None]:
            self._known, self.finished = state.get("recipe"), layers

    def require(self, facts: Mapping[str, object]) -> None:
        """Refuse to continue a run with other arguments; call it as soon as each is known.

        Parameters
        ----------
        facts : mapping
            Arguments that the result depends on, as plain data.

        Raises
        ------
        ValueError
            If they are not those of the run in the folder; what differs is named.
        """
        facts = json.loads(json.dumps(facts))
        self.facts |= facts
        differing = [
            name
            for name, value in facts.items()
            if self._known is not None and self._known.get(name) != value
        ]
        if differing:
            names = ", ".join(_ARGUMENTS.get(name, f"another {name}") for name in differing)
            raise ValueError(
                f"{self.folder} holds a run with {names}: call with the same arguments to continue "
                "it (a model that was being changed in place must be loaded anew), or give another "
                "folder"
            )

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
        state = {"recipe": self.facts, "layers": self.finished, "hidden": goes_on}
        write_json(self.folder / STATE, state)

    def _weights(self, layer: int) -> Path:
        return self.folder / f"layer-{layer}.safetensors"

    def _hidden(self, depth: int) -> Path:
        return self.folder / f"hidden-{depth}.safetensors"


def _read(path: Path) -> dict[str, torch.Tensor]:
    return read_tensors(path, _KIND)[1]


def _read_state(path: Path) -> dict:
    state = read_json(path)
    if not isinstance(state, dict) or not state.keys() >= {"recipe", "layers"}:
        raise ValueError(f"{path} is no state of a run: it holds something else")
    if not isinstance(state["recipe"], dict) or not isinstance(state["layers"], list):
        raise DamagedFile(f"{path} is no readable state of a run")
    return state


def discard(folder: str | os.PathLike) -> None:
    """Remove what `slimgpt` keeps in a folder of its own, and the folder if that was all."""
    folder = Path(folder)
    tensors = [path for path in _tensor_files(folder) if holds_kind(path, _KIND)]
    for path in (folder / STATE, folder / "search.jsonl", *tensors):
        path.unlink(missing_ok=True)
    remove_empty(folder)


def _tensor_files(folder: Path) -> list[Path]:
    return [*folder.glob("layer-*.safetensors"), *folder.glob("hidden-*.safetensors")]
