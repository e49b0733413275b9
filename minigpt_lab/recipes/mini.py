"""From a model and a domain to a mini-GPT: trim, prune, recover, measure, save."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import Flag, Instance, Integer, Location, Model, Number, OneOf, Tokenizer, checked
from ..compensation import is_search, slimgpt
from ..criteria import score
from ..domains import Domain, load_domain
from ..export import KINDS, block_size, export_gguf, gguf_size, quantised
from ..models import (
    fingerprint,
    load_model,
    model_card,
    refuse_masked,
    require_byte_pairs,
    save_model,
    shrink,
    tokenizer_for,
)
from ..planning import one_target, plan_from_scores
from ..recovery import recover, require_ended
from ..store import atomic_write, make_folder
from ..studies import smallest_within
from .preparation import calibration, digest, require_texts
from .result import Mini, training_note
from .timed_run import TimedRun
from .vocabulary import trim_vocabulary

_STEPS = ("trim the vocabulary", "prune", "recover", "train the control", "measure", "save")
#: Raised when the same arguments come to make another model: a run of before is not continued.
_RECIPE = 2
_DOMAIN = Instance(Domain, "lab.load_domain gives one, also for a folder of text files")
_OPTIONS = {
    "size": Number(above=0, below=1) | None,
    "increase": Number(above=0) | None,
    "general": Number(0, below=1),
    "vocabulary": Flag(),
    "allocation": OneOf(("uniform", "log-increase", "search")),
    "drop_blocks": Flag(),
    "reconstruct": Flag(),
    "minutes": Number(above=0),
    "gguf": OneOf(KINDS) | None,
    "calibration_tokens": Integer(256),
    "seq_len": Integer(16),
    "out_dir": Location() | None,
    "seed": Integer(0, 2**32 - 1),
    "progress": Flag(),
}


def require_options(**options) -> None:
    """Refuse options of `make_mini` that it would refuse for every model and domain.

    Raises
    ------
    ValueError
        Naming the first.
    """
    for name, value in options.items():
        _OPTIONS[name](name, value)
    one_target(size=options["size"], increase=options["increase"])
    is_search(options["allocation"], options["drop_blocks"])


@checked(
    model=Model(), tokenizer=Tokenizer(), domain=_DOMAIN, general_domain=_DOMAIN | None, **_OPTIONS
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
    allocation: str = "uniform",
    drop_blocks: bool = False,
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

    The vocabulary is trimmed (`trim_vocabulary`), `slimgpt` prunes heads and FFN channels (as
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
        Instead: prune as much as lets the validation perplexity grow by this share beside the
        dense model (see `smallest_within`): the smaller one of two, with a trimmed vocabulary and
        with all tokens. It is judged before the training, which wins some of it back; the search
        takes its time beyond `minutes`. Exactly one of the two arguments.
    general : float
        Share of general text in the calibration of `slimgpt` and in the training; 0 for none.
    general_domain : Domain, optional
        By default ``load_domain("general")``.
    vocabulary : bool
        Trim the vocabulary; compare bits per character then, not perplexities.
    allocation : {"uniform", "log-increase", "search"}
        Of what is pruned over the layers, see `slimgpt`. A search takes as long as training on some
        ten thousand tokens, out of the same minutes.
    drop_blocks : bool
        Whether that search may drop a layer's whole attention or FFN.
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
        kinds are those of `export_gguf`. FFN widths are then multiples of the kind's blocks.
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
        If both or neither of `size` and `increase` are given, blocks are to be dropped without a
        search, the minutes do not suffice for one
        update, a text is too short, two texts have one name, the model is masked, the trimmed
        vocabulary alone exceeds the size, llama.cpp has no graph for the model whose `gguf` is
        asked for, or `out_dir` holds another run or what no run left there.
    """
    one_target(size=size, increase=increase)
    searching = is_search(allocation, drop_blocks)
    refuse_masked(model)
    tokenizer = tokenizer_for(model, tokenizer)
    if vocabulary:
        require_byte_pairs(tokenizer, "keep the vocabulary (vocabulary=False, or --all-tokens)")
    general_domain = load_domain("general") if general_domain is None else general_domain
    if digest(domain) == digest(general_domain):  # there is no other text to mix in
        general = 0.0
    reading: dict[str, Any] = {"seq_len": seq_len, "max_tokens": calibration_tokens}
    require_texts(model, tokenizer, domain, general_domain, general, **reading)
    precision = "auto"
    if gguf is not None:  # whose weights bfloat16 would round once more
        gguf_size(model, tokenizer, kind=gguf)
        precision = "float32"
    folder = Path(out_dir or tempfile.mkdtemp(prefix="mini-"))
    make_folder(folder)
    facts: dict[str, object] = {"size": size, "increase": increase, "general": general}
    facts |= {"vocabulary": vocabulary, "gguf": gguf, "reconstruct": reconstruct}
    facts |= {"allocation": allocation, "drop_blocks": drop_blocks}
    facts |= {"calibration_tokens": calibration_tokens, "seq_len": seq_len, "seed": seed}
    facts |= {"model": fingerprint(model)[:16], "recipe": _RECIPE}
    facts |= {"domain": digest(domain), "general_domain": digest(general_domain)}
    steps = tqdm(total=len(_STEPS), unit="step", disable=not progress)
    with steps as bar, TimedRun(folder, facts, minutes, bar) as run:
        with run.given_up_unless(folder / "pruned"):
            # 1. The vocabulary: the domain's tokens, and the frequent ones of general text.
            run.enter("trim the vocabulary")
            how: dict[str, Any] = {"searching": searching, "precision": precision}
            run.measure_speed(model, tokenizer, domain, **how, **reading)
            trimmed = model
            if vocabulary:
                mixed = {"general": general_domain, "generality": general}
                trimmed = trim_vocabulary(model, tokenizer, domain, **mixed)

            # 2. Heads and channels.
            run.enter("prune")
            if (folder / "pruned").is_dir():
                pruned = load_model(folder / "pruned", device=model.device)[0]
            else:
                calibrated = partial(
                    calibration,
                    domain=domain,
                    general_domain=general_domain,
                    generality=general,
                    seq_len=seq_len,
                    max_tokens=calibration_tokens,
                )
                pruning: dict[str, Any] = {"reconstruct": reconstruct, "progress": progress}
                pruning |= {"allocation": allocation, "drop_blocks": drop_blocks}
                if gguf is not None:  # rows of whole blocks: none is padded in the file
                    pruning["multiple_of"] = {"ffn": block_size(gguf)}
                if increase is not None:
                    pruning |= {"increase": increase, "seq_len": seq_len}
                    pruning["out_dir"] = folder / "search"
                    pruned = _within(model, trimmed, tokenizer, domain, calibrated, **pruning)
                else:
                    pruning |= calibrated(tokenizer=tokenizer_for(trimmed, tokenizer))
                    target = round(size * model.num_parameters())
                    pruned = _pruned(trimmed, target, out_dir=folder / "pruning", **pruning)
                save_model(pruned, tokenizer_for(pruned, tokenizer), folder / "pruned")
            words = tokenizer_for(pruned, tokenizer)
            if words is tokenizer:
                trimmed = model

        # 3. Training, on as many tokens as the time allows.
        run.enter("recover")
        mini, control = copy.deepcopy(pruned), copy.deepcopy(model)
        options = {"seq_len": seq_len, "seed": seed, "other": general_domain}
        options |= {"general": general_domain, "generality": general} if general else {}
        distil = {"teacher": model, "loss": "mix"}
        options |= run.training([(mini, words, distil), (control, tokenizer, {})], domain, options)
        options["progress"] = progress
        distil |= {"out_dir": folder / "recovery"}
        require_ended(recover(mini, words, domain, **distil, **options))
        run.enter("train the control")
        options["out_dir"] = folder / "control"
        require_ended(recover(control, tokenizer, domain, **options))

        # 4. What was lost, on text that nothing was chosen on.
        run.enter("measure")
        variants = {"dense": model, "dense, fine-tuned": control, "pruned": pruned, "mini": mini}
        variants |= {} if trimmed is model else {"only trimmed": trimmed}
        variants["random"] = _random(trimmed, pruned.num_parameters(), seed)
        sizes = {}
        if gguf is not None:
            variants[f"mini, {gguf}"] = quantised(mini, gguf)
            sizes[f"mini, {gguf}"] = gguf_size(mini, words, kind=gguf)
        held_out = [*{str(each.test): each.test for each in (domain, general_domain)}.values()]
        table, protocol = run.measured(variants, sizes, tokenizer, held_out, seq_len, precision)

        # 5. The model with its card, and the table.
        run.enter("save")
        notes = training_note(run.known["trained"], general, general_domain.name)
        card = model_card(mini, table=table, protocol=protocol, domain=domain.name, notes=notes)
        path = save_model(mini, words, folder / "model", card=card)
        file = folder / f"mini-{gguf}.gguf"
        if gguf is not None and not file.exists():  # written whole or not at all
            export_gguf(mini, words, file, kind=gguf)
        with atomic_write(folder / "table.csv") as staging:
            table.to_csv(staging, index=False)
        run.enter("")
    return Mini(mini, words, table, path, protocol)


def _pruned(model: PreTrainedModel, parameters: int, **options) -> PreTrainedModel:
    """The model at a size; a copy if it is small enough already."""
    if model.num_parameters() <= parameters:
        return copy.deepcopy(model)
    return slimgpt(model, parameters=parameters, **options)[0]


def _within(
    model: PreTrainedModel,
    trimmed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domain: Domain,
    calibrated: Callable[..., dict[str, Any]],
    **options,
) -> PreTrainedModel:
    """The smallest within the limit beside the dense model, of two: with fewer tokens, with all."""
    found = []
    for start in (trimmed,) if trimmed is model else (trimmed, model):
        how = options | calibrated(tokenizer=tokenizer_for(start, tokenizer)) | {"dense": model}
        with warnings.catch_warnings():
            if start is not model:  # there is the other
                warnings.filterwarnings("ignore", "the perplexity of the given model is above")
            pruned, _, curve = smallest_within(start, tokenizer, domain, **how)
        if start is model or curve["within"].iloc[0]:
            found.append(pruned)
    return min(found, key=lambda each: each.num_parameters())


def _random(model: PreTrainedModel, parameters: int, seed: int) -> PreTrainedModel:
    """The control: as many parameters, units chosen at random."""
    if model.num_parameters() <= parameters:
        return copy.deepcopy(model)
    scores = score(model, "random", seed=seed)
    return shrink(model, plan_from_scores(model, scores, parameters=parameters))
