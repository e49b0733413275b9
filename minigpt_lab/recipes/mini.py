"""From a model and a domain to a mini-GPT: trim, prune, recover, measure, save."""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import (
    Flag,
    Instance,
    Integer,
    InvalidArgument,
    Location,
    Model,
    Number,
    OneOf,
    Tokenizer,
    checked,
)
from ..compensation import slimgpt
from ..criteria import score
from ..domains import Domain, Part, load_domain, tokenize
from ..evaluation import perplexity
from ..export import KINDS, export_gguf, gguf_size, quantised
from ..models import (
    dtype_name,
    fingerprint,
    load_model,
    model_card,
    reading_dtype,
    refuse_masked,
    save_model,
    shrink,
    tokenizer_for,
)
from ..planning import one_target, plan_from_scores
from ..recovery import recover
from ..store import RunState, make_folder
from ..studies import HeldOut, smallest_within
from .preparation import calibration, digest, require_own, require_texts, trimmed_for
from .result import Mini, training_note

#: Share of the minutes for measuring, and the most tokens of a text that are read.
_MEASURING, _TEST_TOKENS = 0.15, 65_536
#: The most passes over the train part.
_PASSES = 4
#: Tokens of the trial runs that tell how fast this machine reads and trains.
_TRIAL = 2_048
#: Validation text of an evaluation, in characters; it is evaluated thrice while training.
_EVAL_CHARACTERS = 16_384
_STEPS = ("trim the vocabulary", "prune", "recover", "train the control", "measure", "save")


_DOMAIN = Instance(Domain, "lab.load_domain gives one, also for a folder of text files")


@checked(
    model=Model(),
    tokenizer=Tokenizer(),
    domain=_DOMAIN,
    size=Number(above=0, below=1) | None,
    increase=Number(above=0) | None,
    general=Number(0, below=1),
    general_domain=_DOMAIN | None,
    vocabulary=Flag(),
    reconstruct=Flag(),
    minutes=Number(above=0),
    gguf=OneOf(KINDS) | None,
    calibration_tokens=Integer(256),
    seq_len=Integer(16),
    out_dir=Location() | None,
    seed=Integer(0, 2**32 - 1),
    progress=Flag(),
)
def make_mini(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domain: Domain,
    *,
    size: float | None = None,
    increase: float | None = None,
    general: float = 0.3,
    general_domain: Domain | None = None,
    vocabulary: bool = True,
    reconstruct: bool = False,
    minutes: float = 60,
    gguf: str | None = None,
    calibration_tokens: int = 16_384,
    seq_len: int = 256,
    out_dir: str | os.PathLike | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Mini:
    """Make the smallest good model for a domain, save it, and measure what it lost.

    The vocabulary is trimmed to the domain's tokens, `slimgpt` prunes heads and FFN channels (as
    many in every layer: on SmolLM2 that lost less than its rule, at half of the parameters), and
    `recover` trains what is left on the domain's text and on general text, half on labels and half
    on the dense model's predictions. Beside it stand the dense model, the dense model fine-tuned
    on as many tokens, the model that only lost tokens, and one of the same size pruned at random.
    All are measured on the test part and on general text.

    Parameters
    ----------
    model, tokenizer
        A dense pair; not changed.
    domain : Domain
        Trains on its train part; its test part is only measured.
    size : float, optional
        Share of the dense model's stored parameters to keep, vocabulary included.
    increase : float, optional
        Instead: prune as much as lets the validation perplexity grow by this share, before
        recovery (see `smallest_within`; beside the model whose vocabulary is trimmed already),
        however long the search takes. Exactly one of the two.
    general : float
        Share of general text in the calibration of `slimgpt` and in the training; 0 for none.
    general_domain : Domain, optional
        By default ``load_domain("general")``.
    vocabulary : bool
        Trim the vocabulary; compare bits per character then, not perplexities.
    reconstruct : bool
        Fit every pruned block to the dense model before the training (see `reconstruct`), at the
        cost of time for the training.
    minutes : float
        Time for all of it on this machine, as far as short trials can tell: what pruning leaves is
        spent on training, `recover` and the control on equally many tokens, but no more than four
        passes over the train part; and what training leaves on measuring, at most 65,536 tokens of
        a text.
    gguf : str, optional
        Also write ``mini-KIND.gguf`` for llama.cpp, e.g. ``"Q8_0"``, and measure that rounding; the
        kinds are those of `export_gguf`.
    calibration_tokens, seq_len : int
        Tokens that `slimgpt` reads; tokens per window.
    out_dir : str or path, optional
        Folder for the model (``model/``), its card, ``table.csv`` and the state of every step: the
        same call goes on at the step in which it was stopped. By default a temporary folder. A call
        that was refused leaves it free for another.
    seed : int
        Of training, and of the random control.
    progress : bool
        Show the step, and the minutes gone and to go.

    Returns
    -------
    Mini

    Raises
    ------
    ValueError
        If both or neither of `size` and `increase` are given, the minutes do not suffice for one
        update, a text is too short, two texts have one name, the model is masked, the trimmed
        vocabulary alone exceeds the size, llama.cpp has no graph for the model whose `gguf` is
        asked for, or `out_dir` holds another run or what no run left there.
    """
    one_target(size=size, increase=increase)
    refuse_masked(model)
    general_domain = load_domain("general") if general_domain is None else general_domain
    require_texts(tokenizer, domain, general_domain, general, seq_len)
    if gguf is not None:
        gguf_size(model, tokenizer, kind=gguf)
    folder = Path(out_dir or tempfile.mkdtemp(prefix="mini-"))
    make_folder(folder)
    require_own(folder)
    facts: dict[str, object] = {"size": size, "increase": increase, "general": general}
    facts |= {"vocabulary": vocabulary, "gguf": gguf, "reconstruct": reconstruct}
    facts |= {"calibration_tokens": calibration_tokens, "seq_len": seq_len, "seed": seed}
    facts |= {"model": fingerprint(model)[:16]}
    facts |= {"domain": digest(domain), "general_domain": digest(general_domain)}
    with tqdm(total=len(_STEPS), unit="step", disable=not progress) as bar:
        run = _Run(folder, facts, minutes, bar)

        with run.given_up_unless(folder / "pruned"):
            # 1. The vocabulary: tokens that the domain's calibration and train part use.
            run.enter("trim the vocabulary")
            run.measure_speed(model, tokenizer, domain, seq_len, calibration_tokens)
            trimmed = trimmed_for(model, tokenizer, domain, seq_len) if vocabulary else model
            words = tokenizer_for(trimmed, tokenizer)

            # 2. Heads and channels.
            run.enter("prune")
            if (folder / "pruned").is_dir():
                pruned = load_model(folder / "pruned", device=model.device)[0]
            else:
                shape = {"seq_len": seq_len, "max_tokens": calibration_tokens}
                pruning = calibration(words, domain, general_domain, general, **shape)
                pruning |= {"reconstruct": reconstruct, "progress": progress}
                pruning["allocation"] = "uniform"
                if increase is not None:
                    how = {"increase": increase, "seq_len": seq_len, "out_dir": folder / "search"}
                    pruned = smallest_within(trimmed, words, domain, **how, **pruning)[0]
                else:
                    target = round(size * model.num_parameters())
                    pruned = _pruned(trimmed, target, out_dir=folder / "pruning", **pruning)
                save_model(pruned, words, folder / "pruned")

        # 3. Training, on as many tokens as the time allows.
        run.enter("recover")
        mini, control = copy.deepcopy(pruned), copy.deepcopy(model)
        options = {"seq_len": seq_len, "seed": seed, "other": general_domain}
        options |= {"general": general_domain, "generality": general} if general else {}
        distil = {"teacher": model, "loss": "mix"}
        options |= run.training([(mini, words, distil), (control, tokenizer, {})], domain, options)
        options["progress"] = progress
        recover(mini, words, domain, out_dir=folder / "recovery", **distil, **options)
        run.enter("train the control")
        recover(control, tokenizer, domain, out_dir=folder / "control", **options)

        # 4. What was lost, on text that nothing was chosen on.
        run.enter("measure")
        variants = {"dense": model, "dense, fine-tuned": control, "pruned": pruned, "mini": mini}
        variants |= {"only trimmed": trimmed} if vocabulary else {}
        variants["random"] = _random(trimmed, pruned.num_parameters(), seed)
        sizes = {}
        if gguf is not None:
            variants[f"mini, {gguf}"] = quantised(mini, gguf)
            sizes[f"mini, {gguf}"] = gguf_size(mini, words, kind=gguf)
        texts = [*{str(each.test): each.test for each in (domain, general_domain)}.values()]
        table, protocol = run.measured(variants, sizes, tokenizer, texts, seq_len)

        # 5. The model with its card, and the table.
        run.enter("save")
        notes = training_note(run.known["trained"], general, general_domain.name, reconstruct)
        card = model_card(mini, table=table, protocol=protocol, domain=domain.name, notes=notes)
        path = save_model(mini, words, folder / "model", card=card)
        file = folder / f"mini-{gguf}.gguf"
        if gguf is not None and not file.exists():  # written whole or not at all
            export_gguf(mini, words, file, kind=gguf)
        table.to_csv(folder / "table.csv", index=False)
        run.enter("")
    return Mini(mini, words, table, path, protocol)


def _pruned(model: PreTrainedModel, parameters: int, **options) -> PreTrainedModel:
    """The model at a size; a copy if it is small enough already."""
    if model.num_parameters() <= parameters:
        return copy.deepcopy(model)
    return slimgpt(model, parameters=parameters, **options)[0]


def _random(model: PreTrainedModel, parameters: int, seed: int) -> PreTrainedModel:
    """The control: as many parameters, units chosen at random."""
    if model.num_parameters() <= parameters:
        return copy.deepcopy(model)
    scores = score(model, "random", seed=seed)
    return shrink(model, plan_from_scores(model, scores, parameters=parameters))


class _Run:
    """State of a call in its folder: what it was begun with, time gone, tokens to train on."""

    def __init__(self, folder: Path, facts: Mapping[str, object], minutes: float, bar: tqdm):
        self.folder, self.bar, self.seconds, self.step = folder, bar, 60 * minutes, ""
        self.state = RunState(folder / "state.json")
        self.state.require(facts)
        self.known = dict(self.state.progress or {})
        planned = self.known.get("minutes", minutes)
        if planned != minutes:
            raise InvalidArgument(
                f"minutes is {minutes:g}; {folder} holds a run whose training was planned for "
                f"{planned:g}; repeat that call to resume it, or choose another out_dir"
            )
        self.began = time.monotonic() - self.known.get("seconds", 0.0)

    def enter(self, step: str) -> None:
        """Show the next step, and keep the time gone."""
        gone = time.monotonic() - self.began
        self.known["seconds"] = gone
        self.state.write(**self.known)
        self.bar.update(bool(self.step))
        self.step = step
        self.bar.set_description_str(step or "done", refresh=False)
        self.bar.set_postfix_str(f"{gone / 60:.1f} of {self.seconds / 60:g} min")

    @contextlib.contextmanager
    def given_up_unless(self, finished: Path) -> Iterator[None]:
        """Input that is refused within the block leaves no run, unless this is finished."""
        try:
            yield
        except ValueError:
            if not finished.exists():
                (self.folder / "state.json").unlink(missing_ok=True)
            raise

    def measure_speed(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        domain: Domain,
        seq_len: int,
        calibration_tokens: int,
    ) -> None:
        """Seconds per token of reading, by a short trial.

        Raises
        ------
        ValueError
            If the minutes do not suffice for a short training.
        """
        if "reading" not in self.known:
            options, gone, read = {"seq_len": seq_len, "progress": False}, [], []
            # The first call of all takes longer, and every call some time whatever its tokens.
            for tokens in (seq_len, seq_len, seq_len + _TRIAL):
                began = time.monotonic()
                found = perplexity(
                    model, tokenizer, domain.validation, max_tokens=tokens, **options
                )
                gone.append(time.monotonic() - began)
                read.append(found.tokens)  # fewer, of a short text
            seconds, tokens = max(gone[2] - gone[1], 0.1 * gone[2]), read[2] - read[1]
            self.known["reading"] = seconds / max(tokens, 0.1 * read[2])
        # Pruning reads the calibration text three times or so in float32, half as fast; training
        # takes the time of reading five times, here that of two models and a teacher.
        least = (6 * calibration_tokens + 11 * 8 * _TRIAL) * self.known["reading"]
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
                began, cut = time.monotonic(), max(_TRIAL, 2 * options["seq_len"])
                trial = {"max_tokens": cut, "eval_every": cut, "eval_characters": 1_024}
                how = {**own, **trial, **options}
                history = recover(copy.deepcopy(model), tokenizer, domain, progress=False, **how)
                whole = time.monotonic() - began
                evaluation, end = history["seconds"].iloc[[0, -1]]
                per_token += max(0.0, end - 2 * evaluation) / cut
                more = (_EVAL_CHARACTERS - 1_024) / 4 * (2 if "other" in options else 1)  # tokens
                fixed += 5 * (evaluation + more * self.known["reading"])
                fixed += 3 * max(0.0, whole - end)
            left = self.seconds * (1 - _MEASURING) - (time.monotonic() - self.began) - fixed
            per_token = max(per_token, self.known["reading"])
            self.known["tokens"] = max(8 * _TRIAL, int(left / per_token))
            self.known["minutes"] = self.seconds / 60
            self.state.write(**self.known)
        tokens = self.known["tokens"]
        windows = tokenize(domain.train, words, seq_len=options["seq_len"])
        whole = sum(batch["input_ids"].numel() for batch in windows) / (1 - share)
        if tokens < whole:
            budget: dict[str, float] = {"max_tokens": tokens}
        else:
            tokens = min(tokens, int(_PASSES * whole))
            budget = {"epochs": tokens / whole}
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
    ) -> tuple[pd.DataFrame, str]:
        """Every variant on every text with its bytes (those of `sizes` first), and the protocol."""
        if "test_tokens" not in self.known:  # as many as the time that is left allows
            left = self.seconds - (time.monotonic() - self.began)
            passes = len(texts) * (len(variants) + 1)
            tokens = int(0.8 * left / (passes * self.known["reading"]))
            self.known["test_tokens"] = max(_TRIAL, min(_TEST_TOKENS, tokens))
            self.state.write(**self.known)
        path, tokens = self.folder / "measured.json", self.known["test_tokens"]
        held_out = HeldOut(
            variants["dense"], tokenizer, texts, max_tokens=tokens, seq_len=seq_len, path=path
        )
        rows = []
        for name, model in variants.items():
            measure = partial(held_out.measure, model)
            stored = sum(weight.nbytes for weight in model.parameters())
            facts = {"variant": name, "bytes": sizes.get(name, stored)}
            rows += held_out.table_rows(held_out.get(fingerprint(model), measure), **facts)
        table = pd.DataFrame(rows).drop(columns="passages")
        protocol = f"at most {tokens:,} tokens per text, windows of {seq_len}, no overlap"
        return table, f"{protocol}, read in {dtype_name(reading_dtype(variants['dense']))}"
