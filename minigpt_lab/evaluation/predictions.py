"""Divergence of a model's predictions from a reference's, such as the dense model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import logit_blocks
from ..checks import Flag, Integer, Model, Texts, Tokenizer, checked
from ..domains import Part
from ..models import PRECISION, TrimmedVocabulary
from .language import Perplexity, of_passages
from .results import OneRow
from .windows import resampled, windowed


@dataclass(frozen=True, repr=False)
class Divergence(OneRow):
    """Predictions of a model against those of a reference, on the same tokens.

    Parameters
    ----------
    kl, kl_low, kl_high : float
        Mean over tokens of ``KL(reference ‖ model)`` in nats, with its 95 % interval (percentile
        bootstrap over passages; NaN for a single passage).
    agreement, agreement_low, agreement_high : float
        Share of tokens for which both give the same token the highest probability, with its 95 %
        interval.
    perplexity_ratio, perplexity_ratio_low, perplexity_ratio_high : float
        The model's perplexity over the reference's, with the interval of the paired ratio.
    model, reference : Perplexity
        Of both, from the same pass.
    passages : numpy.ndarray
        Sums per passage: both losses, KL, agreements, tokens, characters ``[passage, 6]``.
    """

    kl: float
    kl_low: float
    kl_high: float
    agreement: float
    agreement_low: float
    agreement_high: float
    perplexity_ratio: float
    perplexity_ratio_low: float
    perplexity_ratio_high: float
    model: Perplexity
    reference: Perplexity
    passages: np.ndarray = field(compare=False)

    @property
    def protocol(self) -> str:
        """Size of the text and of the windows, and precision, to be written beside the numbers."""
        return self.model.protocol

    def row(self) -> dict:
        """The numbers as one row of a table: those of the perplexity, and the divergence."""
        ends = ("", "_low", "_high")
        names = [f"{name}{end}" for name in ("kl", "agreement") for end in ends]
        return {**self.model.row(), **{name: getattr(self, name) for name in names}}

    def __repr__(self) -> str:
        return (
            f"KL {self.kl:.4f} [{self.kl_low:.4f}, {self.kl_high:.4f}] nats per token, same top "
            f"token {self.agreement:.1%}, perplexity {self.model.value:.2f} against "
            f"{self.reference.value:.2f} on {self.model.text} ({self.protocol})"
        )


@checked(
    model=Model(),
    reference=Model(),
    tokenizer=Tokenizer(),
    text=Texts(),
    seq_len=Integer(2),
    stride=Integer(1) | None,
    max_characters=Integer(2) | None,
    max_tokens=Integer(2) | None,
    batch_size=Integer(1) | None,
    precision=PRECISION,
    n_bootstrap=Integer(1),
    seed=Integer(0),
    progress=Flag(),
)
def divergence(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Part | Sequence[str] | str,
    *,
    seq_len: int = 256,
    stride: int | None = None,
    max_characters: int | None = 65_536,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    precision: str = "auto",
    n_bootstrap: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Divergence:
    """KL divergence from a reference's predictions, agreement of top tokens, both perplexities.

    ``KL = (1/N) Σ_t Σ_v p_tv (log p_tv - log q_tv)`` with *p* the reference's predictions and *q*
    the model's, at every token *t* that `perplexity` scores. One pass reads both models.

    Parameters
    ----------
    model, reference : transformers.PreTrainedModel
        E.g. a pruned model and the dense one, with the same vocabulary; both are in memory.
    tokenizer, text, seq_len, stride, max_characters, max_tokens, batch_size, precision
        As for `perplexity`.
    n_bootstrap, seed : int
        Resamples of the intervals, and their seed.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Divergence

    Raises
    ------
    ValueError
        If the vocabularies differ, the text is too short, or a model answers with NaN.
    """
    if not same_vocabulary(model, reference):
        sizes = [each.get_output_embeddings().weight.shape[0] for each in (model, reference)]
        raise ValueError(
            f"the model predicts {sizes[0]:,} tokens, the reference {sizes[1]:,}, not the same "
            "ones: their predictions cannot be compared token by token; compare bits per character "
            "instead (lab.perplexity, lab.compare)"
        )
    texts = windowed(
        model,
        tokenizer,
        text,
        seq_len=seq_len,
        stride=stride,
        max_characters=max_characters,
        max_tokens=max_tokens,
        batch_size=batch_size,
    )

    table, dtype = texts.passage_sums(
        [model, reference], _columns, precision, "divergence", progress
    )  # [passage, 6]
    kl, agreement, ratio = _ratios(table.sum(0))
    low, high = resampled(table, _ratios, n_bootstrap, seed).tolist()
    protocol = {"seq_len": seq_len, "stride": stride or seq_len, "precision": dtype}
    each = [
        of_passages(table[:, [column, 4, 5]], texts, n_bootstrap, seed, **protocol)
        for column in (0, 1)
    ]
    numbers = (kl, low[0], high[0], agreement, low[1], high[1], ratio, low[2], high[2])
    fields: list[Any] = [*map(float, numbers), *each, table]
    return Divergence(*fields)


def same_vocabulary(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether both predict the same tokens of one tokenizer: trimmed alike, masked alike."""
    rows = {each.get_output_embeddings().weight.shape[0] for each in (model, other)}
    return len(rows) == 1 and TrimmedVocabulary.of(model) == TrimmedVocabulary.of(other)


def _ratios(sums: np.ndarray) -> np.ndarray:
    """Mean KL, agreement and ratio of perplexities of sums ``[6, …]``."""
    loss, loss_reference, kl, agreement, tokens, _ = sums
    return np.stack([kl / tokens, agreement / tokens, np.exp((loss - loss_reference) / tokens)])


def _columns(logits: list[torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """Both losses, KL and agreement of every token, ``[batch, token, 4]``."""
    q_logits, p_logits = (x.flatten(0, -2) for x in logits)  # [token, vocabulary]
    columns = []
    for q, p, answer in logit_blocks(q_logits, p_logits, targets.flatten()):
        p = p.to(q.device)
        log_q, log_p = q.float().log_softmax(-1), p.float().log_softmax(-1)
        at_answer = [-x.gather(1, answer[:, None])[:, 0] for x in (log_q, log_p)]
        terms = log_p.exp() * (log_p - log_q)
        kl = terms.masked_fill(log_p.isneginf(), 0).sum(-1)  # 0 log 0 = 0: tokens ruled out
        agreement = (q.argmax(-1) == p.argmax(-1)).float()
        columns.append(torch.stack([*at_answer, kl, agreement], -1))
    return torch.cat(columns).view(*targets.shape, 4)
