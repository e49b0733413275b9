"""Logit distillation: the loss of a student against a teacher's predictions (arXiv 1503.02531)."""

from __future__ import annotations

import contextlib
import math
import warnings
import zlib
from collections.abc import Iterator

import torch
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import InvalidArgument, safe_contextmanager
from ..evaluation import have_likeliest
from ..models import (
    TrimmedVocabulary,
    check_token_ids,
    dtype_name,
    inference,
    is_offloaded,
    reading_dtype,
    tokenizer_for,
)

#: Losses of `recover`.
LOSSES = ("label", "kl", "mix")
#: Logits that are read at once on a CPU, whose cache holds them; elsewhere 128 times as many.
BLOCK = 2**19


class TeacherIsNaN(FloatingPointError):
    """A teacher's predictions are no numbers."""


class Teacher:
    """Predictions of a teacher for the tokens of a student.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The teacher.
    student : transformers.PreTrainedModel
        Has the teacher's vocabulary, or a part of it: then the teacher's probabilities are
        normalised over the tokens that the student kept. A teacher's vocabulary may be padded.
    temperature : float
        *T* in ``p_T = softmax(logits / T)``.
    samples : int, optional
        Keep so many tokens per position, sampled from the predictions, instead of reading the
        windows again in every epoch.

    Raises
    ------
    ValueError
        If the teacher is the student or shares its weights, has none, its vocabulary is masked, or
        it does not have the student's tokens; see also `check`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        student: PreTrainedModel,
        temperature: float = 1.0,
        samples: int | None = None,
    ):
        if _places(student) & _places(model):
            raise InvalidArgument(
                "the teacher is the student, or shares weights with it; give a copy: "
                "copy.deepcopy(model), or the dense model that the student was shrunk from"
            )
        if is_offloaded(model) and not any(hasattr(each, "_hf_hook") for each in model.modules()):
            raise InvalidArgument(
                "the teacher has no weights (they are on the device meta); load them, e.g. with "
                "lab.load_model"
            )
        self.model, self.temperature, self.samples = model, temperature, samples
        self.rows = _rows(model, student)
        self._sampled: dict[bytes, torch.Tensor] = {}
        self._undo, self._precision, self._warned = contextlib.ExitStack(), "float32", False

    @safe_contextmanager
    def reading(self, precision: str) -> Iterator[None]:
        """Within: the teacher has the weights that it is read with; see `inference`."""
        self._precision = precision
        with self._undo:
            self._undo.enter_context(inference(self.model, precision))
            yield

    def check(self, ids: torch.Tensor, precision: str) -> None:
        """Read a window ``[1, token]`` of the training text, before any long work.

        Raises
        ------
        ValueError
            If it is too long for the teacher, or the teacher predicts NaN or worse than a guess
            among all tokens, as one of another tokenizer would.
        """
        check_token_ids(self.model, self._own(ids), "the teacher")
        with inference(self.model, precision):
            logits = self._read(ids)
        if not have_likeliest(logits):
            raise ValueError(
                "the teacher's predictions are NaN; check its weights, or try precision='float32'"
            )
        log_p = _log_p(logits[0, :-1], 1.0)  # [token - 1, vocabulary]
        loss = -log_p.gather(1, ids[0, 1:, None].to(log_p.device)).mean().item()
        if loss >= math.log(log_p.shape[1]):
            raise InvalidArgument(
                f"the teacher loses {loss:.1f} nats per token on the training text, more than a "
                f"guess among its {log_p.shape[1]:,} tokens ({math.log(log_p.shape[1]):.1f}): it "
                "is of another tokenizer, or broken; give the dense model of this tokenizer"
            )

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """The teacher's logits of the student's tokens, ``[batch, token, vocabulary]``.

        Raises
        ------
        TeacherIsNaN
            If they are NaN, in float32 too.
        """
        logits = self._read(ids)
        if not have_likeliest(logits):
            self._undo.close()  # the weights are as stored again
            low, high = (reading_dtype(self.model, each) for each in (self._precision, "float32"))
            if low != high:
                with inference(self.model, "float32"):
                    logits = self._read(ids)
                self._undo.enter_context(inference(self.model, self._precision))
            if not have_likeliest(logits):
                raise TeacherIsNaN(
                    "the teacher's predictions are NaN on the training text; check its weights"
                )
            if not self._warned:
                warnings.warn(
                    f"the teacher gives NaN on some of the training text in {dtype_name(low)}; "
                    "such batches are read again in float32",
                    stacklevel=2,
                )
            self._warned = True
        return logits

    def _read(self, ids: torch.Tensor) -> torch.Tensor:
        own = self._own(ids)
        if self.model.device.type != "meta":  # offloaded layers fetch their inputs
            own = own.to(self.model.device)
        logits = self.model(input_ids=own, use_cache=False).logits.to(ids.device)
        return logits if self.rows is None else logits[..., self.rows.to(ids.device)]

    def _own(self, ids: torch.Tensor) -> torch.Tensor:
        """The teacher's ids of the student's tokens."""
        return ids if self.rows is None else self.rows.to(ids.device)[ids]

    def sampled(self, ids: torch.Tensor) -> torch.Tensor:
        """Tokens sampled from ``p_T``, ``[batch, token - 1, samples]``; the same in every epoch.

        Unbiased, unlike the largest probabilities (arXiv 2503.16870). Their seed comes from the
        window itself, so a resumed run samples the same.
        """
        rows = []
        for window in ids:
            key = window.cpu().numpy().tobytes()
            if key not in self._sampled:
                generator = torch.Generator(window.device).manual_seed(zlib.crc32(key))
                p = _log_p(self.logits(window[None])[0, :-1], self.temperature).exp()
                tokens = p.multinomial(self.samples, replacement=True, generator=generator)
                self._sampled[key] = tokens.int().cpu()
            rows.append(self._sampled[key])
        return torch.stack(rows).long().to(ids.device)


def _places(model: PreTrainedModel) -> set[int]:
    """Where a model's weights lie in memory; those without numbers lie nowhere."""
    return {each.data_ptr() for each in model.parameters() if each.numel() and not each.is_meta}


def _log_p(logits: torch.Tensor, T: float) -> torch.Tensor:
    """``log softmax(logits / T)`` of a teacher, at least in float32."""
    return _scaled(logits, T).log_softmax(-1)


def _scaled(logits: torch.Tensor, T: float) -> torch.Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if T == 1 else wide / T


def _rows(teacher: PreTrainedModel, student: PreTrainedModel) -> torch.Tensor | None:
    """The teacher's id of each of the student's tokens; None if they are the same."""
    own, wanted = TrimmedVocabulary.of(teacher), TrimmedVocabulary.of(student)
    if own.allowed != own.rows:
        raise InvalidArgument(
            "the teacher's vocabulary is masked: it says nothing of the other tokens; leave the "
            "with block first, or give it shrink(model, plan)"
        )
    if own.size < wanted.size or not {*wanted.rows} <= {*own.rows}:
        raise InvalidArgument(
            f"the teacher has {len(own.rows):,} of {own.size:,} tokens, the student "
            f"{len(wanted.rows):,} of {wanted.size:,}, not all of them the teacher's; give a "
            "teacher with the same tokenizer, trimmed no further than the student"
        )
    if own.rows == wanted.rows:
        return None
    row = {token: row for row, token in enumerate(own.rows)}
    return torch.tensor([row[token] for token in wanted.rows])


class DistillationLoss:
    """Loss of a student, for the Trainer: ``(1 - m) CE + m T² KL(p_T ‖ q_T)``, mean over tokens.

    ``CE = -log q(label)`` with *q* the student's predictions and *p* the teacher's, both
    ``softmax(logits / T)`` in the second term; T² keeps the size of its gradient (Hinton et al.,
    arXiv 1503.02531, section 2).

    Parameters
    ----------
    teacher : Teacher
        Reads the same windows. With `Teacher.samples`, ``KL`` is estimated by the mean of
        ``-log q_T`` over the sampled tokens, which differs by the entropy of *p_T*, a constant.
    mix : float
        *m*, the share of the second term: 1 leaves the labels out.
    """

    def __init__(self, teacher: Teacher, mix: float):
        self.teacher, self.mix = teacher, mix

    def __call__(
        self, outputs, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Loss of a batch of windows; the labels are the windows themselves, ``[batch, token]``."""
        guide, n = self.teacher, num_items_in_batch
        known = guide.logits(labels) if guide.samples is None else guide.sampled(labels)
        if n is None:
            n = labels[:, 1:].numel()
        elif isinstance(n, torch.Tensor):  # the same number for each device of this process
            n = n.sum()
        return _TokenLoss.apply(outputs["logits"], labels, known, guide.temperature, self.mix, n)


class _TokenLoss(torch.autograd.Function):
    """``Σ_t [(1 - m) CE_t + m T² KL_t] / n`` and its gradient, in one pass over the logits *z*.

    With the student's ``q = softmax(z)``, ``q_T = softmax(z / T)`` and the teacher's ``p_T``

        ∂CE/∂z = q - onehot(label)        ∂(T² KL)/∂z = T (q_T - p_T)

    where sampled tokens stand for *p_T* as their shares. A block of positions is widened to
    float32, read and turned into its gradient while the processor's cache holds it; autograd would
    write all logits and probabilities to memory several times over.
    """

    @staticmethod
    def forward(ctx, z, labels, known, T, m, n):
        gradient = torch.empty_like(z)
        gradient[:, -1] = 0  # the last position of a window predicts nothing
        loss = torch.zeros((), dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
        for window, block in _blocks(z):
            z_t = z[window, block]  # [t, vocabulary]
            label = labels[window, 1:][block, None]  # [t, 1]
            log_q = _scaled(z_t, T).log_softmax(-1)
            q = log_q.exp()

            # 1. The teacher's term, over all tokens or the sampled ones.
            if known.is_floating_point():
                log_p = _log_p(known[window, block], T)
                log_p.clamp_(min=torch.finfo(log_p.dtype).min)  # 0 log 0 = 0, and not NaN
                p = log_p.exp()
                loss += m * T**2 * log_p.sub_(log_q).mul_(p).sum()
                g = (q - p).mul_(m * T)
            else:
                tokens = known[window, block]  # [t, samples]
                loss -= m * T**2 * log_q.gather(1, tokens).mean(1).sum()
                g = q * (m * T)
                _add_at(g, tokens, -m * T / tokens.shape[1])

            # 2. The labels' term.
            if m < 1:
                if T != 1:
                    log_q = _scaled(z_t, 1).log_softmax(-1)
                    q = log_q.exp()
                loss -= (1 - m) * log_q.gather(1, label).sum()
                g.add_(q, alpha=1 - m)
                _add_at(g, label, m - 1)
            gradient[window, block] = g.div_(n)
        ctx.save_for_backward(gradient)
        return loss / n

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        if upstream != 1:
            gradient = gradient * upstream.to(gradient.dtype)
        return gradient, None, None, None, None, None


def _blocks(z: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Window and positions of each block; the last position of a window is in none."""
    windows, positions = z.shape[0], z.shape[1] - 1
    block = BLOCK if z.device.type == "cpu" else 128 * BLOCK
    step = max(1, block // z.shape[2])
    for window in range(windows):
        for start in range(0, positions, step):
            yield window, slice(start, min(start + step, positions))


def _add_at(g: torch.Tensor, tokens: torch.Tensor, value: float) -> None:
    """Add a number at some tokens of each position, once for each time they are named."""
    g.scatter_add_(1, tokens, g.new_full((), value).expand(tokens.shape))


def teacher_of(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    loss: str,
    temperature: float,
    samples: int | None,
    stop_at: float | str | None,
) -> Teacher | None:
    """The teacher of a run, if there is one and the run uses it.

    Parameters
    ----------
    model, teacher, tokenizer, loss, temperature, samples, stop_at
        Those of `recover`.

    Raises
    ------
    ValueError
        If a teacher is missing or without use, cannot teach this model or be compared with it.
    """
    wants = [f"loss={loss!r}"] * (loss != "label") + ["stop_at='teacher'"] * (stop_at == "teacher")
    if teacher is None:
        if wants:
            raise InvalidArgument(f"{wants[0]} needs a teacher: pass the dense model")
        return None
    if not wants:
        raise InvalidArgument(
            "teacher is given, but loss='label' does not use it; set loss='kl' or 'mix', or leave "
            "it out"
        )
    if stop_at == "teacher":
        _require_readable(teacher, tokenizer)
    return Teacher(teacher, model, temperature, samples)


def _require_readable(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a teacher whose perplexity cannot be measured."""
    if teacher.device.type == "meta":
        raise InvalidArgument(
            "stop_at is 'teacher', and the teacher is offloaded; load it without offloading "
            "(device_map=None), or give a number"
        )
    try:
        tokenizer_for(teacher, tokenizer)
    except ValueError as error:
        raise InvalidArgument(
            "stop_at is 'teacher', who has more tokens than this tokenizer; give the teacher's "
            "tokenizer, which also fits the trimmed model, or a number as stop_at"
        ) from error
