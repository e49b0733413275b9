"""A plan is data that is what it says it is; and what a plan counts."""

from __future__ import annotations

import copy
import json
import math
import threading

import numpy as np
import pytest
import torch
from helpers import logits, random_model, random_plan
from hypothesis import given, settings
from hypothesis import strategies as st

import minigpt_lab as lab
from minigpt_lab.checks import locked
from minigpt_lab.models import Anatomy, fingerprint

MODEL = random_model("opt")
DATA = random_plan(MODEL, 3).to_dict() | {
    "shift": {"model.decoder.layers.0.fc2": [0.5] * 32},
    "neurons": {"model.decoder.layers.0.fc2": {"activation": [1, 3]}},
    "origin": {"method": "random"},
}
WRONG = [
    None, 3, -1, 2.5, True, "3", [], {}, [[]], [None], [1.5], [True], ["1"], [-1], {"a": 1},
    {3: [1]}, {"model.decoder.layers.0.fc1": [math.inf] * 20},
    {"ffn": None}, {"ffn": 3}, {"ffn": [None] * 3}, {"ffn": [[0.5]] * 3}, {"ffn": [["0"]] * 3},
    {"fc1": {"input": [0]}}, {"model.decoder.layers.0.fc1": {"inputs": [0]}},
    {"model.decoder.layers.0.fc1": {"input": [999]}}, {"model.decoder.layers.0.fc1": [1]},
    {"model.decoder.layers.0.fc1": [math.nan] * 20},
    {"model.decoder.layers.0.fc1": ["0"] * 20}, {"model.decoder.layers.0.fc1": [0.0] * 19},
]  # fmt: skip
RIGHT = {  # values of the list that a field may have
    "model_hash": ["3"], "vocabulary_size": [], "vocabulary": [None],
    "units": [], "keep": [{}], "origin": [{}, {"a": 1}],
    "zero": [{}], "shift": [{}], "neurons": [{}],
}  # fmt: skip
RIGHT["origin"] += [value for value in WRONG if isinstance(value, dict) and 3 not in value]


def same(a, b) -> bool:
    """Equal and of one type: 1 is not True."""
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("field", RIGHT)
def test_a_plan_edited_by_hand_is_right_or_refused(field):
    for value in WRONG:
        data = {**copy.deepcopy(DATA), field: value}
        if any(same(value, right) for right in RIGHT[field]):
            lab.PruningPlan.from_dict(data).predicted_size(MODEL)
            continue
        with pytest.raises(ValueError, match="plan") as error:
            lab.shrink(MODEL, lab.PruningPlan.from_dict(data))
        assert "\n" not in str(error.value) and len(str(error.value)) < 500, value


@pytest.mark.parametrize("data", [None, 3, [], "plan", {}, {"keep": {}}, {**DATA, "more": 1}])
def test_what_is_no_plan_is_said(data):
    with pytest.raises(ValueError, match="no pruning plan"):
        lab.PruningPlan.from_dict(data)


def test_numbers_of_numpy_and_torch_become_json():
    plan = lab.PruningPlan(
        "",
        {"ffn": np.array([20, 20, 20])},
        {"ffn": [torch.arange(5), np.arange(7), [np.int64(3)]]},
        shift={"model.decoder.layers.0.fc2": np.zeros(32, np.float32)},
        vocabulary_size=np.int64(97),
        vocabulary=np.arange(50),
    )
    assert lab.PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_every_plan_equals_its_json(seed):
    plan = random_plan(MODEL, seed)
    assert lab.PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def as_the_paper_zeroes(model, statistics, linear, activation, before):
    """Non-zero parameters after `prune_linear` and `prune_activations` of the paper's code.

    `before` gives the name of the linear layer in front of an activation.
    """
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name in statistics.layer_of if linear is not None else ():
            module = modules[name]
            read, made = (statistics.mean(name, side, "absolute") for side in ("input", "output"))
            least = made
            if module.bias is not None:
                least = np.minimum(made, statistics.mean(name, "output", "unbiased"))
                module.bias[torch.as_tensor((least <= linear) & (made <= linear))] = 0
            module.weight[:, torch.as_tensor(read <= linear)] = 0
            module.weight[torch.as_tensor(least <= linear)] = 0
        for name in statistics.activations if activation is not None else ():
            dead = torch.as_tensor(statistics.mean(name, "activation", "absolute") <= activation)
            first = modules[before(name)]
            first.weight[dead] = 0
            if first.bias is not None:
                first.bias[dead] = 0
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("tiny-opt", lambda name: name.replace("fc2", "fc1")),
        ("tiny-llama", lambda name: name.replace("down_proj", "gate_proj")),
        ("tiny-phi", lambda name: name.replace("fc2", "fc1")),
    ],
)
@pytest.mark.parametrize(("linear", "activation"), [(None, 0.05), (0.1, None), (0.1, 0.05)])
def test_the_papers_count_is_what_its_code_would_count(name, before, linear, activation):
    model, tokenizer = lab.load_model(name, device="cpu")
    batches = lab.tokenize(
        lab.load_domain("tiny-medical").calibration, tokenizer, seq_len=64, max_tokens=2048
    )
    statistics = lab.collect_statistics(model, batches, progress=False)
    plan = lab.contextual_plan(
        model, statistics, epsilon_linear=linear, epsilon_activation=activation
    )
    size = plan.predicted_size(model)
    zeroed = as_the_paper_zeroes(model, statistics, linear, activation, before)
    already = size.dense - sum(int(p.count_nonzero()) for p in model.parameters())
    assert zeroed <= size.paper_nonzero <= zeroed + already
    assert size.nonzero <= size.paper_nonzero <= size.dense
    if name == "tiny-opt" and (linear, activation) == (None, 0.05):  # as measured by others
        assert size.paper_nonzero / size.dense == pytest.approx(0.828, abs=0.01)
        assert size.nonzero / size.dense == pytest.approx(0.658, abs=0.01)
    if name == "tiny-opt" and (linear, activation) == (0.1, None):
        assert size.paper_nonzero / size.dense == pytest.approx(0.739, abs=0.01)
        assert size.nonzero / size.dense == pytest.approx(0.499, abs=0.01)
    assert "Mini-GPTs' code would count" in str(size)
    assert size.to_frame()["paper_nonzero"][0] == size.paper_nonzero


def test_a_plan_by_scores_counts_as_the_paper_would(model, family):
    """A channel costs the row and bias before its activation, a token its rows, and no more."""
    scores = lab.score(model, "random", sites=("ffn",))
    plan = lab.plan_from_scores(model, scores, ratio=0.5)
    gone = sum(plan.removed["ffn"])
    size = plan.predicted_size(model)
    anatomy = Anatomy(model)
    first = anatomy.module(0, anatomy.family.produces["ffn"][0])
    assert size.dense - size.paper_nonzero == gone * (32 + (first.bias is not None))
    assert size.stored < size.paper_nonzero


CHANGES = {
    "rms_norm_eps": lambda model: setattr(model.config, "rms_norm_eps", 0.1),
    "hidden_act": lambda model: setattr(model.config, "hidden_act", "relu"),
    "rope": lambda model: model.config.rope_parameters.update(rope_theta=5.0),
    "weight": lambda model: model.model.norm.weight.detach().mul_(2),
    "data": lambda model: model.model.norm.weight.data.mul_(2),
    "data, one value": lambda model: model.lm_head.weight.data[3, 5].add_(1),
    "another tensor": lambda model: setattr(
        model.model.norm, "weight", torch.nn.Parameter(torch.ones(32))
    ),
    "swapped data": lambda model: setattr(model.model.norm.weight, "data", torch.ones(32)),
    "type": lambda model: model.bfloat16(),
    "sign": lambda model: model.model.norm.weight.data.neg_(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_fingerprint_sees_every_change_and_its_undoing(change):
    model = random_model("llama")
    before = fingerprint(model)
    CHANGES[change](model)
    changed = fingerprint(model)
    assert changed != before and fingerprint(model) == changed
    assert fingerprint(copy.deepcopy(model)) == changed
    assert fingerprint(random_model("llama")) == before


@pytest.mark.parametrize(
    ("name", "value"), [("use_cache", False), ("_name_or_path", "here"), ("architectures", ["a"])]
)
def test_circumstances_are_no_change(name, value):
    model = random_model("llama")
    before = fingerprint(model)
    setattr(model.config, name, value)
    assert fingerprint(model) == before


def test_a_mask_is_another_model_and_leaving_it_the_old():
    model = random_model("llama")
    before = fingerprint(model)
    plan = random_plan(model, 5, vocabulary=False)
    with lab.masked(model, plan):
        masked = fingerprint(model)
        assert masked != before
        with lab.masked(model, random_plan(model, 6, vocabulary=False)):
            assert fingerprint(model) not in (before, masked)
        assert fingerprint(model) == masked
    assert fingerprint(model) == before


def test_no_thread_sees_the_weights_under_anothers_mask():
    model, found = random_model("llama"), []
    before = fingerprint(model)
    asked = threading.Thread(target=lambda: found.append(fingerprint(model)))
    with locked(model), lab.masked(model, random_plan(model, 5, vocabulary=False)):
        asked.start()
        asked.join(0.2)
        assert not found  # it waits
    asked.join()
    assert found == [before]


CALLS_OF_A_MODEL = [
    lambda bad: lab.describe(bad),
    lambda bad: lab.model_size(bad),
    lambda bad: lab.model_size(MODEL, 3),
    lambda bad: lab.label(bad),
    lambda bad: fingerprint(bad),
    lambda bad: lab.PruningPlan.load(3),
    lambda bad: lab.PruningPlan.load(None),
    lambda bad: lab.PruningPlan("", {}, {}).predicted_size(bad),
    lambda bad: lab.PruningPlan("", {}, {}).require(bad),
    lambda bad: lab.save_model(bad, None, "x"),
    lambda bad: lab.save_model(MODEL, None, "x"),
]


@pytest.mark.parametrize("call", CALLS_OF_A_MODEL)
def test_what_is_no_model_is_said(call):
    for bad in (None, "tiny-llama", 3, (MODEL, None)):
        with pytest.raises(ValueError, match=r"is .*; expected") as error:
            call(bad)
        assert "\n" not in str(error.value)


def test_heads_of_phi_leave_where_queries_are_normalised():
    from transformers import PhiConfig, PhiForCausalLM

    config = PhiConfig(
        vocab_size=97, hidden_size=32, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=4, qk_layernorm=True,
    )  # fmt: skip
    model = PhiForCausalLM(config).eval()
    keep = {"attention": [[0, 2], [1, 3]]}
    mini = lab.shrink(model, lab.PruningPlan("", {"attention": [4, 4]}, keep))
    assert mini.config.num_attention_heads == 4  # with 2 its norms would be twice as wide
    assert logits(mini, torch.arange(8)[None]).isfinite().all()
