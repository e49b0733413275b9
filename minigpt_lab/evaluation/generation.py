"""Text that a model writes: after a prompt, as answers to questions, or of its own accord."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from ..checks import (
    Flag,
    Integer,
    InvalidArgument,
    Model,
    Text,
    Tokenizer,
    checked,
    safe_contextmanager,
)
from ..domains import Question, split_words, token_ids, window_prefix
from ..models import PRECISION, check_token_ids, inference, seeded, tokenizer_for
from .answers import QUESTIONS, Answers
from .windows import again_in_float32, by_length, finite_or_float32, require_likeliest


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
    limit = _longest(model)
    if length > limit:
        raise InvalidArgument(
            f"prompt and continuation would be {length} tokens, this model takes {limit}; "
            "shorten one of them"
        )
    check_token_ids(model, ids)
    ids = ids.to(model.device)
    with inference(model), _generating(model, max_new_tokens):
        settings = {"generation_config": model.generation_config}
        mask = torch.ones_like(ids)
        output = model.generate(input_ids=ids, attention_mask=mask, **settings).sequences
    # A continuation alone may be decoded otherwise (without its first space): decode both.
    before, whole = (
        tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (ids[0], output[0])
    )
    if whole.startswith(before):
        return whole.removeprefix(before)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@checked(
    model=Model(),
    tokenizer=Tokenizer(),
    questions=QUESTIONS,
    max_new_tokens=Integer(1),
    batch_size=Integer(1),
    precision=PRECISION,
    progress=Flag(),
)
def write_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    max_new_tokens: int = 8,
    batch_size: int = 16,
    precision: str = "auto",
    progress: bool = True,
) -> Answers:
    """Answer questions by writing: the choice whose words the greedy continuation begins with.

    The choices are not shown, so this is harder than choosing among them (`answer_questions`), and
    a pruned model may pass the one and fail the other. Case, punctuation and space are ignored. A
    text that begins with no choice, or with words that two choices share, is a wrong answer.

    Parameters
    ----------
    model, tokenizer, questions
        As for `answer_questions`.
    max_new_tokens : int
        Tokens written; a choice of more cannot be met.
    batch_size : int
        Questions that are continued together.
    precision, progress
        As for `answer_questions`.

    Returns
    -------
    Answers
        Of style ``"written"``, for `compare_answers` and `compare`; its chance is 0.

    Raises
    ------
    ValueError
        If there are no questions, a question has no tokens, the model takes no more than
        `max_new_tokens`, tokenizer and model do not belong together, or the model gives NaN.
    """
    tokenizer = tokenizer_for(model, tokenizer)
    prefix, limit = window_prefix(tokenizer), _longest(model)
    room = limit - max_new_tokens - len(prefix)  # for the question
    if room < 1:
        raise InvalidArgument(
            f"max_new_tokens is {max_new_tokens}, of {limit} tokens that this model takes: none is "
            "left for a question"
        )
    prompts, truncated = [], []
    for number, question in enumerate(questions):
        ids = token_ids(question.prompt, tokenizer)
        if not ids:
            raise ValueError(f"question {number} ({question!s}) has no tokens in this tokenizer")
        prompts.append(prefix + ids[-room:])
        truncated.append(max(0, len(ids) - room))
    groups = by_length([len(ids) for ids in prompts], batch_size)
    written = [""] * len(prompts)

    def read(precision: str) -> np.ndarray:
        logits = np.zeros(len(prompts))  # the highest of the first token: NaN if any is
        with inference(model, precision), _generating(model, max_new_tokens):
            for group in tqdm(groups, desc="writing", unit="batch", disable=not progress):
                texts, logits[group] = _continued(model, tokenizer, [prompts[i] for i in group])
                for number, text in zip(group, texts, strict=True):
                    written[number] = text
        return logits

    _, dtype = finite_or_float32(
        read, [model], precision, lambda i: f"question {i} ({questions[i]!s})"
    )
    rows = []
    for number, (question, text) in enumerate(zip(questions, written, strict=True)):
        picked = _choice_written(text, question.choices)
        rows += [
            {
                "question": number,
                "source": question.source,
                "choice": choice,
                "text": question.choices[choice],
                "is_answer": choice == question.answer,
                "written": text,
                "truncated": truncated[number],
                "picked": choice == picked,
            }
            for choice in range(len(question.choices))
        ]
    how = (dtype, limit, max_new_tokens)
    return Answers(pd.DataFrame(rows), tuple(questions), "match", "written", *how)


@checked(
    model=Model(),
    tokenizer=Tokenizer(),
    max_tokens=Integer(1),
    seq_len=Integer(2),
    batch_size=Integer(1),
    precision=PRECISION,
    seed=Integer(0, 2**32 - 1),
    progress=Flag(),
)
def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int = 8_192,
    seq_len: int = 256,
    batch_size: int = 32,
    precision: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> list[str]:
    """Texts that the model writes of its own accord: general text for those who have none.

    Each begins with a random word of the vocabulary and goes on with tokens drawn from the model's
    own predictions, ``x_t ~ p(x | x_<t)``, until its end-of-text token (as the calibration text of
    LLM-QAT, arXiv 2305.17888). Tokenized, they can be the ``general=`` of `slimgpt`. Measured on
    SmolLM2-135M without half of its FFN channels (medicine; ``generality=0.25``, 8,192 tokens of
    each text): they take 10 % off the perplexity on general text, real general text 29 %; neither
    costs anything in the domain.

    Parameters
    ----------
    model, tokenizer
        A causal language model, dense as a rule, and its tokenizer.
    max_tokens : int
        Tokens of all texts together.
    seq_len : int
        Longest text, in tokens.
    batch_size : int
        Texts written together.
    precision, progress
        As for `write_answers`.
    seed : int
        Of the first words and of the draws.

    Returns
    -------
    list of str

    Raises
    ------
    ValueError
        If the model takes no text of `seq_len` tokens, its predictions are not finite in float32
        either, or the tokenizer has no token that is a word.
    """
    tokenizer = tokenizer_for(model, tokenizer)
    prefix = window_prefix(tokenizer)
    if len(prefix) + seq_len > _longest(model):
        raise InvalidArgument(
            f"seq_len is {seq_len}, this model takes {_longest(model) - len(prefix)} tokens; "
            "shorten it"
        )
    words = _words(tokenizer)

    def read(precision: str) -> list[str]:
        texts: list[str] = []
        left = max_tokens
        bar = tqdm(total=max_tokens, desc="sampling", unit="token", disable=not progress)
        with bar, seeded(seed), inference(model, precision):
            while left > 0:
                # 1. Rows for what is left, each with its first word.
                length = min(seq_len, max(left, 2))
                rows = min(batch_size, -(-left // length))
                first = words[torch.randint(len(words), (rows,))]
                begin = torch.tensor([prefix] * rows, dtype=torch.long)
                ids = torch.cat([begin, first[:, None]], 1)
                check_token_ids(model, ids)
                # 2. x_t ~ p(x | x_<t).
                with _generating(model, length - 1, do_sample=True, top_k=0) as ends:
                    output = _sampled(model, ids.to(model.device), bar)
                # 3. A row ends before its end-of-text token.
                new = output[:, len(prefix) :].tolist()
                written = [[*itertools.takewhile(lambda x: x not in ends, row)] for row in new]
                texts += tokenizer.batch_decode(written)
                left -= sum(map(len, written))
                bar.n = max_tokens - left
                bar.refresh()
        return texts

    return again_in_float32(read, [model], precision)[0]


def _longest(model: PreTrainedModel) -> int:
    """Most tokens of prompt and continuation."""
    return getattr(model.config, "max_position_embeddings", None) or 1 << 30


def _continued(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> tuple[list[str], np.ndarray]:
    """Continuations of rows of tokens, and the highest logit of the first token of each.

    Padding stands at the left, so that all are continued at the same place; the mask hides it, and
    positions are counted from the mask.
    """
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in prompts])  # [batch, token]
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in prompts])
    check_token_ids(model, ids)
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=model.generation_config,
    )
    texts = tokenizer.batch_decode(output.sequences[:, length:], skip_special_tokens=True)
    return texts, output.logits[0].amax(-1).float().cpu().numpy()


def _words(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Ids of the tokens that are a word, or the beginning of one ``[token]``."""
    special = {*tokenizer.all_special_ids}
    ids = [token for token in sorted(tokenizer.get_vocab().values()) if token not in special]
    texts = tokenizer.batch_decode([[token] for token in ids])
    words = [token for token, text in zip(ids, texts, strict=True) if text.strip().isalpha()]
    if not words:
        raise ValueError(f"none of the tokenizer's {len(ids)} tokens is a word to begin with")
    return torch.tensor(words)


class _Steps(BaseStreamer):
    """Advances a bar by a token of every row."""

    def __init__(self, bar: tqdm):
        self.bar = bar

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompts, then with the next token of every row."""
        self.bar.update(min(len(value), self.bar.total - self.bar.n))

    def end(self) -> None:
        """Nothing is left to show."""


def _sampled(model: PreTrainedModel, ids: torch.Tensor, bar: tqdm) -> torch.Tensor:
    """Rows of tokens continued by the model's own settings ``[batch, token]``."""
    settings = {"generation_config": model.generation_config, "streamer": _Steps(bar)}
    try:
        with model.register_forward_hook(require_likeliest):
            return model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), **settings
            ).sequences
    except FloatingPointError as error:
        raise FloatingPointError("NaN on the texts that it writes") from error


def _choice_written(text: str, choices: Sequence[str]) -> int | None:
    """Index of the choice whose words a text begins with, the longest; None if not exactly one."""
    words, found = split_words(text.casefold()), {}
    for index, choice in enumerate(choices):
        wanted = split_words(choice.casefold())
        if wanted and words[: len(wanted)] == wanted:
            found.setdefault(len(wanted), []).append(index)
    best = found[max(found)] if found else []
    return best[0] if len(best) == 1 else None


@safe_contextmanager
def _generating(model: PreTrainedModel, max_new_tokens: int, **sampling) -> Iterator[list[int]]:
    """Within the block, only the end-of-text tokens of the model's generation settings are used.

    Greedy, unless `sampling` says otherwise. Yields those tokens.
    """
    own = model.generation_config  # None where someone removed it
    end = getattr(own, "eos_token_id", None)
    end = model.config.eos_token_id if end is None else end
    ends = end if isinstance(end, list) else [end]
    model.generation_config = GenerationConfig(
        **{"do_sample": False, **sampling},
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=next(iter(ends), None) or 0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    try:
        yield [each for each in ends if each is not None]
    finally:
        model.generation_config = own
