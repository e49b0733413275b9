"""The smallest pruned model whose perplexity grows by no more than allowed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..architectures import dense_type
from ..calibration import tokens_hash
from ..checks import Flag, Instance, Integer, InvalidArgument, Model, Number, checked
from ..compensation import discard, is_search, slimgpt, unscored_sites
from ..criteria import chosen_sites
from ..domains import Domain, excerpt
from ..models import (
    SITES,
    Anatomy,
    PruningPlan,
    TrimmedVocabulary,
    fingerprint,
    keep_all,
    refuse_masked,
    shrink,
)
from ..planning import Allocation, allocation_name, most_units, removed_shares, unit_steps
from ..store import cache_key
from .arguments import BATCHES, FOLDER, PAIR
from .held_out import HeldOut

_MAX_CHARACTERS = 65_536  # of the validation part


@checked(
    **PAIR,
    batches=BATCHES,
    domain=Instance(Domain),
    increase=Number(0),
    other=Instance(Domain) | None,
    other_increase=Number(0),
    dense=Model() | None,
    most=Number(above=0, below=1),
    tolerance=Number(),
    seq_len=Integer(2),
    max_tokens=Integer(1) | None,
    out_dir=FOLDER,
    progress=Flag(),
)
def smallest_within(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domain: Domain,
    *,
    batches: Iterable[dict[str, torch.Tensor]],
    increase: float = 0.05,
    other: Domain | None = None,
    other_increase: float = 0.2,
    dense: PreTrainedModel | None = None,
    most: float = 0.8,
    tolerance: float = 0.01,
    seq_len: int = 256,
    max_tokens: int | None = None,
    out_dir: str | os.PathLike | None = None,
    progress: bool = True,
    **options,
) -> tuple[PreTrainedModel, PruningPlan, pd.DataFrame]:
    """Prune as much as the perplexity on a domain's validation part allows.

    Bisection on the ratio, with one run of `slimgpt` for each; it assumes that perplexity grows
    with the ratio. The returned model has been measured, so it is within the limit even where this
    is not so. The test part is not read.

    Parameters
    ----------
    model, tokenizer
        A pair; not changed.
    domain : Domain
        Its validation part judges.
    batches : iterable of dict
        Calibration tokens.
    increase : float
        Largest relative increase of the perplexity over the dense model's: 0.05 is 5 %.
    other : Domain, optional
        Another domain, e.g. general text, whose validation part has a limit too.
    other_increase : float
        That limit.
    dense : PreTrainedModel, optional
        The model that the limits are relative to, by default `model`: give it where `model` has a
        trimmed vocabulary. `tokenizer` is then of this one, and a perplexity is per token of it.
    most : float
        Largest ratio; less where that would not leave a unit in every block.
    tolerance : float
        Stop when the ratio is known to this precision.
    seq_len, max_tokens : int
        Tokens per window, and of the validation part.
    out_dir : str or path, optional
        Folder for ``sizes.json``, the sizes measured so far, and the checkpoints of the current
        one: an interrupted call continues.
    progress : bool
        Show a progress bar.
    **options
        Arguments of `slimgpt`: ``allocation="search"``, ``drop_blocks``, ``sites``,
        ``reconstruct``, ``general``, …
        ``ratio_of`` is ``"decoder"`` unless it is given.

    Returns
    -------
    transformers.PreTrainedModel, PruningPlan, pandas.DataFrame
        The smallest model within the limit, its plan, and the curve that was seen: one row per size
        with ``ratio, stored, perplexity, increase, within``, from the given model down, and with
        `other` also ``other_perplexity, other_increase``. If none
        was within the limit there is a warning, and the model is a copy of the given one.

    Raises
    ------
    ValueError
        If a number is out of range, a ratio cannot be met, an argument of `slimgpt` is given that
        is chosen here, or `dense` is not what `model` was made of.
    """
    Number(above=0, below=most)("tolerance", tolerance)
    if taken := sorted({"ratio", "parameters", "counts", "inplace"} & set(options)):
        raise ValueError(f"{', '.join(taken)}: chosen by smallest_within; leave it out")
    options = {"ratio_of": "decoder", "allocation": "log-increase", "progress": progress, **options}
    is_search(options["allocation"], options.get("drop_blocks", False))
    if not options.get("drop_blocks"):
        most = min(most, _reachable(model, options))
    if options.get("general") is not None:
        options["general"] = BATCHES("general", options["general"])  # read for every size
    limits = {"perplexity": 1 + increase}  # column to the most, relative to dense
    texts = [excerpt(domain.validation, tokenizer, max_characters=_MAX_CHARACTERS)]
    if other is not None:
        limits["other_perplexity"] = 1 + other_increase
        texts.append(excerpt(other.validation, tokenizer, max_characters=_MAX_CHARACTERS))
    path = out_dir and Path(out_dir) / "sizes.json"
    dense = model if dense is None else dense
    refuse_masked(dense)
    _require_same_origin(model, dense)
    held_out = HeldOut(dense, tokenizer, texts, max_tokens=max_tokens, seq_len=seq_len, path=path)
    trials = _Trials(model, batches, held_out, limits, options, out_dir)

    # Bisection on the ratio: `low` is within the limits, `high` is not.
    given_fits = trials.within(trials.rows[0])
    low, high, best = 0.0, most if given_fits else 0.0, None
    with tqdm(desc="smallest within", unit="size", disable=not progress) as bar:
        while high - low > tolerance:
            middle = (low + high) / 2
            row, made = trials.measure(middle)
            if trials.within(row):
                low, best = middle, made
            else:
                high = middle
            bar.update()
            bar.set_postfix(ratio=f"{low:.3f}")
    if not given_fits:
        warnings.warn(
            "the perplexity of the given model is above what is allowed already: nothing is "
            "pruned; allow a larger increase",
            stacklevel=2,
        )
    elif low == 0:
        names = " or ".join(map(str, texts))
        allowed = " or ".join(f"{most - 1:.1%}" for most in limits.values())
        warnings.warn(
            f"even pruning {high:.1%} raises the perplexity on {names} by more than {allowed}: "
            "the model returned is the given one; allow a larger increase",
            stacklevel=2,
        )
    pruned, plan = (best or trials.prune(low)) if low else _unpruned(model, increase)
    curve = trials.curve()
    for unused in map(trials.folder, {*curve["ratio"]} - {low}):
        if unused:
            discard(unused)
    return pruned, plan, curve


def _require_same_origin(model: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Refuse a dense model of another type, or without some of the model's tokens."""
    own, whole = TrimmedVocabulary.of(model), TrimmedVocabulary.of(dense)
    types = [dense_type(each.config.model_type) for each in (model, dense)]
    if types[0] != types[1] or own.size != whole.size or not {*own.rows} <= {*whole.rows}:
        raise InvalidArgument(
            f"dense is a {types[1]} of {len(whole.rows):,} tokens, model a {types[0]} of "
            f"{len(own.rows):,} that are not among them; give the model that it was trimmed from"
        )


def _reachable(model: PreTrainedModel, options: Mapping[str, Any]) -> float:
    """The largest ratio that leaves the fewest possible units in every block."""
    defaults = {name: each.default for name, each in signature(slimgpt).parameters.items()}
    given = {**defaults, **options}
    layer_sites = unscored_sites(
        Anatomy(model), chosen_sites(model, given["sites"], given["units"]), given["keep_layers"]
    )
    counts = most_units(layer_sites, unit_steps(layer_sites, given["multiple_of"]))
    return removed_shares(model, layer_sites, counts)[given["ratio_of"]]


def _spread(model: PreTrainedModel, allocation: str | Allocation | Sequence[float]) -> object:
    """What tells an allocation from others: its name or shares; of a function, some of them."""
    if not callable(allocation):
        return allocation_name(allocation)
    layer_sites = unscored_sites(Anatomy(model), SITES, (0, 0))
    return [[*map(float, allocation(ratio, layer_sites))] for ratio in (0.2, 0.5)]


class _Trials:
    """Sizes that were tried: how to prune to one, what it loses, and whether that is allowed.

    `limits` are the largest perplexities relative to the dense model's, one for each text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterable[dict[str, torch.Tensor]],
        held_out: HeldOut,
        limits: Mapping[str, float],
        options: Mapping[str, Any],
        out_dir: str | os.PathLike | None,
    ):
        self.model, self.batches, self.held_out = model, batches, held_out
        self.limits, self.options, self.out_dir = limits, options, out_dir
        general = options.get("general")
        apart = ("general", "progress", "allocation")
        plain = {k: str(v) for k, v in options.items() if k not in apart}
        plain["general"] = "" if general is None else tokens_hash(general)
        self.own = fingerprint(model)
        self.facts = [self.own, tokens_hash(batches), plain, _spread(model, options["allocation"])]
        self.rows: list[dict] = []
        measure = partial(held_out.measure, held_out.dense)
        dense = held_out.get(fingerprint(held_out.dense), measure)
        sums = [loss.passages.sum(0) for loss in held_out.perplexities(dense)]
        self.lengths = [characters / tokens for _, tokens, characters in sums]  # of its tokens
        self.dense = self.levels(dense)
        self.measure(0.0)

    def levels(self, found: dict) -> dict[str, float]:
        """Perplexity on every text, per token of the dense model: a trimmed one splits further."""
        sums = [loss.passages.sum(0) for loss in self.held_out.perplexities(found)]
        per_character = [nats / characters for nats, _, characters in sums]
        pairs = zip(self.limits, per_character, self.lengths, strict=True)
        with np.errstate(over="ignore"):
            return {name: float(np.exp(nats * length)) for name, nats, length in pairs}

    def folder(self, ratio: float) -> Path | None:
        """Of the checkpoints of a size."""
        name = f"ratio-{ratio:.6f}-{cache_key([self.held_out.facts, self.facts])[:8]}"
        return Path(self.out_dir) / name if self.out_dir else None

    def prune(self, ratio: float) -> tuple[PreTrainedModel, PruningPlan]:
        folder = self.folder(ratio)
        return slimgpt(self.model, self.batches, ratio=ratio, out_dir=folder, **self.options)

    def measure(self, ratio: float) -> tuple[dict, tuple | None]:
        """A row of the curve; and the pruned model with its plan, if the row was not known."""
        made = None

        def compute() -> dict:
            nonlocal made
            made = self.prune(ratio) if ratio else (self.model, None)
            return self.held_out.measure(made[0])

        found = self.held_out.get([self.facts, ratio] if ratio else self.own, compute)
        self.rows.append({"ratio": ratio, "stored": found["stored"], **self.levels(found)})
        return self.rows[-1], made

    def within(self, row: Mapping[str, float]) -> bool:
        """Whether a row keeps every limit."""
        return all(row[name] <= self.dense[name] * most for name, most in self.limits.items())

    def curve(self) -> pd.DataFrame:
        """All rows, from the given model down."""
        curve = pd.DataFrame(self.rows).sort_values("ratio", ignore_index=True)
        for name in self.limits:
            curve[name.replace("perplexity", "increase")] = curve[name] / self.dense[name] - 1
        return curve.assign(within=[self.within(row) for row in curve.to_dict("records")])


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
