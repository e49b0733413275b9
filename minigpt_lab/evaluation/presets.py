"""Perplexity settings as papers published them, by name."""

from __future__ import annotations

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
        "seq_len": 2048,
        "max_tokens": 40 * 2048,
        "max_characters": None,
        "chunked": True,
    },
}
