"""Greedy continuation of a prompt."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..checks import Integer, InvalidArgument, Model, Text, Tokenizer, checked, safe_contextmanager
from ..domains import token_ids, window_prefix
from ..models import check_token_ids, inference, tokenizer_for


@checked(model=Model(), tokenizer=Tokenizer(), prompt=Text(), max_new_tokens=Integer(1))
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 40,
) -> str:
    """Greedy continuation of a prompt, without the prompt.

    Always the likeliest token, until the model's end-of-text token; the model's own generation
    settings (beams, penalties, …) are not used.

    Parameters
    ----------
    model, tokenizer
        A causal language model, and its tokenizer (that of the dense model will do).
    prompt : str
        Beginning of the text.
    max_new_tokens : int
        Length of the continuation, unless the model ends it.

    Raises
    ------
    ValueError
        If the prompt is empty, or longer than the model can continue.
    """
    tokenizer = tokenizer_for(model, tokenizer)
    text = token_ids(prompt, tokenizer)
    if not text:
        raise InvalidArgument(
            f"prompt is {prompt!r:.60}, which has no token; expected at least one that the "
            "tokenizer knows"
        )
    ids = torch.tensor([window_prefix(tokenizer) + text])
    length = ids.shape[1] + max_new_tokens
    longest = getattr(model.config, "max_position_embeddings", None) or length
    if length > longest:
        raise InvalidArgument(
            f"prompt and continuation would be {length} tokens, this model takes {longest}; "
            "shorten one of them"
        )
    check_token_ids(model, ids)
    ids = ids.to(model.device)
    with inference(model), _greedy(model, max_new_tokens):
        settings = {"generation_config": model.generation_config}
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    # A continuation alone may be decoded otherwise (without its first space): decode both.
    before, whole = (
        tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (ids[0], output[0])
    )
    if whole.startswith(before):
        return whole.removeprefix(before)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@safe_contextmanager
def _greedy(model: PreTrainedModel, max_new_tokens: int) -> Iterator[None]:
    """Within: of the model's own generation settings only its end of text counts."""
    own = model.generation_config  # None where someone removed it
    end = getattr(own, "eos_token_id", None)
    end = model.config.eos_token_id if end is None else end
    ends = end if isinstance(end, list) else [end]
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=next(iter(ends), None) or 0,
    )
    try:
        yield
    finally:
        model.generation_config = own
