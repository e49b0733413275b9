"""Run the decoder layers one after another, each on the outputs of the layers before it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

from ..domains import unpadded
from ..models import SITES, Anatomy, inference, weight_axis
from ..store import Shards
from .forward import first_output, patched_forward, run_decoder, watch

Calls = list[list[dict]]  # [window][layer]: keyword arguments; masks may differ between layers


def catch_inputs(
    model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]], hidden: Shards
) -> Calls:
    """Run the embeddings alone, to catch the first layer's inputs and every layer's arguments.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model.
    batches : iterable of dict
        Tokens; padding is left out.
    hidden : Shards
        Filled with the first layer's inputs ``[batch, token, feature]``, one per window.

    Returns
    -------
    list of list of dict
        ``[window][layer]`` to the layer's keyword arguments beside the hidden states.
    """
    calls: Calls = []
    returns_tuple: bool | None = None  # whether layers return a tuple

    def record(forward: Callable, *args, **kwargs):
        """Note a layer's arguments and hand its input on, in place of its output."""
        nonlocal returns_tuple
        if returns_tuple is None:  # run one layer, once, to know
            returns_tuple = isinstance(forward(*args, **kwargs), tuple)
        states = args[0] if args else kwargs["hidden_states"]
        if not calls[-1]:  # the first layer
            hidden[len(calls) - 1] = states
        calls[-1].append({k: v for k, v in kwargs.items() if k != "hidden_states"})
        return (states, None) if returns_tuple else states

    with inference(model), patched_forward(Anatomy(model).layers, record):
        for ids in unpadded(batches):
            calls.append([])
            run_decoder(model, ids)
    return calls


class LayerRunner:
    """Run one decoder layer over all windows, in steps, so that no matrix product runs twice.

    How a projection that reads units (o, down) is pruned depends on its inputs over all windows. So
    `inputs` runs the layer up to that projection and keeps what it reads; later steps continue from
    there: attention is not run again, nor are the projections into the FFN. The layer's own code
    runs, so every family is supported, those with parallel blocks included.

    Parameters
    ----------
    anatomy : Anatomy
        Of the model.
    index : int
        The layer.
    hidden : Shards
        Its inputs ``[batch, token, feature]`` by window; `finish` replaces them by its outputs.
    calls : list of list of dict
        From `catch_inputs`.
    weights : sequence of float, optional
        Weight of every token of a window, by window; by default all count alike.

    Attributes
    ----------
    dtype : torch.dtype or None
        Type that the inputs are cast to; None for as they are.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        index: int,
        hidden: Shards,
        calls: Calls,
        weights: Sequence[float] | None = None,
    ):
        family = anatomy.family
        self.weights = [1.0] * len(calls) if weights is None else weights
        self.dtype: torch.dtype | None = None
        self.per_head = family.per_head
        self.layer = anatomy.layers[index]
        self.hidden = hidden
        self.kwargs = [window[index] for window in calls]
        self.readers = {site: anatomy.module(index, family.consumes[site]) for site in SITES}
        self.ffn_producers = [anatomy.module(index, each) for each in family.produces["ffn"]]
        self.attention = anatomy.attention(index)
        self.columns: dict[str, torch.Tensor] = {}
        # kept between steps, by window
        self.read = {site: Shards(hidden.place, hidden.folder) for site in SITES}
        self.attention_outputs = Shards(hidden.place, hidden.folder)

    def inputs(self, site: str) -> Iterator[torch.Tensor]:
        """Inputs ``[…, feature]`` of the site's projection, window by window; each is kept.

        Sites in the order of the data flow: attention first.
        """
        for window in range(len(self.hidden)):
            try:
                self.run(window, until=site)
            except _Reached as reached:
                self.read[site][window] = reached.states
                yield reached.states

    def keep_columns(self, site: str, columns: torch.Tensor) -> None:
        """Restrict the inputs of the site's projection to these features from now on."""
        self.columns[site] = columns

    def finish(self) -> None:
        """Replace the hidden states by the layer's outputs."""
        for window in range(len(self.hidden)):
            self.hidden[window] = self.run(window)
            self.attention_outputs.pop(window, None)

    def keep_heads(self, units: Sequence[int]) -> None:
        """Restrict the layer's arguments that have an entry per head to these heads."""
        for window, kwargs in enumerate(self.kwargs if self.per_head else ()):
            by_head = kwargs[self.per_head].unflatten(0, (len(self.hidden[window]), -1))
            own = by_head[:, [*units]].flatten(0, 1)  # [batch · heads, …]
            self.kwargs[window] = {**kwargs, self.per_head: own}

    def forget(self, site: str) -> None:
        """Drop the kept inputs of a site's projection: the weights before it have changed."""
        self.read[site].clear()

    def keep_attention(self) -> None:
        """Compute attention's outputs, unless they are kept, to run only the FFN from now on."""
        if not self.attention_outputs:
            for _ in self.inputs("ffn"):
                pass
        self.forget("ffn")

    def residual_stream(self, window: int, site: str) -> torch.Tensor:
        """Residual stream behind a part of the layer ``[batch, token, feature]``.

        Behind attention it is the output of a layer whose FFN returns 0; with parallel blocks too.
        Gradients flow to the part's projections where they are enabled. Behind the FFN, attention's
        outputs are those that `keep_attention` has kept.
        """
        if site == "ffn":
            return self.run(window)
        reader = self.readers["ffn"]
        width = reader.weight.shape[weight_axis(reader, "output")]
        with (
            patched_forward(self.ffn_producers, lambda _forward, x: x),
            patched_forward([reader], lambda _forward, x: x.new_zeros(*x.shape[:-1], width)),
        ):
            return self.run(window, resume=False)

    def run(self, window: int, until: str | None = None, resume: bool = True) -> torch.Tensor:
        """Output of the layer for one window, continued from what earlier steps kept of it.

        Parameters
        ----------
        window : int
            Which window.
        until : {"attention", "ffn"}, optional
            Stop where this site's projection reads its input.
        resume : bool
            Continue from the kept inputs of the FFN's projection, if there are any.
        """
        with contextlib.ExitStack() as patches:
            attention = partial(self._attention_output, window, until)
            patches.enter_context(patched_forward([self.attention], attention))
            if resume and window in self.read["ffn"]:
                self._resume_at_ffn(patches, self._take("ffn", window))
            if until is not None:
                patches.enter_context(watch({until: self.readers[until]}, before=_stop))
            # not layer(…): what its hooks do to the arguments was done when they were caught
            states = self.hidden[window]
            states = states if self.dtype is None else states.to(self.dtype)
            return first_output(self.layer.forward(states, **self.kwargs[window]))

    def _attention_output(
        self, window: int, until: str | None, forward: Callable, *args, **kwargs
    ) -> tuple[torch.Tensor, None]:
        """Attention's output: kept, projected from what was kept, or computed."""
        if window in self.attention_outputs:
            states = self.attention_outputs[window]
        elif window in self.read["attention"]:
            states = self.readers["attention"](self._take("attention", window))
            residual = self._attention_residual(args, kwargs)
            states = states if residual is None else states + residual
        else:
            states = forward(*args, **kwargs)[0]
        if until == "ffn":  # the window comes by again
            self.attention_outputs[window] = states
        return states, None

    def _attention_residual(self, args: tuple, kwargs: dict) -> torch.Tensor | None:
        """The residual stream, if the attention module adds it itself (BLOOM)."""
        signature = inspect.signature(type(self.attention).forward)
        return signature.bind(self.attention, *args, **kwargs).arguments.get("residual")

    def _resume_at_ffn(self, patches: contextlib.ExitStack, states: torch.Tensor) -> None:
        """Feed the FFN's last projection these states; skip the projections before it."""
        # what the skipped ones return is not read: their own input will do
        patches.enter_context(patched_forward(self.ffn_producers, lambda _forward, x: x))
        patches.enter_context(watch({"ffn": self.readers["ffn"]}, before=lambda *_: states))

    def _take(self, site: str, window: int) -> torch.Tensor:
        """The kept inputs of a site's projection, restricted to its kept columns."""
        states = self.read[site].pop(window)
        return states[..., self.columns[site]] if site in self.columns else states


class _Reached(Exception):
    """Raised where a projection is about to read `states`."""

    def __init__(self, states: torch.Tensor):
        super().__init__()
        self.states = states


def _stop(_site: str, states: torch.Tensor) -> None:
    raise _Reached(states)
