"""The texts that a recovery trains on, and those that it is judged on."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

from ..checks import InvalidArgument
from ..domains import SEPARATOR, Domain, Part, excerpt, tokenize


def training_windows(
    words: PreTrainedTokenizerBase,
    domain: Domain,
    general: Domain | None,
    generality: float,
    seq_len: int,
    max_tokens: int | None,
) -> torch.Tensor:
    """Windows of a domain's train part, and so many general ones that they are a share of all.

    A share that is not 0 is one window at least.

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
        If a text is too short, or the general one is the domain's own.
    """
    if general is None:
        return _packed(domain, words, seq_len, max_tokens)
    if [*general.train] == [*domain.train]:
        raise InvalidArgument(
            f"general is {general.name!r}, whose text is that of domain; give another domain, or "
            "leave it out"
        )
    own = None if max_tokens is None else round((1 - generality) * max_tokens)
    if own is not None and own < seq_len:
        raise InvalidArgument(
            f"generality is {generality} and max_tokens is {max_tokens}: the domain's own text "
            f"gets {own} tokens, less than one window of seq_len={seq_len}; lower generality, or "
            "raise max_tokens"
        )
    windows = _packed(domain, words, seq_len, own)
    if not generality:
        return windows
    wanted = max(1, round(len(windows) * generality / (1 - generality)))
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
    """What an evaluation measures, by the column of the history.

    Without a limit in characters, the other text is as long as the domain's, which decides.
    """
    texts = {"perplexity": excerpt(domain.validation, max_characters=max_characters)}
    if other is not None:
        length = max_characters or len(SEPARATOR.join(texts["perplexity"]))
        texts["other_perplexity"] = excerpt(other.validation, max_characters=length)
    return texts
