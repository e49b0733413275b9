"""Recovery settings as papers published them, by name; what they left open is marked as ours."""

from __future__ import annotations

_LLM_PRUNER = {
    "method": "lora",
    "epochs": 2,
    "learning_rate": 1e-4,
    "warmup_steps": 100,
    "seq_len": 256,
    "batch_size": 4,
    "gradient_accumulation_steps": 16,
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
}
_SLIMGPT = {"epochs": 1, "warmup_steps": 10, "batch_size": 16, "gradient_accumulation_steps": 4}

#: Arguments of `recover`: ``lab.recover(mini, tokenizer, domain, **RECOVERY_PRESETS["slimgpt"])``.
#: All see 64 windows per update, on one device.
RECOVERY_PRESETS: dict[str, dict] = {
    # arXiv 2305.11627 and its code: 2 epochs, cut-off 256, micro-batches of 4, 100 updates warm-up,
    # linear decay (the Trainer's default)
    "llm-pruner": {**_LLM_PRUNER, "lr_scheduler_type": "linear"},
    # arXiv 2412.18110 and its code: 1 epoch, length 256, batches of 16, 10 updates warm-up
    "slimgpt": {**_LLM_PRUNER, **_SLIMGPT},
    # arXiv 2407.11681: 2 epochs, 64 windows per update, learning rate 1e-4, cosine decay. Ours, as
    # in LLM-Pruner: seq_len, the LoRA settings, how the 64 are made up, the warm-up
    "mini-llm": _LLM_PRUNER,
}
