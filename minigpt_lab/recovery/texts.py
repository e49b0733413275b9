"""The texts that a recovery trains on, and those that it is judged on."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from ..domains import Domain, Part, excerpt, tokenize


def training_windows(
    words: PreTrainedTokenizerBase,
    domain: Domain,
    general: Domain | None,
    generality: float,
    seq_len: int,
    max_tokens: int | None,
) -> torch.Tensor:
    """Windows of a domain's train part, and so many general ones that they are a share of all.

    Parameters
    ----------
    words : transformers.PreTrainedTokenizerBase
        The model's tokenizer.
    domain, general : Domain
        General text, if any, is the other one's train part.
    generality : float
        Its share.
    seq_len, max_tokens : int
        Tokens per window, and in all.

    Returns
    -------
    torch.Tensor
        Token ids ``[window, token]``.

    Raises
    ------
    ValueError
        If a text is too short.
    """
    share = generality if general is not None else 0.0
    own = None if max_tokens is None else round((1 - share) * max_tokens)
    windows = _packed(domain, words, seq_len, own)
    wanted = round(len(windows) * share / (1 - share))
    if general is None or not wanted:
        return windows
    mixed_in = _packed(general, words, seq_len, wanted * seq_len)
    if len(mixed_in) < wanted:
        raise ValueError(
            f"general.train fills {len(mixed_in):,} windows of {seq_len} tokens, and a share of "
            f"{generality} of the training text is {wanted:,}; lower generality or max_tokens"
        )
    return torch.cat([windows, mixed_in])


def _packed(
    domain: Domain, words: PreTrainedTokenizerBase, seq_len: int, max_tokens: int | None
) -> torch.Tensor:
    """Windows of a train part, ``[window, token]``."""
    batches = tokenize(domain.train, words, seq_len=seq_len, max_tokens=max_tokens)
    return torch.cat([batch["input_ids"] for batch in batches])


def validation_texts(
    domain: Domain, other: Domain | None, max_characters: int | None
) -> dict[str, Part]:
    """What an evaluation measures, by the column of the history."""
    judged = {"perplexity": domain, "other_perplexity": other}
    return {
        column: excerpt(each.validation, max_characters=max_characters)
        for column, each in judged.items()
        if each is not None
    }
