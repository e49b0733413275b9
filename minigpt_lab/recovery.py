"""Fine-tuning after pruning, on the domain's train part, judged on its validation part.

Mini-GPTs recovers a pruned model by a short fine-tune until it reaches the dense model's
perplexity. Its reference code trains, stops and reports on the same 512 tokens; here the three are
disjoint: train, validation, test.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from .domains import Domain
from .evaluation import perplexity
from .families import Anatomy
from .tokens import excerpt, tokenize
from .vocabulary import tokenizer_for

#: Peak learning rate by method, unless one is given.
LEARNING_RATES = {"full": 5e-5, "lora": 2e-4}


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domain: Domain,
    method: str = "full",
    epochs: float = 1.0,
    tokens: int | None = None,
    learning_rate: float | None = None,
    stop_at: float | None = None,
    other: Domain | None = None,
    eval_every: int = 8_192,
    eval_characters: int = 16_384,
    patience: int = 4,
    seq_len: int = 256,
    batch_size: int = 4,
    accumulation: int = 1,
    checkpointing: bool = False,
    rank: int = 8,
    alpha: int = 16,
    dropout: float = 0.05,
    out_dir: str | os.PathLike | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Fine-tune a pruned model, in place, until it is as good as the dense one or stops improving.

    Weights that are zero stay zero (with LoRA: rows and columns of zeros). The best state by
    validation perplexity is kept, after Ctrl-C, a diverged loss or lost patience too; a run that
    only harms changes nothing. Packed windows, AdamW, gradient clipping at 1, warm-up over 5 % of
    the steps, cosine decay, bfloat16 where CUDA has it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Shrunk, masked or dense; its weights are changed.
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's tokenizer, or the original one of a trimmed model.
    domain : Domain
        Trains on ``domain.train``, stops on ``domain.validation``.
    method : {"full", "lora"}
        All weights, or LoRA adapters (arXiv 2106.09685) on every linear layer of the decoder,
        merged at the end.
    epochs : float
        Passes over the training text.
    tokens : int, optional
        Use this many tokens of the training text; by default all.
    learning_rate : float, optional
        Peak; by default that of `LEARNING_RATES`.
    stop_at : float, optional
        Stop as soon as the validation perplexity is at or below this: the dense model's, on the
        same protocol. (Comparable only if the vocabulary is the dense one.)
    other : Domain, optional
        Another domain whose validation perplexity is followed too: what is being forgotten.
    eval_every : int
        Tokens between evaluations; checkpoints are written at the same moments.
    eval_characters : int
        Validation text per evaluation, in characters.
    patience : int
        Evaluations without improvement before it stops.
    seq_len, batch_size, accumulation : int
        Tokens per window, windows per step, steps per update.
    checkpointing : bool
        Trade time for memory (gradient checkpointing).
    rank, alpha, dropout
        Of the LoRA adapters.
    out_dir : str or path, optional
        Folder for checkpoints: a killed call resumes from the last one there, to the same curve.
        By default a temporary one.
    seed : int
        Of the order of windows and of dropout.

    Returns
    -------
    pandas.DataFrame
        One row per evaluation, the first before training: ``step, tokens, epoch, train_loss,
        perplexity, other_perplexity, seconds``. Its ``attrs`` say why it stopped (``"stopped"``:
        finished, recovered, patience, interrupted, diverged), where it was best (``"best_step"``)
        and, if it recovered, after how many tokens and epochs (``"recovery_tokens"``,
        ``"recovery_epochs"``).

    Raises
    ------
    ValueError
        If an argument is out of range or the training text shorter than one window.
    """
    if method not in LEARNING_RATES:
        raise ValueError(f"unknown method {method!r}; expected one of {sorted(LEARNING_RATES)}")
    rate = LEARNING_RATES[method] if learning_rate is None else learning_rate
    for name, value in (("epochs", epochs), ("learning_rate", rate), ("eval_every", eval_every)):
        if not value > 0:
            raise ValueError(f"{name} is {value}; expected a number above 0")
    words = tokenizer_for(model, tokenizer)
    windows = [
        {"input_ids": row, "labels": row}
        for batch in tokenize(domain.train, words, seq_len, tokens)
        for row in batch["input_ids"]
    ]
    texts = {
        name: excerpt(part.validation, max_characters=eval_characters)
        for name, part in (("perplexity", domain), ("other_perplexity", other))
        if part is not None
    }
    per_step = seq_len * batch_size * accumulation
    every = max(1, round(eval_every / per_step))
    lora = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout} if method == "lora" else None
    with _folder(out_dir) as folder, _adapted(model, lora) as trained:
        trainer = _Trainer(
            model=trained,
            args=TrainingArguments(
                output_dir=str(folder),
                num_train_epochs=epochs,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                activation_checkpointing=checkpointing,
                learning_rate=rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.05,
                max_grad_norm=1.0,
                bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
                use_cpu=model.device.type == "cpu",
                eval_strategy="steps",
                eval_steps=every,
                save_strategy="steps",
                save_steps=every,
                logging_steps=every,
                save_total_limit=2,
                load_best_model_at_end=True,
                metric_for_best_model="eval_perplexity",
                greater_is_better=False,
                report_to=[],
                seed=seed,
                dataloader_pin_memory=model.device.type == "cuda",
            ),
            train_dataset=windows,
            eval_dataset=windows[:1],  # asked for, never read: see _Trainer.evaluate
            callbacks=[EarlyStoppingCallback(patience), _StopAt(stop_at)],
        )
        trainer.measured = (words, texts, seq_len)
        with _zeros_kept(model) if lora is None else contextlib.nullcontext():
            why, start = trainer.run(folder, stop_at)
    return _history(trainer, why, start, stop_at, per_step)


class _Trainer(Trainer):
    """A Trainer whose evaluation is the kit's perplexity, on held-out text."""

    measured: tuple
    started: float

    def run(self, folder: Path, stop_at: float | None) -> tuple[str, dict]:
        """Train, put the best state back, and say why it ended and where it began."""
        self.started = time.time()
        checkpoint, first = get_last_checkpoint(str(folder)), folder / "start.json"
        if checkpoint is None:
            first.write_text(json.dumps(self.evaluate()))
        start = json.loads(first.read_text())
        if stop_at is not None and start["eval_perplexity"] <= stop_at:
            return "recovered", start
        weights = {
            name: parameter.detach().cpu().clone()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        why = "finished"
        try:
            self.train(resume_from_checkpoint=checkpoint)
        except KeyboardInterrupt:
            why = "interrupted"
        except FloatingPointError:
            why = "diverged"
        best = self.state.best_metric
        if best is None or not best < start["eval_perplexity"]:
            with torch.no_grad():
                for name, value in weights.items():
                    self.model.get_parameter(name).copy_(value)
        elif why != "finished":
            self._load_best_model()
        return why, start

    def evaluate(self, *_args, metric_key_prefix: str = "eval", **_options) -> dict[str, float]:
        """Perplexity on every text, logged and shown to the callbacks."""
        tokenizer, texts, seq_len = self.measured
        found = {"seconds": time.time() - self.started}
        for name, text in texts.items():
            try:
                found[name] = perplexity(self.model, tokenizer, text, seq_len).value
            except ValueError as error:
                raise FloatingPointError(str(error)) from error
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class _StopAt(TrainerCallback):
    """Stop when the validation perplexity is at or below a level."""

    def __init__(self, level: float | None):
        self.level = level

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        """Compare after every evaluation."""
        if self.level is not None and metrics["eval_perplexity"] <= self.level:
            control.should_training_stop = True


@contextlib.contextmanager
def _folder(out_dir: str | os.PathLike | None) -> Iterator[Path]:
    if out_dir is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
    else:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        yield Path(out_dir)


@contextlib.contextmanager
def _adapted(model: PreTrainedModel, lora: dict | None) -> Iterator[nn.Module]:
    """The model itself, or with adapters that are merged into it on leaving."""
    gradients = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training = model.training
    try:
        if lora is None:
            yield model
            return
        names = [name for _, name, _ in Anatomy(model).linears()]
        adapted = get_peft_model(model, LoraConfig(target_modules=names, **lora))
        try:
            with torch.no_grad():
                for name in names:
                    _spare_zeros(model.get_submodule(name))
            yield adapted
        finally:
            adapted.merge_and_unload()
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(gradients.get(parameter, True))
        model.train(training)


def _spare_zeros(layer: nn.Module) -> None:
    """Keep an adapter from filling rows and columns that are zero in the weight it adapts."""
    zero = layer.base_layer.weight == 0
    for factor, places, axis in (
        (layer.lora_A["default"].weight, zero.all(0), 1),
        (layer.lora_B["default"].weight, zero.all(1), 0),
    ):
        if places.any():
            mask = places.unsqueeze(1 - axis)
            factor.masked_fill_(mask, 0)
            factor.register_hook(lambda grad, mask=mask: grad.masked_fill(mask, 0))


@contextlib.contextmanager
def _zeros_kept(model: PreTrainedModel) -> Iterator[None]:
    """No gradient for weights that are zero; decoupled weight decay leaves zeros alone."""
    handles = []
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() == 2:
            zero = parameter.detach() == 0
            if zero.any():
                handles.append(
                    parameter.register_hook(lambda grad, zero=zero: grad.masked_fill(zero, 0))
                )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _history(trainer: _Trainer, why: str, start: dict, stop_at, per_step: int) -> pd.DataFrame:
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    rows = [
        {
            "step": row["step"],
            "tokens": row["step"] * per_step,
            "epoch": row.get("epoch", 0.0),
            "train_loss": losses.get(row["step"]),
            "perplexity": row["eval_perplexity"],
            "other_perplexity": row.get("eval_other_perplexity"),
            "seconds": row["eval_seconds"],
        }
        for row in [{**start, "step": 0}, *trainer.state.log_history]
        if "eval_perplexity" in row
    ]
    history = pd.DataFrame(rows).drop_duplicates("step", ignore_index=True)
    recovered = history[history["perplexity"] <= (stop_at if stop_at is not None else -1)]
    if len(recovered):
        why = "recovered"
        history.attrs["recovery_tokens"] = int(recovered["tokens"].iloc[0])
        history.attrs["recovery_epochs"] = float(recovered["epoch"].iloc[0])
    elif why == "finished" and 0 < trainer.state.global_step < trainer.state.max_steps:
        why = "patience"
    best = history["perplexity"].idxmin()
    history.attrs |= {"stopped": why, "best_step": int(history["step"][best])}
    return history
