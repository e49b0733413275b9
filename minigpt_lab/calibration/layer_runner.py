"""Layer by layer through a model, each fed with what the layers before it have become."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checks import hooked, safe_contextmanager
from ..domains import unpadded
from ..models import SITES, Anatomy, check_token_ids, execution_device, inference
from ..store import Shards

Calls = list[list[dict]]  # [window][layer]: keyword arguments; masks may differ between layers


def for_each_layer(
    model: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    visit: Callable[[int, Callable[[], None]], None],
) -> None:
    """Visit the decoder layers in order, for methods that change one layer after another.

    Memory holds every batch's hidden states at one depth. Padding is left out (see `unpadded`).

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model.
    batches : iterable of dict
        ``input_ids`` and, if there is padding, ``attention_mask``.
    visit : callable
        ``(layer, forward)``, called without gradients. ``forward()`` sends all tokens through the
        layer as it is at that moment; hooks see them. After the visit the layer runs once more, and
        its outputs are the next one's inputs.
    """
    anatomy, hidden = Anatomy(model), Shards()
    with inference(model):
        calls = catch_inputs(model, batches, hidden)
        for index in range(len(anatomy.layers)):
            one = LayerRunner(anatomy, index, hidden, calls)
            visit(index, lambda one=one: [one.run(window) for window in range(len(calls))])
            if index + 1 < len(anatomy.layers):
                one.finish()


def catch_inputs(
    model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]], hidden: Shards
) -> Calls:
    """Run the embeddings alone: what the first layer reads, and how each layer is called.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A supported causal language model.
    batches : iterable of dict
        Tokens; padding is left out.
    hidden : Shards
        Filled with ``[batch, token, feature]`` of every window.

    Returns
    -------
    list of list of dict
        ``[window][layer]`` to the keyword arguments beside the hidden states.
    """
    calls: Calls = []
    device = execution_device(model.get_input_embeddings())
    wraps: bool | None = None  # whether layers return a tuple

    def record(forward: Callable, *args, **kwargs):
        nonlocal wraps
        if wraps is None:
            wraps = isinstance(forward(*args, **kwargs), tuple)
        states = args[0] if args else kwargs["hidden_states"]
        if not calls[-1]:
            hidden[len(calls) - 1] = states
        calls[-1].append({k: v for k, v in kwargs.items() if k != "hidden_states"})
        return (states, None) if wraps else states

    with inference(model), _all_patched(Anatomy(model).layers, record):
        for ids in unpadded(batches):
            check_token_ids(model, ids)
            calls.append([])
            model.base_model(input_ids=ids.to(device), use_cache=False)
    return calls


class LayerRunner:
    """One decoder layer over all windows, in parts, so that no matrix product runs twice.

    What a projection that reads units (o, down) should become depends on all that it reads. So
    `inputs` runs the layer up to it and keeps what it reads; later parts go on from there:
    attention is not run again, nor are the projections into the FFN. Works on every family,
    parallel blocks included, because the layer's own code is what runs.

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
    """

    def __init__(self, anatomy: Anatomy, index: int, hidden: Shards, calls: Calls):
        family = anatomy.family
        self.layer = anatomy.layers[index]
        self.hidden = hidden
        self.arguments = [window[index] for window in calls]
        self.readers = {site: anatomy.module(index, family.consumes[site]) for site in SITES}
        self.producers = [anatomy.module(index, each) for each in family.produces["ffn"]]
        path = family.consumes["attention"].path.rpartition(".")[0]
        self.attention = self.layer.get_submodule(path)
        self.columns: dict[str, torch.Tensor] = {}
        self.read = {site: Shards(hidden.place, hidden.folder) for site in SITES}
        self.attended = Shards(hidden.place, hidden.folder)

    def inputs(self, site: str) -> Iterator[torch.Tensor]:
        """What the site's projection reads, window by window ``[…, feature]``; each is kept.

        Sites in the order of the data flow: attention first.
        """
        for window in range(len(self.hidden)):
            try:
                self.run(window, until=site)
            except _Reached as reached:
                self.read[site][window] = reached.states
                yield reached.states

    def keep_columns(self, site: str, columns: torch.Tensor) -> None:
        """Of what the site's projection reads, only these features exist from now on."""
        self.columns[site] = columns

    def finish(self) -> None:
        """Replace the hidden states by the layer's outputs."""
        for window in range(len(self.hidden)):
            self.hidden[window] = self.run(window)

    def run(self, window: int, until: str | None = None) -> torch.Tensor:
        """The layer's output for one window, from what is known of it already."""
        attend, hooks, passed = partial(self._attend, window, until == "ffn"), [], ()
        if window in self.read["ffn"]:
            states = self._take("ffn", window)
            reader, passed = self.readers["ffn"], self.producers
            hooks.append(partial(reader.register_forward_pre_hook, lambda *_: (states,)))
        if until is not None:
            hooks.append(partial(self.readers[until].register_forward_pre_hook, _stop))
        # outputs of the producers are not read: pass anything through
        through = _all_patched(passed, lambda _forward, states: states)
        with patched_forward(self.attention, attend), through, hooked(*hooks):
            # not layer(…): what its hooks do to the arguments was done when they were recorded
            found = self.layer.forward(self.hidden[window], **self.arguments[window])
        return found[0] if isinstance(found, tuple) else found

    def _attend(self, window: int, again: bool, forward: Callable, *args, **kwargs) -> tuple:
        """What the attention module returns; kept if the window comes by `again`."""
        if window in self.attended:
            return self.attended.pop(window), None
        if window in self.read["attention"]:
            states = self.readers["attention"](self._take("attention", window))
            given = inspect.signature(type(self.attention).forward)
            bound = given.bind(self.attention, *args, **kwargs).arguments
            if "residual" in bound:  # BLOOM's attention adds it itself
                states = states + bound["residual"]
        else:
            states = forward(*args, **kwargs)[0]
        if again:
            self.attended[window] = states
        return states, None

    def _take(self, site: str, window: int) -> torch.Tensor:
        states = self.read[site].pop(window)
        return states[..., self.columns[site]] if site in self.columns else states


class _Reached(Exception):
    """A projection is about to read `states`."""

    def __init__(self, states: torch.Tensor):
        super().__init__()
        self.states = states


def _stop(_module: nn.Module, args: tuple) -> None:
    raise _Reached(args[0])


@safe_contextmanager
def patched_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Let a module do something else while inside: ``forward(its own forward, …)``."""
    own = module.__dict__.get("forward")
    module.forward = partial(forward, module.forward)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@safe_contextmanager
def _all_patched(modules: Iterable[nn.Module], forward: Callable) -> Iterator[None]:
    """The same in several modules."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(patched_forward(module, forward))
        yield
