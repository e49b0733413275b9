"""The smallest model that loses no more than allowed, found by trying sizes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import tokens_hash
from ..checks import (
    Batches,
    Flag,
    Instance,
    Integer,
    Location,
    Model,
    Number,
    Tokenizer,
    checked,
)
from ..compensation import discard, slimgpt
from ..domains import Domain
from ..evaluation import perplexity
from ..models import Anatomy, PruningPlan, fingerprint, keep_all, model_size, shrink
from ..planning import allocation_name
from ..store import ResultCache, cache_key, content_hash


@checked(
    model=Model(),
    tokenizer=Tokenizer(),
    batches=Batches(),
    domain=Instance(Domain),
    increase=Number(0),
    most=Number(above=0, below=1),
    tolerance=Number(),
    seq_len=Integer(2),
    max_tokens=Integer(1) | None,
    out_dir=Location() | None,
    progress=Flag(),
)
def smallest_within(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domain: Domain,
    *,
    batches: Iterable[dict[str, torch.Tensor]],
    increase: float = 0.05,
    most: float = 0.8,
    tolerance: float = 0.01,
    seq_len: int = 256,
    max_tokens: int | None = None,
    out_dir: str | os.PathLike | None = None,
    progress: bool = True,
    **options,
) -> tuple[PreTrainedModel, PruningPlan, pd.DataFrame]:
    """Cut as much as the perplexity on a domain's validation part allows.

    Bisection on the ratio, one `slimgpt` for each: as if perplexity grew with it. What is returned
    was measured, whatever the curve looks like. The test part stays unseen.

    Parameters
    ----------
    model, tokenizer
        A pair; left as it is.
    domain : Domain
        Its validation part judges.
    batches : iterable of dict
        Calibration tokens.
    increase : float
        Largest relative increase of the perplexity over the dense model's: 0.05 is 5 %.
    most : float
        Ratio at which to stop looking for more.
    tolerance : float
        Stop when the ratio is known so well.
    seq_len, max_tokens : int
        Of `perplexity`.
    out_dir : str or path, optional
        Folder for ``sizes.jsonl``, the sizes measured so far, and the cut that is being made: an
        interrupted call goes on there.
    progress : bool
        Show a progress bar.
    **options
        Arguments of `slimgpt`: ``allocation="search"``, ``sites``, … ``ratio_of`` is ``"decoder"``
        unless it is given.

    Returns
    -------
    transformers.PreTrainedModel, PruningPlan, pandas.DataFrame
        The smallest model within the limit, its plan, and the curve that was seen: one row per size
        with ``ratio, stored, perplexity, increase, within``, from the dense model down. If every
        cut was beyond the limit there is a warning, and the model is a copy of the dense one.

    Raises
    ------
    ValueError
        If a number is out of range, a ratio cannot be met, or an
        argument of `slimgpt` that is chosen here is given.
    """
    Number(above=0, below=most)("tolerance", tolerance)
    if taken := sorted({"ratio", "parameters", "counts", "inplace"} & set(options)):
        raise ValueError(f"{', '.join(taken)}: chosen by smallest_within; leave it out")
    options = {"ratio_of": "decoder", "allocation": "log-increase", **options}
    recipe = {
        "model": fingerprint(model),
        "tokens": tokens_hash(batches),
        "text": content_hash(domain.validation),
        "protocol": [seq_len, max_tokens],
        "options": {name: str(value) for name, value in options.items()}
        | {"allocation": allocation_name(options["allocation"])},
    }
    ledger = ResultCache(out_dir and f"{out_dir}/sizes.jsonl")
    made: dict[float, tuple[PreTrainedModel, PruningPlan]] = {}  # the last one within the limit
    rows: dict[float, dict] = {}

    def cut(ratio: float) -> tuple[PreTrainedModel, PruningPlan]:
        folder = out_dir and _folder(out_dir, ratio, recipe)
        return slimgpt(model, batches, ratio=ratio, out_dir=folder, progress=progress, **options)

    def measured(ratio: float) -> dict:
        mini, plan = cut(ratio) if ratio else (model, None)
        found = perplexity(
            mini,
            tokenizer,
            domain.validation,
            seq_len=seq_len,
            max_tokens=max_tokens,
            progress=False,
        )
        if ratio and within(found.value):
            made.clear()
            made[ratio] = mini, plan
        return {"stored": model_size(mini).stored, "perplexity": found.value}

    def within(value: float) -> bool:
        return value <= rows[0.0]["perplexity"] * (1 + increase)

    def look(ratio: float) -> bool:
        rows[ratio] = ledger.get([recipe, ratio], lambda: measured(ratio))
        return within(rows[ratio]["perplexity"])

    look(0.0)
    low, high = 0.0, most
    with tqdm(desc="smallest within", unit="size", disable=not progress) as bar:
        while high - low > tolerance:
            middle = (low + high) / 2
            low, high = (middle, high) if look(middle) else (low, middle)
            bar.update()
            bar.set_postfix(ratio=f"{low:.3f}")
    curve = pd.DataFrame([{"ratio": ratio, **row} for ratio, row in sorted(rows.items())])
    curve["increase"] = curve["perplexity"] / rows[0.0]["perplexity"] - 1
    curve["within"] = curve["perplexity"].map(within)
    best = float(curve[curve["within"]].sort_values("stored")["ratio"].iloc[0])
    if best == 0:
        warnings.warn(
            f"even a cut of {high:.1%} raises the perplexity on {domain.validation} by more than "
            f"{increase:.1%}: the model returned is the dense one; allow a larger increase",
            stacklevel=2,
        )
        plan = PruningPlan(
            recipe["model"],
            Anatomy(model).layer_widths(),
            keep_all(Anatomy(model)),
            vocabulary_size=len(model.get_input_embeddings().weight),
            origin={"method": "smallest_within", "increase": increase},
        )
        mini = shrink(model, plan)
    else:
        mini, plan = made[best] if best in made else cut(best)
    for ratio in rows if out_dir is not None else ():
        if ratio != best:
            discard(_folder(out_dir, ratio, recipe))
    return mini, plan, curve


def _folder(out_dir: str | os.PathLike, ratio: float, recipe: dict) -> Path:
    key = cache_key(recipe)
    return Path(out_dir) / f"ratio-{ratio:.6f}-{key[:8]}"
