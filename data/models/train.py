"""Train the tiny models of this folder on the project's own texts: ``tasks.py tiny [NAME …]``.

One tokenizer and one model each of Llama, OPT, Phi, GPT-2 and BLOOM architecture, about a million
parameters, fitted to the calibration and train parts of the four ``tiny-*`` domains, stopped on
validation. The test parts stay unseen. Same versions and machine give the same weights.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    EarlyStoppingCallback,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

import minigpt_lab as lab
from minigpt_lab.store import atomic_write

FOLDER = Path(__file__).resolve().parent
VOCABULARY, WINDOW, STRIDE = 1024, 128, 16
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": True, "attention_dropout": 0.1,
}  # fmt: skip
CONFIGS = {
    "tiny-llama": LlamaConfig(**COMMON, intermediate_size=384, num_key_value_heads=2),
    "tiny-opt": OPTConfig(**COMMON, ffn_dim=512, word_embed_proj_dim=128, dropout=0.1),
    "tiny-phi": PhiConfig(**COMMON, intermediate_size=512, resid_pdrop=0.1, embd_pdrop=0.1),
    "tiny-gpt2": GPT2Config(**COMMON, n_inner=512),
    "tiny-bloom": BloomConfig(**COMMON, hidden_dropout=0.1),
}


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **SPECIAL, clean_up_tokenization_spaces=False
    )


def windows(texts: list[str], tokenizer: PreTrainedTokenizerFast, stride: int) -> list[dict]:
    """Overlapping windows of tokens, each its own label."""
    ids = torch.tensor(tokenizer("\n\n".join(texts))["input_ids"])
    rows = ids.unfold(0, WINDOW, stride)
    return [{"input_ids": row, "labels": row} for row in rows]


def train(name: str, tokenizer: PreTrainedTokenizerFast, train_texts, validation_texts) -> None:
    """Fit one model and replace its folder."""
    set_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch, max_steps=2000, per_device_train_batch_size=16,
            learning_rate=2e-3, lr_scheduler_type="cosine", warmup_steps=50, weight_decay=0.1,
            eval_strategy="steps", eval_steps=100, save_steps=100, save_total_limit=2,
            load_best_model_at_end=True, logging_steps=100, report_to=[], seed=0,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=windows(train_texts, tokenizer, STRIDE),
            eval_dataset=windows(validation_texts, tokenizer, WINDOW),
            callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
        )
        trainer.train()
    with atomic_write(FOLDER / name) as staging:
        model.cpu().save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def main() -> None:
    """Train the models named on the command line, by default all of `CONFIGS`."""
    domains = [lab.load_domain(name) for name in lab.domain_names(tiny=True)]
    train_texts = [text for d in domains for text in (*d.calibration, *d.train)]
    validation_texts = [text for d in domains for text in d.validation]
    tokenizer = train_tokenizer(train_texts)
    for name in sys.argv[1:] or CONFIGS:
        train(name, tokenizer, train_texts, validation_texts)


if __name__ == "__main__":
    main()
