"""Reconstruction of one block epoch by epoch, and the dial between a domain and general text."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import LayerRunner, catch_inputs
from ..checks import Integer, Number, checked
from ..compensation import (
    CalibrationWindows,
    DenseStream,
    Reconstruction,
    Solver,
    apply_elimination,
    fit_block,
    full_precision,
    read_problem,
    solve,
    stream_loss,
)
from ..domains import Part
from ..models import Anatomy, inference
from ..store import Shards
from .ablations import slimgpt_variants
from .arguments import BATCHES, MODEL, PAIR, SHARES, TEXTS


class _Stream:
    """A text up to one layer of the dense model, and the dense stream behind that layer's FFN."""

    def __init__(self, model: PreTrainedModel, batches: Iterable[dict], layer: int):
        text = CalibrationWindows(batches, joined=True)
        hidden, anatomy = Shards(), Anatomy(model)
        self.calls, self.weights = catch_inputs(model, text.batches(), hidden), text.weights
        self.dense = DenseStream(hidden, self.calls)
        for index in range(layer):
            self.dense.advance(anatomy, index)
        behind = self.dense.behind["ffn"]
        self.inputs = Shards()
        for window in behind:
            self.inputs[window] = behind[window]
        self.dense.advance(anatomy, layer)

    @property
    def targets(self) -> Shards:
        """The dense residual stream behind the layer's FFN, by window."""
        return self.dense.behind["ffn"]

    def runner(self, anatomy: Anatomy, layer: int) -> LayerRunner:
        """Of the pruned layer, on the dense inputs."""
        return LayerRunner(anatomy, layer, self.inputs, self.calls, self.weights)


@checked(
    model=MODEL,
    batches=BATCHES,
    held_out=BATCHES,
    layer=Integer(0),
    ratio=Number(above=0, below=1),
    epochs=Integer(1),
)
@torch.inference_mode(False)
def reconstruction_curve(
    model: PreTrainedModel,
    batches: Sequence[dict],
    held_out: Sequence[dict],
    *,
    layer: int,
    ratio: float,
    epochs: int = 20,
) -> pd.DataFrame:
    """Loss of one pruned FFN while it is reconstructed, on calibration and on held-out text.

    Where the held-out loss turns up while the other still falls, the block overfits its text.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The dense model; not changed.
    batches, held_out : sequence of dict
        Calibration tokens, and others that are only measured.
    layer : int
        Whose FFN; the layers before it are dense.
    ratio : float
        Share of its channels to remove.
    epochs : int
        See `minigpt_lab.Reconstruction`.

    Returns
    -------
    pandas.DataFrame
        Columns ``epoch`` (0: the closed form), ``text`` (calibration, held-out) and ``loss``, the
        squared error of the residual stream relative to each token's energy.
    """
    pruned, solver, settings = copy.deepcopy(model), Solver(), Reconstruction(epochs)
    anatomy, rows = Anatomy(pruned), []
    with inference(model), inference(pruned), full_precision():
        # 1. Both texts up to the layer, and what the dense model makes of it.
        own, other = (_Stream(model, each, layer) for each in (batches, held_out))
        runners = [own.runner(anatomy, layer), other.runner(anatomy, layer)]
        # 2. The closed form, on the calibration text.
        problem = read_problem(anatomy, runners[0], layer, "ffn", solver)
        count = round(ratio * len(problem.unit_columns))
        apply_elimination(anatomy, runners[0], problem, solve(problem, count, solver), solver)
        runners[1].keep_attention()
        # 3. Epoch by epoch, the loss on both.
        for epoch in fit_block(anatomy, runners[0], layer, "ffn", own.targets, settings):
            for text, runner, stream in zip(
                ("calibration", "held-out"), runners, (own, other), strict=True
            ):
                loss = stream_loss(runner, "ffn", stream.targets)
                rows.append({"epoch": epoch, "text": text, "loss": loss})
    return pd.DataFrame(rows)


@checked(**PAIR, batches=BATCHES, general=BATCHES, texts=TEXTS, ratios=SHARES, shares=SHARES)
def generality_curve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[dict],
    *,
    general: Sequence[dict],
    texts: Sequence[Part],
    ratios: Sequence[float],
    shares: Sequence[float],
    max_tokens: int = 8_192,
    seq_len: int = 256,
    out_dir: str | None = None,
    **options,
) -> pd.DataFrame:
    """Prune to several sizes with several shares of general text in the calibration.

    Parameters
    ----------
    model, tokenizer
        The dense pair; not changed.
    batches, general : sequence of dict
        Calibration tokens of the domain, and of general text.
    texts : sequence of Part
        Held out, of both.
    ratios, shares : sequence of float
        Shares to remove, and shares μ of general text: 0 fits the domain alone, 1 general text.
    max_tokens, seq_len, out_dir
        Of `slimgpt_variants`.
    **options
        Of `slimgpt`, e.g. ``sites``, ``reconstruct``.

    Returns
    -------
    pandas.DataFrame
        That of `slimgpt_variants`, with ``ratio`` and ``generality`` (both NaN for dense).
    """
    cells, variants = [], {}
    for ratio, share in itertools.product(ratios, shares):
        name = f"{ratio:.0%} removed, μ {share:g}"
        cells.append({"variant": name, "ratio": ratio, "generality": share})
        variants[name] = {**options, "ratio": ratio, "general": general, "generality": share}
    table, _ = slimgpt_variants(
        model,
        tokenizer,
        variants,
        batches=batches,
        texts=texts,
        max_tokens=max_tokens,
        seq_len=seq_len,
        out_dir=out_dir,
    )
    return table.merge(pd.DataFrame(cells), on="variant", how="left")
