"""Prunings that a comparison runs when it wants their model: plans, `slimgpt`, reconstruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from ..calibration import tokens_hash
from ..checks import DictOf, Instance, Integer, Text, checked
from ..compensation import reconstruct, slimgpt
from ..models import PruningPlan, shrink
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


Pruning = PruningPlan | SlimGPTRun | ReconstructedPlan
Prunings = dict[Cell, Pruning]


PRUNING = Instance(PruningPlan) | Instance(SlimGPTRun) | Instance(ReconstructedPlan)
PLANS = DictOf(Instance(tuple), PRUNING)


@checked(plans=PLANS, batches=BATCHES, variants=DictOf(Text(), Instance(Mapping), 1))
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


@checked(plans=PLANS, batches=BATCHES, epochs=Integer(1))
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


@checked(model=MODEL, pruning=PRUNING)
def pruned_model(model: PreTrainedModel, pruning: Pruning) -> PreTrainedModel:
    """Prune a copy of the dense model."""
    if isinstance(pruning, PruningPlan):
        return shrink(model, pruning)
    if isinstance(pruning, ReconstructedPlan):
        options = {"epochs": pruning.epochs, "progress": False}
        return reconstruct(shrink(model, pruning.plan), model, pruning.batches, **options)
    return slimgpt(model, pruning.batches, progress=False, **pruning.options)[0]


def pruning_key(pruning: Pruning) -> list:
    """What the pruned model depends on, beside the dense one."""
    if isinstance(pruning, PruningPlan):
        return [pruning.keep, pruning.shift]
    if isinstance(pruning, ReconstructedPlan):
        key = pruning_key(pruning.plan)
        return ["reconstruct", *key, tokens_hash(pruning.batches), pruning.epochs]
    return ["slimgpt", tokens_hash(pruning.batches), dict(pruning.options)]
