"""What `make_mini` needs before the long work: checked texts, a folder of its own, calibration."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import InvalidArgument
from ..domains import Domain, count_tokens, tokenize
from ..models import Anatomy
from ..store import content_hash

#: What a run leaves in its folder and reads again.
_OWN = ("pruned", "model", "recovery", "control", "mini-*.gguf")


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


def require_own(folder: Path) -> None:
    """Refuse a folder with what looks like a run's results, and no run.

    Raises
    ------
    ValueError
        Naming what was found; it is left alone.
    """
    if (folder / "state.json").is_file():
        return
    for pattern in _OWN:
        for path in folder.glob(pattern):
            raise InvalidArgument(
                f"out_dir is {str(folder)!r}, which holds {path.name} and no run of make_mini; "
                "choose another folder, or move that away"
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
