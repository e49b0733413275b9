"""The training loop of recovery: evaluated by perplexity, checkpointed, stopped, resumed."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState
from transformers.utils import logging

from ..checks import first_line, safe_contextmanager
from ..evaluation import perplexity
from .adapters import Trainable
from .checkpoints import (
    STATE,
    discard_checkpoint,
    has_ended,
    last_whole,
    open_run,
    rotate,
    seal,
    slim,
)


class _DiskTrouble(Exception):
    """A checkpoint could not be written."""


#: Times worse than before training, and than a guess among all tokens: it has diverged.
ABSURD = 100
#: What a full disk raises while json, torch and safetensors write.
_WRITING = (OSError, RuntimeError, SafetensorError)


class KitTrainer(Trainer):
    """A Trainer whose evaluation is the kit's perplexity, and that ends with its best state.

    Parameters
    ----------
    subject : Trainable
        What is trained.
    measured : tuple
        Tokenizer, texts by name (``"perplexity"`` first), and `seq_len` of an evaluation.
    **options
        Of `transformers.Trainer`.
    """

    def __init__(self, subject: Trainable, measured: tuple, **options):
        super().__init__(model=subject.module, **options)
        self.subject = subject
        self.remove_callback(PrinterCallback)
        self.measured = measured
        self.began = time.time()
        self.trouble: Exception | None = None
        self.absurd = math.inf

    def run(self, folder: Path, facts: dict, progress: bool) -> tuple[str, dict]:
        """Train, or resume, and put the best state back.

        Parameters
        ----------
        folder : pathlib.Path
            Of the checkpoints.
        facts : dict
            What the run is: another one in the same folder is refused.
        progress : bool
            Show a progress bar.

        Returns
        -------
        why : str
            Why it ended.
        start : dict
            Metrics before training.
        """
        first = self.is_world_process_zero()
        run = open_run(folder, facts)
        start = run.progress and run.progress["start"]
        checkpoint = self._agreed(last_whole(folder) if first else None)
        self.began, ended = time.time(), False
        if start is None:
            start = self._agreed(self._measure())
            if first:
                run.write(start=start)
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / STATE))
            self.began -= max(row.get("eval_seconds", 0.0) for row in state.log_history)
            ended = has_ended(dataclasses.asdict(state))
        level = facts["stop_at"]
        if level is not None and start["eval_perplexity"] <= level:
            self.subject.improved = False
            return "recovered", start
        vocabulary = self.subject.model.get_input_embeddings().weight.shape[0]
        self.absurd = ABSURD * max(start["eval_perplexity"], vocabulary)
        why = "finished"
        if ended:
            self.state = state
        else:
            why = self._train(checkpoint, progress and first)
        if first and why == "finished":
            slim(folder)
        best = folder / f"checkpoint-{self.state.best_global_step}"
        if not (self.state.best_metric or math.inf) < start["eval_perplexity"]:
            self.subject.improved = False
        elif (best / STATE).is_file():  # else not written: the model still is in its best state
            self.state.best_model_checkpoint = str(best)
            self._load_best_model()
        return why, start

    def _train(self, checkpoint: Path | None, progress: bool) -> str:
        with tqdm(desc="recover", unit="step", disable=not progress) as bar:
            self.add_callback(_Progress(bar))
            try:
                self.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            except KeyboardInterrupt:
                return "interrupted"
            except FloatingPointError:
                return "diverged"
            except _DiskTrouble as error:
                warnings.warn(str(error), stacklevel=4)
                return "disk"
        return "finished"

    def _agreed(self, value):
        """The first process's value in all of them: they must decide alike, or wait for ever."""
        return gather_object([value])[0]

    def _measure(self) -> dict[str, float]:
        """Perplexity on every text of the model as it would be given back now."""
        tokenizer, texts, seq_len = self.measured
        diverged = np.errstate(over="ignore", invalid="ignore")  # what becomes of it is seen later
        with self.subject.given_back() as model, diverged:
            found = {
                f"eval_{name}": perplexity(
                    model, tokenizer, text, seq_len=seq_len, progress=False
                ).value
                for name, text in texts.items()
            }
        return {**found, "eval_seconds": time.time() - self.began}

    def evaluate(self, *_args, **_options) -> dict[str, float]:
        """Measure, log and show to the callbacks."""
        try:
            metrics = self._measure()
        except ValueError as error:  # the texts were fine before training: the model gives NaN
            metrics = FloatingPointError(str(error))
        metrics = self._agreed(metrics)
        if not isinstance(metrics, Exception) and not math.isfinite(metrics["eval_perplexity"]):
            metrics = FloatingPointError("the perplexity is infinite")
        if isinstance(metrics, Exception):
            raise metrics
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        if metrics["eval_perplexity"] > self.absurd:
            raise FloatingPointError("the loss has diverged")
        return metrics

    def save_model(self, *args, **options) -> None:
        """Write the weights; trouble waits until every process has passed the barrier after it."""
        try:
            super().save_model(*args, **options)
        except _WRITING as error:
            self.trouble = error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.trouble is not None:
            raise self.trouble
        super()._save_optimizer_and_scheduler(output_dir)

    def _issue_warnings_after_load(self, load_result) -> None:
        """None: what is missing from a checkpoint of this very model is tied to what is there."""

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint, whole or not at all."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with _quiet():
                super()._save_checkpoint(model, trial)
            if self.is_world_process_zero():
                seal(folder)
        except _WRITING as error:
            self.trouble = error
        troubles = filter(None, gather_object([self.trouble and first_line(self.trouble)]))
        if reason := next(troubles, None):
            if self.is_world_process_zero():
                discard_checkpoint(folder)
            raise _DiskTrouble(
                f"stopped: {folder} could not be written ({reason}); is the disk full? The best "
                "state so far is in the model; make room and repeat the call to go on from the "
                "checkpoint before"
            )
        if self.is_world_process_zero():  # the Trainer's own rotation removes a user's copies too
            rotate(folder.parent, self.state.best_model_checkpoint)


@safe_contextmanager
def _quiet() -> Iterator[None]:
    """Without a bar per file, or a warning that checkpoints of the same second look alike."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class StopTraining(TrainerCallback):
    """Stop at a level of validation perplexity, or after evaluations without improvement."""

    def __init__(self, level: float | None, patience: int):
        self.level, self.patience = level, patience

    def on_step_end(self, args, state, control, **kwargs):
        """Log the training loss with every evaluation, also with the last."""
        control.should_log = control.should_log or control.should_evaluate

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        """Compare after every evaluation."""
        found = [row["eval_perplexity"] for row in state.log_history if "eval_perplexity" in row]
        stale = len(found) - 1 - found.index(min(found))
        level = -math.inf if self.level is None else self.level
        if found[-1] <= level or stale >= self.patience:
            control.should_training_stop = True


class _Progress(TrainerCallback):
    """The same bar as everywhere in the kit; the Trainer's own print a table or a dict per row."""

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
        """An early end is no failure."""
        self.bar.total = state.global_step
