"""Settings as papers published them, by name; what they left open is marked as our choice.

Only the settings: what a paper trained and measured on (Alpaca, WikiText-2) is for the caller to
bring, and every number says its own protocol.
"""

from __future__ import annotations

_LORA = {"method": "lora", "learning_rate": 1e-4, "rank": 8, "alpha": 16, "dropout": 0.05}

#: Arguments of `recover`: ``lab.recover(mini, tokenizer, domain, **RECOVERY_PRESETS["slimgpt"])``.
#: All see 64 windows per update, on one device.
RECOVERY_PRESETS: dict[str, dict] = {
    # arXiv 2305.11627 and its code: 2 epochs, cut-off 256, micro-batches of 4, 100 updates warm-up,
    # linear decay (the Trainer's default)
    "llm-pruner": {
        **_LORA, "epochs": 2, "seq_len": 256, "batch_size": 4, "accumulation": 16, "warmup": 100,
        "lr_scheduler_type": "linear",
    },
    # arXiv 2412.18110 and its code: 1 epoch, length 256, batches of 16, 10 updates warm-up
    "slimgpt": {
        **_LORA, "epochs": 1, "seq_len": 256, "batch_size": 16, "accumulation": 4, "warmup": 10,
    },
    # arXiv 2407.11681: 2 epochs, batch of 64, learning rate 1e-4, cosine decay
    "mini-llm": {
        **_LORA, "epochs": 2, "seq_len": 256, "batch_size": 4, "accumulation": 16, "warmup": 100,
    },
}  # fmt: skip

#: What a recovery preset holds that its paper does not give: ours, as in LLM-Pruner.
UNPUBLISHED: dict[str, tuple[str, ...]] = {
    "mini-llm": ("rank", "alpha", "dropout", "seq_len", "batch_size", "accumulation", "warmup"),
}

#: Arguments of `perplexity`: the text in whole windows, joined by blank lines and encoded once, a
#: beginning-of-text token (of tokenizers that have one) only before the first; the first token of
#: each window is not scored, the shorter last window is left out.
PERPLEXITY_PRESETS: dict[str, dict] = {
    # LLM-Pruner, FLAP, SlimGPT, MINI-LLM (LLaMA-7B): "perplexity at 128"
    "128": {"seq_len": 128, "max_characters": None, "chunked": True},
    # GPTQ, SparseGPT, Wanda: "perplexity at 2048"
    "2048": {"seq_len": 2048, "max_characters": None, "chunked": True},
    # Mini-GPTs' code: the first 40 windows of 2048 tokens (there of shuffled text that calibration
    # and training have seen; here of the text given, in its order)
    "mini-gpts": {
        "seq_len": 2048, "max_tokens": 40 * 2048, "max_characters": None, "chunked": True,
    },
}  # fmt: skip
