"""One run of `make_mini`: what it was begun with, the time gone, and what is left for training."""

from __future__ import annotations

import contextlib
import copy
import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Self

import pandas as pd
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import InvalidArgument
from ..compensation import STEP_TOKENS
from ..domains import Domain, Part, tokenize
from ..evaluation import perplexity
from ..models import fingerprint, reading_dtype
from ..recovery import recover, require_ended
from ..store import RunState
from ..studies import HeldOut

#: Share of the minutes for measuring, and the most tokens of a text that are read.
_MEASURING, _TEST_TOKENS = 0.15, 65_536
#: The most passes over the train part.
_PASSES = 4
#: Tokens of the trial runs that tell how fast this machine reads and trains.
_TRIAL = 2_048
#: Validation text of an evaluation, in characters; it is evaluated thrice while training.
_EVAL_CHARACTERS = 16_384
#: Seconds after which the bar is drawn again.
_REDRAW = 10


#: What a run leaves in its folder and reads again.
_OWN = ("pruned", "model", "recovery", "control", "mini-*.gguf", "table.csv", "measured.json")
#: Files by which a step resumes.
_CHECKPOINTS = [f"{name}/**/*" for name in ("search", "pruning", "pruned", "recovery", "control")]
_CHECKPOINTS += ["measured.json"]


def require_own(folder: Path) -> None:
    """Refuse a folder without a run, but with what looks like a run's results.

    Raises
    ------
    ValueError
        Naming what was found; it is left alone.
    """
    for pattern in _OWN:
        for path in folder.glob(pattern):
            raise InvalidArgument(
                f"out_dir is {str(folder)!r}, which holds {path.name} and no run of make_mini (or "
                "its state.json is damaged); choose another folder, or move that away"
            )


def least_tokens(seq_len: int, share: float, *, trial: bool = False) -> int:
    """Tokens of the shortest training, or of a trial: two windows of the domain's own at least."""
    return max(_TRIAL if trial else 8 * _TRIAL, math.ceil(2 * seq_len / (1 - share)))


def _tokens(text: Part, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> int:
    """Tokens of a text in whole windows."""
    windows = tokenize(text, tokenizer, seq_len=seq_len)
    return sum(batch["input_ids"].numel() for batch in windows)


class TimedRun:
    """State of a call in its folder: what it was begun with, time gone, tokens to train on."""

    def __init__(self, folder: Path, facts: Mapping[str, object], minutes: float, bar: tqdm):
        self.folder, self.bar, self.seconds, self.step = folder, bar, 60 * minutes, ""
        self.state = RunState(folder / "state.json")
        self.begins = self.state.progress is None
        if self.begins:
            require_own(folder)
        self.state.require(facts)
        self.known = dict(self.state.progress or {})
        planned = self.known.get("minutes", minutes)
        if planned != minutes:
            raise InvalidArgument(
                f"minutes is {minutes:g}; {folder} holds a run whose training was planned for "
                f"{planned:g}; repeat that call to resume it, or choose another out_dir"
            )
        self.began = time.monotonic() - self.known.get("seconds", 0.0) - self._unwritten()
        self._over = threading.Event()
        self._clock = threading.Thread(target=self._draw_again, daemon=True)

    def __enter__(self) -> Self:
        """Within, the bar is drawn also while a step lasts."""
        if not self.bar.disable:
            self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._clock.is_alive():
            self._clock.join()

    def _draw_again(self) -> None:
        while not self._over.wait(_REDRAW):
            self.show()

    def _unwritten(self) -> float:
        """Seconds of a step that was killed: from its beginning to its last checkpoint."""
        if not self.known:
            return 0.0
        kept = [path for name in _CHECKPOINTS for path in self.folder.glob(name)]
        times = [path.stat().st_mtime for path in kept]
        return max(0.0, max(times, default=0.0) - (self.folder / "state.json").stat().st_mtime)

    def enter(self, step: str) -> None:
        """Show the next step, and keep the time gone."""
        self._keep()
        self.bar.update(bool(self.step))
        self.step = step
        self.bar.set_description_str(step or "done", refresh=False)
        self.show()

    def show(self) -> None:
        """Draw the bar, with the minutes gone and to go."""
        gone = time.monotonic() - self.began
        to_go = max(0.0, self.seconds - gone)
        self.bar.set_postfix_str(f"{gone / 60:.1f} min gone, {to_go / 60:.1f} to go")

    def _keep(self) -> None:
        """Write what is known, and the seconds gone."""
        self.known["seconds"] = time.monotonic() - self.began
        self.state.write(**self.known)

    @contextlib.contextmanager
    def given_up_unless(self, finished: Path) -> Iterator[None]:
        """Input that is refused within the block leaves no run that it began, unless finished."""
        try:
            yield
        except ValueError:
            if self.begins and not finished.exists():
                (self.folder / "state.json").unlink(missing_ok=True)
            raise

    def measure_speed(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        domain: Domain,
        *,
        seq_len: int,
        max_tokens: int,
        searching: bool,
        precision: str,
    ) -> None:
        """Seconds per token of reading, and of measuring in a precision, by a short trial.

        Raises
        ------
        ValueError
            If the minutes do not suffice for a short training.
        """
        if "measuring" not in self.known:
            read = partial(_seconds_per_token, model, tokenizer, domain.validation, seq_len)
            self.known["reading"] = self.known["measuring"] = read("auto")
            if reading_dtype(model, precision) != reading_dtype(model):
                self.known["measuring"] = read(precision)
        # Pruning reads the calibration text three times or so in float32, half as fast; training
        # takes the time of reading five times, here that of two models and a teacher. A search
        # builds two supernets, and takes 60 steps on each.
        reads = 6 * max_tokens + 11 * 8 * _TRIAL
        if searching:
            reads += 2 * (6 * max_tokens + 60 * 5 * STEP_TOKENS)
        least = reads * self.known["reading"]
        if least > self.seconds * (1 - _MEASURING):
            raise ValueError(
                f"minutes is {self.seconds / 60:g}, too few: pruning and a short training take "
                f"about {least / 60 / (1 - _MEASURING):.2g} on this machine; give more, or fewer "
                "calibration_tokens"
            )

    def training(self, trainings: Sequence[tuple], domain: Domain, options: Mapping) -> dict:
        """Arguments of `recover`: tokens or epochs for the time that is left, evaluations.

        Each training (model, tokenizer, arguments of its own) is tried on a few tokens and copies:
        seconds for a token, and for what comes with a run whatever its tokens (five evaluations,
        three checkpoints).
        """
        words, share = trainings[0][1], options.get("generality", 0.0)
        if "tokens" not in self.known:
            per_token, fixed = 0.0, 0.0
            for model, tokenizer, own in trainings:
                began, cut = time.monotonic(), least_tokens(options["seq_len"], share, trial=True)
                trial = {"max_tokens": cut, "eval_every": cut, "eval_characters": 1_024}
                how = {**own, **trial, **options}
                tried = {"progress": False, **how}
                history = require_ended(recover(copy.deepcopy(model), tokenizer, domain, **tried))
                whole = time.monotonic() - began
                evaluation, end = history["seconds"].iloc[[0, -1]]
                per_token += max(0.0, end - 2 * evaluation) / cut
                more = (_EVAL_CHARACTERS - 1_024) / 4 * (2 if "other" in options else 1)  # tokens
                fixed += 5 * (evaluation + more * self.known["reading"])
                fixed += 3 * max(0.0, whole - end)
            left = self.seconds * (1 - _MEASURING) - (time.monotonic() - self.began) - fixed
            per_token = max(per_token, self.known["reading"])
            least = least_tokens(options["seq_len"], share)
            self.known["tokens"] = max(least, int(left / per_token))
            self.known["minutes"] = self.seconds / 60
            self._keep()
        tokens = self.known["tokens"]
        whole = _tokens(domain.train, words, options["seq_len"]) / (1 - share)
        if share:  # no more in one pass than the general text is a share of
            general = _tokens(options["general"].train, words, options["seq_len"])
            whole = min(whole, general / share)
        tokens = min(tokens, int(_PASSES * whole))
        passes = max(1.0, tokens / whole)
        budget = {"max_tokens": int(tokens / passes), "epochs": passes}
        self.known["trained"] = int(tokens)
        return {
            **budget,
            "eval_every": max(_TRIAL, tokens // 3),
            "eval_characters": _EVAL_CHARACTERS,
        }

    def measured(
        self,
        variants: Mapping[str, PreTrainedModel],
        sizes: Mapping[str, int],
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[Part],
        seq_len: int,
        precision: str,
    ) -> tuple[pd.DataFrame, str]:
        """Every variant on every text with its bytes (those of `sizes` first), and the protocol."""
        if "test_tokens" not in self.known:  # as many as the time that is left allows
            left = self.seconds - (time.monotonic() - self.began)
            passes = len(texts) * (len(variants) + 1)
            tokens = int(0.8 * left / (passes * self.known["measuring"]))
            self.known["test_tokens"] = max(_TRIAL, min(_TEST_TOKENS, tokens))
            self._keep()
        path, tokens = self.folder / "measured.json", self.known["test_tokens"]
        how = {"max_tokens": tokens, "seq_len": seq_len, "path": path, "precision": precision}
        held_out = HeldOut(variants["dense"], tokenizer, texts, **how)
        cells = [(fingerprint(each), partial(held_out.measure, each)) for each in variants.values()]
        rows = []
        results = held_out.results(cells, "measured", "model", progress=False)
        for (name, model), result in zip(variants.items(), results, strict=True):
            stored = sum(weight.nbytes for weight in model.parameters())
            rows += held_out.table_rows(result, variant=name, bytes=sizes.get(name, stored))
        table = pd.DataFrame(rows).drop(columns="passages")
        protocol = f"at most {tokens:,} tokens per text, windows of {seq_len}, no overlap"
        return table, f"{protocol}, read in {held_out.read_in}"


def _seconds_per_token(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Part,
    seq_len: int,
    precision: str,
) -> float:
    """Of reading, by a short trial."""
    options, gone, read = {"seq_len": seq_len, "progress": False, "precision": precision}, [], []
    # The first call of all takes longer, and every call some time whatever its tokens.
    for tokens in (seq_len, seq_len, seq_len + _TRIAL):
        began = time.monotonic()
        found = perplexity(model, tokenizer, text, max_tokens=tokens, **options)
        gone.append(time.monotonic() - began)
        read.append(found.tokens)  # fewer, of a short text
    seconds, tokens = max(gone[2] - gone[1], 0.1 * gone[2]), read[2] - read[1]
    return seconds / max(tokens, 0.1 * read[2])
