"""Exercises of notebooks 07 to 10: which runs, which way of choosing, and what makes up for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from ..models import Anatomy
from .checking import exercise
from .verdicts import Count, Name, Number, Share

# 07_compare_runs


@exercise
def dominated_share(table: pd.DataFrame) -> Share:
    """Share of the models that another of their front beats."""
    on_front = float(table["front"].mean())
    mistakes = {"the share on a front; the rest can be thrown away": on_front}
    return Share(1 - on_front, mistakes)


@exercise
def separate_fronts(table: pd.DataFrame) -> Count:
    """Groups of models whose perplexities compare."""
    mistakes = {
        "the number of dense models; each has a front per text": table["model"].nunique(),
        "the number of models on a front; several stand on each": int(table["front"].sum()),
    }
    return Count(table.groupby(["model", "protocol", "text"], dropna=False).ngroups, mistakes)


# 08_mini_llm


@exercise
def directions_needed(weights: int, cosine: float) -> Number:
    """Random directions until an estimate's expected cosine to the gradient reaches a value."""
    mistakes = {
        "the cosine times d; √(n ÷ d) is the cosine, so n is its square times d": cosine * weights,
        "the number of weights; that would be a cosine of 1": weights,
        "the square root of what is asked for": (cosine**2 * weights) ** 0.5,
    }
    return Number(cosine**2 * weights, mistakes)


@exercise
def forward_passes(windows: int, directions: int) -> Count:
    """Passes of a window through the model that a zeroth-order score takes."""
    mistakes = {
        "one per direction; the loss is needed on both sides of the weights": windows * directions,
        "those of one window": 2 * directions,
        "those of one direction": 2 * windows,
    }
    return Count(2 * windows * directions, mistakes)


# 09_method_comparison


def _cell(table: pd.DataFrame, text: str, sites: str, ratio: float) -> pd.Series:
    rows = table[(table["text"] == text) & (table["sites"] == sites) & (table["ratio"] == ratio)]
    return rows.set_index("method")["perplexity"]


@exercise
def best_method(table: pd.DataFrame, text: str, sites: str, ratio: float) -> Name:
    """The method with the lowest perplexity on a text, among cuts of one size."""
    found = _cell(table, text, sites, ratio)
    mistakes = {"the worst": str(found.idxmax())}
    return Name(str(found.idxmin()), list(found.index), mistakes)


@exercise
def price_of_not_looking(table: pd.DataFrame, text: str, sites: str, ratio: float) -> Number:
    """How many times the best method's perplexity the random cut has."""
    found = _cell(table, text, sites, ratio)
    mistakes = {
        "the inverse; the random cut goes on top": found.min() / found["random"],
        "the worst method over the best": found.max() / found.min(),
        "the difference; divide": found["random"] - found.min(),
    }
    return Number(found["random"] / found.min(), mistakes)


# 10_slimgpt


@exercise
def exact_loss(W: torch.Tensor, H: torch.Tensor, removed: Sequence[int]) -> Number:
    """What removing some inputs costs per token once the other weights have made up for it."""
    H_inv, W_removed = torch.linalg.inv(H), W[:, removed]
    block = H_inv[removed][:, removed]

    def cost(moment: torch.Tensor) -> float:
        return float(torch.trace(W_removed @ moment @ W_removed.T))

    mistakes = {
        "what it costs if nothing makes up for it; take a block of H⁻¹": cost(
            H[removed][:, removed]
        ),
        "with the block of H⁻¹ as it is; invert that block": cost(block),
        "with the diagonal of H⁻¹ alone; the inputs that leave go together": cost(
            torch.diag(1 / block.diagonal())
        ),
    }
    return Number(cost(torch.linalg.inv(block)), mistakes)


@exercise
def last_ratio(depth: int, first: float, mean: float) -> Number:
    """The last layer's ratio of a logarithmic increase, from the first layer's and the mean."""
    progress = np.log(np.arange(depth) + 1)
    value = first + (mean - first) / (progress.mean() / np.log(depth))
    mistakes = {
        "that of a linear increase": first + 2 * (mean - first),
        "with the logarithm of 32 layers; this model has another depth": first
        + (mean - first) / (progress.mean() / np.log(32)),
        "the mean itself": mean,
    }
    return Number(value, mistakes)


@exercise
def tokens_to_invert(model: PreTrainedModel) -> Count:
    """Tokens that it takes at least until H of the FFN's second projection has full rank."""
    channels = Anatomy(model).units("ffn")[0]
    mistakes = {
        "the hidden size; the second projection reads the channels": model.config.hidden_size,
        "the entries of H; its rank counts": channels**2,
        "one too few: each token adds one to the rank": channels - 1,
    }
    return Count(channels, mistakes)
