"""Gradients without backpropagation: two forward passes per random direction (SPSA).

A direction *z* is never stored: it is made again from the seed wherever it is needed, one layer at
a time, as in MeZO (arXiv 2305.17333). So a pass needs the memory of inference, and the estimate is
kept as one number per direction.
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

#: Places of the pool at which a direction may begin.
STARTS = 2**18


class Directions:
    """Random directions ``z_k ~ N(0, I)`` of every linear layer.

    ::

        z_k = diag(s) P[o : o + n]        s = ±1 for each row, o uniform

    where *P* is one pool of Gaussian numbers, and *s* and *o* are drawn for each layer and each
    direction: n Gaussian numbers would take about as long as the layer's product. Each ``z_k`` is
    an exact draw from ``N(0, I)``. Two layers or two directions may share numbers, but no signs, so
    ``E[z z'ᵀ] = 0`` as for independent draws, and the estimate is as unbiased.

    Parameters
    ----------
    seed : int
        Of all directions; they are the same on every device.
    weights : dict
        Linear layer's name to its weight, for shape, device and type.
    """

    def __init__(self, seed: int, weights: dict[str, torch.Tensor]):
        self.seed, self.weights = seed, weights
        self._places = {name: place for place, name in enumerate(weights)}
        self._largest = max((W.numel() for W in weights.values()), default=0)
        state = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state))
        self._pool = torch.randn(self._largest + STARTS, generator=generator)
        self._copies: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, W: torch.Tensor, name: str, k: int, step: float) -> torch.Tensor:
        """``W + step · z_k``, in memory that the next call uses again."""
        _, room = self._copy(W)
        out = room[: W.numel()].view(W.shape)
        return torch.addcmul(W, *self._parts(W, name, k), value=step, out=out)

    def add_(self, g: torch.Tensor, name: str, k: int, step: float) -> None:
        """Add ``step · z_k`` in place, in the type of *g*."""
        g.addcmul_(*self._parts(self.weights[name], name, k), value=step)

    def _parts(self, W: torch.Tensor, name: str, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers ``[row, column]`` and the signs of their rows ``[row, 1]``."""
        rng = np.random.default_rng((self.seed, k, self._places[name]))
        o = rng.integers(STARTS)
        s = 2 * rng.integers(0, 2, (len(W), 1), dtype=np.int8) - 1
        pool, _ = self._copy(W)
        return pool[o : o + W.numel()].view(W.shape), torch.from_numpy(s).to(W)

    def _copy(self, W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The pool, and room for one weight, in a weight's type and on its device."""
        kind = (W.dtype, W.device)
        if kind not in self._copies:
            self._copies[kind] = self._pool.to(W), W.new_empty(self._largest)
        return self._copies[kind]


@dataclass(frozen=True)
class Estimate:
    """``ĝ = (1/K) Σ_k c_k z_k`` with ``c_k = (L(W + εz_k) - L(W - εz_k)) / 2ε``.

    Parameters
    ----------
    coefficients : numpy.ndarray
        ``c`` ``[direction]``.
    directions : Directions
        ``z``.
    """

    coefficients: np.ndarray
    directions: Directions

    def __getitem__(self, name: str) -> torch.Tensor:
        """The estimate for one layer, in float32; made anew at every call."""
        g = torch.zeros_like(self.directions.weights[name], dtype=torch.float32)
        for k, c in enumerate(self.coefficients):
            self.directions.add_(g, name, k, c / len(self.coefficients))
        return g

    def cosine(self, gradients: Gradients) -> float:
        """Cosine between the estimate and the true gradient over all their weights."""
        dot = estimate_square = truth_square = 0.0
        for name in self.directions.weights:
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
    copy of the largest layer and as many random numbers. MeZO and MINI-LLM perturb all parameters;
    those that are not scored would only add noise.

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
        Of the directions.

    Raises
    ------
    ValueError
        If there are no tokens, an option is out of range, or a loss is not finite.
    """
    modules = linear_modules(model, names)
    windows = list(unpadded(batches))
    samples = [[row] for ids in windows for row in ids.split(1)] if per_sample else [windows]
    directions = Directions(seed, {name: each.weight.detach() for name, each in modules.items()})
    coefficients = []
    with inference(model):
        for sample in samples * n_directions:
            k = len(coefficients)
            with _perturbed(modules, directions, k, eps):
                loss_plus = _mean_loss(model, sample)
            with _perturbed(modules, directions, k, -eps):
                loss_minus = _mean_loss(model, sample)
            coefficients.append((loss_plus - loss_minus) / (2 * eps))
    return Estimate(np.array(coefficients), directions)


def _mean_loss(model: PreTrainedModel, windows: list[torch.Tensor]) -> float:
    return float(np.mean([loss for ids in windows for loss in window_losses(model, ids).tolist()]))


@safe_contextmanager
def _perturbed(
    modules: Mapping[str, nn.Module], directions: Directions, k: int, step: float
) -> Iterator[None]:
    """While a layer runs, its weight is ``W + step · z_k``."""
    originals: dict[str, torch.Tensor] = {}

    def perturb(name: str, _x: torch.Tensor) -> None:
        weight = modules[name].weight
        originals[name] = weight.data  # the tensor itself: it is never written to
        weight.data = directions.add(weight.detach(), name, k, step)

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
