"""A tokenizer as the metadata of a GGUF file: byte-pair encodings of two kinds.

Over bytes (GPT-2, SmolLM, Qwen2, Llama 3; llama.cpp's ``gpt2``), or over characters with bytes for
what has no token, blanks written as ``▁`` and no split before the merges (Llama 2, Mistral;
llama.cpp's ``llama``).
"""

from __future__ import annotations

import itertools
import json
import re

from transformers import PreTrainedTokenizerBase

from ..checks import InvalidArgument

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

#: How text is split before the merges, and whether a whole word that is a token is taken as it is
#: (``ignore_merges``), to llama.cpp's name for it.
_SPLITS = {
    ("words", False): "gpt-2",
    ("digits words", False): "smollm",
    (_CONTRACTIONS + r"\p{N}" + _REST, False): "qwen2",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST, False): "dbrx",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
    (r" ?[^(\s|[.,!?…。，、।۔،])]+", False): "bloom",
}

# llama.cpp's types of tokens
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


def tokenizer_fields(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, object]:
    """Metadata from which llama.cpp encodes text to the same ids.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        A byte-pair encoding.
    rows : int
        Rows of the model's embedding; those without a token are marked as unused.

    Raises
    ------
    InvalidArgument
        If GGUF cannot describe the tokenizer.
    """
    if not tokenizer.is_fast:
        raise _undescribed("written in Python")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    _refuse_odd_merges(spec)
    # 1. Tokens and their types, one for each row.
    tokens, types = [f"<unused_{row}>" for row in range(rows)], [_UNUSED] * rows
    for token, row in spec["model"]["vocab"].items():
        if row < rows:
            tokens[row], types[row] = token, _NORMAL
    for token in spec["added_tokens"]:
        if token["id"] < rows:
            tokens[token["id"]] = token["content"]
            types[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
    # 2. How text is split and merged.
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    if spec["model"]["byte_fallback"]:
        ranks = {merge.replace(" ", ""): -rank for rank, merge in reversed([*enumerate(merges)])}
        for row, token in enumerate(tokens):
            if re.fullmatch("<0x[0-9A-F]{2}>", token):
                types[row] = _BYTE
            elif token == spec["model"]["unk_token"]:
                types[row] = _UNKNOWN
        kind = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": [float(ranks.get(token, -len(merges))) for token in tokens],
            "tokenizer.ggml.add_space_prefix": _begins_with_blank(spec),
        }
    else:
        kind = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": _split_name(spec),
            "tokenizer.ggml.merges": merges,
        }
    # 3. The tokens that begin and end a text.
    end = tokenizer.eos_token_id
    if end is None or end >= rows:  # llama.cpp would stop at token 11
        raise _undescribed("without a token that ends a text; set tokenizer.eos_token")
    begins, ends = _surrounding(tokenizer)
    special = {
        "bos": end if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        "eos": end,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    fields = kind | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": begins,
        "tokenizer.ggml.add_eos_token": ends,
    }
    if tokenizer.chat_template and isinstance(tokenizer.chat_template, str):
        fields["tokenizer.chat_template"] = tokenizer.chat_template
    for name, row in special.items():
        if row is not None and row < rows:
            fields[f"tokenizer.ggml.{name}_token_id"] = row
    return fields


def _refuse_odd_merges(spec: dict) -> None:
    """Refuse what neither kind of llama.cpp's tokenizers does."""
    model = spec["model"]
    if model["type"] != "BPE" or not model["merges"]:
        raise _undescribed(f"of the kind {model['type']}")
    whole_words = model["byte_fallback"] and model["ignore_merges"]
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if whole_words or any(model[name] for name in odd):
        raise _undescribed("that does more than merge pairs")
    for token in spec["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise _undescribed(f"whose token {token['content']!r} takes spaces beside it")


def _split_name(spec: dict) -> str:
    """llama.cpp's name for how a tokenizer of bytes splits text, from its ``tokenizer.json``.

    Raises
    ------
    InvalidArgument
        If llama.cpp has no name for it.
    """
    normalizer, outer = spec["normalizer"], spec["pre_tokenizer"] or {"type": None}
    steps = outer.get("pretokenizers", [outer])
    key = " ".join(filter(None, map(_split_step, steps))), bool(spec["model"]["ignore_merges"])
    composed = normalizer is None or normalizer["type"] == "NFC"  # nearly all text is
    if steps[-1]["type"] != "ByteLevel" or key not in _SPLITS or not composed:
        raise _undescribed("that splits text in a way of its own")
    return _SPLITS[key]


def _begins_with_blank(spec: dict) -> bool:
    """Whether a text gets a blank before it, in a tokenizer that writes blanks as ``▁``.

    Raises
    ------
    InvalidArgument
        If it does more than that before the merges.
    """
    normalizer, split = spec["normalizer"], spec["pre_tokenizer"]
    at_blanks = {"type": "Split", "pattern": {"String": " "}}  # of which none are left: Gemma
    if normalizer and (split is None or at_blanks.items() <= split.items()):
        steps = normalizer.get("normalizers", [normalizer])
        blanks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        if steps[-1] == blanks and steps[:-1] in ([], [{"type": "Prepend", "prepend": "▁"}]):
            return len(steps) == 2
    if normalizer is None and split and split["type"] == "Metaspace" and not split["split"]:
        return split["prepend_scheme"] != "never"
    raise _undescribed("that splits text in a way of its own")


def _split_step(step: dict) -> str:
    """One step of a pre-tokenizer in a word; the pattern of a split; nothing for mere bytes."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "words" if step["use_regex"] else ""
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits"
    if step["type"] == "Split" and (step["behavior"], step["invert"]) == ("Isolated", False):
        return step["pattern"].get("Regex", "another")
    return "another"


def _surrounding(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether an encoded text begins with the bos token, and ends with the eos token."""
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole, bos, eos = tokenizer("a")["input_ids"], tokenizer.bos_token_id, tokenizer.eos_token_id
    for begins, ends in itertools.product((False, True), repeat=2):
        if whole == [bos] * begins + inner + [eos] * ends:
            return begins, ends
    raise _undescribed("that puts other tokens than bos and eos around a text")


def _undescribed(what: str) -> InvalidArgument:
    return InvalidArgument(
        f"tokenizer is one {what}; expected a BPE as GPT-2, SmolLM, Qwen2, Llama or Mistral have "
        "it, which is what is written as GGUF; lab.save_model keeps any tokenizer"
    )
