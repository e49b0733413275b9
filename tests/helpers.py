"""Models, plans and texts that test files share."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import random
import resource
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.models.bloom import BloomConfig
from transformers.models.gemma import GemmaConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.opt import OPTConfig
from transformers.models.phi import PhiConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

import minigpt_lab as lab
from minigpt_lab.models import ALL_SITES, ATTENTION_UNITS, SITES, Anatomy, weight_axis

_COMMON = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
_GATED = {**_COMMON, "intermediate_size": 20, "num_key_value_heads": 2}
_MULTI_QUERY = {**_GATED, "num_key_value_heads": 1, "head_dim": 6}
CONFIGS = {
    "llama": LlamaConfig(**_GATED, tie_word_embeddings=True),
    "mistral": MistralConfig(**_GATED),
    "qwen2": Qwen2Config(**_GATED),
    "qwen3": Qwen3Config(**_GATED, head_dim=6),
    "opt": OPTConfig(**_COMMON, ffn_dim=20, word_embed_proj_dim=32, dropout=0.0),
    "opt_350m": OPTConfig(
        **_COMMON, ffn_dim=20, word_embed_proj_dim=16, do_layer_norm_before=False, dropout=0.0
    ),
    "phi": PhiConfig(**_COMMON, intermediate_size=20, resid_pdrop=0.0),
    "phi3": Phi3Config(**_GATED),
    "gemma": GemmaConfig(**_MULTI_QUERY),
    "gemma2": Gemma2Config(**_GATED, head_dim=6, sliding_window=32, query_pre_attn_scalar=6),
    "gemma3": Gemma3TextConfig(
        **_MULTI_QUERY, sliding_window=32, query_pre_attn_scalar=6, sliding_window_pattern=2
    ),
    "gpt2": GPT2Config(**_COMMON, n_inner=20, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gpt_neox": GPTNeoXConfig(**_COMMON, intermediate_size=20),
    "bloom": BloomConfig(**_COMMON),  # its FFN has four times the hidden size's channels
}


def random_model(family: str, seed: int = 0, layers: int = 3) -> torch.nn.Module:
    """A small model of a family with every parameter random, biases too."""
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[family])
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def random_plan(model, seed: int, vocabulary: bool = True) -> lab.PruningPlan:
    """Units, features and tokens cut at random: every kind of cut, every family."""
    rng = np.random.default_rng(seed)
    anatomy = Anatomy(model)

    def subset(total: int, least: int) -> list[int]:
        size = rng.integers(least, total + 1)
        return np.sort(rng.choice(total, size, replace=False)).tolist()

    units = {site: anatomy.units(site) for site in ALL_SITES}
    keep = {site: [subset(n, min(n, 1)) for n in counts] for site, counts in units.items()}
    zero = {}
    for _, name, module in anatomy.linears():
        zero[name] = {
            side: subset(module.weight.shape[weight_axis(module, side)], 0)[:3]
            for side in ("input", "output")
        }
        if module.bias is not None:
            zero[name]["bias"] = zero[name]["output"][:1]
    rows = model.get_input_embeddings().weight.shape[0]
    kept = sorted({*range(3), *subset(rows, 20)}) if vocabulary else None
    # features of removed units are not listed in a plan
    stay = lab.PruningPlan("random", units, keep).kept_features(anatomy)
    for name, sides in zero.items():
        for side, indices in sides.items():
            sides[side] = [i for i in indices if stay[name][side][i]]
    return lab.PruningPlan("random", units, keep, zero, rows, kept)


def picture(model, weights: bool = True) -> dict[str, object]:
    """Everything that a call could leave changed in a model."""
    found: dict[str, object] = {"config": copy.deepcopy(vars(model.config))}
    found["generation"] = copy.deepcopy(vars(model.generation_config))
    for name, module in model.named_modules():
        inside = {k: sorted(map(str, v)) for k, v in vars(module).items() if isinstance(v, dict)}
        inside |= {k: v for k, v in vars(module).items() if isinstance(v, bool | int | str)}
        found[f"{name} module"] = (type(module), sorted(vars(module)), inside)
    for name, p in model.named_parameters(remove_duplicate=False):
        content = p.detach().contiguous().view(torch.uint8).numpy().tobytes() if weights else b""
        facts = (id(p), p.data_ptr(), p.dtype, p.requires_grad, id(p.grad), p._backward_hooks)
        found[name] = (*facts, hashlib.sha256(content).hexdigest())
    return found


FOLDER_JSON = ("config.json", "minigpt_lab.json")
SHORT = {"seq_len": 32, "max_tokens": 512, "eval_every": 256, "eval_characters": 600}


def spoil(model, value: float) -> None:
    """Break every weight of a projection in layer 1 that writes heads."""
    anatomy = Anatomy(model)
    with torch.no_grad():
        anatomy.module(1, anatomy.family.produces["attention"][-1]).weight.fill_(value)


def as_format_1(folder: Path) -> Path:
    """Turn a saved mini-GPT's folder into one from before there were classes of pruned models.

    The widths were in ``minigpt_lab.json``, and the config was that of the dense model.
    """
    config, sidecar = (json.loads((folder / name).read_text()) for name in FOLDER_JSON)
    config["model_type"] = config["model_type"].removeprefix("minigpt-")
    config["architectures"] = [n.removeprefix("Minigpt") for n in config["architectures"]]
    config.pop("minigpt_lab_biases")
    sidecar |= {"format": 1, "widths": config.pop("minigpt_lab_widths")}
    for name, content in zip(FOLDER_JSON, (config, sidecar), strict=True):
        (folder / name).write_text(json.dumps(content))
    return folder


def consumer_inputs(model, probe) -> dict[tuple[str, int], tuple[np.ndarray, np.ndarray]]:
    """``(site, layer)`` to the weight ``[out, in]`` and the input ``[token, in]`` of o/down."""
    anatomy, found, handles = Anatomy(model), {}, []
    for site in SITES:
        for layer in range(len(anatomy.layers)):
            module = anatomy.module(layer, anatomy.family.consumes[site])

            def hook(module, args, key=(site, layer)):
                weight = module.weight.detach().double().movedim(weight_axis(module, "input"), 1)
                weight = weight.numpy().copy()
                found[key] = weight, args[0].flatten(0, -2).detach().double().numpy()

            handles.append(module.register_forward_pre_hook(hook))
    logits(model, probe)
    for handle in handles:
        handle.remove()
    return found


def units(features: np.ndarray, total: int) -> np.ndarray:
    """Sum over each unit's features: they stand side by side."""
    return features.reshape(total, -1).sum(1)


WORDS = (
    "court judge law patient blood dose sword gold dragon market price wage road night river stone "
    "tree bread window letter music table garden winter summer engine bridge signal paper copper"
).split()


def passage(seed: int, n: int = 60) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(n)) + "."


def problem(seed: int = 0, units: int = 6, features: int = 4, tokens: int = 200):
    """A linear layer ``W``, what it reads and the features of its units, shuffled; float64."""
    generator = torch.Generator().manual_seed(seed)
    width = units * features
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x = mixing @ torch.randn(width, tokens, generator=generator, dtype=torch.float64)
    weight = torch.randn(10, width, generator=generator, dtype=torch.float64)
    places = torch.randperm(width, generator=generator).reshape(units, features)
    return weight, x, x @ x.T / tokens, places


def windows(seed: int = 3, count: int = 6) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 97, (2, 12), generator=generator)} for _ in range(count)]


def site_counts(model, units: str, ffn=(5, 0, 7)) -> dict[str, list[int]]:
    """Channels, and one head or group of every layer that has two."""
    site = ATTENTION_UNITS[units]
    return {"ffn": [*ffn], site: [min(1, n - 1) for n in Anatomy(model).units(site)]}


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@contextlib.contextmanager
def running_notebook(variables: dict):
    """Call `experiments.record` as a cell of a notebook with these variables would."""
    shell = SimpleNamespace(user_ns=variables)
    with patch("minigpt_lab.experiments.recording.get_ipython", lambda: shell):
        yield


@contextlib.contextmanager
def full_disk(most: int = 64):
    """No file may grow beyond a few bytes: what json, Rust and torch meet on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
