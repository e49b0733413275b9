"""The vocabulary site: the tokens to keep, and a trimmed tokenizer to match.

Only byte-pair encodings are trimmed. Bytes, special tokens, and the tokens that a kept token is
merged from are always kept. So any text can still be encoded, and a text whose tokens were all kept
is encoded exactly as before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from weakref import WeakKeyDictionary

import numpy as np
import tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..checks import Integer, InvalidArgument, ListOf, Model, Tokenizer, checked

#: Key of a trimmed tokenizer's original token ids in its ``init_kwargs``, saved and loaded with it.
_ORIGINAL = "minigpt_lab_original_ids"
_MOST_TOKENS = 2**24


@dataclass(frozen=True)
class TrimmedVocabulary:
    """The tokens of a model whose vocabulary was trimmed or masked, by their original ids.

    Parameters
    ----------
    size : int
        Tokens of the model before it was trimmed.
    rows : tuple of int
        Original id of every row of the embedding.
    allowed : tuple of int
        Original ids that a text may contain; fewer than the rows only under a mask.
    """

    size: int
    rows: tuple[int, ...]
    allowed: tuple[int, ...]

    @classmethod
    def from_dict(cls, data: dict, model: PreTrainedModel) -> TrimmedVocabulary:
        """Read the vocabulary that `save_model` wrote for a model.

        Raises
        ------
        ValueError
            If it does not fit the rows of the model's embedding.
        """
        size = Integer(1, _MOST_TOKENS)("the vocabulary's size", data["size"])
        rows = ListOf(Integer(0))("the vocabulary's rows", data["rows"])
        total = model.get_input_embeddings().weight.shape[0]
        if len(rows) != total or any(a >= b for a, b in pairwise([*rows, size])):
            raise ValueError(f"the vocabulary is not {total} ascending rows of a size above them")
        return cls(size, rows, rows)

    @classmethod
    def of(cls, model: PreTrainedModel) -> TrimmedVocabulary:
        """The vocabulary of a model; of one that was never trimmed, all tokens."""
        size = model.get_input_embeddings().weight.shape[0]
        known = getattr(model, "trimmed_vocabulary", None)
        return known or cls(size, tuple(range(size)), tuple(range(size)))

    def trimmed(self, kept: Sequence[int]) -> TrimmedVocabulary:
        """Keep only the rows `kept`, given as ids of the model."""
        rows = tuple(self.rows[token] for token in kept)
        return TrimmedVocabulary(self.size, rows, rows)

    def masked(self, kept: Sequence[int]) -> TrimmedVocabulary:
        """Keep all rows, but allow only `kept`, given as ids of the model."""
        return replace(self, allowed=tuple(self.rows[token] for token in kept))


def _byte_pair_model(tokenizer: PreTrainedTokenizerBase) -> dict | None:
    """The byte-pair model of a tokenizer as JSON, or None if it is of another kind."""
    if not tokenizer.is_fast:
        return None
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return model if model.get("type") == "BPE" else None


def require_byte_pairs(
    tokenizer: PreTrainedTokenizerBase, instead: str = "leave epsilon_embedding out"
) -> None:
    """Refuse a tokenizer whose vocabulary cannot be trimmed.

    Raises
    ------
    InvalidArgument
        If it is no byte-pair encoding.
    """
    if _byte_pair_model(tokenizer) is None:
        raise InvalidArgument(
            f"the vocabulary of {type(tokenizer).__name__} cannot be trimmed; expected byte pairs "
            f"(BPE) with their merges; {instead}"
        )


def _merges(model: dict) -> list[tuple[str, str, str]]:
    """Merges ``(left, right, result)`` of a byte-pair model, as tokens."""
    inner = model.get("continuing_subword_prefix") or ""
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    return [(a, b, a + b.removeprefix(inner)) for a, b in pairs]


def merge_table(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Merges as ids ``[merge, (left, right, result)]``; empty if it is no byte-pair encoding."""
    model = _byte_pair_model(tokenizer)
    if model is None:
        return np.zeros((0, 3), np.int64)
    ids = model["vocab"]
    rows = [tuple(ids[t] for t in merge) for merge in _merges(model) if {*merge} <= ids.keys()]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def protected_tokens(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Ids that are always kept: special and added tokens, and those of single bytes."""
    protected = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    model = _byte_pair_model(tokenizer)
    if model is not None:
        ids = model["vocab"]
        protected |= {ids[token] for token in _byte_tokens(tokenizer, model) if token in ids}
    return np.array(sorted(protected), dtype=np.int64)


def _byte_tokens(tokenizer: PreTrainedTokenizerBase, model: dict) -> set[str]:
    """Tokens into which any text can be split: bytes, or single characters if there are none."""
    if model.get("byte_fallback"):
        return {f"<0x{value:02X}>" for value in range(256)}
    if "ByteLevel" in tokenizer.backend_tokenizer.to_str():
        return {*ByteLevel.alphabet()}
    inner = model.get("continuing_subword_prefix") or ""
    last = model.get("end_of_word_suffix") or ""
    return {t for t in model["vocab"] if len(t.removeprefix(inner).removesuffix(last)) == 1}


def close_over_merges(kept: np.ndarray, merges: np.ndarray) -> np.ndarray:
    """Add to the kept tokens all tokens that they are merged from.

    Parameters
    ----------
    kept : numpy.ndarray of bool
        Mask ``[vocabulary]``.
    merges : numpy.ndarray
        ``[merge, (left, right, result)]``.

    Returns
    -------
    numpy.ndarray of bool
        Mask ``[vocabulary]``.
    """
    kept, before = kept.copy(), -1
    left, right, result = merges.T
    while before != (before := int(kept.sum())):  # until no token is added any more
        kept[left[kept[result]]] = True
        kept[right[kept[result]]] = True
    return kept


@checked(tokenizer=Tokenizer(), kept=ListOf(Integer(0), least=1))
def trim_tokenizer(
    tokenizer: PreTrainedTokenizerBase, kept: np.ndarray | list[int]
) -> PreTrainedTokenizerFast:
    """Make a tokenizer with only the kept tokens, renumbered 0, 1, 2, … in their order.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        A byte-pair tokenizer.
    kept : sequence of int
        Ids of the tokens to keep, closed over merges (as a plan holds them), ascending.

    Returns
    -------
    transformers.PreTrainedTokenizerFast

    Raises
    ------
    ValueError
        If the tokenizer is not a byte-pair encoding, or `kept` is not ascending.
    """
    if any(a >= b for a, b in pairwise(kept)):
        raise InvalidArgument("kept is not ascending; expected each id once, in ascending order")
    return _renumbered(tokenizer, {int(old): new for new, old in enumerate(kept)})


def _renumbered(tokenizer: PreTrainedTokenizerBase, new: dict[int, int]) -> PreTrainedTokenizerFast:
    """Make a tokenizer with only the tokens of `new`, which maps old ids to new ones."""
    require_byte_pairs(tokenizer)
    original = tokenizer.init_kwargs.get(_ORIGINAL)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    added = [token for token in spec["added_tokens"] if token["id"] in new]
    # 1. Added tokens join the model's own table: ids outside it would be recomputed on loading.
    vocab = {**spec["model"]["vocab"], **{token["content"]: token["id"] for token in added}}
    vocab = {token: new[old] for token, old in vocab.items() if old in new}
    spec["model"]["vocab"] = vocab
    # 2. Merges, added tokens and the post-processor with only the tokens that are left.
    merges = _merges(spec["model"])
    spec["model"]["merges"] = [[a, b] for a, b, both in merges if {a, b, both} <= vocab.keys()]
    spec["added_tokens"] = [{**token, "id": new[token["id"]]} for token in added]
    _renumber_post_processor(spec.get("post_processor"), new)
    # 3. A tokenizer with the old one's settings, that knows its original ids.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(spec)),
        **{name: token for name, token in tokenizer.special_tokens_map.items() if token in vocab},
        **{
            _ORIGINAL: [
                original[old] if original else old for old in sorted(new, key=new.__getitem__)
            ]
        },
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        clean_up_tokenization_spaces=False,
        chat_template=tokenizer.chat_template,
    )


def _renumber_post_processor(node: object, new: dict[int, int]) -> None:
    """Give the special tokens that a post-processor inserts their new ids, in place."""
    if isinstance(node, list):
        for child in node:
            _renumber_post_processor(child, new)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key == "ids":
                node[key] = [new[old] for old in value]
            elif key in ("sep", "cls"):
                node[key] = [value[0], new[value[1]]]
            else:
                _renumber_post_processor(value, new)


@checked(model=Model(lock=False), tokenizer=Tokenizer())
def tokenizer_for(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """The tokenizer that fits a model: trimmed if the model's vocabulary is, else as given.

    For a model that was trimmed, once or more, the tokenizer of any earlier stage may be given. A
    special token for which the model has no row is accepted here: only a text that contains it is
    refused later.

    Raises
    ------
    ValueError
        If the tokenizer does not belong to the model.
    """
    wanted = TrimmedVocabulary.of(model)
    # 1. Original ids of the tokenizer's tokens, and whether they include those of the model.
    original = tokenizer.init_kwargs.get(_ORIGINAL)
    if original is None or len(original) == wanted.size:  # the dense model's tokenizer
        original = range(wanted.size)
        fits = _fits(tokenizer, model, wanted.size)
    else:
        fits = {*wanted.allowed} <= {*original}
    if not fits:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary "
            f"{len(wanted.rows)}: they do not belong together; use the pair that load_model returns"
        )
    if [*wanted.allowed] == [*original]:
        return tokenizer
    # 2. The trimmed tokenizer, made once: id of the given tokenizer to row of the model.
    fitted = _fitted.get(tokenizer)
    if fitted is None or fitted[0] != wanted:
        row = {token: row for row, token in enumerate(wanted.rows)}
        own_id = {token: own for own, token in enumerate(original)}
        new = {own_id[token]: row[token] for token in wanted.allowed}
        fitted = _fitted[tokenizer] = (wanted, _renumbered(tokenizer, new))
    return fitted[1]


def _fits(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, rows: int) -> bool:
    """Whether an untrimmed tokenizer can belong to a model with so many rows of embedding."""
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    if any(token >= rows for token in tokenizer.get_vocab().values() if token not in special):
        return False
    # Models have a few rows more than tokens. More than a tenth is accepted only if model and
    # tokenizer have one name, or one of them has none.
    names = {tokenizer.name_or_path, model.config._name_or_path} - {""}
    return len(tokenizer) >= 0.9 * rows or len(names) < 2


# Tokenizer to the vocabulary and the result of its last trimming: a sweep asks for the same one at
# every point.
_fitted: WeakKeyDictionary = WeakKeyDictionary()
