"""Whatever a public function is given, it works with it or refuses it in one sentence."""

import importlib
import inspect
import operator
import traceback
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import minigpt_lab as lab
from minigpt_lab.studies import methods, projections

PACKAGE = Path(lab.__file__).resolve().parent


class Odd:
    """Of no use to anything."""

    def __repr__(self):
        return "<odd>"


def bad_values(domain) -> dict[str, object]:
    """What people pass by mistake, by what it is."""
    ids = torch.tensor([[5, 6, 7, 8]])
    return {
        "None": None,
        "a word": "purple",
        "nothing said": "",
        "bytes": b"text",
        "minus one": -1,
        "zero": 0,
        "a half": 0.5,
        "NaN": float("nan"),
        "infinity": float("inf"),
        "True": True,
        "numpy's minus three": np.int64(-3),
        "too large for a float": 10**400,
        "a Decimal": Decimal("0.3"),
        "pandas' NA": pd.NA,
        "an Ellipsis": ...,
        "a frame": pd.DataFrame({"a": [1]}),
        "a series": pd.Series([0.1, 0.2]),
        "lines": "a\nb",
        "torch's NaN": torch.tensor(float("nan")),
        "an array": np.array([0.5, 2.0]),
        "a complex number": 1j,
        "an empty list": [],
        "a list of None": [None],
        "a mapping": {"a": 1},
        "a missing file": Path("no/such/file.txt"),
        "a Domain": domain,
        "one batch": {"input_ids": ids},
        "ids of one dimension": [{"input_ids": ids[0]}],
        "ids out of range": [{"input_ids": ids + 10**6}],
        "ids of floats": [{"input_ids": ids.float()}],
        "ids of bytes": [{"input_ids": ids.to(torch.uint8)}],
        "ids without values": [{"input_ids": ids.to("meta")}],
        "half a surrogate pair": "\ud83d",
        "a mask of twos": [{"input_ids": ids, "attention_mask": ids * 0 + 2}],
        "a function": lambda *_: -5,
        "an object": Odd(),
        "a module": torch.nn.Linear(2, 2),
    }


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """Small things of every kind that public functions take."""
    model, tokenizer = lab.load_model("tiny-llama", device="cpu")
    domain = lab.load_domain("tiny-law")
    batches = lab.tokenize(domain.calibration, tokenizer, seq_len=32, max_tokens=128)
    statistics = lab.collect_statistics(model, batches, progress=False)
    scores = lab.score(model, "magnitude")
    plan = lab.contextual_plan(model, statistics, quantile=0.2)
    names = ["model.layers.0.mlp.down_proj"]
    questions = domain.questions[:2]
    answers = lab.answer_questions(model, tokenizer, questions)
    influence = pd.DataFrame({"layer": [1], "site": ["layer"], "influence": [0.1]})
    hessians = lab.collect_hessians(model, batches, down_projections(model), progress=False)
    return {
        "model": model, "tokenizer": tokenizer, "domain": domain, "batches": batches,
        "statistics": statistics, "scores": scores, "plan": plan, "names": names,
        "mini": lab.shrink(model, plan),
        "questions": questions, "answers": answers, "hessians": hessians,
        "perplexity": lab.perplexity(
            model, tokenizer, domain.test, max_tokens=64, progress=False
        ),
        "problems": projections.layer_problems(model, batches, layer=0),
        "influence": influence, "dropping": lab.plan_dropping(model, influence, count=1),
        "folder": tmp_path_factory.mktemp("out"),
    }  # fmt: skip


def down_projections(model) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith("mlp.down_proj")]


def calls(t: dict) -> dict[str, dict]:
    """Arguments with which every public function runs, in well under a second if it can."""
    pair = {"model": t["model"], "tokenizer": t["tokenizer"]}
    read = {"model": t["model"], "batches": t["batches"]}
    test, domains = lab.excerpt(t["domain"].test, max_characters=600), [t["domain"]]
    return {
        "answer_questions": {
            **pair, "questions": t["questions"], "score": "logprob", "style": "cloze",
            "seq_len": 128, "batch_size": 2, "precision": "auto", "progress": False,
        },
        "benchmark": {**pair, "tasks": "no_such_task", "num_fewshot": 0, "limit": 1,
                      "batch_size": 1, "include_path": None, "precision": "auto", "seed": 0},
        "bias_compensated": {"model": t["model"], "plan": t["plan"], "statistics": t["statistics"]},
        "block_influence": {**read, "sites": ("ffn",)},
        "check_disjoint": {"parts": {"a": ("one text",), "b": ("another one",)}},
        "cloze_questions": {"domain": t["domain"], "n": 3, "seed": 0},
        "collect_hessians": {**read, "names": t["names"], "progress": False},
        "collect_statistics": {**read, "path": None, "precision": "auto", "examples": 2,
                               "progress": False},
        "compare_answers": {"first": t["answers"], "second": t["answers"]},
        "contextual_plan": {
            "model": t["model"], "statistics": t["statistics"], "epsilon_linear": 0.001,
            "epsilon_activation": 0.01, "epsilon_embedding": 0.0, "quantile": None,
            "tokenizer": t["tokenizer"], "token_counts": None, "units": "kv_group",
        },
        "count_tokens": {"text": test, "tokenizer": t["tokenizer"]},
        "criterion": {"name": "a_name_of_a_test"},
        "describe": {"model": t["model"]},
        "domain_matrix": {
            **pair, "domains": domains, "plans": {("tiny-law", 0): t["plan"]}, "max_tokens": 64,
            "seq_len": 32, "recovery_tokens": 0, "recover_on": "mix", "seed": 0, "out_dir": None,
        },
        "domain_names": {"tiny": True},
        "domain_plans": {
            **pair, "domains": domains, "ratio": 0.3, "samples": 1, "calibration_tokens": 64,
            "seq_len": 32, "out_dir": None,
        },
        "damped_inverse": {"H": torch.eye(4), "damping": 0.1, "damping_mode": "mean"},
        "compare": {
            "results": {"a": t["perplexity"], "b": t["perplexity"]}, "pairs": "all",
            "reference": None, "level": 0.05, "n_bootstrap": 10, "n_permutations": 19, "seed": 0,
        },
        "divergence": {
            "model": t["model"], "reference": t["model"], "tokenizer": t["tokenizer"],
            "text": test, "seq_len": 32, "stride": 16, "max_characters": 300, "max_tokens": 64,
            "batch_size": 2, "precision": "auto", "n_bootstrap": 10, "seed": 0, "progress": False,
        },
        "efficiency": {**pair, "dense": None, "seq_len": 16, "new_tokens": 2, "batch_size": 1,
                       "repeats": 1},
        "eliminate": {
            "W": torch.ones(2, 4), "H": torch.eye(4), "unit_columns": torch.arange(4)[:, None],
            "count": 1,
            "saliency": "exact", "block_size": 1, "damping": 0.1, "damping_mode": "mean",
            "compensate": True,
        },
        "export_gguf": {**pair, "path": t["folder"] / "mini.gguf", "kind": "F32",
                        "embedding": "Q8_0"},
        "export_vllm": {**pair, "path": t["folder"] / "vllm", "card": None},
        "excerpt": {"text": test, "tokenizer": t["tokenizer"], "max_tokens": 64,
                    "max_characters": 100},
        "sample_texts": {
            **pair, "max_tokens": 32, "seq_len": 16, "batch_size": 2, "precision": "float32",
            "seed": 0, "progress": False,
        },
        "write_answers": {
            **pair, "questions": t["questions"], "max_new_tokens": 2, "batch_size": 2,
            "precision": "auto", "progress": False,
        },
        "generate": {**pair, "prompt": "The court", "max_new_tokens": 2},
        "gguf_size": {**pair, "kind": "Q4_0", "embedding": None},
        "gradient_cosine": {**read, "sites": ("ffn",), "eps": 1e-3,
                            "gradient_checkpointing": False, "n_directions": 1,
                            "per_sample": False, "seed": 0},
        "label": {"model": t["model"]},
        "linear_compensated": {**read, "plan": t["dropping"], "damping": 0.1, "progress": False},
        "load_domain": {"name_or_path": "tiny-law", "column": None, "online": False},
        "load_domains": {"names_or_paths": ["tiny-law"]},
        "load_model": {"name_or_path": "tiny-llama", "dtype": "auto", "device": "cpu"},
        "make_mini": {
            # a size that the vocabulary alone exceeds: no call goes on to train
            **pair, "domain": t["domain"], "size": 1e-4, "increase": None, "general": 0.3,
            "general_domain": t["domain"], "vocabulary": False, "reconstruct": False,
            "allocation": "uniform", "drop_blocks": False, "minutes": 1e-3, "gguf": None,
            "calibration_tokens": 256, "seq_len": 32, "out_dir": None, "seed": 0,
            "progress": False,
        },
        "make_domain": {"name": "mine", "documents": list(test) * 1, "title": "", "licence": "",
                        "attribution": "", "question_sources": ()},
        "model_card": {
            "model": t["model"], "table": None, "protocol": "", "domain": "", "notes": "",
        },
        "trim_vocabulary": {**pair, "domain": t["domain"], "general": t["domain"],
                            "generality": 0.3},
        "model_size": {"model": t["model"], "dense": None},
        "perplexity": {
            **pair, "text": test, "seq_len": 32, "stride": 16, "max_characters": 300,
            "max_tokens": 64, "batch_size": 2, "precision": "auto", "n_bootstrap": 10, "seed": 0,
            "progress": False,
        },
        "plan_dropping": {"model": t["model"], "influence": t["influence"], "count": 1,
                          "ratio": None},
        "plan_from_scores": {
            "model": t["model"], "scores": t["scores"], "ratio": 0.2, "parameters": None,
            "threshold": None, "allocation": "uniform", "ratio_of": "units", "keep_layers": (0, 0),
            "multiple_of": 1,
        },
        "position_bias": {**pair, "questions": t["questions"], "score": "logprob",
                          "style": "letters"},
        "quantised": {"model": t["model"], "kind": "Q8_0", "embedding": None},
        "recover": {
            **pair, "domain": t["domain"], "method": "lora", "epochs": 0.1, "max_tokens": 32,
            "learning_rate": 1e-4, "stop_at": None, "other": None, "eval_every": 32,
            "eval_characters": 200, "patience": 1, "seq_len": 16, "batch_size": 1,
            "gradient_accumulation_steps": 1, "warmup_ratio": 0.0, "warmup_steps": None,
            "gradient_checkpointing": False, "r": 2, "lora_alpha": 2, "lora_dropout": 0.0,
            "target_modules": ["q_proj"], "out_dir": None, "precision": "auto", "seed": 0,
            "progress": False, "teacher": None, "loss": "label", "temperature": 1.0, "mix": 0.5,
            "teacher_samples": None, "general": None, "generality": 0.3,
            "lr_scheduler_type": "cosine",
        },
        "reconstruct": {
            "mini": t["mini"], "model": t["model"], "batches": t["batches"], "epochs": 1,
            "learning_rate": 0.001, "sites": ("ffn",), "general": None, "generality": 0.5,
            "offload": "device", "out_dir": None, "progress": False,
        },
        "save_model": {**pair, "path": t["folder"] / "saved", "portable": False,
                       "remote_code": False, "card": None},
        "search_counts": {
            **read, "ratio": 0.2, "parameters": None, "sites": ("ffn",), "units": "kv_group",
            "ratio_of": "units", "keep_layers": (0, 0), "multiple_of": 1,
            "general": None, "generality": 0.5, "levels": 2, "rounds": 1, "steps": 1, "seed": 0,
            "drop_blocks": True, "offload": "device", "out_dir": None, "progress": False,
            "bias": "keep",
        },
        "score": {
            "model": t["model"], "criterion": "magnitude", "batches": t["batches"],
            "statistics": None, "sites": ("ffn",), "units": "kv_group", "cache": False,
        },
        "shrink": {"model": t["model"], "plan": t["plan"]},
        "slimgpt": {
            **read, "ratio": 0.2, "parameters": None, "sites": ("ffn",), "units": "kv_group",
            "allocation": "uniform", "ratio_of": "units", "keep_layers": (0, 0), "multiple_of": 1,
            "counts": None, "inplace": False, "offload": "device", "out_dir": None,
            "progress": False, "saliency": "exact", "damping": 0.3, "damping_mode": "feature",
            "bias": "keep", "block_size": "dynamic", "reconstruct": False, "general": None,
            "generality": 0.5, "stream_share": 0.5, "drop_blocks": False,
        },
        "smallest_within": {
            **pair, "batches": t["batches"], "domain": t["domain"], "increase": 0.5, "most": 0.5,
            "other": None, "other_increase": 0.5, "dense": None,
            "tolerance": 0.4, "seq_len": 32, "max_tokens": 64, "out_dir": None, "progress": False,
        },
        "tokenize": {"text": test, "tokenizer": t["tokenizer"], "seq_len": 16, "max_tokens": 64,
                     "batch_size": 2},
        "tokenizer_for": pair,
        "trim_tokenizer": {"tokenizer": t["tokenizer"], "kept": list(range(len(t["tokenizer"])))},
        "weight_compensated": {"model": t["model"], "plan": t["plan"], "hessians": t["hessians"],
                               "damping": 0.01},
    }  # fmt: skip


def study_calls(t: dict) -> dict[str, dict]:
    """The same for what notebooks take from `minigpt_lab.studies`."""
    pair = {"model": t["model"], "tokenizer": t["tokenizer"]}
    texts = [lab.excerpt(t["domain"].test, max_characters=600)]
    read = {"model": t["model"], "batches": t["batches"]}
    found = {"mine": methods.Method("magnitude")}
    sweep = pd.DataFrame({
        "component": "linear", "method": "contextual", "epsilon": [0.1, 0.2, 0.3],
        "perplexity_ratio": [1.0, 1.1, 2.0], "nonzero_ratio": [0.9, 0.8, 0.7],
    })  # fmt: skip
    plans = {("mine", "ffn", 0.2): t["plan"]}
    short = {"max_tokens": 64, "seq_len": 32, "out_dir": None}
    return {
        "ablations.calibration_amounts": {
            **pair, "source": t["domain"].calibration, "texts": texts, "options": {"ratio": 0.2},
            "tokens": [64], "lengths": [32], "total": 64, "seq_len": 32, "max_tokens": 64,
        },
        "projections.layer_losses": {"problems": t["problems"], "ratios": [0.2]},
        "projections.layer_problems": {**read, "layer": 0},
        "ablations.one_layer_at_a_time": {
            **pair, "batches": t["batches"], "texts": texts, "places": [0.0], "ratios": [0.2],
            **short,
        },
        "ablations.slimgpt_timing": {"model": t["model"], "calibrations": [t["batches"]],
                                     "repeats": 1, "out_dir": None},
        "reconstruction.reconstruction_curve": {
            **read, "held_out": t["batches"], "layer": 0, "ratio": 0.5, "epochs": 1,
        },
        "reconstruction.generality_curve": {
            **pair, "batches": t["batches"], "general": t["batches"], "texts": [t["domain"].test],
            "ratios": [0.2], "shares": [0.5], "max_tokens": 64, "seq_len": 32, "out_dir": None,
        },
        "ablations.slimgpt_variants": {
            **pair, "variants": {"a": {"ratio": 0.2}}, "batches": t["batches"], "texts": texts,
            "prompt": "", **short,
        },
        "activations.activation_frame": {"statistics": {"law": t["statistics"]}},
        "activations.calibration_stability": {
            "pieces": {"law": [t["statistics"]]}, "quantile": 0.2,
        },
        "analysis.knee": {"curve": sweep},
        "analysis.matched_plan": {"model": t["model"], "plan": t["plan"], "criterion": "random",
                                  "seed": 0},
        "analysis.measure": {"variant": "dense", **pair, "texts": texts, "dense": None,
                             "seq_len": 32},
        "activations.neuron_overlap": {"samples": {"law": [t["statistics"]] * 2}, "epsilon": 0.1,
                                    "quantile": None},
        "analysis.threshold_sweep": {
            **pair, "statistics": t["statistics"], "text": texts[0], "max_tokens": 64,
            "epsilons": {"activation": [0.01]}, "controls": (), "token_counts": None,
            "out_dir": None, "seeds": (0,), "seq_len": 32,
        },
        "dropped_blocks.as_fast": {"speeds": {0.5: 1.5}, "wanted": 1.2},
        "dropped_blocks.dropped_or_narrowed": {
            **pair, "batches": t["batches"], "general": t["batches"], "texts": texts,
            "influence": t["influence"], "ratio": 1e-3, "max_tokens": 64, "seq_len": 32,
        },
        "runtimes.runtime_speeds": {
            **pair, "models": {"a": t["model"]}, "kinds": [], "seq_len": 16, "new_tokens": 1,
            "repeats": 1, "progress": False,
        },
        "matrix.kept_overlap": {"plans": {("law", 0): t["plan"], ("law", 1): t["plan"]}},
        "matrix.mixed": {"domains": [t["domain"]]},
        "methods.gradient_methods": {"directions": [1], "seeds": 1},
        "methods.method_comparison": {
            **pair, "plans": {}, "texts": texts, "recover_on": None, "recovery": None, **short,
        },
        "methods.method_overlap": {"plans": plans, "sites": "ffn", "ratio": 0.2},
        "methods.method_plans": {
            "model": t["model"], "scores": {"mine": t["scores"]}, "methods": found,
            "statistics": t["statistics"], "ratios": [0.2], "sites": ("ffn",),
        },
        "prunings.fine_tuned_runs": {
            "prunings": {("slimgpt", "ffn", 0.2): t["plan"]}, "tokenizer": t["tokenizer"],
            "domain": t["domain"], "losses": ["label"],
        },
        "prunings.pruned_model": {"model": t["model"], "pruning": t["plan"]},
        "prunings.reconstructed_plans": {
            "plans": plans, "batches": t["batches"], "epochs": 1,
        },
        "methods.method_scores": {**read, "statistics": t["statistics"], "methods": found,
                                  "sites": ("ffn",), "out_dir": None},
        "rankings.by_seed": {"losses": {("a", "ffn", 0.2, "law"): t["perplexity"]}},
        "rankings.told_apart": {
            "losses": [{(name, "ffn", 0.2, "law"): t["perplexity"] for name in "ab"}],
            "sites": "ffn", "ratio": 0.2, "text": "law",
        },
        "prunings.slimgpt_runs": {"plans": plans, "batches": t["batches"], "variants": {"a": {}}},
    }  # fmt: skip


FUNCTIONS = sorted(
    name
    for name in lab.__all__
    if inspect.isfunction(getattr(lab, name)) and name not in ("check", "masked")
)
KEYS = ("pruning_key", "plain_options")  # of studies, for studies
ELSEWHERE = ("domain_matrix", "domain_plans", "set_overlap", "registered_methods", *KEYS)
MODULES = [
    importlib.import_module(f"minigpt_lab.studies.{name}")
    for name in (
        *("ablations", "activations", "analysis", "dropped_blocks", "matrix", "methods"),
        *("projections", "prunings", "reconstruction"),
    )
]
STUDIES = sorted(
    f"{module.__name__.split('.')[-1]}.{name}"
    for module in MODULES
    for name, value in vars(module).items()
    if inspect.isfunction(value) and value.__module__ == module.__name__
    if not name.startswith("_") and name not in ELSEWHERE
)


def raw(error: BaseException) -> str:
    """Why an error is no sentence of ours; empty if it is one."""
    place = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    if PACKAGE not in place.parents:
        return f"raised in {place.name}"
    if not isinstance(error, ValueError | TypeError | OSError | RuntimeError):
        return f"is a {type(error).__name__}"
    text = str(error)
    return "is no sentence" if "\n" in text or not 15 < len(text) < 500 else ""


def run(name: str, arguments: dict) -> str:
    try:
        operator.attrgetter(name)(lab.studies if "." in name else lab)(**arguments)
    except Exception as error:
        why = raw(error)
        return why and f"{type(error).__name__} {why}: {str(error)[:120]!r}"
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS + STUDIES)
def test_every_argument_of_every_function(name, things, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    valid, complaints = (calls(things) | study_calls(things))[name], []
    for argument in valid:
        for what, value in bad_values(things["domain"]).items():
            if value is valid[argument]:
                continue  # the call that works, once more
            complaint = run(name, {**valid, argument: value})
            if complaint:
                complaints.append(f"{argument}={what}: {complaint}")
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers_of_numpy_and_torch_are_numbers(name, things, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    valid = calls(things)[name]

    def as_numpy(value):
        return {int: np.int64, float: np.float64, bool: np.bool_}.get(type(value), lambda v: v)(
            value
        )

    def as_torch(value):
        return torch.tensor(value) if type(value) in (int, float) else value

    expected = run(name, valid)
    for form in (as_numpy, as_torch):
        assert run(name, {k: form(v) for k, v in valid.items()}) == expected
