"""What a layer-by-layer run has finished, on disk: a killed run goes on at the layer it was in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .assets import staged
from .biases import give_bias
from .families import Anatomy
from .shards import Shards

STATE = "state.json"

#: How a run differs, where the name in its recipe is none that a caller gave.
_WORDS = {
    "model": "another model",
    "tokens": "other calibration tokens",
    "counts": "another size or allocation",
    "search": "another size or search",
}


class Finished:
    """Layers that are done, and the hidden states behind them.

    Parameters
    ----------
    folder : str or path
        Made if need be.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        state = self.folder / STATE
        found = json.loads(state.read_text(encoding="utf-8")) if state.is_file() else {}
        self.found: dict[str, object] | None = found.get("recipe")
        self.layers: list[dict[str, dict]] = found.get("layers", [])  # site to {"kept", "error"}
        self.recipe: dict[str, object] = {}

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
            for window, states in load_file(path).items():
                hidden[int(window)] = states.to(hidden[int(window)].device)

    def restore(self, anatomy: Anatomy, layer: int) -> dict[str, dict]:
        """Cut a finished layer of the dense model again; returns what `add` was given."""
        cuts = self.layers[layer]
        tensors = load_file(self._weights(layer)) if cuts else {}
        for site, cut in cuts.items():
            module = anatomy.module(layer, anatomy.family.consumes[site])
            anatomy.rebuild(site, layer, cut["kept"])
            if f"{site}.bias" in tensors and module.bias is None:
                give_bias(module)
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
                _save(tensors, self._weights(layer))
            if depth < len(anatomy.layers):
                _save({str(window): hidden[window] for window in hidden}, self._hidden(depth))
            self.layers.append(dict(cuts))
            with staged(self.folder / STATE) as staging:
                state = {"recipe": self.recipe, "layers": self.layers}
                staging.write_text(json.dumps(state), encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"layer {layer} could not be written to {self.folder} ({error}); the layers "
                "before it are kept: make room and call again with the same arguments"
            ) from error
        self._hidden(layer).unlink(missing_ok=True)

    def _weights(self, layer: int) -> Path:
        return self.folder / f"layer-{layer}.safetensors"

    def _hidden(self, depth: int) -> Path:
        return self.folder / f"hidden-{depth}.safetensors"


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    with staged(path) as staging:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staging)
