"""Exercises of notebooks 07 to 13: runs, methods, MINI-LLM, SlimGPT, mini-GPTs, formats."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from gguf import GGMLQuantizationType, quants
from transformers import PreTrainedModel

from ..calibration import refit
from ..domains import Part
from ..models import Anatomy
from .checking import exercise
from .functions import normal
from .verdicts import Answer

Q8_0 = GGMLQuantizationType.Q8_0

# 07_compare_runs


@exercise("function")
def pareto_front() -> Answer:
    """Which models no other beats in size and loss."""

    def compared(size, loss):
        """For each pair of models: the first no worse in both, better in one, better in both."""
        points = np.stack([size, loss], 1)
        no_worse, better = points[:, None] <= points, points[:, None] < points
        return no_worse.all(-1), better.any(-1), better.all(-1)

    def right(size, loss):
        no_worse, in_one, _ = compared(size, loss)
        return ~(no_worse & in_one).any(0)

    def without_equals(size, loss):
        return ~(compared(size, loss)[0] & ~np.eye(len(size), dtype=bool)).any(0)

    mistakes = {
        "the dominated ones; those that no other beats are asked for": (
            lambda size, loss: ~right(size, loss)
        ),
        "with models that another equals in one and beats in the other; those are dominated": (
            lambda size, loss: ~compared(size, loss)[2].any(0)
        ),
        "without models that another equals in both; neither beats the other": without_equals,
        "the large models of high loss; smaller is better in both": (
            lambda size, loss: right(-size, -loss)
        ),
    }
    cases = {
        "five models": (np.array([9, 7, 5, 5.5, 3]), np.array([20, 21, 24, 30, 40.0])),
        "models of equal size": (np.array([9, 7, 7, 5]), np.array([20, 22, 21, 30.0])),
        "two models that are equal": (np.array([9, 5, 5, 7]), np.array([20, 25, 25, 26.0])),
    }
    return Answer(right, mistakes, cases=cases)


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


@exercise("function")
def spsa_gradient() -> Answer:
    """Zeroth-order estimate of a gradient: the mean of ``c z`` over directions ``z [n, d]``."""

    def mean(slope):
        return lambda loss, w, Z, eps: sum(slope(loss, w, z, eps) * z for z in Z) / len(Z)

    def central(loss, w, z, eps):
        return (loss(w + eps * z) - loss(w - eps * z)) / (2 * eps)

    right = mean(central)
    mistakes = {
        "twice the estimate; the two points are 2ε apart": (lambda *inputs: 2 * right(*inputs)),
        "from one side; take L(w + εz) − L(w − εz)": (
            mean(lambda loss, w, z, eps: (loss(w + eps * z) - loss(w)) / eps)
        ),
        "the sum over the directions; take their mean": (
            lambda loss, w, Z, eps: len(Z) * right(loss, w, Z, eps)
        ),
        "the slopes; each is multiplied by its direction": (
            lambda loss, w, Z, eps: torch.stack([central(loss, w, z, eps) for z in Z])
        ),
        "without ε below; the slope is the difference over 2ε": (
            lambda loss, w, Z, eps: 2 * eps * right(loss, w, Z, eps)
        ),
        "the estimate of the last direction; take the mean over all": (
            lambda loss, w, Z, eps: right(loss, w, Z[-1:], eps)
        ),
    }

    def loss(w):
        return (w**4 + w).sum()

    w, Z = normal(6).double(), normal(4, 6, seed=1).double()
    cases = {"one direction": (loss, w, Z[:1], 0.05), "four directions": (loss, w, Z, 0.1)}
    return Answer(right, mistakes, tolerance=1e-4, cases=cases)


# 09_method_comparison


@exercise("function")
def wanda_scores() -> Answer:
    """Wanda's score ``|W_ij| ‖x_j‖₂`` of every weight (arXiv 2306.11695)."""

    def scores(norm):
        return lambda W, X: W.abs() * norm(X)  # W [out, in], X [tokens, in]

    right = scores(lambda X: X.norm(dim=0))
    mistakes = {
        "with the sign of the weights; take |W|": lambda W, X: W * X.norm(dim=0),
        "with one norm for all inputs; each feature has its own, over the tokens": (
            scores(torch.norm)
        ),
        "with the squared norm; take its root": scores(lambda X: X.square().sum(0)),
        "with the mean |x|; Wanda takes the Euclidean norm": scores(lambda X: X.abs().mean(0)),
        "with the root of the mean square; Wanda takes the root of the sum": (
            scores(lambda X: X.square().mean(0).sqrt())
        ),
        "the weights' size alone; multiply by the inputs' norms": scores(lambda X: 1),
        "with W² instead of |W|": lambda W, X: W.abs() * right(W, X),
    }
    W, X = normal(4, 6), normal(20, 6, seed=1) * torch.tensor([1, 2, 3, 0.5, 0.1, 1])
    cases = {"five tokens": (W, X[:5]), "twenty tokens": (W, X)}
    return Answer(right, mistakes, cases=cases)


def _cell(table: pd.DataFrame, text: str, sites: str, ratio: float) -> pd.Series:
    rows = table[(table["text"] == text) & (table["sites"] == sites) & (table["ratio"] == ratio)]
    return rows.set_index("method")["perplexity"]


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
    H_inv = torch.linalg.inv(H)
    block = H_inv[removed][:, removed]
    others = [j for j in range(len(H)) if j not in removed]

    def cost(moment: torch.Tensor, pruned: Sequence[int] = removed) -> float:
        return float(torch.trace(W[:, pruned] @ moment @ W[:, pruned].T))

    mistakes = {
        "the loss of the pair that was removed above; the other pair is asked for": (
            cost(torch.linalg.inv(H_inv[others][:, others]), others)
        ),
        "the error without compensation; take a block of H⁻¹": cost(H[removed][:, removed]),
        "with the block of H⁻¹ as it is; invert that block": cost(block),
        "with the diagonal of H⁻¹ alone; the inputs are removed together": cost(
            torch.diag(1 / block.diagonal())
        ),
    }
    return Answer(cost(torch.linalg.inv(block)), mistakes)


@exercise("function")
def column_removal() -> Answer:
    """The optimal brain surgeon for one column: ``W - W_:j [H⁻¹]_j: / [H⁻¹]_jj``."""

    def right(W, H, j):
        kept = torch.tensor([column for column in range(len(H)) if column != j])
        updated = torch.zeros_like(W)
        updated[:, kept] = refit(W, H, kept)
        return updated

    def plain(W, H, j):
        kept = W.clone()
        kept[:, j] = 0
        return kept

    def with_row(row):
        return lambda W, H, j: W - torch.outer(W[:, j], row(H, torch.linalg.inv(H), j))

    mistakes = {
        "the column zeroed, the others as they were; update them": plain,
        "with H; its inverse says how the inputs stand in for each other": (
            with_row(lambda H, H_inv, j: H[j] / H[j, j])
        ),
        "not divided by [H⁻¹]_jj": with_row(lambda H, H_inv, j: H_inv[j]),
        "divided by H_jj; take [H⁻¹]_jj": with_row(lambda H, H_inv, j: H_inv[j] / H[j, j]),
        "with the update added; subtract it": (
            with_row(lambda H, H_inv, j: -H_inv[j] / H_inv[j, j])
        ),
        "the update alone; subtract it from W": lambda W, H, j: W - right(W, H, j),
        "without column j; keep it, as zeros": (
            lambda W, H, j: torch.cat([right(W, H, j)[:, :j], right(W, H, j)[:, j + 1 :]], 1)
        ),
    }
    W, X = normal(3, 5).double(), normal(5, 40, seed=1).double()
    X[4] += X[0] - X[1]
    H = X @ X.T / 40
    cases = {"the last column": (W, H, 4), "the second column": (W, H, 1)}
    return Answer(right, mistakes, tolerance=1e-4, cases=cases)


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


@exercise("function")
def gguf_header() -> Answer:
    """Version, number of tensors and number of fields, from the first bytes of a GGUF file."""

    def read(form, start=4):
        return lambda data: struct.unpack_from(form, data, start)

    right = read("<IQQ")
    mistakes = {
        "read from the first byte; the letters GGUF come first": read("<IQQ", 0),
        "read with the largest byte first; GGUF is little-endian": read(">IQQ"),
        "read as three numbers of 32 bits; the two counts have 64": read("<III"),
        "read with a version of 64 bits; it has 32": read("<QQI"),
        "the number of fields before that of tensors": (
            lambda data: (right(data)[0], right(data)[2], right(data)[1])
        ),
    }
    key = b"general.architecture"
    rest = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, 5) + b"llama"
    cases = {
        f"a file of {tensors} tensors": (b"GGUF" + struct.pack("<IQQ", 3, tensors, 27) + rest,)
        for tensors in (272, 65_537)
    }
    return Answer(right, mistakes, tolerance=1e-9, cases=cases)


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


@exercise("function")
def rounded_weights() -> Answer:
    """Weights rounded as Q8_0 does: blocks of 32 that share a scale ``d = max |w| / 127``."""

    def rounded(scale, to_integer=np.round, block=32):
        def of(w):
            blocks = w.reshape(-1, block)
            d = scale(blocks)[:, None]
            return (d * to_integer(blocks / np.where(d == 0, 1, d))).reshape(-1)

        return of

    def largest(blocks):
        return np.abs(blocks).max(1) / 127

    def right(w):
        return quants.dequantize(quants.quantize(w, Q8_0), Q8_0)

    mistakes = {
        "with fractions cut off; round to the nearest integer": rounded(largest, np.trunc),
        "with one scale for all blocks; each has its own": (
            lambda w: rounded(largest, block=len(w))(w)
        ),
        "with the largest w; take the largest |w|": rounded(lambda blocks: blocks.max(1) / 127),
        "with 128 steps; d is max |w| / 127": rounded(lambda blocks: np.abs(blocks).max(1) / 128),
        "with 255 steps; d is max |w| / 127": rounded(lambda blocks: np.abs(blocks).max(1) / 255),
        "the integers; multiply them by the scale": (
            lambda w: np.round(w / np.repeat(np.maximum(largest(w.reshape(-1, 32)), 1e-30), 32))
        ),
        "the weights as they were": lambda w: w,
    }
    w = 0.1 * normal(64).numpy()
    w[40] = -1
    cases = {
        "one block": (w[:32],),
        "two blocks": (w,),
        "a block of zeros": (np.zeros(32, np.float32),),
    }
    return Answer(right, mistakes, tolerance=2e-3, cases=cases)
