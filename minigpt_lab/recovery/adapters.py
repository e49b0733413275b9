"""A model made ready to train, all weights or LoRA adapters; either way, zeros are kept."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from ..checks import (
    GLOBAL_STATE,
    Snapshot,
    deferred,
    locked,
    restore_on_exit,
    safe_contextmanager,
    suggest,
)
from ..models import Anatomy, weight_axis


def adapter_targets(model: PreTrainedModel, wanted: Sequence[str] | None) -> list[str]:
    """Full names of the linear layers that get an adapter.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Of a known family.
    wanted : sequence of str, optional
        Full names, or their last parts (``"q_proj"``); by default every linear layer of the
        decoder.

    Raises
    ------
    ValueError
        If a name fits no linear layer.
    """
    # the layers of a dropped block have no weights
    names = [name for _, name, module in Anatomy(model).linears() if module.weight.numel()]
    chosen = []
    for target in names if wanted is None else wanted:
        fitting = [name for name in names if f".{name}".endswith(f".{target}")]
        if not fitting:
            known = names if "." in target else sorted({name.rpartition(".")[2] for name in names})
            raise ValueError(f"no linear layer {target!r} to adapt; {suggest(target, known)}")
        chosen += fitting
    return sorted(set(chosen), key=names.index)


class Trainable:
    """A model in training, and the weights that it would have if training ended now.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model itself, with whatever is put into it for training.
    module : torch.nn.Module
        What the Trainer trains: the model, or the PEFT model around it.
    before : Snapshot
        Of the model before it was made ready.
    sources : mapping
        Each parameter that changes, to its trained copy or to its adapted layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        module: nn.Module,
        before: Snapshot,
        sources: Mapping[nn.Parameter, nn.Parameter | nn.Module],
    ):
        self.model, self.module = model, module
        self.before, self.sources = before, sources
        self.improved = True

    def values(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Parameters and their new values in the type they are stored in, one after another."""
        for parameter, source in self.sources.items():
            if isinstance(source, nn.Parameter):
                value = source.detach()
            else:  # W + (alpha / r) B A, in float32
                delta = source.get_delta_weight("default").detach()
                value = parameter.detach().to(_training_dtype(parameter)) + delta
            yield parameter, value.to(parameter.dtype)

    @safe_contextmanager
    def merged(self) -> Iterator[PreTrainedModel]:
        """Within: the plain model with its new weights, rounded to the type they are stored in."""
        training = Snapshot(self.model)
        with contextlib.ExitStack() as undo:
            undo.callback(training.restore)
            for parameter, value in self.values():
                old = parameter.data.cpu()  # on the CPU the tensor itself
                undo.callback(_set_data, parameter, old, parameter.device)
                parameter.data = value
            self.before.restore()
            yield self.model


def _set_data(parameter: nn.Parameter, tensor: torch.Tensor, device: torch.device) -> None:
    parameter.data = tensor.to(device)


@safe_contextmanager
def trainable(
    model: PreTrainedModel, names: Sequence[str] | None = None, **lora
) -> Iterator[Trainable]:
    """Within: the model is ready to train; afterwards it is plain again, with its new weights.

    All weights are trained in copies in float32 at least, whatever type they are stored in: steps
    smaller than half a unit in the last place would be lost in bfloat16, and gradients in float16.
    Adapters are in float32 too; the weights below them stay as stored, except float16. If the block
    ends in an exception, or `Trainable.improved` is False, the weights are the old ones, bit for
    bit. An interrupt while the new ones are being written is raised when all of them are.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Trained itself, or adapted.
    names : sequence of str, optional
        Linear layers that get a LoRA adapter, merged at the end; None trains all weights.
    **lora
        Of `peft.LoraConfig`.

    Yields
    ------
    Trainable
    """
    half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    with locked(model):
        with restore_on_exit(model) as before:
            if names is None:
                module, sources = model, _replace_by_copies(model)
                _keep_zeros(sources.values())
                # Checkpoints have no generation settings, which transformers may refuse to save,
                # and the names in memory: the Trainer reads no others.
                model.generation_config = GenerationConfig()
                model.save_pretrained = functools.partial(
                    model.save_pretrained, save_original_format=False
                )
            else:
                stored = [model.get_submodule(name).weight for name in names]
                if half:
                    _replace_by_copies(model)
                module = _with_adapters(model, names, **lora)
                sources = dict(zip(stored, map(model.get_submodule, names), strict=True))
            subject = Trainable(model, module, before, sources)
            yield subject
        deferred.raise_pending()  # nothing has changed yet
        if subject.improved:
            with torch.no_grad():
                for parameter, value in subject.values():
                    parameter.copy_(value)


def _training_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _replace_by_copies(model: PreTrainedModel) -> dict[nn.Parameter, nn.Parameter]:
    """Put copies in float32 at least in the place of all parameters; tied ones stay tied."""
    copies: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in copies:
                    copy = parameter.detach().to(_training_dtype(parameter), copy=True)
                    copies[parameter] = nn.Parameter(copy)
                module._parameters[name] = copies[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(_training_dtype(buffer))
    return copies


def _with_adapters(model: PreTrainedModel, names: Sequence[str], **lora) -> nn.Module:
    """Put LoRA adapters around linear layers of the model."""
    with locked(GLOBAL_STATE), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses a deprecated name
        transposed = weight_axis(model.get_submodule(names[0]), "output") == 1
        config = LoraConfig(target_modules=list(names), fan_in_fan_out=transposed, **lora)
        peft: Any = get_peft_model(model, config)
    # Checkpoints without embeddings: peft asks the hub whether a pruned one has changed.
    peft.save_pretrained = functools.partial(peft.save_pretrained, save_embedding_layers=False)
    for name in names:
        _keep_zeros_of_adapter(model.get_submodule(name))
    return peft


def _keep_zeros(parameters: Iterable[nn.Parameter]) -> None:
    """No gradient for weights that are zero; decoupled weight decay leaves zeros alone."""
    for parameter in parameters:
        zero = parameter.detach() == 0
        if parameter.dim() == 2 and zero.any():
            _mask_gradient(parameter, zero)


@torch.no_grad()
def _keep_zeros_of_adapter(layer: nn.Module) -> None:
    """ΔW = B A stays zero in the columns and rows in which W is: no columns of A, no rows of B."""
    zero = layer.base_layer.weight == 0
    inputs, outputs = (weight_axis(layer.base_layer, side) for side in ("input", "output"))
    columns, rows = zero.all(outputs)[None, :], zero.all(inputs)[:, None]
    for factor, mask in ((layer.lora_A, columns), (layer.lora_B, rows)):
        if mask.any():
            factor["default"].weight.masked_fill_(mask, 0)
            _mask_gradient(factor["default"].weight, mask)


def _mask_gradient(parameter: nn.Parameter, mask: torch.Tensor) -> None:
    parameter.register_hook(lambda grad: grad.masked_fill(mask, 0))
