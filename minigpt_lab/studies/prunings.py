"""Prunings that a comparison runs when it wants their model.

Plans, `slimgpt`, and either with reconstruction or with fine-tuning on the same tokens after it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import tokens_hash
from ..checks import (
    DictOf,
    Instance,
    Integer,
    InvalidArgument,
    ListOf,
    OneOf,
    Text,
    Tokenizer,
    checked,
)
from ..compensation import reconstruct, slimgpt
from ..domains import Domain
from ..models import PruningPlan, fingerprint, shrink
from ..recovery import recover, require_ended
from ..store import content_hash
from .arguments import BATCHES, MODEL

#: Kinds of pruning: name to the sites that are scored.
KINDS = {"ffn": ("ffn",), "attention": ("attention",), "both": ("ffn", "attention")}
Cell = tuple[str, str, float]  # method, name in KINDS, ratio
Plans = dict[Cell, PruningPlan]


@dataclass(frozen=True)
class SlimGPTRun:
    """Pruning by `slimgpt`, run when its model is wanted: too large to keep for every method.

    Parameters
    ----------
    batches : sequence of dict
        Calibration tokens.
    options : mapping
        Of `slimgpt`.
    """

    batches: Sequence[dict] = field(repr=False)
    options: Mapping[str, object]


@dataclass(frozen=True)
class ReconstructedPlan:
    """A plan whose model is then fitted to the dense one by `reconstruct`.

    Parameters
    ----------
    plan : PruningPlan
        What to remove.
    batches : sequence of dict
        Calibration tokens.
    epochs : int
        Of the reconstruction.
    """

    plan: PruningPlan
    batches: Sequence[dict] = field(repr=False)
    epochs: int


@dataclass(frozen=True)
class FineTunedRun:
    """A model that is fine-tuned as a whole after its pruning, or without one: the control.

    Parameters
    ----------
    pruning : PruningPlan, SlimGPTRun or None
        What to remove.
    tokenizer : transformers.PreTrainedTokenizerBase
        Of the dense model.
    domain : Domain
        Its train part is trained on.
    options : mapping
        Of `recover`; ``teacher="dense"`` is the dense model.
    """

    pruning: Pruning | None
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    domain: Domain = field(repr=False)
    options: Mapping[str, object]


Pruning = PruningPlan | SlimGPTRun | ReconstructedPlan | FineTunedRun
Prunings = dict[Cell, Pruning]


PRUNING = (
    Instance(PruningPlan)
    | Instance(SlimGPTRun)
    | Instance(ReconstructedPlan)
    | Instance(FineTunedRun)
)
PLANS = DictOf(Instance(tuple), PRUNING)
_OF_PLANS = DictOf(Instance(tuple), Instance(PruningPlan, "lab.plan_from_scores gives one"))


@checked(plans=_OF_PLANS, batches=BATCHES, variants=DictOf(Text(), Instance(Mapping), 1))
def slimgpt_runs(
    plans: Plans, batches: Sequence[dict], *, variants: Mapping[str, Mapping[str, object]]
) -> dict[Cell, SlimGPTRun]:
    """`slimgpt` at the sizes of other methods' plans, as more methods of the same comparison.

    Parameters
    ----------
    plans : mapping
        From `method_plans`; every kind and ratio in it is run.
    batches : sequence of dict
        Calibration tokens, those of the other methods.
    variants : mapping
        Method's name to options of `slimgpt`. Without an ``allocation`` among them, as many units
        are removed from every layer as in the other methods' plans.
    """
    runs = {}
    sizes = {(kind, ratio): plan.removed for (_, kind, ratio), plan in plans.items()}
    for (kind, ratio), counts in sizes.items():
        for name, options in variants.items():
            size = {"sites": KINDS[kind], "ratio": ratio}
            if "allocation" not in options:
                size = {"sites": (*counts,), "counts": counts}
            runs[name, kind, ratio] = SlimGPTRun(batches, {**size, **options})
    return runs


@checked(plans=_OF_PLANS, batches=BATCHES, epochs=Integer(1))
def reconstructed_plans(
    plans: Plans, batches: Sequence[dict], *, epochs: int
) -> dict[Cell, ReconstructedPlan]:
    """Every plan with reconstruction after it, as methods ``"NAME, reconstructed"``.

    Parameters
    ----------
    plans : mapping
        From `method_plans`.
    batches : sequence of dict
        Calibration tokens.
    epochs : int
        See `minigpt_lab.Reconstruction`.
    """
    return {
        (f"{name}, reconstructed", kind, ratio): ReconstructedPlan(plan, batches, epochs)
        for (name, kind, ratio), plan in plans.items()
    }


@checked(
    prunings=PLANS,
    tokenizer=Tokenizer(),
    domain=Instance(Domain),
    losses=ListOf(OneOf(("label", "kl", "mix")), 1),
)
def fine_tuned_runs(
    prunings: Mapping[Cell, PruningPlan | SlimGPTRun],
    tokenizer: PreTrainedTokenizerBase,
    domain: Domain,
    *,
    losses: Sequence[str] = ("label", "kl"),
    **options,
) -> dict[Cell, FineTunedRun]:
    """Every pruning with fine-tuning after it, as methods ``"NAME, fine-tuned (LOSS)"``.

    Parameters
    ----------
    prunings : mapping
        From `method_plans` or `slimgpt_runs`.
    tokenizer, domain
        The *calibration* part is trained on: what reconstruction reads too.
    losses : sequence of str
        See `recover`; with ``"kl"`` and ``"mix"`` the dense model is the teacher.
    **options
        Of `recover`: numbers of the training. Losses have their defaults.

    Raises
    ------
    ValueError
        If an option is none of those.
    """
    taken = {"loss", "teacher", "temperature", "mix", "out_dir", "general", "other", "progress"}
    allowed = {*inspect.signature(recover).parameters} - {"model", "tokenizer", "domain"} - taken
    if unknown := sorted({*options} - allowed):
        raise InvalidArgument(f"{', '.join(unknown)}: expected {', '.join(sorted(allowed))}")
    same_text = replace(domain, calibration=domain.train, train=domain.calibration)
    return {
        (f"{name}, fine-tuned ({loss})", kind, ratio): FineTunedRun(
            pruning,
            tokenizer,
            same_text,
            {**options, "loss": loss, "teacher": None if loss == "label" else "dense"},
        )
        for (name, kind, ratio), pruning in prunings.items()
        for loss in losses
    }


@checked(model=MODEL, pruning=PRUNING)
def pruned_model(model: PreTrainedModel, pruning: Pruning) -> PreTrainedModel:
    """Prune a copy of the dense model."""
    if isinstance(pruning, PruningPlan):
        return shrink(model, pruning)
    if isinstance(pruning, ReconstructedPlan):
        options = {"epochs": pruning.epochs, "progress": False}
        return reconstruct(shrink(model, pruning.plan), model, pruning.batches, **options)
    if isinstance(pruning, FineTunedRun):
        inner = pruning.pruning
        pruned = copy.deepcopy(model) if inner is None else pruned_model(model, inner)
        own: dict[str, Any] = {"progress": False, **pruning.options}
        if own.get("teacher") == "dense":
            own["teacher"] = model
        require_ended(recover(pruned, pruning.tokenizer, pruning.domain, **own))
        return pruned
    return slimgpt(model, pruning.batches, progress=False, **pruning.options)[0]


def pruning_key(pruning: Pruning) -> list:
    """What the pruned model depends on, beside the dense one."""
    if isinstance(pruning, PruningPlan):
        return [pruning.keep, pruning.shift]
    if isinstance(pruning, ReconstructedPlan):
        key = pruning_key(pruning.plan)
        return ["reconstruct", *key, tokens_hash(pruning.batches), pruning.epochs]
    if isinstance(pruning, FineTunedRun):
        texts = [content_hash(pruning.domain.train), content_hash(pruning.domain.validation)]
        inner = [] if pruning.pruning is None else pruning_key(pruning.pruning)
        return ["fine-tune", *inner, *texts, plain_options(pruning.options)]
    return ["slimgpt", tokens_hash(pruning.batches), plain_options(pruning.options)]


def plain_options(options: Mapping[str, object]) -> dict[str, object]:
    """Options as a key holds them: hashes for models, domains and tokens."""

    def plain(name: str, value: Any) -> object:
        if isinstance(value, PreTrainedModel):
            return fingerprint(value)
        if isinstance(value, Domain):
            return [content_hash(part) for part in value.parts.values()]
        return tokens_hash(value) if name in ("batches", "general") and value else value

    return {name: plain(name, value) for name, value in options.items()}
