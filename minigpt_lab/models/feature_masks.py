"""Masks of the features of every linear layer of the decoder, and the weights between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .anatomy import Anatomy, weight_axis

#: Linear layer's name, then ``"input"``, ``"output"`` or ``"bias"``, to a mask of its features.
Masks = dict[str, dict[str, np.ndarray]]
Features = Mapping[str, Mapping[str, Sequence[int] | np.ndarray]]  # their indices


def all_features(anatomy: Anatomy) -> Masks:
    """Masks of all features; the one of a bias that a layer lacks is False."""
    masks = {}
    for _, name, module in anatomy.linears():
        inputs, outputs = (
            np.ones(module.weight.shape[weight_axis(module, side)], bool)
            for side in ("input", "output")
        )
        bias = np.full_like(outputs, module.bias is not None)
        masks[name] = {"input": inputs, "output": outputs, "bias": bias}
    return masks


def without_features(masks: Masks, features: Features) -> Masks:
    """Copy masks, and set the listed features of them to False."""
    copied = {name: {side: mask.copy() for side, mask in m.items()} for name, m in masks.items()}
    for name, sides in features.items():
        for side in sides.keys() & copied[name].keys():
            copied[name][side][np.asarray(sides[side], np.int64)] = False
    return copied


def count_weights(masks: Masks) -> int:
    """Number of weights whose input and output are in the masks, and of biases that are."""
    counts = (m["input"].sum() * m["output"].sum() + m["bias"].sum() for m in masks.values())
    return int(sum(counts))
