"""Pruned models in the formats of llama.cpp: bytes on disk against what is lost."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import DictOf, Flag, Instance, Integer, ListOf, Model, OneOf, Text, checked
from ..domains import Part, Question
from ..evaluation import Perplexity, answer_questions, compare, write_answers
from ..export import KINDS, gguf_size, quantised
from ..models import fingerprint
from .arguments import FOLDER, PAIR, TEXTS
from .held_out import HeldOut


@checked(
    **PAIR,
    models=DictOf(Text(), Model()),
    texts=TEXTS,
    kinds=ListOf(OneOf(KINDS), 1),
    questions=ListOf(Instance(Question), 1) | None,
    max_tokens=Integer(2) | None,
    seq_len=Integer(2),
    out_dir=FOLDER,
    progress=Flag(),
)
def format_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    models: Mapping[str, PreTrainedModel],
    texts: Sequence[Part],
    kinds: Sequence[str] = ("F16", "Q8_0", "Q4_0"),
    questions: Sequence[Question] | None = None,
    max_tokens: int | None = None,
    seq_len: int = 256,
    out_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure every model in every format, read in float32: bfloat16 would round it once more.

    Parameters
    ----------
    model, tokenizer
        The dense pair.
    models : mapping
        Name to a pruned model, one that is not pruned, or the dense one.
    texts : sequence of Part
        Held out.
    kinds : sequence of str
        Formats, see `export_gguf`.
    questions : sequence of Question, optional
        Also answered by every model in every format, by choosing and by writing.
    max_tokens, seq_len : int
        Tokens per text (None for all), and per window.
    out_dir : str or path, optional
        Folder for ``formats.json``: finished cells are kept.
    progress : bool
        Show a progress bar.

    Returns
    -------
    pandas.DataFrame
        One row per model, format and text: ``model, kind, bytes, stored`` and the numbers of
        `perplexity`; with questions also ``accuracy`` and ``written``, the shares of right answers
        that it chooses and that it writes (`write_answers`). ``coarser`` names the best model on
        this text of at most as many bytes that stores more weights, in fewer bits each;
        ``difference`` is how much better that one is, in bits per character (``difference_low``,
        ``difference_high``: paired 95 % interval).

    Raises
    ------
    ValueError
        If llama.cpp has no graph for a model, or a text is too short.
    """
    path = out_dir and Path(out_dir) / "formats.json"
    held_out = HeldOut(
        model,
        tokenizer,
        texts,
        max_tokens=max_tokens,
        seq_len=seq_len,
        path=path,
        precision="float32",
    )
    cells = [(name, each, kind) for name, each in models.items() for kind in kinds]
    sizes = [gguf_size(each, tokenizer, kind=kind) for _, each, kind in cells]
    asked = ["written", [asdict(question) for question in questions]] if questions else []
    rows, losses = [], []
    shown = tqdm(cells, desc="formats", unit="model", disable=not progress)
    for (name, each, kind), size in zip(shown, sizes, strict=True):

        def compute(each=each, kind=kind) -> dict:
            rounded = quantised(each, kind)
            result = held_out.measure(rounded)
            if questions is not None:
                asking = (rounded, tokenizer, questions)
                how = {"precision": "float32", "progress": False}
                result["accuracy"] = answer_questions(*asking, **how).accuracy
                result["written"] = write_answers(*asking, **how).accuracy
            return result

        result = held_out.get([fingerprint(each), kind, asked], compute)
        found = {name: result[name] for name in ("accuracy", "written") if name in result}
        facts = {"model": name, "kind": kind, "bytes": size, **found}
        rows += held_out.table_rows(result, **facts)
        losses += held_out.perplexities(result)
    columns = [*rows[0], "coarser", "difference", "difference_low", "difference_high"]
    return pd.DataFrame(_against_coarser(rows, losses), columns=columns)


def _against_coarser(rows: list[dict], losses: list[Perplexity]) -> list[dict]:
    """Every row with the best model at most as large that was pruned less and rounded more."""
    found = []
    for row, loss in zip(rows, losses, strict=True):
        others = [
            (other["bits_per_character"], f"{other['model']} {other['kind']}", other_loss)
            for other, other_loss in zip(rows, losses, strict=True)
            if other["text"] == row["text"]
            and other["stored"] > row["stored"]
            and other["bytes"] <= row["bytes"]
        ]
        if others:
            _, name, best = min(others, key=lambda each: each[:2])
            gap = compare({"coarser": best, "own": loss}, n_permutations=1).iloc[0]
            scale = 1 / np.log(2)  # from nats to bits
            if gap["unit"] == "nats per token":
                scale *= loss.passages[:, 1].sum() / loss.passages[:, 2].sum()
            row = {**row, "coarser": name, "difference": scale * gap["difference"]}
            row |= {f"difference_{end}": scale * gap[end] for end in ("low", "high")}
        found.append(row)
    return found
