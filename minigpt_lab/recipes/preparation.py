"""What `make_mini` needs before the long work: checked texts, calibration."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import InvalidArgument
from ..domains import Domain, count_tokens, tokenize
from ..models import Anatomy
from ..store import content_hash
from .timed_run import least_tokens


def require_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domain: Domain,
    general_domain: Domain,
    general: float,
    *,
    seq_len: int,
    max_tokens: int,
) -> None:
    """Refuse texts shorter than a window or than `slimgpt` needs, and two that share a name.

    Raises
    ------
    ValueError
        Naming the part and its tokens, or the name.
    """
    of_general = general_domain.parts.values() if general else [general_domain.test]
    for part in (*domain.parts.values(), *of_general):
        tokenize(part, tokenizer, seq_len=seq_len, max_tokens=seq_len)
    if general:
        tokens = count_tokens(general_domain.train, tokenizer).sum()
        needed = math.ceil(general * least_tokens(seq_len, general))
        if tokens < needed:
            raise InvalidArgument(
                f"{general_domain.train} has {tokens:,} tokens, and the shortest training with a "
                f"share of {general:g} reads {needed:,}; give more general text, or a smaller share"
            )
    tokenize(domain.calibration, tokenizer, seq_len=seq_len, max_tokens=max_tokens)
    # Below d tokens the Hessian of d inputs has no inverse, and the damping decides.
    width = max(Anatomy(model).layer_widths()["ffn"])
    tokens = count_tokens(domain.calibration, tokenizer).sum()
    if tokens < min(width, max_tokens):
        more = math.ceil(10 * width / tokens) / 10
        raise InvalidArgument(
            f"{domain.calibration} has {tokens:,} tokens; to prune matrices of {width:,} inputs "
            f"takes as many: give {more:.1f} times as much text in all"
        )
    if domain.name == general_domain.name and digest(domain) != digest(general_domain):
        raise InvalidArgument(
            f"domain and general_domain are both called {domain.name!r}, and their texts differ; "
            "give one of them another name"
        )


def digest(domain: Domain) -> str:
    """Hash of all passages of a domain."""
    return content_hash([text for part in domain.parts.values() for text in part])[:16]


def calibration(
    *,
    tokenizer: PreTrainedTokenizerBase,
    domain: Domain,
    general_domain: Domain,
    generality: float,
    **shape: int,
) -> dict[str, Any]:
    """Arguments of `slimgpt`: tokens of the domain, and of general text if it has a share."""
    arguments: dict[str, Any] = {"batches": tokenize(domain.calibration, tokenizer, **shape)}
    if generality:
        general = tokenize(general_domain.calibration, tokenizer, **shape)
        arguments |= {"general": general, "generality": generality}
    return arguments
