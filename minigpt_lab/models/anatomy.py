"""Access to a model's layers, units and the weights that belong to them, for every family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..architectures import ALL_SITES, FAMILIES, SITES, Projection, dense_type
from ..checks import COMPUTE_DTYPES
from . import layouts


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, in either of transformers' two layouts."""
    return isinstance(module, nn.Linear | Conv1D)


def weight_axis(module: nn.Module, side: str) -> int:
    """Dimension of ``module.weight`` that holds its ``"input"`` or ``"output"`` features."""
    transposed = isinstance(module, Conv1D)  # stored [in, out], nn.Linear [out, in]
    return int(transposed) if side == "output" else int(not transposed)


def head_features(config: PretrainedConfig) -> int:
    """Features of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class Anatomy:
    """Access to a model's layers, units and the weights that belong to them, for every family.

    Unit counts are read from the tensors, not from the config, so a model whose layers were shrunk
    to different widths is described as it is. The units of attention are its key/value groups (site
    ``"attention"``; without grouped queries these are its heads), or the query heads of each group
    (site ``"balanced_heads"``, whose unit *i* is the *i*-th query head of every group).

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model of a supported family.

    Raises
    ------
    ValueError
        If the model's architecture has no entry in `FAMILIES`, or its weights are quantised or
        wrapped by an adapter.
    """

    def __init__(self, model: PreTrainedModel):
        config = model.config
        model_type = dense_type(config.model_type)
        if model_type not in FAMILIES:
            raise ValueError(
                f"architecture {model_type!r} is not supported; supported: "
                f"{', '.join(sorted(FAMILIES))}. To add one, give its projections in an entry of "
                "minigpt_lab.FAMILIES (see minigpt_lab/architectures/families.py)"
            )
        self.model = model
        self.family = FAMILIES[model_type]
        self.layers: Sequence[nn.Module] = model.get_submodule(self.family.layers)
        self.head_dim = head_features(config)
        for site in SITES:
            for projection, _ in self.coupled(site):
                _require_plain(self.name(0, projection), self.module(0, projection))

    def name(self, layer: int, projection: Projection) -> str:
        """Full module name of a projection."""
        return f"{self.family.layers}.{layer}.{projection.path}"

    def module(self, layer: int, projection: Projection) -> nn.Module:
        """The projection's linear layer."""
        return self.layers[layer].get_submodule(projection.path)

    def attention(self, layer: int) -> nn.Module:
        """The module of a layer's attention."""
        path, _, _ = self.family.consumes["attention"].path.rpartition(".")
        return self.layers[layer].get_submodule(path)

    def linears(self) -> Iterator[tuple[int, str, nn.Module]]:
        """Layer index, full name and module of every linear layer inside the decoder layers.

        The head is left out: its outputs are tokens, which the vocabulary site prunes.
        """
        for index, layer in enumerate(self.layers):
            for path, module in layer.named_modules():
                if is_linear(module):
                    yield index, f"{self.family.layers}.{index}.{path}", module

    def coupled(self, site: str) -> Iterator[tuple[Projection, str]]:
        """Projections whose ``"output"`` or ``"input"`` features are the site's units."""
        for projection in self.family.produces[site]:
            yield projection, "output"
        yield self.family.consumes[site], "input"

    def grid(self, site: str, layer: int) -> layouts.Grid:
        """Groups, heads per group and features per head of a layer (see `layouts`)."""
        read = self._width(layer, self.family.consumes[site], "input")
        if site == "ffn":
            return read, 1, 1
        # With G groups, h query heads per group and d = head_dim: q writes G h d features, k and v
        # write G d each, o reads G h d. So written - read = 2 G d.
        producers = self.family.produces["attention"]
        written = sum(self._width(layer, projection, "output") for projection in producers)
        groups = (written - read) // 2 // self.head_dim
        return groups, read // self.head_dim // max(groups, 1), self.head_dim

    def _width(self, layer: int, projection: Projection, side: str) -> int:
        """Number of input or output features of a projection."""
        module = self.module(layer, projection)
        return module.weight.shape[weight_axis(module, side)]

    def units(self, site: str) -> list[int]:
        """Number of a site's units in every layer: channels, key/value groups, heads per group."""
        axis = self.family.consumes[site].axis
        return [self.grid(site, layer)[axis] for layer in range(len(self.layers))]

    def layer_widths(self) -> dict[str, list[int]]:
        """Site to the number of units in every layer, for all sites."""
        return {site: self.units(site) for site in ALL_SITES}

    def unit_features(
        self, projection: Projection, layer: int, *, block: str | None = None
    ) -> np.ndarray:
        """Rows or columns of a projection that belong to each of its units.

        Parameters
        ----------
        projection : Projection
            One entry of ``family.produces[site]``, or ``family.consumes[site]``.
        layer : int
            The layer; in a shrunk model they differ.
        block : str, optional
            Only the features of this block, in a fused projection.

        Returns
        -------
        numpy.ndarray
            Indices ``[unit, feature]``.
        """
        return layouts.unit_features(projection, self.grid(projection.site, layer), block)

    def unit_parameters(self, site: str, layer: int) -> int:
        """Parameters that are removed from a layer with one unit."""
        total = 0
        for projection, side in self.coupled(site):
            module = self.module(layer, projection)
            features = self.unit_features(projection, layer).shape[1]
            total += features * module.weight.shape[1 - weight_axis(module, side)]
            if side == "output" and module.bias is not None:
                total += features
        return total

    def activation_keeps_zero(self) -> bool:
        """Whether the FFN's activation maps 0 to 0: a channel with zeroed inputs then outputs 0."""
        activation = self.layers[0].get_submodule(self.family.activation)
        return bool(activation(torch.zeros(1)).item() == 0.0)

    def soft_cap(self) -> float | None:
        """The soft cap *c* of the logits, ``c tanh(logits / c)``, if the model has one."""
        # "_" is a field that no config has
        return getattr(self.model.config, self.family.soft_cap or "_", None)

    def set_soft_cap(self, value: float | None) -> None:
        """Change the soft cap, in a family that has one."""
        if self.family.soft_cap:
            setattr(self.model.config, self.family.soft_cap, value)

    def head_is_tied(self) -> bool:
        """Whether the output head shares its weight with the token embedding."""
        head = self.model.get_output_embeddings()
        return head is None or head.weight is self.model.get_input_embeddings().weight


def _require_plain(name: str, module: nn.Module) -> None:
    """Refuse a projection that is quantised or wrapped by an adapter."""
    if not is_linear(module) or module.weight.dtype not in COMPUTE_DTYPES:
        kind, weight = type(module).__name__, getattr(module, "weight", None)
        stored = "" if weight is None else f" with weights of type {weight.dtype}"
        raise ValueError(
            f"{name} is {kind}{stored}; expected a linear layer with plain weights. Of a "
            "quantised model load the checkpoint it was made from (or call "
            "model.dequantize()); merge an adapter into its base"
        )
