"""Exported files in llama.cpp itself: logits, greedy tokens and token ids are PyTorch's."""

from __future__ import annotations

import copy
import json
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import CONFIGS, random_plan
from tokenizer_kinds import TEXT as TRAINING_TEXT
from tokenizer_kinds import model_of
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
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import minigpt_lab as lab
from minigpt_lab import __main__ as command_line
from minigpt_lab.export.rounding import decode, encode
from minigpt_lab.models import (
    Anatomy,
    close_over_merges,
    fingerprint,
    merge_table,
    protected_tokens,
)
from minigpt_lab.recipes import mini, timed_run

xllamacpp = pytest.importorskip("xllamacpp")

TEXT = (
    "The judge's 12 orders weren't   read;\n\n\nPARAGRAPH 1024: naïve café, 東京, 🙂\tdon't we'll "
    "x=3.14*r**2 </s>"
)
SCRIPTS = "दिल्ली में। عربی، متن۔ Ελληνικά (και) «русский»: 東京、大阪。 ไทย 한국어 שלום…"


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

    def step(self, ids: list[int], rows: int) -> tuple[int, np.ndarray] | None:
        """The greedy token after some ids and the log-probabilities of all tokens ``[row]``.

        None if the token is a part of a character, of which llama.cpp does not tell.
        """
        answer = self.server.handle_completions(
            {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": rows}
        )
        told = answer["choices"][0]["logprobs"]
        if told is None:
            return None
        table = np.full(rows, np.nan)
        for entry in told["content"][0]["top_logprobs"]:
            table[entry["id"]] = entry["logprob"]
        return told["content"][0]["id"], table

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the tokens that begin and end it."""
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(
            f"{self.server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request) as answer:
            return json.load(answer)["tokens"]


def agree(model, tokenizer, path: Path, limit=1e-3, tokens=12, text=TEXT) -> None:
    """Compare llama.cpp with PyTorch: ids of a text, greedy tokens, their log-probabilities."""
    running, rows = LlamaCpp(path), len(model.get_input_embeddings().weight)
    own = lab.tokenizer_for(model, tokenizer)
    assert running.encode(text) == own(text)["input_ids"]
    ids, told = own("The court")["input_ids"], 0
    for _ in range(tokens):
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).numpy()
        greedy, step = int(expected.argmax()), running.step(ids, rows)
        if step is not None:
            told += 1
            assert expected[greedy] - expected[step[0]] < limit / 10  # the same, or a tie
            likely = expected > -80  # what is less likely is cut off
            assert np.abs(step[1] - expected)[likely].max() < limit
        ids = [*ids, greedy]
    assert told > tokens / 2


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
    agree(model, tiny[1], path)


SPLITS = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    **{
        name: [
            pre_tokenizers.Split(
                Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits +
                    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        for name, digits in {"qwen2": "", "dbrx": "{1,3}", "llama-bpe": "{1,3}"}.items()
    },
    "bloom": [
        pre_tokenizers.Split(Regex(r" ?[^(\s|[.,!?…。，、।۔،])]+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}  # fmt: skip


def byte_level(split: str, begin: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE that splits text as a model of llama.cpp's list does."""
    made = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    made.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[split])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]
    )
    made.train_from_iterator([TRAINING_TEXT, TEXT], trainer)
    if begin:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    made.add_tokens(["naïve"])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("split", SPLITS)
def test_texts_are_split_alike(split, tmp_path):
    tokenizer = byte_level(split, begin=split == "llama-bpe")
    model = model_of(tokenizer)
    path = lab.export_gguf(model, tokenizer, tmp_path / "mini.gguf", kind="F32")
    assert f"{split}".encode() in path.read_bytes()
    agree(model, tokenizer, path, text=TEXT + SCRIPTS)


def blanks(prepend: str) -> PreTrainedTokenizerFast:
    """A BPE over characters that writes blanks as ▁, and what it has no token for as bytes."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    special = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256))]
    replaced = normalizers.Replace(" ", "▁")
    if prepend == "normalizer":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaced])
    elif prepend == "Gemma":
        made.normalizer = replaced
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, max_token_length=9)
    made.train_from_iterator([TRAINING_TEXT], trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **tokens)


@pytest.mark.parametrize("prepend", ["normalizer", "first", "never", "Gemma"])
def test_blanks_and_bytes_of_characters(prepend, tmp_path):
    tokenizer = blanks(prepend)
    model = model_of(tokenizer)
    plan = random_plan(model, 0, vocabulary=False)
    kept = trimmed(model, tokenizer).vocabulary
    mini = lab.shrink(model, lab.PruningPlan(**{**vars(plan), "vocabulary": kept}))
    for each in (model, mini):
        path = lab.export_gguf(
            each, tokenizer, tmp_path / f"{len(kept)}-{each is mini}", kind="F32"
        )
        agree(each, tokenizer, path)


def random_family(family: str, tokenizer, **values):
    """A small random model of a family, biases too, with a row for each token."""
    torch.manual_seed(2)
    config = CONFIGS[family].to_dict() | {"vocab_size": len(tokenizer)}
    if family.startswith("qwen"):
        config["layer_types"] = None
    if family == "gemma3":  # every sixth layer sees more than the window
        config |= {"layer_types": None, "num_hidden_layers": 7, "sliding_window_pattern": 6}
    model = AutoModelForCausalLM.from_config(type(CONFIGS[family])(**config | values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Gemma 2 caps its logits; and it must write characters, not parts of them
            parameter.normal_(std=0.2 if family == "gemma2" else 0.1 if "gemma" in family else 0.3)
    return model


FAMILIES = {
    "mistral": ("llama", "deci"),
    "qwen2": ("qwen2", "deci"),
    "qwen3": ("qwen3", "qwen3"),
    "phi": ("phi2", "phi2"),
    "gpt2": ("gpt2", "gpt2"),
    "gpt_neox": ("gptneox", "gptneox"),
    "bloom": ("bloom", "bloom"),
    "gemma": ("gemma", "gemma"),
    "gemma2": ("gemma2", "gemma2"),
    "gemma3": ("gemma3", "gemma3"),
}


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, pruned, tmp_path):
    tokenizer = byte_level("gpt-2")
    model = random_family(family, tokenizer)
    if pruned:
        model = lab.shrink(model, random_plan(model, 1, vocabulary=False))
    path = lab.export_gguf(model, tokenizer, tmp_path / "mini.gguf", kind="F32")
    assert f"{FAMILIES[family][pruned]}.attention.head_count".encode() in path.read_bytes()
    # GPT-NeoX has another GELU there; and llama.cpp reads GELU from a table of float16
    agree(model, tokenizer, path, {"gpt_neox": 0.02, "gemma3": 0.005}.get(family, 1e-3))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scaled_rotary_frequencies(family, tmp_path):
    tokenizer = byte_level("gpt-2")
    rope = {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    model = random_family(family, tokenizer, rope_parameters=rope)
    path = lab.export_gguf(model, tokenizer, tmp_path / "mini.gguf", kind="F32")
    assert b"rope_freqs" in path.read_bytes()
    agree(model, tokenizer, path)


@pytest.mark.parametrize("rows", [1040, 1024])
def test_rows_without_tokens_and_tokens_without_rows(rows, tiny, tmp_path):
    """Models have spare rows; a special token of the tokenizer may have none."""
    model, tokenizer = copy.deepcopy(tiny[0]), copy.deepcopy(tiny[1])
    model.resize_token_embeddings(rows, mean_resizing=False)
    if rows == 1024:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<spare>"]})
    path = lab.export_gguf(model, tokenizer, tmp_path / "mini.gguf", kind="F32")
    agree(model, tokenizer, path)


def without_blocks(model, attention, ffn):
    rows = [(layer, "attention", 0.0) for layer in attention] + [(i, "ffn", 0.0) for i in ffn]
    influence = pd.DataFrame(rows, columns=["layer", "site", "influence"])
    return lab.shrink(model, lab.plan_dropping(model, influence, count=len(rows)))


@pytest.mark.parametrize(
    ("attention", "ffn"), [([], [1, 3]), ([2, 3], [3]), ([0, 1], [1, 2]), ([0, 1, 2, 3], [])]
)
def test_layers_without_attention_or_ffn(attention, ffn, tiny, tmp_path):
    mini = without_blocks(tiny[0], attention, ffn)
    path = lab.export_gguf(mini, tiny[1], tmp_path / "mini.gguf", kind="F32")
    assert b"deci" in path.read_bytes()
    agree(mini, tiny[1], path)
    assert lab.gguf_size(mini, tiny[1], kind="F32") == path.stat().st_size


@pytest.mark.parametrize(("family", "graph"), [("llama", "deci"), ("gpt2", "gpt2")])
def test_a_dropped_block_keeps_its_bias(family, graph, tmp_path):
    tokenizer = byte_level("gpt-2")
    values = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    mini = without_blocks(random_family(family, tokenizer, **values), [1, 2], [0, 2])
    path = lab.export_gguf(mini, tokenizer, tmp_path / "mini.gguf", kind="F32")
    assert f"{graph}.attention.head_count".encode() in path.read_bytes()
    agree(mini, tokenizer, path)


def round_inputs(model, kind: str):
    """Round what every matrix reads, as llama.cpp does to multiply it with rounded weights."""
    kind = kind if kind in ("F16", "BF16") else "Q8_0"

    def rounded(module, args):
        rows = args[0].flatten(0, -2)
        rows = np.pad(rows.numpy(), ((0, 0), (0, -rows.shape[1] % 32)))
        values = torch.from_numpy(decode(encode(rows, kind), kind))[:, : args[0].shape[-1]]
        return (values.reshape(args[0].shape),)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounded)
    return model


#: Kind to the largest difference of log-probabilities. What is left are values next to a tie, which
#: are rounded up here and down there, and minima of blocks, which llama.cpp multiplies apart.
LIMITS = {
    "F16": 0.02, "BF16": 0.02, "Q8_0": 0.1, "Q4_0": 0.1, "Q5_0": 0.1, "Q4_1": 0.2, "Q5_1": 0.2,
}  # fmt: skip


@pytest.mark.parametrize("kind", LIMITS)
def test_rounded_files_compute_as_rounded_copies(kind, tiny, tiny_statistics, tmp_path):
    model, _ = variant("uneven FFN", tiny, tiny_statistics)
    path = lab.export_gguf(model, tiny[1], tmp_path / "mini.gguf", kind=kind)
    rounded = lab.quantised(model, kind)
    agree(round_inputs(rounded, kind), tiny[1], path, LIMITS[kind])


@pytest.mark.slow
def test_the_file_that_make_writes_of_a_folder_of_texts_runs(tmp_path, monkeypatch):
    """The command of README, from texts to a runtime: trimmed, pruned, trained, rounded."""
    monkeypatch.setattr(mini, "load_domain", lambda _: lab.load_domain("tiny-games"))
    monkeypatch.setattr(timed_run, "_TRIAL", 256)
    texts, out = tmp_path / "my texts", tmp_path / "out"
    texts.mkdir()
    passages = [text for part in lab.load_domain("tiny-law").parts.values() for text in part]
    for number in range(8):
        (texts / f"{number}.txt").write_text("\n\n".join(passages[number::8]))
    command = f"make --model tiny-llama --size 0.6 --minutes 0.5 --gguf Q8_0 --out {out}".split()
    monkeypatch.setattr(sys, "argv", ["minigpt_lab", *command, "--domain", str(texts)])
    command_line.main()
    model, tokenizer = lab.load_model(out / "model", device="cpu")
    assert len(tokenizer) < len(lab.load_model("tiny-llama")[1])
    rounded = round_inputs(lab.quantised(model, "Q8_0"), "Q8_0")
    agree(rounded, tokenizer, out / "mini-Q8_0.gguf", LIMITS["Q8_0"], text="The court's ORDER 12")


@pytest.mark.slow
def test_a_real_model_with_uneven_layers_and_a_trimmed_vocabulary(tmp_path):
    model, tokenizer = lab.load_model("smollm2-135m", device="cpu")
    text = "\n\n".join(list(lab.load_domain("medical").test)[:60])
    ids = tokenizer(text)["input_ids"]
    kept = np.isin(np.arange(49_152), [*ids, *protected_tokens(tokenizer)])
    kept = close_over_merges(kept, merge_table(tokenizer))
    keep = {
        "ffn": [[*range(0, 1536 - 20 * layer)] for layer in range(30)],
        "attention": [[0, 1, 2] if layer % 3 else [0, 2] for layer in range(30)],
    }
    units = {"ffn": [1536] * 30, "attention": [3] * 30}
    plan = lab.PruningPlan(
        fingerprint(model), units, keep, {}, 49_152, np.flatnonzero(kept).tolist()
    )
    mini = lab.shrink(model, plan)
    path = lab.export_gguf(mini, tokenizer, tmp_path / "mini.gguf", kind="F32")
    agree(mini, tokenizer, path, tokens=6, text=text)
    path.unlink()  # 360 MB
