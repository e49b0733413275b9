"""The training loop of recovery: evaluated by perplexity, checkpointed, stopped early, resumed."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from ..checks import first_line
from ..evaluation import Perplexity, perplexity
from ..models import quiet
from ..store import WriteFailed
from .adapters import Trainable
from .checkpoints import (
    STATE,
    discard_checkpoint,
    drop_optimizers,
    has_ended,
    is_complete,
    last_complete,
    open_run,
    rotate,
    seal,
)
from .distillation import Teacher, TeacherIsNaN

#: Times worse than before training, and than a guess among all tokens: the run has diverged.
DIVERGED = 100


class RecoveryTrainer(Trainer):
    """A Trainer that is evaluated by perplexity and ends with its best state.

    Parameters
    ----------
    subject : Trainable
        The model in training.
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's tokenizer, or the original one.
    windows : torch.Tensor
        Token ids to train on ``[window, token]``; evaluations read windows of this length too.
    texts : dict of str to passages
        Evaluated texts; the perplexity of the first (``"perplexity"``) decides.
    precision : {"auto", "bfloat16", "float32"}
        Of an evaluation.
    **options
        Of `transformers.Trainer`.
    """

    def __init__(
        self,
        subject: Trainable,
        tokenizer: PreTrainedTokenizerBase,
        windows: torch.Tensor,
        texts: Mapping[str, Sequence[str]],
        precision: str,
        **options,
    ):
        super().__init__(
            model=subject.module,
            train_dataset=[{"input_ids": ids, "labels": ids} for ids in windows],
            eval_dataset=[{}],  # required, never read: see `evaluate`
            **options,
        )
        self.remove_callback(PrinterCallback)
        self.subject, self.texts, self.seq_len = subject, texts, windows.shape[1]
        self.tokenizer, self.precision = tokenizer, precision
        self.began = time.time()
        self.limit, self.tokens = math.inf, 0

    def run(
        self,
        folder: Path,
        facts: dict,
        stop_at: float | Teacher | None,
        patience: int,
        progress: bool,
    ) -> tuple[str, dict]:
        """Train, or resume, and load the best state.

        Parameters
        ----------
        folder : pathlib.Path
            Of the checkpoints.
        facts : dict
            What identifies the run: another one in the same folder is refused.
        stop_at : float or Teacher, optional
            Perplexity at which nothing is left to do, or who has it.
        patience : int
            Evaluations without improvement before it stops.
        progress : bool
            Show a progress bar.

        Returns
        -------
        why : str
            Why it ended.
        start : dict
            Metrics before training, and the perplexity to stop at.
        """
        first = self.is_world_process_zero()
        self.began, state = time.time(), None
        run = open_run(folder, facts)
        start = run.progress and run.progress["start"]
        checkpoint = self._agree(last_complete(folder) if first else None)
        if start is None:
            start = self._agree(self._measure())
            if isinstance(stop_at, Teacher):
                stop_at = self._agree(self._level(stop_at.model))
            start["stop_at"] = stop_at
            if first:
                run.write(start=start)
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / STATE))
            self.began -= max(row.get("eval_seconds", 0.0) for row in state.log_history)
        level = start["stop_at"]
        self.add_callback(RecoveryCallback(start["eval_perplexity"], level, patience))
        if level is not None and start["eval_perplexity"] <= level:
            self.subject.improved = False
            return "recovered", start
        vocabulary = self.subject.model.get_input_embeddings().weight.shape[0]
        self.limit = DIVERGED * max(start["eval_perplexity"], vocabulary)
        if state is not None and has_ended(dataclasses.asdict(state)):
            self.state, why = state, "finished"
        else:
            why = self._train(checkpoint, progress and first)
        if first and why == "finished":
            drop_optimizers(folder)
        self.subject.improved = (self.state.best_metric or math.inf) < start["eval_perplexity"]
        best = folder / f"checkpoint-{self.state.best_global_step}"
        if self.subject.improved and is_complete(best):  # else the model is in its best state
            self.state.best_model_checkpoint = str(best)
            with quiet():
                self._load_best_model()
        return why, start

    def _train(self, checkpoint: Path | None, progress: bool) -> str:
        """Train until the end, an interruption, divergence, a broken teacher or a full disk."""
        with tqdm(desc="recover", unit="step", disable=not progress) as bar, quiet():
            self.add_callback(ProgressBar(bar))
            try:
                self.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            except KeyboardInterrupt:
                return "interrupted"
            except FloatingPointError as error:
                remedy = "a lower learning_rate" + ", or precision='float32'" * self.args.bf16
                if isinstance(error, TeacherIsNaN):
                    if self.args.world_size > 1:  # the others train on, and would wait for it
                        raise
                    remedy = "another teacher"
                warnings.warn(
                    f"stopped: {error}; the best state so far is in the model; try {remedy}",
                    stacklevel=4,
                )
                return "diverged"
            except (
                OSError,
                RuntimeError,
                SafetensorError,
            ) as error:  # json's, torch's, safetensors'
                saving = self.control.should_save and not self.control.should_evaluate
                if not (saving or isinstance(error, WriteFailed)) or self.args.world_size > 1:
                    raise
                folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
                discard_checkpoint(folder)
                warnings.warn(
                    f"stopped: {folder} could not be written ({first_line(error)}); is the disk "
                    "full? The best state so far is in the model; make room and repeat the call to "
                    "go on from the checkpoint before",
                    stacklevel=4,
                )
                return "disk"
        return "finished"

    def _agree(self, value):
        """The first process's value in all of them: each must decide alike, or others hang."""
        return gather_object([value])[0]

    def _measure(self) -> dict[str, float]:
        """Perplexity on every text of the model as it would be returned now."""
        overflow = np.errstate(over="ignore", invalid="ignore")  # of a model that diverges
        with self.subject.merged() as model, overflow:
            found = {name: self._perplexity(model, text) for name, text in self.texts.items()}
        self.tokens = found["perplexity"].tokens
        metrics = {f"eval_{name}": each.value for name, each in found.items()}
        return {**metrics, "eval_seconds": time.time() - self.began}

    def _level(self, teacher: PreTrainedModel) -> float:
        """A teacher's loss on the text that decides, for each token that the model scores there.

        The teacher's own perplexity if both have the same tokens.
        """
        losses = self._perplexity(teacher, self.texts["perplexity"]).passages[:, 0]
        return math.exp(losses.sum() / self.tokens)

    def _perplexity(self, model: PreTrainedModel, text: Sequence[str]) -> Perplexity:
        return perplexity(
            model,
            self.tokenizer,
            text,
            seq_len=self.seq_len,
            max_characters=None,
            precision=self.precision,
            progress=False,
        )

    def evaluate(self, *_args, **_options) -> dict[str, float]:
        """Measure, log and pass on to the callbacks.

        Raises
        ------
        FloatingPointError
            If the model has diverged.
        """
        try:
            metrics = self._measure()
        except ValueError:  # the texts were fine before training: the model gives NaN
            metrics = {"eval_perplexity": math.inf}
        metrics = self._agree(metrics)
        if not math.isfinite(metrics["eval_perplexity"]):
            raise FloatingPointError("the perplexity is not finite")
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        if metrics["eval_perplexity"] > self.limit:
            raise FloatingPointError("the perplexity has diverged")
        return metrics


def history_of(state: TrainerState, why: str, start: dict) -> pd.DataFrame:
    """The evaluations as a table, with why and where it ended."""
    stop_at = start.get("stop_at")
    losses = {row["step"]: row["loss"] for row in state.log_history if "loss" in row}
    rows = [
        {
            "step": row["step"],
            "tokens": row.get("num_input_tokens_seen", 0),
            "epoch": row.get("epoch", 0.0),
            "train_loss": losses.get(row["step"]),
            "perplexity": row["eval_perplexity"],
            "other_perplexity": row.get("eval_other_perplexity"),
            "seconds": row["eval_seconds"],
        }
        for row in [{**start, "step": 0}, *state.log_history]
        if "eval_perplexity" in row
    ]
    history = pd.DataFrame(rows)
    recovered = history[history["perplexity"] <= (stop_at if stop_at is not None else -1)]
    if len(recovered):
        why = "recovered"
        history.attrs["recovery_tokens"] = int(recovered["tokens"].iloc[0])
        history.attrs["recovery_epochs"] = float(recovered["epoch"].iloc[0])
    elif why == "finished" and state.global_step < state.max_steps:
        why = "patience"
    best = history["perplexity"].idxmin()
    history.attrs |= {"stopped": why, "best_step": int(history["step"][best])}
    return history


def require_ended(history: pd.DataFrame) -> pd.DataFrame:
    """What `recover` returned, if nothing stopped it: else a result would be made of half of it.

    Raises
    ------
    KeyboardInterrupt, OSError
        What it was stopped by.
    """
    if history.attrs.get("stopped") == "interrupted":
        raise KeyboardInterrupt
    if history.attrs.get("stopped") == "disk":
        raise OSError("a checkpoint could not be written; make room and repeat the call")
    return history


class RecoveryCallback(TrainerCallback):
    """Stop in time, log with every evaluation, look after the checkpoints."""

    def __init__(self, start: float, stop_at: float | None, patience: int):
        self.start, self.patience = start, patience
        self.stop_at = -math.inf if stop_at is None else stop_at

    def on_step_end(self, args, state, control, **kwargs):
        """Log the training loss with every evaluation, also with the last."""
        control.should_log = control.should_log or control.should_evaluate

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        """Stop at the perplexity asked for, or if the last few were no better than one before."""
        logged = [row["eval_perplexity"] for row in state.log_history if "eval_perplexity" in row]
        curve = [self.start, *logged]
        waited = len(curve) - 1 - curve.index(min(curve))
        if curve[-1] <= self.stop_at or waited >= self.patience:
            control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        """Mark the checkpoint as complete; remove old ones, but no copies that a user made."""
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            rotate(Path(args.output_dir), state.best_model_checkpoint)


class ProgressBar(TrainerCallback):
    """The same bar as everywhere in the package; the Trainer's own prints a table of its logs."""

    def __init__(self, bar: tqdm):
        self.bar = bar

    def on_train_begin(self, args, state, control, **kwargs):
        """Show where it begins, and how far it may go."""
        self.bar.reset(state.max_steps)
        self.bar.update(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        """Advance."""
        self.bar.update()

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        """Show the validation perplexity."""
        self.bar.set_postfix(perplexity=f"{metrics['eval_perplexity']:.2f}")

    def on_train_end(self, args, state, control, **kwargs):
        """Early stopping is no failure."""
        self.bar.total = state.global_step
