"""Fine-tuning after pruning, on the domain's train part, judged on its validation part.

Mini-GPTs recovers a pruned model by a short fine-tune until it reaches the dense model's
perplexity. Its reference code trains, stops and reports on the same 512 tokens; here the three are
disjoint: train, validation, test.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ..checks import (
    Flag,
    Instance,
    Integer,
    ListOf,
    Location,
    Model,
    Number,
    OneOf,
    Text,
    Tokenizer,
    checked,
    refuse_unused,
)
from ..domains import Domain
from ..models import (
    PRECISION,
    dtype_name,
    is_offloaded,
    product_dtype,
    refuse_masked,
    seeded,
    tokenizer_for,
)
from .adapters import adapter_targets, trainable
from .checkpoints import identity, of_model, run_folder
from .distillation import LOSSES, DistillationLoss, teacher_of
from .texts import training_windows, validation_texts
from .training import RecoveryTrainer, history_of

#: Peak learning rate by method, unless one is given. SmolLM2-135M with half of its FFN channels, 32
#: updates of 1,024 tokens of medicine, loss "mix", from validation perplexity 36.1: full 2e-4 27.6,
#: 3e-4 27.5, 5e-4 27.9, 1e-3 31.1; LoRA 2e-3 28.8. With half the text (full, 3e-4) 29.2; then 512
#: tokens per update 29.3, and 256 at 2e-4 28.8 for a fifth more time; the weights averaged with
#: decay 0.7, 0.8, 0.9 29.3, 29.3, 29.5. One run each: nothing clearly better than the defaults.
LEARNING_RATES = {"full": 3e-4, "lora": 2e-3}
#: How the learning rate falls after the warm-up, by transformers' names.
DECAYS = ("cosine", "linear", "constant_with_warmup")

_DOMAIN = Instance(
    Domain,
    "pass all of it, e.g. load_domain('law'): it is trained on one part and judged on another",
)


@checked(
    model=Model(),
    tokenizer=Tokenizer(),
    domain=_DOMAIN,
    method=OneOf(LEARNING_RATES),
    epochs=Number(above=0),
    max_tokens=Integer(1) | None,
    learning_rate=Number(above=0) | None,
    lr_scheduler_type=OneOf(DECAYS),
    warmup_ratio=Number(0, below=1),
    warmup_steps=Integer(0) | None,
    teacher=Model() | None,
    loss=OneOf(LOSSES),
    temperature=Number(0.01, 100),
    mix=Number(above=0, below=1),
    teacher_samples=Integer(1) | None,
    general=_DOMAIN | None,
    generality=Number(0, below=1),
    stop_at=Number(above=0) | OneOf(["teacher"]) | None,
    other=_DOMAIN | None,
    eval_every=Integer(1),
    eval_characters=Integer(1) | None,
    patience=Integer(1),
    seq_len=Integer(2),
    batch_size=Integer(1),
    gradient_accumulation_steps=Integer(1),
    gradient_checkpointing=Flag(),
    r=Integer(1),
    lora_alpha=Number(above=0),
    lora_dropout=Number(0, below=1),
    target_modules=ListOf(Text(), 1) | None,
    out_dir=Location() | None,
    precision=PRECISION,
    seed=Integer(0, 2**32 - 1),
    progress=Flag(),
)
@torch.inference_mode(False)
@torch.enable_grad()
def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domain: Domain,
    *,
    method: str = "full",
    epochs: float = 1.0,
    max_tokens: int | None = None,
    learning_rate: float | None = None,
    lr_scheduler_type: str = "cosine",
    warmup_ratio: float = 0.05,
    warmup_steps: int | None = None,
    teacher: PreTrainedModel | None = None,
    loss: str = "label",
    temperature: float = 1.0,
    mix: float = 0.5,
    teacher_samples: int | None = None,
    general: Domain | None = None,
    generality: float = 0.3,
    stop_at: float | str | None = None,
    other: Domain | None = None,
    eval_every: int = 32_768,
    eval_characters: int | None = None,
    patience: int = 4,
    seq_len: int = 256,
    batch_size: int = 4,
    gradient_accumulation_steps: int = 1,
    gradient_checkpointing: bool = False,
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.05,
    target_modules: Sequence[str] | None = None,
    out_dir: str | os.PathLike | None = None,
    precision: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Fine-tune or distil a pruned model, in place, until it stops improving or is good enough.

    With a `teacher`, such as the dense model, the loss is ``(1 - m) CE + m T² KL(p_T ‖ q_T)`` for
    the teacher's predictions *p* and the model's *q* at temperature *T* (arXiv 1503.02531), with
    ``m = 1`` for ``"kl"`` and `mix` for ``"mix"``. Labels adapt a model to the text, a teacher
    restores what it was.

    Packed windows, AdamW, gradient clipping at 1, linear warm-up, products in bfloat16 where the
    device is fast at it. Zero weights are kept at zero (with LoRA: rows and columns of zeros).
    The best state by validation perplexity is restored at the end, also after interruption,
    divergence or early stopping; if nothing was better than the start, the model is unchanged. An
    exception restores it, bit for bit; an interrupt that comes as the finished model is written
    is raised right after, and the model is the finished one.

    Weights stored in bfloat16 or float16 are trained as float32 and rounded at the end; every
    evaluation measures the model as it would be returned: adapters merged, weights rounded.

    Memory: training all weights takes 16 bytes for each (float32 copy, gradient, Adam's two
    moments) beside the model as stored. Adapters take that for their own weights only; weights
    stored in float16 are then trained through as float32, and an evaluation holds the adapted
    weights a second time, in host memory.

    Under ``torchrun`` the processes train one model together, with an `out_dir` that all of them
    see; every process ends with the same weights and the same history. A full disk then raises,
    where one process would stop and restore the best state.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Shrunk or dense; its weights are changed. All are trained, whatever their `requires_grad`.
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's tokenizer, or the original one of a trimmed model.
    domain : Domain
        Trains on ``domain.train``, stops on ``domain.validation``.
    method : {"full", "lora"}
        All weights, or LoRA adapters (arXiv 2106.09685), merged at the end.
    epochs : float
        Passes over the training text.
    max_tokens : int, optional
        Use the first so many tokens of the training text; by default all.
    learning_rate : float, optional
        Peak; by default that of `LEARNING_RATES`.
    lr_scheduler_type : {"cosine", "linear", "constant_with_warmup"}
        How the learning rate falls after the warm-up.
    warmup_ratio : float
        Share of all updates over which the learning rate grows.
    warmup_steps : int, optional
        Their number, instead of the share.
    teacher : transformers.PreTrainedModel, optional
        Its predictions are learnt; it is read in the reading precision and left as it was. It has
        the same tokenizer. A model with a trimmed vocabulary learns those of the tokens it kept.
    loss : {"label", "kl", "mix"}
        The next token of the text, the teacher's predictions, or both.
    temperature : float
        *T* of the teacher's term, between 0.01 and 100.
    mix : float
        Share of the teacher's term in ``loss="mix"``.
    teacher_samples : int, optional
        Read every window with the teacher once and keep so many tokens per position, sampled from
        its predictions (unbiased; 12 are enough in arXiv 2503.16870), instead of reading it again
        in every epoch. By default all its predictions count, and nothing is kept.
    general : Domain, optional
        Another domain whose train part is mixed in, so that less is forgotten.
    generality : float
        Its share of the windows, one at least. `max_tokens` counts both.
    stop_at : float or "teacher", optional
        Stop as soon as the validation perplexity is at or below this, or the teacher's: a dense
        model, or one fine-tuned on the domain. The loss of a teacher with more tokens is that on
        the whole text, divided by the tokens that the model scores; it needs its own tokenizer.
    other : Domain, optional
        Another domain whose validation perplexity is followed too: what is being forgotten. By
        default `general`.
    eval_every : int
        Tokens between evaluations, rounded to whole updates; checkpoints are written at the same
        moments.
    eval_characters : int, optional
        Validation text per evaluation, in characters; by default the whole part, and of `other` as
        much as that.
    patience : int
        Evaluations without improvement, on the start too, before it stops.
    seq_len, batch_size, gradient_accumulation_steps : int
        Tokens per window, windows per step on each device, steps per update. An update sees the
        product of the three, times the number of devices.
    gradient_checkpointing : bool
        Trade time for memory.
    r, lora_alpha, lora_dropout
        Rank, scale (``lora_alpha / r``) and dropout of the LoRA adapters.
    target_modules : sequence of str, optional
        Linear layers that get one: full names or last parts; by default all of the decoder.
    out_dir : str or path, optional
        Folder for checkpoints, by default a temporary one. The same call resumes from the last
        whole checkpoint there, to the same curve; if the run had ended, it returns what that
        returned. Another run in the same folder is refused.
    precision : {"auto", "bfloat16", "float32"}
        ``"auto"`` multiplies in bfloat16 (autocast) where the device is fast at it; the weights
        that are trained and Adam's moments are float32 either way. Evaluations follow it too.
    seed : int
        Of the order of windows, of dropout and of the adapters.
    progress : bool
        Show a progress bar.

    Returns
    -------
    pandas.DataFrame
        One row per evaluation, the first before training: ``step, tokens, epoch, train_loss,
        perplexity, other_perplexity, seconds``. Its ``attrs`` say why it stopped (``"stopped"``:
        finished, recovered, patience, interrupted, diverged (NaN, also of the teacher, or a hundred
        times worse than both the start and a guess), or disk if a checkpoint could not be written),
        where it was best (``"best_step"``) and, if it recovered, after how many tokens and epochs
        (``"recovery_tokens"``, ``"recovery_epochs"``).

    Raises
    ------
    ValueError
        If an argument is out of range or has no effect beside the others, a text too short, or the
        general one that of the domain, `out_dir` holds another run, a loss lacks its teacher or a
        teacher its use, or the teacher has another tokenizer, reads no windows of this length,
        shares weights with the model or predicts NaN.
    TypeError
        If a part of a domain is given, or its name, instead of the domain.
    """
    _require_trainable(model)
    if method != "lora":
        adapters = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
        refuse_unused(recover, f"method={method!r}", target_modules=target_modules, **adapters)
    if general is None:
        refuse_unused(recover, "general=None", generality=generality)
    if loss != "mix":
        refuse_unused(recover, f"loss={loss!r}", mix=mix)
    if loss == "label":
        samples = {"teacher_samples": teacher_samples}
        refuse_unused(recover, f"loss={loss!r}", temperature=temperature, **samples)
    words = tokenizer_for(model, tokenizer)
    guide = teacher_of(model, teacher, tokenizer, loss, temperature, teacher_samples, stop_at)

    # 1. The texts, and what is trained.
    windows = training_windows(words, domain, general, generality, seq_len, max_tokens)
    if guide is not None:
        guide.check(windows[:1], precision)
    texts = validation_texts(domain, other or general, eval_characters)
    names, lora = None, {}
    if method == "lora":
        names = adapter_targets(model, target_modules)
        lora = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}

    # 2. All that the curve depends on: a run in `out_dir` resumes only if it agrees.
    rate = LEARNING_RATES[method] if learning_rate is None else learning_rate
    autocast = product_dtype(model.device, precision)
    if warmup_steps is not None:
        refuse_unused(recover, "warmup_steps", warmup_ratio=warmup_ratio)
    warmup = warmup_ratio if warmup_steps is None else warmup_steps  # below 1 a share of all
    share = {"label": 0.0, "kl": 1.0, "mix": mix}[loss]
    facts: dict[str, object] = {"method": method, "seed": seed, **lora}
    facts |= {"target_modules": target_modules and list(target_modules), "epochs": epochs}
    facts |= {"learning_rate": rate, "lr_scheduler_type": lr_scheduler_type, "warmup": warmup}
    facts |= {"loss": loss, "mix": share, "stop_at": stop_at, "patience": patience}
    facts |= {"eval_every": eval_every, "eval_characters": eval_characters}
    facts |= {"max_tokens": max_tokens, "seq_len": seq_len, "batch_size": batch_size}
    facts |= {"gradient_accumulation_steps": gradient_accumulation_steps}
    facts |= {"precision": dtype_name(autocast), **identity(model, windows, texts, precision)}
    if guide is not None:
        facts |= {"temperature": temperature, "teacher_samples": teacher_samples}
        facts |= of_model("teacher", guide.model, precision)

    # 3. Train. Adapters are initialised at random: the seed comes before them. The weights get
    # their new values when all else is done: an interrupt before that leaves the old ones.
    with (
        seeded(seed),
        nullcontext() if guide is None else guide.reading(precision),
        torch.enable_grad(),  # reading switches gradients off
        trainable(model, names, **lora) as subject,
        run_folder(out_dir) as folder,
    ):
        arguments = _arguments(
            folder,
            model.device.type,
            bf16=autocast == torch.bfloat16,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            activation_checkpointing=gradient_checkpointing,
            learning_rate=rate,
            warmup_steps=warmup,
            lr_scheduler_type=lr_scheduler_type,
            seed=seed,
        )
        # What one update sees: windows on several devices of this process, in several processes.
        update = arguments.train_batch_size * arguments.world_size * gradient_accumulation_steps
        facts["windows per update"] = update
        arguments.eval_steps = max(1, round(eval_every / (update * seq_len)))
        arguments.save_steps = arguments.logging_steps = arguments.eval_steps
        trainer = RecoveryTrainer(
            subject,
            tokenizer,
            windows,
            texts,
            precision,
            args=arguments,
            compute_loss_func=DistillationLoss(guide, share) if guide and share else None,
        )
        level = guide if isinstance(stop_at, str) else stop_at
        why, start = trainer.run(folder, facts, level, patience, progress)
        return history_of(trainer.state, why, start)


def _require_trainable(model: PreTrainedModel) -> None:
    """Refuse a model whose weights cannot be changed."""
    refuse_masked(model)
    if is_offloaded(model):
        raise ValueError(
            "the model is offloaded, and training changes all its weights; load it without "
            "offloading (device_map=None)"
        )


def _arguments(folder: Path, device: str, **options) -> TrainingArguments:
    """Training arguments of every recovery, and the options of this one."""
    return TrainingArguments(
        output_dir=str(folder),
        max_grad_norm=1.0,
        use_cpu=device == "cpu",
        eval_strategy="steps",
        save_strategy="steps",
        save_total_limit=None,  # see `checkpoints.rotate`
        metric_for_best_model="eval_perplexity",
        greater_is_better=False,
        include_num_input_tokens_seen="all",
        report_to=[],
        ddp_find_unused_parameters=False,  # every weight takes part in every update
        disable_tqdm=True,
        dataloader_pin_memory=device == "cuda",
        **options,
    )
