"""Recovery settings as papers published them, by name; what they left open is marked as ours."""

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
