"""Tokenizers of every kind, trained in a moment on the project's own texts."""

from __future__ import annotations

import functools
import re

import torch
from helpers import CONFIGS
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoModelForCausalLM, PreTrainedTokenizer, PreTrainedTokenizerFast

import minigpt_lab as lab

TEXT = "\n\n".join(lab.load_domain("tiny-law").train)
_BYTES = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": ["</s>"]}
_FALLBACK = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python, which knows no offsets; some of its tokens reach over a blank line."""

    words = ("<unk>", "\n\nT", ".\n\n", "the", *sorted({*TEXT, *"\n "} - {"a"}))

    def __init__(self, **options):
        super().__init__(unk_token="<unk>", **options)

    @property
    def vocab_size(self):
        return len(self.words)

    def get_vocab(self):
        return {**{word: i for i, word in enumerate(self.words)}, **self.added_tokens_encoder}

    def _tokenize(self, text):
        return re.findall(r"(?s)\n\nT|\.\n\n(?!T)|the|.", text)

    def _convert_token_to_id(self, token):
        return self.words.index(token) if token in self.words else 0

    def _convert_id_to_token(self, index):
        return self.words[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        begin = [] if self.bos_token_id is None else [self.bos_token_id]
        return begin + token_ids_0


def _byte_level(prefix_space=False):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    made.decoder = decoders.ByteLevel()
    return made, trainers.BpeTrainer(vocab_size=500, **_BYTES)


def _newlines_after_a_full_stop():  # as Llama 3 and GPT-4 split
    made = Tokenizer(models.BPE())
    split = r"[^\r\n\p{L}]?\p{L}+| ?[^\s\p{L}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return made, trainers.BpeTrainer(vocab_size=500, **_BYTES)


def _one_word():  # as Llama 2: a whole text is one word, spaces are ▁
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    return made, trainers.BpeTrainer(vocab_size=600, special_tokens=_FALLBACK, max_token_length=9)


def _unigram():
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    return made, trainers.UnigramTrainer(
        vocab_size=400, special_tokens=special, unk_token="<unk>", show_progress=False
    )


def _wordpiece():
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    return made, trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=special, show_progress=False
    )


def _characters():  # without an a
    letters = dict.fromkeys(["?", *sorted({*TEXT} - {"a"})])
    made = Tokenizer(models.WordLevel({x: i for i, x in enumerate(letters)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return made, None


_MAKERS = {
    "byte-level": _byte_level,
    "prefix space": lambda: _byte_level(prefix_space=True),
    "full stop and newlines": _newlines_after_a_full_stop,
    "one word": _one_word,
    "Unigram": _unigram,
    "WordPiece": _wordpiece,
    "characters": _characters,
}
KINDS = (*_MAKERS, "Python")
#: Those that can write any text, and a text of characters that take several of their tokens.
SPELLS_ALL = ("byte-level", "prefix space", "full stop and newlines", "one word")
SCRIPTS = "Müller naïve (n = 8) 裁判所は棄却した。👩‍👩‍👧 🇨🇭 and �: 🙂🙂 résumé Δx≤½ सूरज"


@functools.cache
def tokenizer_of(kind: str, bos: bool = False):
    """A tokenizer of a kind, which begins texts with a token of its own or not; read-only."""
    if kind == "Python":
        return Letters(**({"bos_token": "?"} if bos else {}))
    made, trainer = _MAKERS[kind]()
    if trainer is not None:
        made.train_from_iterator([TEXT], trainer)
    if not bos:
        return PreTrainedTokenizerFast(tokenizer_object=made)
    made.add_special_tokens(["<begin>"])
    begin = ("<begin>", made.token_to_id("<begin>"))
    made.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<begin>")


def model_of(tokenizer, family: str = "llama", seed: int = 0) -> torch.nn.Module:
    """A small random model with a row for each token."""
    torch.manual_seed(seed)
    values = CONFIGS[family].to_dict() | {
        "vocab_size": len(tokenizer), "num_hidden_layers": 2, "eos_token_id": None,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(type(CONFIGS[family])(**values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model
