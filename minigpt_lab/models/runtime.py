"""Helpers for running a model: device, eval mode, seeds, name, hash of the weights, token ids."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from ..architectures import dense_type
from ..checks import Instance, Model, Text, checked, locked, safe_contextmanager
from .offloading import materialized_parameters
from .precision import cast_weights, reading_dtype


def default_device() -> torch.device:
    """CUDA if there is one, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def require_room(model: PreTrainedModel, seq_len: int, new_tokens: int) -> None:
    """Refuse a prompt and new tokens that a model has no positions for."""
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None and seq_len + new_tokens > room:
        raise ValueError(
            f"{seq_len} + {new_tokens} tokens do not fit {label(model)}, which has {room} "
            "positions; choose a smaller seq_len"
        )


@checked(model=Instance(PreTrainedModel, "lab.load_model returns a model and its tokenizer"))
def label(model: PreTrainedModel) -> str:
    """Name of a model for captions and records, with its origin, and its size if it was pruned."""
    origin, pruned = origin_of(model), is_pruned(model)
    name = Path(model.config._name_or_path or dense_type(model.config.model_type)).name
    if "title" in origin and (pruned or "note" in origin):  # else the folder may be of another
        name = origin["title"] + (f" ({origin['note']})" if "note" in origin else "")
    return f"{name}, pruned to {model.num_parameters():,} parameters" if pruned else name


def origin_of(model: PreTrainedModel) -> dict[str, str]:
    """What is known of a model's base: ``title, note, licence, language, hub``, or some of them."""
    known = getattr(model.config, "minigpt_lab_origin", None)
    texts = known.items() if isinstance(known, dict) else ()
    return {name: text for name, text in texts if isinstance(text, str)}


def is_pruned(model: PreTrainedModel) -> bool:
    """Whether a model has plans, or was larger when its config was written by `shrink`.

    Plans lie beside the weights, in ``minigpt_lab.json``, which plain transformers does not copy.
    """
    if getattr(model, "pruning_plans", None):
        return True
    return noted_dense(model).get("parameters", 0) > model.num_parameters()


def noted_dense(model: PreTrainedModel) -> dict[str, Any]:
    """What pruning noted of the dense model in the config (see `dense_counts`); may be empty."""
    known = getattr(model.config, "minigpt_lab_dense", None)
    if not isinstance(known, dict) or not {"parameters", "layers"} <= known.keys():
        return {}
    counts = [known.get(name, 1) for name in ("parameters", "layers", "tokens")]
    return known if all(isinstance(count, int) and count > 0 for count in counts) else {}


@safe_contextmanager
def inference(model: nn.Module, precision: str | None = None) -> Iterator[nn.Module]:
    """Evaluation mode without gradients, on a locked model that is restored at the end.

    Parameters
    ----------
    model : torch.nn.Module
        Any model.
    precision : {"auto", "bfloat16", "float32"}, optional
        Within, the weights have this type (see `reading_dtype`); by default they are as stored.
    """
    with locked(model), contextlib.ExitStack() as undo:
        training = {module: module.training for module in model.modules()}
        try:
            model.eval()
            with torch.no_grad():
                if precision is not None:
                    cast_weights(model, reading_dtype(model, precision), undo)
                yield model
        finally:
            for module, flag in training.items():
                module.training = flag


class GlobalGenerators:
    """What `seeded` locks: the process's random generators, which one thread at a time may seed."""


_GENERATORS = GlobalGenerators()


@safe_contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators of random, NumPy and torch; their states are restored afterwards."""
    with locked(_GENERATORS), contextlib.ExitStack() as undo:
        undo.callback(random.setstate, random.getstate())
        undo.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002
        undo.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        if torch.backends.mps.is_available():
            undo.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
        set_seed(seed)
        yield


@safe_contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings (missing keys that are tied) and bars per file."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# Config fields that do not change what the model computes.
_IGNORED = {
    "_name_or_path",
    "transformers_version",
    "minigpt_lab_origin",
    "minigpt_lab_dense",
    "minigpt_lab_widths",  # hashed as shapes of the weights
    "minigpt_lab_biases",
    "architectures",
    "use_cache",
    "dtype",
}
_MOST_HASHES = 4  # cached per model: of its own weights, and of them under a few masks
_hashes: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@checked(model=Model())
def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of a model's config and weights (names, types, shapes, bytes).

    Cached until the config or a weight changes, so that a repeated call only sums the weights.
    Changes in place are noticed by autograd's version counter; those that it does not count
    (``weight.data.mul_(2)``) nearly always by the sum. Not noticed are changes through ``.data``
    that only reorder a weight's values, and changes of offloaded weights.

    A call waits while another thread uses the model, so it never reads weights under that thread's
    mask.
    """
    entries = {k: v for k, v in model.config.to_dict().items() if k not in _IGNORED}
    entries["model_type"] = dense_type(model.config.model_type)
    config = json.dumps(entries, sort_keys=True, default=str)
    version = config, *((name, *_version(p)) for name, p in model.named_parameters())
    hashes = _hashes.setdefault(model, {})  # version to hash, the last used at the end
    hashes[version] = hashes.pop(version, None) or _hash(model, config)
    while len(hashes) > _MOST_HASHES:
        del hashes[next(iter(hashes))]
    return hashes[version]


def _hash(model: PreTrainedModel, config: str) -> str:
    """SHA-256 of a config and of all parameters: their names, types, shapes and bytes."""
    digest = hashlib.sha256(config.encode())
    for name, parameter in materialized_parameters(model):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        if parameter.numel():  # of a dropped block's there is nothing to read
            content = parameter.detach().cpu().contiguous().view(torch.uint8)
            digest.update(memoryview(content.numpy()).cast("B"))
    return digest.hexdigest()


def _version(parameter: torch.Tensor) -> tuple:
    """A key that changes with a parameter: its address, autograd's version, a sum over its bits."""
    count = 0 if parameter.is_inference() else parameter._version
    key = parameter.data_ptr(), count, parameter.dtype, parameter.shape
    if parameter.is_meta:
        return key
    values = parameter.detach().flatten()
    size = values.element_size()
    narrow = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    # summed in words of 64 bits where the size allows: 20 times as fast
    dtype = torch.int64 if values.numel() * size % 8 == 0 else narrow
    return *key, int(values.view(dtype).sum(dtype=torch.int64))  # wraps around: exact in any order


@checked(model=Model(), model_hash=Text(), what=Text())
def require_weights(model: PreTrainedModel, model_hash: str, what: str) -> None:
    """Refuse a model whose weights are not those that something was measured on.

    Raises
    ------
    ValueError
        If its fingerprint is not `model_hash`; the message names `what` was measured.
    """
    own_hash = fingerprint(model)
    if own_hash != model_hash:
        raise ValueError(
            f"{what} are of another model (weights {model_hash[:12]}), not of {label(model)} "
            f"(weights {own_hash[:12]}); compute them on this one"
        )


def check_token_ids(
    model: PreTrainedModel, input_ids: torch.Tensor, name: str = "this model"
) -> None:
    """Refuse token ids, or windows, that the model (called `name`) has no embedding for.

    Raises
    ------
    ValueError
        Naming the offending id or length and the legal range.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if input_ids.numel() == 0:
        raise ValueError(
            f"input_ids of shape {[*input_ids.shape]} hold no token; give at least one"
        )
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= rows:
        raise ValueError(
            f"token id {low if low < 0 else high} is outside the model's vocabulary (0 to "
            f"{rows - 1}): the text uses a special token that this model has no row for, or the "
            "tokenizer does not belong to it; use the pair that load_model returns"
        )
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and input_ids.shape[1] > longest:
        raise ValueError(
            f"windows of {input_ids.shape[1]} tokens are longer than {name}'s {longest}; use a "
            "shorter seq_len"
        )
