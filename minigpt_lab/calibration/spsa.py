"""Gradients without backpropagation: two forward passes per random direction (SPSA).

A direction *z* is never stored: it is generated again from the seed wherever it is needed, one
layer at a time, as in MeZO (arXiv 2305.17333). So a pass needs the memory of inference, and the
estimate is kept as one number per direction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..checks import (
    Batches,
    Flag,
    Integer,
    ListOf,
    Model,
    Number,
    OneOf,
    checked,
    safe_contextmanager,
)
from ..domains import unpadded
from ..models import SITES, Anatomy, inference
from .forward import watch
from .gradients import NAMES, Gradients, collect_gradients, linear_modules
from .losses import window_losses


@dataclass(frozen=True)
class Estimate:
    """``ĝ = (1/K) Σ_k c_k z_k`` with ``c_k = (L(W + εz_k) - L(W - εz_k)) / 2ε``.

    Parameters
    ----------
    coefficients : numpy.ndarray
        ``c`` ``[direction]``.
    seed : int
        Of all directions.
    weights : dict
        Linear layer's name to its weight, for shape and device.
    """

    coefficients: np.ndarray
    seed: int
    weights: dict[str, torch.Tensor]

    def __getitem__(self, name: str) -> torch.Tensor:
        """The estimate for one layer, in float32; generated anew at every call."""
        place = list(self.weights).index(name)
        g = torch.zeros_like(self.weights[name], dtype=torch.float32)
        for k, c in enumerate(self.coefficients):
            g.add_(_direction(self.seed, k, place, g), alpha=c / len(self.coefficients))
        return g

    def cosine(self, gradients: Gradients) -> float:
        """Cosine between the estimate and the true gradient over all their weights."""
        dot = estimate_square = truth_square = 0.0
        for name in self.weights:
            estimate, truth = self[name].flatten(), gradients[name].flatten()
            dot += float(estimate @ truth)
            estimate_square += float(estimate @ estimate)
            truth_square += float(truth @ truth)
        return dot / np.sqrt(estimate_square * truth_square)


@checked(
    model=Model(),
    batches=Batches(),
    names=NAMES,
    eps=Number(above=0),
    n_directions=Integer(1),
    per_sample=Flag(),
    seed=Integer(0),
)
def estimate_gradients(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    names: Iterable[str],
    *,
    eps: float = 1e-3,
    n_directions: int = 1,
    per_sample: bool = False,
    seed: int = 0,
) -> Estimate:
    """Simultaneous perturbation of linear layers' weights, and of nothing else.

    Each layer is perturbed as it is about to run, in place, and gets its own bits back right after:
    adding ``ε z`` and subtracting it again would not give them back. Beyond inference this takes a
    copy of one layer and its direction. MeZO and MINI-LLM perturb all parameters; those that are
    not scored would only add noise.

    In bfloat16 a weight above ¼ moves by nothing or by more than ``ε = 10⁻³``: raise ε there.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model; unchanged afterwards, bit for bit.
    batches : iterable of dict
        Calibration tokens; padding is left out.
    names : iterable of str
        Full names of the linear layers.
    eps : float
        ε.
    n_directions : int
        Directions for the text, or for each window.
    per_sample : bool
        Give each window directions of its own instead of measuring all along the same ones: for
        as many passes, `n_directions` times as many directions as there are windows.
    seed : int
        Of the directions; the same on one kind of device.

    Raises
    ------
    ValueError
        If there are no tokens, an option is out of range, or a loss is not finite.
    """
    modules = linear_modules(model, names)
    windows = list(unpadded(batches))
    samples = [[row] for ids in windows for row in ids.split(1)] if per_sample else [windows]
    coefficients = []
    with inference(model):
        for sample in samples * n_directions:
            k = len(coefficients)
            with _perturbed(modules, seed, k, eps):
                loss_plus = _mean_loss(model, sample)
            with _perturbed(modules, seed, k, -eps):
                loss_minus = _mean_loss(model, sample)
            coefficients.append((loss_plus - loss_minus) / (2 * eps))
    weights = {name: module.weight.detach() for name, module in modules.items()}
    return Estimate(np.array(coefficients), seed, weights)


def _mean_loss(model: PreTrainedModel, windows: list[torch.Tensor]) -> float:
    return float(np.mean([loss for ids in windows for loss in window_losses(model, ids).tolist()]))


def _direction(seed: int, k: int, place: int, like: torch.Tensor) -> torch.Tensor:
    """``z_k ~ N(0, I)`` of one layer, in float32."""
    state = np.random.SeedSequence((seed, k, place)).generate_state(1, np.uint64)[0]
    generator = torch.Generator(like.device).manual_seed(int(state))
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=torch.float32)


@safe_contextmanager
def _perturbed(modules: Mapping[str, nn.Module], seed: int, k: int, step: float) -> Iterator[None]:
    """While a layer runs, its weight is ``W + step · z_k``."""
    places = {name: place for place, name in enumerate(modules)}
    originals: dict[str, torch.Tensor] = {}

    def perturb(name: str, _x: torch.Tensor) -> None:
        weight = modules[name].weight
        originals[name] = weight.data  # the tensor itself: it is never written to
        W = weight.detach().clone()
        weight.data = W.add_(_direction(seed, k, places[name], W), alpha=step)

    def restore(name: str, *_: object) -> None:
        modules[name].weight.data = originals.pop(name)

    try:
        with watch(modules, before=perturb, after=restore):
            yield
    finally:
        for name in list(originals):  # interrupted between the two
            restore(name)


@checked(
    model=Model(), batches=Batches(), sites=ListOf(OneOf(SITES), 1), gradient_checkpointing=Flag()
)
def gradient_cosine(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    sites: tuple[str, ...] = SITES,
    gradient_checkpointing: bool = False,
    **options,
) -> float:
    """Cosine between a zeroth-order estimate and the true gradient.

    Expect about ``√(directions / weights)``: random directions of many weights are nearly
    orthogonal to anything.

    Parameters
    ----------
    model, batches
        As for `score`.
    sites : tuple of str
        Sites whose weights are perturbed.
    gradient_checkpointing : bool
        Of the backpropagation.
    **options
        Of the estimate: ``eps``, ``n_directions``, ``per_sample``, ``seed``.
    """
    names = scored_weights(model, sites)
    estimate = estimate_gradients(model, batches, names, **options)
    truth = collect_gradients(model, batches, names, gradient_checkpointing=gradient_checkpointing)
    return estimate.cosine(truth)


def scored_weights(model: PreTrainedModel, sites: tuple[str, ...]) -> list[str]:
    """Names of the linear layers whose weights belong to units of some sites."""
    anatomy = Anatomy(model)
    return [
        anatomy.name(layer, projection)
        for layer in range(len(anatomy.layers))
        for site in sites
        for projection, _ in anatomy.coupled(site)
    ]
