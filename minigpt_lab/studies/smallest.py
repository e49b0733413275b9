"""The smallest pruned model whose perplexity grows by no more than allowed."""

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
from ..checks import Batches, Flag, Instance, Integer, Location, Model, Number, Tokenizer, checked
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
    """Prune as much as the perplexity on a domain's validation part allows.

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
        Largest ratio.
    tolerance : float
        Stop when the ratio is known so well.
    seq_len, max_tokens : int
        Of `perplexity`.
    out_dir : str or path, optional
        Folder for ``sizes.jsonl``, the sizes measured so far, and the checkpoints of the current
        one: an interrupted call continues.
    progress : bool
        Show a progress bar.
    **options
        Arguments of `slimgpt`: ``allocation="search"``, ``sites``, … ``ratio_of`` is ``"decoder"``
        unless it is given.

    Returns
    -------
    transformers.PreTrainedModel, PruningPlan, pandas.DataFrame
        The smallest model within the limit, its plan, and the curve that was seen: one row per size
        with ``ratio, stored, perplexity, increase, within``, from the dense model down. If none
        was within the limit there is a warning, and the model is a copy of the dense one.

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
    trials = _Trials(
        model,
        tokenizer,
        domain.validation,
        batches,
        options,
        limit=1 + increase,
        protocol={"seq_len": seq_len, "max_tokens": max_tokens},
        out_dir=out_dir,
        progress=progress,
    )

    # 1. Bisection on the ratio.
    low, high = 0.0, most
    with tqdm(desc="smallest within", unit="size", disable=not progress) as bar:
        while high - low > tolerance:
            middle = (low + high) / 2
            low, high = (middle, high) if trials.is_within(middle) else (low, middle)
            bar.update()
            bar.set_postfix(ratio=f"{low:.3f}")

    # 2. The smallest of those that were within the limit.
    curve = trials.curve()
    best = float(curve[curve["within"]].sort_values("stored")["ratio"].iloc[0])
    if best == 0:
        warnings.warn(
            f"even pruning {high:.1%} raises the perplexity on {domain.validation} by more than "
            f"{increase:.1%}: the model returned is the dense one; allow a larger increase",
            stacklevel=2,
        )
        pruned, plan = _unpruned(model, increase)
    else:
        pruned, plan = trials.prune(best)
    trials.discard_except(best)
    return pruned, plan, curve


class _Trials:
    """Pruned models of several sizes and their perplexity; finished measurements are kept."""

    def __init__(
        self, model, tokenizer, text, batches, options, *, limit, protocol, out_dir, progress
    ):
        self.model, self.tokenizer, self.text, self.batches = model, tokenizer, text, batches
        self.options, self.limit, self.protocol = options, limit, protocol
        self.out_dir, self.progress = out_dir, progress
        self.key = {
            "model": fingerprint(model),
            "tokens": tokens_hash(batches),
            "text": content_hash(text),
            "protocol": [*protocol.values()],
            "options": {name: str(value) for name, value in options.items()}
            | {"allocation": allocation_name(options["allocation"])},
        }
        self.cache = ResultCache(out_dir and f"{out_dir}/sizes.jsonl")
        self.last: tuple[float, tuple] | None = None  # the last pruned model within the limit
        self.rows = {0.0: self._get(0.0)}

    def is_within(self, ratio: float) -> bool:
        """Whether a model pruned by a ratio is within the limit."""
        self.rows[ratio] = self._get(ratio)
        return self._allowed(self.rows[ratio]["perplexity"])

    def _allowed(self, perplexity: float) -> bool:
        return perplexity <= self.rows[0.0]["perplexity"] * self.limit

    def _get(self, ratio: float) -> dict:
        return self.cache.get([self.key, ratio], lambda: self._measured(ratio))

    def _measured(self, ratio: float) -> dict:
        pruned, plan = self.prune(ratio) if ratio else (self.model, None)
        found = perplexity(pruned, self.tokenizer, self.text, progress=False, **self.protocol)
        if ratio and self._allowed(found.value):
            self.last = ratio, (pruned, plan)
        return {"stored": model_size(pruned).stored, "perplexity": found.value}

    def prune(self, ratio: float) -> tuple[PreTrainedModel, PruningPlan]:
        """Prune a copy by a ratio; the last one within the limit is at hand."""
        if self.last is not None and self.last[0] == ratio:
            return self.last[1]
        options = {"ratio": ratio, "progress": self.progress, **self.options}
        return slimgpt(self.model, self.batches, out_dir=self._folder(ratio), **options)

    def curve(self) -> pd.DataFrame:
        """All sizes that were measured, from the dense model down."""
        curve = pd.DataFrame([{"ratio": ratio, **row} for ratio, row in sorted(self.rows.items())])
        curve["increase"] = curve["perplexity"] / self.rows[0.0]["perplexity"] - 1
        curve["within"] = curve["perplexity"].map(self._allowed)
        return curve

    def discard_except(self, best: float) -> None:
        """Remove the checkpoints of all other sizes."""
        for ratio in self.rows if self.out_dir is not None else ():
            if ratio != best:
                discard(self._folder(ratio))

    def _folder(self, ratio: float) -> Path | None:
        if self.out_dir is None:
            return None
        return Path(self.out_dir) / f"ratio-{ratio:.6f}-{cache_key(self.key)[:8]}"


def _unpruned(model: PreTrainedModel, increase: float) -> tuple[PreTrainedModel, PruningPlan]:
    """A copy of the dense model, with the plan that removes nothing."""
    anatomy = Anatomy(model)
    plan = PruningPlan(
        fingerprint(model),
        anatomy.layer_widths(),
        keep_all(anatomy),
        vocabulary_size=len(model.get_input_embeddings().weight),
        origin={"method": "smallest_within", "increase": increase},
    )
    return shrink(model, plan), plan
