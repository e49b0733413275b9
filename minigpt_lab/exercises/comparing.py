"""Exercises of notebooks 07 to 13: runs, methods, MINI-LLM, SlimGPT, mini-GPTs, formats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from ..domains import Part
from ..models import Anatomy
from .checking import exercise
from .verdicts import Answer

# 07_compare_runs


@exercise("share")
def dominated_share(table: pd.DataFrame) -> Answer:
    """Share of the models that another of their front beats."""
    on_front = float(table["front"].mean())
    mistakes = {"the share on a front; the rest can be thrown away": on_front}
    return Answer(1 - on_front, mistakes)


@exercise("count")
def separate_fronts(table: pd.DataFrame) -> Answer:
    """Number of groups of models whose perplexities compare."""
    mistakes = {
        "the number of dense models; each has a front per text": table["model"].nunique(),
        "the number of models on a front; several stand on each": int(table["front"].sum()),
    }
    return Answer(table.groupby(["model", "protocol", "text"], dropna=False).ngroups, mistakes)


# 08_mini_llm


@exercise("number")
def directions_needed(weights: int, cosine: float) -> Answer:
    """Random directions until an estimate's expected cosine to the gradient reaches a value."""
    mistakes = {
        "the cosine times d; √(n ÷ d) is the cosine, so n is its square times d": cosine * weights,
        "the number of weights; that would be a cosine of 1": weights,
        "the square root of what is asked for": (cosine**2 * weights) ** 0.5,
    }
    return Answer(cosine**2 * weights, mistakes)


@exercise("count")
def forward_passes(windows: int, directions: int) -> Answer:
    """Forward passes of a window that a zeroth-order score takes."""
    mistakes = {
        "one per direction; the loss is needed on both sides of the weights": windows * directions,
        "those of one window": 2 * directions,
    }
    return Answer(2 * windows * directions, mistakes)


# 09_method_comparison


def _cell(table: pd.DataFrame, text: str, sites: str, ratio: float) -> pd.Series:
    rows = table[(table["text"] == text) & (table["sites"] == sites) & (table["ratio"] == ratio)]
    return rows.set_index("method")["perplexity"]


@exercise("name")
def best_method(table: pd.DataFrame, text: str, sites: str, ratio: float) -> Answer:
    """The method with the lowest perplexity on a text, among pruned models of one size."""
    perplexities = _cell(table, text, sites, ratio)
    mistakes = {"the worst": str(perplexities.idxmax())}
    return Answer(str(perplexities.idxmin()), mistakes, options=list(perplexities.index))


@exercise("number")
def price_of_not_looking(table: pd.DataFrame, text: str, sites: str, ratio: float) -> Answer:
    """Perplexity after random pruning over that of the best method."""
    perplexities = _cell(table, text, sites, ratio)
    mistakes = {
        "the inverse; random pruning goes on top": perplexities.min() / perplexities["random"],
        "the worst method over the best": perplexities.max() / perplexities.min(),
        "the difference; divide": perplexities["random"] - perplexities.min(),
    }
    return Answer(perplexities["random"] / perplexities.min(), mistakes)


# 10_slimgpt


@exercise("number")
def exact_loss(W: torch.Tensor, H: torch.Tensor, removed: Sequence[int]) -> Answer:
    """Squared error per token of removing some inputs, the other weights being updated.

    tr W_r ([H⁻¹]_rr)⁻¹ W_rᵀ for the removed inputs r.
    """
    H_inv, W_removed = torch.linalg.inv(H), W[:, removed]
    block = H_inv[removed][:, removed]

    def cost(moment: torch.Tensor) -> float:
        return float(torch.trace(W_removed @ moment @ W_removed.T))

    mistakes = {
        "the error without compensation; take a block of H⁻¹": cost(H[removed][:, removed]),
        "with the block of H⁻¹ as it is; invert that block": cost(block),
        "with the diagonal of H⁻¹ alone; the inputs are removed together": cost(
            torch.diag(1 / block.diagonal())
        ),
    }
    return Answer(cost(torch.linalg.inv(block)), mistakes)


@exercise("number")
def last_ratio(depth: int, first: float, mean: float) -> Answer:
    """The last layer's ratio of a logarithmic increase, from the first layer's and the mean."""
    rise = (mean - first) / np.log(np.arange(depth) + 1).mean()
    mistakes = {
        "that of a linear increase": first + 2 * (mean - first),
        "with the logarithm of 32 layers; this model has another depth": first + rise * np.log(32),
        "the mean itself": mean,
    }
    return Answer(first + rise * np.log(depth), mistakes)


@exercise("count")
def tokens_to_invert(model: PreTrainedModel) -> Answer:
    """Fewest tokens for which H of the FFN's second projection has full rank."""
    channels = Anatomy(model).units("ffn")[0]
    mistakes = {
        "the hidden size; the second projection reads the channels": model.config.hidden_size,
        "one too few: each token adds one to the rank": channels - 1,
    }
    return Answer(channels, mistakes)


# 12_your_own_mini


@exercise("number")
def bits_per_character(row: pd.Series) -> Answer:
    """Bits per character from perplexity, tokens and characters."""
    nats, rate = np.log(row["perplexity"]), row["tokens"] / row["characters"]
    bits = nats / np.log(2)
    mistakes = {
        "nats; take the logarithm to base 2": nats * rate,
        "bits per token; multiply by tokens per character": bits,
        "multiplied by characters per token; a token's bits are shared by its characters": (
            bits / rate
        ),
        "the perplexity itself per character; take its logarithm first": row["perplexity"] * rate,
    }
    return Answer(bits * rate, mistakes)


@exercise("number")
def gap_closed(table: pd.DataFrame, text: Part) -> Answer:
    """Share of the way from the pruned model to the fine-tuned dense one, in bits."""
    rows = table[table["text"] == str(text)].set_index("variant")["bits_per_character"]
    dense, tuned = rows["dense"], rows["dense, fine-tuned"]
    pruned, mini = rows["pruned"], rows["mini"]
    value = (pruned - mini) / (pruned - tuned)
    mistakes = {
        "the way to the dense model; the fine-tuned one saw the same text": (
            (pruned - mini) / (pruned - dense)
        ),
        "what is still missing; the share closed is asked for": 1 - value,
        "a percentage; divide by 100": 100 * value,
        "the gain in bits; divide it by the gap": pruned - mini,
    }
    return Answer(float(value), mistakes)


# 13_how_small


@exercise("number")
def bits_per_weight(weights: int, bits: int, scale: int) -> Answer:
    """Bits per weight of blocks that share a scale."""
    mistakes = {
        "without the scales, which every block stores too": float(bits),
        "with a scale for every weight; a block shares one": float(bits + scale),
        "a byte has eight bits; bits are asked for": (bits + scale / weights) / 8,
    }
    return Answer(bits + scale / weights, mistakes)


@exercise("count")
def bytes_per_row(width: int, weights: int, bits: int, scale: int) -> Answer:
    """Bytes of a row in whole blocks that share a scale."""
    blocks = -(-width // weights)
    mistakes = {
        "without the scales, which every block stores too": blocks * weights * bits // 8,
        "the last block is stored whole, padded with zeros": (
            width // weights * (weights * bits + scale) // 8
        ),
        "bits; a byte has eight": blocks * (weights * bits + scale),
    }
    return Answer(blocks * (weights * bits + scale) // 8, mistakes)
