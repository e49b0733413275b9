"""Exported files in llama.cpp itself: logits, greedy tokens and token ids are PyTorch's."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random_plan

import minigpt_lab as lab
from minigpt_lab.models import Anatomy, close_over_merges, merge_table, protected_tokens

xllamacpp = pytest.importorskip("xllamacpp")

TEXT = (
    "The judge's 12 orders weren't   read;\n\n\nPARAGRAPH 1024: naïve café, 東京, 🙂\tdon't we'll "
    "x=3.14*r**2 </s>"
)


class LlamaCpp:
    """A model in llama.cpp, in float32: no flash attention, no rounded cache."""

    def __init__(self, path: Path):
        options = xllamacpp.CommonParams()
        options.model.path = str(path)
        options.n_ctx, options.n_parallel, options.warmup = 128, 1, False
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
        flash = xllamacpp.llama_flash_attn_type
        options.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
        float32 = xllamacpp.ggml_type.GGML_TYPE_F32
        options.cache_type_k = options.cache_type_v = float32
        options.verbosity = -1
        self.server = xllamacpp.Server(options)

    def greedy(self, ids: list[int], tokens: int, rows: int) -> tuple[list[int], np.ndarray]:
        """Tokens that it writes after some ids, and their log-probabilities ``[token, row]``."""
        answer = self.server.handle_completions(
            {"prompt": ids, "n_predict": tokens, "temperature": 0, "n_probs": rows,
             "ignore_eos": False, "cache_prompt": False}
        )  # fmt: skip
        steps = answer["choices"][0]["logprobs"]["content"]
        table = np.full((len(steps), rows), np.nan)
        for step, entry in enumerate(steps):
            for each in entry["top_logprobs"]:
                table[step, each["id"]] = each["logprob"]
        return [entry["id"] for entry in steps], table

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the tokens that begin and end it."""
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(
            f"{self.server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]


def same_as_torch(model, tokenizer, path: Path, gap: float = 1e-3, tokens: int = 12) -> float:
    """Compare a file in llama.cpp with a model in PyTorch; the largest difference of logits."""
    running = LlamaCpp(path)
    own = lab.tokenizer_for(model, tokenizer)
    assert running.encode(TEXT) == own(TEXT)["input_ids"]
    rows, ids = len(model.get_input_embeddings().weight), own("The court")["input_ids"]
    written, found = running.greedy(ids, tokens, rows)
    assert len(written) > 4
    with torch.no_grad():
        logits = model.float()(torch.tensor([ids + written])).logits[0, len(ids) - 1 : -1]
    expected = logits.log_softmax(-1).numpy()
    assert written == expected.argmax(1).tolist()
    # log-probabilities below float32's reach are cut off
    error = np.abs(found - expected)[np.isfinite(found) & (expected > -80)].max()
    assert error < gap
    return error


def trimmed(model, tokenizer) -> lab.PruningPlan:
    """Units cut unevenly, and half of the tokens."""
    plan = random_plan(model, 3, vocabulary=False)
    rows = plan.vocabulary_size
    kept = np.arange(rows) < rows // 2
    kept[protected_tokens(tokenizer)] = True
    kept = close_over_merges(kept, merge_table(tokenizer))
    return lab.PruningPlan(**{**vars(plan), "vocabulary": np.flatnonzero(kept).tolist()})


def variant(name: str, tiny, statistics):
    """A model and the graph that it should get."""
    model, tokenizer = tiny
    if name == "dense":
        return model, "llama"
    anatomy = Anatomy(model)
    every = {site: anatomy.units(site) for site in ("ffn", "attention", "balanced_heads")}
    keep = {
        "uniform": {"ffn": [range(100)] * 4, "attention": [[1]] * 4},
        "uneven FFN": {"ffn": [range(5, n) for n in (384, 37, 384, 200)]},
        "uneven groups": {"attention": [[1], [0, 1], [0], [0, 1]]},
        "uneven heads": {
            "balanced_heads": [[0, 1], [0], [1], [0, 1]], "attention": [[0], *[[0, 1]] * 3],
        },
    }  # fmt: skip
    if name in keep:
        kept = {site: [[*units] for units in layers] for site, layers in keep[name].items()}
        plan = lab.PruningPlan("", {site: every[site] for site in kept}, kept)
        plan = lab.PruningPlan(**{**vars(plan), "model_hash": statistics.model_hash})
    else:
        plan = trimmed(model, tokenizer)
    if name == "biases":
        plan = lab.bias_compensated(model, plan, statistics)
    return lab.shrink(model, plan), "llama" if name == "uniform" else "deci"


VARIANTS = ("dense", "uniform", "uneven FFN", "uneven groups", "uneven heads", "trimmed", "biases")


@pytest.mark.parametrize("name", VARIANTS)
def test_llama_cpp_computes_the_same(name, tiny, tiny_statistics, tmp_path):
    model, graph = variant(name, tiny, tiny_statistics)
    path = lab.export_gguf(model, tiny[1], tmp_path / "mini.gguf", kind="F32")
    assert f"{graph}.attention.head_count".encode() in path.read_bytes()
    same_as_torch(model, tiny[1], path)
