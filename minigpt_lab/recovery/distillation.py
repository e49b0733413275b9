"""Logit distillation: the loss of a student against a teacher's predictions (arXiv 1503.02531)."""

from __future__ import annotations

import zlib

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ..checks import InvalidArgument
from ..models import TrimmedVocabulary

#: Losses of `recover`.
LOSSES = ("label", "kl", "mix")


class Teacher:
    """Predictions of a teacher for the tokens of a student.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The teacher.
    student : transformers.PreTrainedModel
        Has the teacher's vocabulary, or a part of it: then the teacher's probabilities are
        normalised over the tokens that the student kept.
    temperature : float
        *T* in ``p_T = softmax(logits / T)``.
    samples : int, optional
        Keep so many tokens per position, sampled from the predictions, instead of reading the
        windows again in every epoch.

    Raises
    ------
    ValueError
        If the teacher is the student or shares its weights, its vocabulary is masked, or it does
        not have the student's tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        student: PreTrainedModel,
        temperature: float = 1.0,
        samples: int | None = None,
    ):
        trained = {parameter.data_ptr() for parameter in student.parameters()}
        if any(parameter.data_ptr() in trained for parameter in model.parameters()):
            raise InvalidArgument(
                "the teacher is the student, or shares weights with it; give a copy: "
                "copy.deepcopy(model), or the dense model that the student was shrunk from"
            )
        self.model, self.temperature, self.samples = model, temperature, samples
        self.rows = _rows(model, student)
        self._sampled: dict[bytes, torch.Tensor] = {}

    @torch.no_grad()
    def log_probabilities(self, ids: torch.Tensor) -> torch.Tensor:
        """``log p_T`` of the next token over the student's, ``[batch, token - 1, vocabulary]``.

        Raises
        ------
        ValueError
            If the teacher answers with NaN.
        """
        own = ids if self.rows is None else self.rows.to(ids.device)[ids]
        logits = self.model(input_ids=own.to(self.model.device), use_cache=False).logits[:, :-1]
        logits = logits.to(ids.device)
        if self.rows is not None:
            logits = logits[..., self.rows.to(ids.device)]
        log_p = (logits.float() / self.temperature).log_softmax(-1)
        if log_p[..., 0].isnan().any():
            raise ValueError(
                "the teacher's predictions are NaN; check its weights, or try precision='float32'"
            )
        return log_p

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
                p = self.log_probabilities(window[None])[0].exp()
                tokens = p.multinomial(self.samples, replacement=True, generator=generator)
                self._sampled[key] = tokens.int().cpu()
            rows.append(self._sampled[key])
        return torch.stack(rows).long().to(ids.device)


def _rows(teacher: PreTrainedModel, student: PreTrainedModel) -> torch.Tensor | None:
    """The teacher's id of each of the student's tokens; None if they are the same."""
    own, wanted = TrimmedVocabulary.of(teacher), TrimmedVocabulary.of(student)
    if own.allowed != own.rows:
        raise InvalidArgument(
            "the teacher's vocabulary is masked: it says nothing of the other tokens; leave the "
            "with block first, or give it shrink(model, plan)"
        )
    if own.size != wanted.size or not {*wanted.rows} <= {*own.rows}:
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
        logits = outputs["logits"][:, :-1].flatten(0, 1).float()  # [token, vocabulary]
        targets = labels[:, 1:].flatten()
        T, m = self.teacher.temperature, self.mix  # the paper's letters
        log_q = (logits / T if T != 1 else logits).log_softmax(-1)

        # 1. The teacher's term, over all tokens or the sampled ones.
        if self.teacher.samples is None:
            log_p = self.teacher.log_probabilities(labels).flatten(0, 1)
            divergence = functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
        else:
            tokens = self.teacher.sampled(labels).flatten(0, 1)  # [token, samples]
            divergence = -log_q.gather(1, tokens).mean(1).sum()
        loss = m * T**2 * divergence

        # 2. The labels' term.
        if m < 1:
            log_q1 = log_q if T == 1 else logits.log_softmax(-1)
            loss = loss + (1 - m) * functional.nll_loss(log_q1, targets, reduction="sum")
        return loss / (targets.numel() if num_items_in_batch is None else num_items_in_batch)


def teacher_of(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    loss: str,
    temperature: float,
    samples: int | None,
    stop_at: float | str | None,
) -> Teacher | None:
    """The teacher of a run, if there is one and the run uses it.

    Parameters
    ----------
    model, teacher, loss, temperature, samples, stop_at
        Those of `recover`.

    Raises
    ------
    ValueError
        If a teacher is missing or without use, or cannot teach this model.
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
    guide = Teacher(teacher, model, temperature, samples)
    if stop_at == "teacher" and guide.rows is not None:
        raise InvalidArgument(
            "stop_at is 'teacher', whose perplexity counts other tokens than that of a model with "
            "a trimmed vocabulary; give a number, or leave it out"
        )
    return guide
