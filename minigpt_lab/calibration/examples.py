"""Where a text excites each FFN neuron most, noted while the statistics are collected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..checks import safe_contextmanager
from .forward import watch


@dataclass(frozen=True, repr=False, eq=False)
class Examples:
    """For every FFN neuron the windows of a text with its largest |activation|.

    Parameters
    ----------
    values : numpy.ndarray
        Largest |activation| of a window, descending ``[neuron, example]``, layer after layer; -1
        where there were fewer windows.
    places : numpy.ndarray
        Its token, as an index into `tokens` ``[neuron, example]``.
    tokens : numpy.ndarray
        Tokens of all windows that are an example, one after the other ``[token]``.
    starts : numpy.ndarray
        Index of the first token of every window ``[window]``.
    """

    values: np.ndarray
    places: np.ndarray
    tokens: np.ndarray
    starts: np.ndarray

    @property
    def count(self) -> int:
        """Examples of a neuron."""
        return self.values.shape[1]

    def __add__(self, other: Examples) -> Examples:
        """The largest of both texts."""
        count = min(self.count, other.count)
        values = np.hstack([self.values, other.values])  # [neuron, both]
        places = np.hstack([self.places, other.places + len(self.tokens)])
        order = np.argsort(-values, axis=1, kind="stable")[:, :count]
        return Examples(
            np.take_along_axis(values, order, 1),
            np.take_along_axis(places, order, 1),
            np.concatenate([self.tokens, other.tokens]),
            np.concatenate([self.starts, other.starts + len(self.tokens)]),
        ).without_unused_windows()

    def without_unused_windows(self) -> Examples:
        """The same with only those windows that are an example of some neuron."""
        window = np.searchsorted(self.starts, self.places, side="right") - 1
        used = np.unique(window[self.values >= 0])
        ends = np.append(self.starts[1:], len(self.tokens))
        lengths = (ends - self.starts)[used]
        starts = np.cumsum(lengths) - lengths
        kept = [self.tokens[self.starts[w] : ends[w]] for w in used]
        shift = np.zeros(len(self.starts), np.int64)
        shift[used] = starts - self.starts[used]
        places = np.where(self.values >= 0, self.places + shift[window], 0)
        return Examples(self.values, places, np.concatenate(kept), starts)


class ExampleFinder:
    """Keeps the largest |activation| of every neuron, one per window, while a model reads.

    A window's first token is left out: without anything before it, it excites the same few neurons
    in every window.

    Memory is that of ``neurons · count`` values and places, and of the tokens read.

    Parameters
    ----------
    modules : mapping
        Linear layers, by name, whose inputs are the neurons; none keeps nothing.
    count : int
        Examples of a neuron.
    """

    def __init__(self, modules: Mapping[str, nn.Module], count: int):
        self.modules, self.count = modules, count
        self.top: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.windows: list[torch.Tensor] = []
        self.shape = (0, 0)

    @safe_contextmanager
    def watching(self) -> Iterator[None]:
        """Context in which activations are compared."""
        with watch(self.modules, before=self._merge):
            yield

    def begin(self, ids: torch.Tensor) -> None:
        """Name the windows ``[window, token]`` that the model reads next."""
        if not self.modules:
            return
        self.first = sum(len(window) for window in self.windows)
        self.windows += ids.cpu().unbind()
        self.shape = ids.shape

    def _merge(self, name: str, x: torch.Tensor) -> None:
        """Merge the windows' largest values into those kept ``[example, neuron]``."""
        n, length = self.shape
        value, place = x.detach().reshape(n, length, -1)[:, 1:].abs().max(dim=1)  # [window, neuron]
        place = 1 + place + (self.first + length * torch.arange(n, device=x.device))[:, None]
        value = value.float()
        if name in self.top:
            value, place = (
                torch.cat(both) for both in zip(self.top[name], (value, place), strict=True)
            )
        value, order = value.topk(min(self.count, len(value)), dim=0)
        self.top[name] = value, place.gather(0, order)

    def examples(self) -> Examples | None:
        """What was found, of all modules in their order."""
        if not self.modules:
            return None
        found = [self.top[name] for name in self.modules]
        short = self.count - len(found[0][0])
        values, places = (
            np.concatenate([pair[i].T.cpu().numpy() for pair in found]) for i in range(2)
        )
        if short:
            values = np.pad(values, ((0, 0), (0, short)), constant_values=-1)
            places = np.pad(places, ((0, 0), (0, short)))
        lengths = np.array([len(window) for window in self.windows])
        tokens = torch.cat(self.windows).numpy()
        return Examples(
            values, places, tokens, np.cumsum(lengths) - lengths
        ).without_unused_windows()
