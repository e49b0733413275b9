"""What a layer-by-layer run has finished, on disk: a killed run goes on at the layer it was in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from ..checks import writable_folder
from ..models import Anatomy, add_bias, rebuild_layer
from ..store import (
    SUFFIX,
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

#: How a run differs, where the name in its recipe is none that a caller gave.
_WORDS = {
    "model": "another model",
    "tokens": "other calibration tokens",
    "counts": "another size or allocation",
    "search": "another size or search",
}


class Finished:
    """Layers that are done, and the hidden states behind them.

    Files that are damaged are set aside, and the run begins anew.

    Parameters
    ----------
    folder : str or path
        Made if need be.

    Raises
    ------
    FileExistsError
        If a file in it has the name of one of ours and is something else: it is left alone.
    OSError
        If it cannot be made or written.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = writable_folder(folder).absolute()
        make_folder(self.folder)
        found = read_cached(self.folder / STATE, _read_state, ".json") or {}
        self.found: dict[str, object] | None = found.get("recipe")
        self.layers: list[dict[str, dict]] = found.get("layers", [])  # site to {"kept", "error"}
        self.recipe: dict[str, object] = {}
        needed = [self._weights(layer) for layer, cuts in enumerate(self.layers) if cuts]
        hidden = self._hidden(len(self.layers))
        for path in {*_tensor_files(self.folder)} - {*needed, hidden}:
            if not holds_kind(path, _KIND):
                raise FileExistsError(
                    f"{path} exists and is of no run; it is left alone: choose another folder"
                )
        missing = [path for path in needed if read_cached(path, _read, SUFFIX) is None]
        waits = found.get("hidden", hidden.exists())
        if missing or (waits and read_cached(hidden, _read, SUFFIX) is None):
            self.found, self.layers = None, []

    def require(self, facts: Mapping[str, object]) -> None:
        """Refuse to go on with a run of another recipe; each part of it as soon as it is known.

        Parameters
        ----------
        facts : mapping
            What the result depends on, as plain data.

        Raises
        ------
        ValueError
            If they are not those of the run in the folder; what differs is named.
        """
        facts = json.loads(json.dumps(facts))
        self.recipe |= facts
        if self.found is None:
            return
        differs = [name for name, value in facts.items() if self.found.get(name) != value]
        if differs:
            words = [_WORDS.get(name, f"another {name}") for name in differs]
            raise ValueError(
                f"{self.folder} holds a run with {', '.join(words)}: call with the same "
                "arguments to go on with it (a model that was being changed in place must be "
                "loaded anew), or give another folder"
            )

    def restore_hidden(self, hidden: Shards) -> None:
        """Bring hidden states to where the run had come."""
        path = self._hidden(len(self.layers))
        if path.is_file():
            for window, states in _read(path).items():
                hidden[int(window)] = states.to(hidden[int(window)].device)

    def restore(self, anatomy: Anatomy, layer: int) -> dict[str, dict]:
        """Cut a finished layer of the dense model again; returns what `add` was given."""
        cuts = self.layers[layer]
        tensors = _read(self._weights(layer)) if cuts else {}
        for site, cut in cuts.items():
            module = anatomy.module(layer, anatomy.family.consumes[site])
            rebuild_layer(anatomy, site, layer, cut["kept"])
            if f"{site}.bias" in tensors and module.bias is None:
                add_bias(module)
            for name, parameter in module.named_parameters():
                parameter.copy_(tensors[f"{site}.{name}"])
        return cuts

    def add(self, anatomy: Anatomy, cuts: Mapping[str, dict], hidden: Shards) -> None:
        """Keep the next finished layer.

        Parameters
        ----------
        anatomy : Anatomy
            Of the model, that layer cut.
        cuts : mapping
            Site to ``{"kept", "error"}``.
        hidden : Shards
            The layer's outputs; not looked at after the last layer.

        Raises
        ------
        OSError
            If it cannot be written, e.g. because the disk is full: layers before it stay finished.
        """
        layer, depth = len(self.layers), len(self.layers) + 1
        tensors = {
            f"{site}.{name}": parameter.detach()
            for site in cuts
            for name, parameter in anatomy.module(
                layer, anatomy.family.consumes[site]
            ).named_parameters()
        }
        try:
            if tensors:
                write_tensors(self._weights(layer), _KIND, {}, tensors)
            waits = depth < len(anatomy.layers)
            if waits:
                states = {str(window): hidden[window] for window in hidden}
                write_tensors(self._hidden(depth), _KIND, {}, states)
            self.layers.append(dict(cuts))
            state = {"recipe": self.recipe, "layers": self.layers, "hidden": waits}
            write_json(self.folder / STATE, state)
        except OSError as error:
            raise OSError(
                f"layer {layer} could not be written to {self.folder} ({error}); the layers "
                "before it are kept: make room and call again with the same arguments"
            ) from error
        self._hidden(layer).unlink(missing_ok=True)

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
    return [*folder.glob(f"layer-*{SUFFIX}"), *folder.glob(f"hidden-*{SUFFIX}")]
