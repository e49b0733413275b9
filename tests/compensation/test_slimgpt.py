"""Pruning with compensation: the algebra, one pass through every family, and what it is worth."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from helpers import CONFIGS, logits, problem, random_model, same, site_counts, windows
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import minigpt_lab as lab
from minigpt_lab.architectures import ATTENTION_UNITS
from minigpt_lab.calibration.layer_runner import LayerRunner, catch_inputs
from minigpt_lab.calibration.moments import second_moments
from minigpt_lab.compensation import SALIENCIES, eliminate, projection
from minigpt_lab.compensation.obs import next_block
from minigpt_lab.models.anatomy import Anatomy
from minigpt_lab.models.runtime import inference
from minigpt_lab.store import tensor_files
from minigpt_lab.store.shards import Shards


def column_loop(weight, hessian, units, count):
    """The paper's algorithm 1 as it is printed: heads to the front, then column by column."""
    weight, hessian, width = weight.clone(), hessian.clone(), units.shape[1]
    left, order = list(range(len(units))), []
    for _ in range(count):
        inverse = torch.linalg.inv(hessian)
        errors = []
        for unit in left:
            block = inverse[units[unit]][:, units[unit]]
            pivots = torch.linalg.cholesky(block).diagonal()
            errors.append(float((weight[:, units[unit]] / pivots).square().sum()))
        gone = left.pop(int(np.argmin(errors)))
        order.append(gone)
        others = [c for u in range(len(units)) if u != gone for c in units[u].tolist()]
        front = [*units[gone].tolist(), *others]
        root = torch.linalg.cholesky(inverse[front][:, front], upper=True)
        moved = weight[:, front].clone()
        for i in range(width):
            error = moved[:, i : i + 1] / root[i, i]
            moved[:, i:] -= error @ root[i : i + 1, i:]
        moved[:, :width] = 0
        weight[:, front] = moved
        columns = units[gone]
        hessian[columns], hessian[:, columns] = 0, 0
        hessian[columns, columns] = 1
    return weight, order


@given(st.integers(0, 10_000), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_the_closed_form_is_the_papers_loop(seed, count):
    weight, _, hessian, units = problem(seed)
    assume(torch.linalg.cond(hessian) < 1e6)  # else the two differ by their rounding
    expected, order = column_loop(weight, hessian, units, count)
    found = eliminate(
        weight, hessian, units, count=count, saliency="slimgpt", block_size=1, damping=0
    )
    assert found.order == order
    columns = units[found.kept].ravel()
    torch.testing.assert_close(found.W, expected[:, columns], atol=1e-8, rtol=1e-8)


@given(st.integers(0, 10_000), st.sampled_from(sorted(SALIENCIES)), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_the_loss_is_the_true_one(seed, saliency, size):
    weight, x, hessian, units = problem(seed)
    found = eliminate(
        weight, hessian, units, count=4, saliency=saliency, block_size=size, damping=0
    )
    short = torch.zeros_like(weight)
    short[:, units[found.kept].ravel()] = found.W
    true = ((weight - short) @ x).square().sum() / x.shape[1]
    assert found.loss == pytest.approx(float(true), rel=1e-6)
    assert found.scale == pytest.approx(float((weight @ x).square().sum() / x.shape[1]))


def test_exact_errors_are_what_removing_one_unit_costs():
    weight, x, hessian, units = problem()
    inverse = torch.linalg.inv(hessian)
    errors = {name: rule(weight, inverse, units) for name, rule in SALIENCIES.items()}
    for unit in range(len(units)):
        rest = [c for c in range(weight.shape[1]) if c not in units[unit]]
        best = torch.linalg.lstsq(x[rest].T, (weight @ x).T).solution.T
        true = (weight @ x - best @ x[rest]).square().sum() / x.shape[1]
        assert float(errors["exact"][unit]) == pytest.approx(float(true), rel=1e-6)
    # [H⁻¹]_jj is at least the squared pivot: without the grouped Cholesky errors look smaller
    assert (errors["diag"] <= errors["slimgpt"] * (1 + 1e-9)).all()
    single = torch.arange(weight.shape[1])[:, None]
    for rule in SALIENCIES.values():
        torch.testing.assert_close(
            rule(weight, inverse, single), exact := SALIENCIES["exact"](weight, inverse, single)
        )
    assert len(exact) == weight.shape[1]


def test_dead_units_leave_first_and_for_free():
    weight, _, hessian, units = problem()
    columns = units[[4, 1]].ravel()
    hessian[columns], hessian[:, columns] = 0, 0
    found = eliminate(weight, hessian, units, count=2)
    assert (found.order, found.loss) == ([1, 4], 0)
    assert eliminate(weight, hessian, units, count=3).order[:2] == [1, 4]
    torch.testing.assert_close(found.W, weight[:, units[found.kept].ravel()])


def test_a_singular_moment_is_damped_more_with_a_warning():
    weight, _, _, units = problem()
    x = torch.randn(weight.shape[1], 3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="singular"):
        found = eliminate(weight, x @ x.T, units, count=3, damping=0)
    assert torch.isfinite(found.W).all()
    with pytest.raises(ValueError, match="NaN"):
        eliminate(weight, x @ x.T * torch.nan, units, count=3)


def test_block_sizes():
    def sizes(block_size, total):
        done = []
        while sum(done) < total:
            done.append(next_block(block_size, sum(done), total))
        return done

    assert sizes("dynamic", 2752)[:3] == [1024, 864, 432]
    assert min(sizes("dynamic", 800)[:-1]) == 8
    assert sizes(7, 20) == [7, 7, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"saliency": "exct"}, "did you mean 'exact'"),
        ({"count": 7}, "at most the 6 units"),
        ({"count": -1}, "count is -1"),
        ({"damping": -1}, "damping is -1"),
        ({"block_size": 0}, "block_size is 0"),
        ({"block_size": "dynamc"}, "block_size is 'dynamc'"),
        ({"H": torch.eye(3)}, r"H is a Tensor of shape \[3, 3\]"),
        ({"unit_columns": torch.tensor([[0, 99]])}, "expected columns of every unit"),
    ],
)
def test_bad_options(options, message):
    weight, _, hessian, units = problem()
    with pytest.raises(ValueError, match=message):
        eliminate(**{"W": weight, "H": hessian, "unit_columns": units, "count": 2, **options})


def test_parts_of_a_layer_are_the_layer(model):
    """What is kept between the parts gives the same outputs, and no product runs twice."""
    anatomy, batches, hidden = Anatomy(model), windows(), Shards()
    readers = [anatomy.name(1, anatomy.family.consumes[site]) for site in ("attention", "ffn")]
    modules = {name: model.get_submodule(name) for name in readers}
    with inference(model):
        with second_moments(modules) as sums:
            for batch in batches:
                states = model.base_model(**batch, output_hidden_states=True, use_cache=False)
        calls = catch_inputs(model, batches, hidden)
        with FlopCounterMode(display=False) as whole:
            LayerRunner(anatomy, 0, hidden, calls).run(0)
        with FlopCounterMode(display=False) as parts:
            for index in range(2):
                one = LayerRunner(anatomy, index, hidden, calls)
                read = {site: list(one.inputs(site)) for site in ("attention", "ffn")}
                one.finish()
    torch.testing.assert_close(hidden[5], states.hidden_states[2], rtol=1e-4, atol=1e-4)
    for name, found in zip(readers, read.values(), strict=True):
        x = torch.cat([states.flatten(0, -2) for states in found]).double()
        torch.testing.assert_close(x.T @ x / len(x), sums[name].second(), rtol=1e-4, atol=1e-4)
    assert parts.get_total_flops() == 2 * len(batches) * whole.get_total_flops() > 0


@pytest.mark.parametrize("units", sorted(ATTENTION_UNITS))
def test_every_family_is_cut_and_makes_up_for_it(family, units):
    model, batches = random_model(family), windows()
    before = logits(model, batches[0]["input_ids"])
    if units == "balanced_heads" and max(Anatomy(model).units(units)) == 1:
        with pytest.raises(ValueError, match="grouped-query"):
            lab.slimgpt(model, batches, ratio=0.3, units=units)
        return
    counts = site_counts(model, units)
    options = {"units": units, "progress": False, "dtype": torch.float64}
    mini, plan = lab.slimgpt(model, batches, counts=counts, **options)
    assert plan.removed == counts
    assert torch.equal(logits(model, batches[0]["input_ids"]), before)
    assert lab.model_size(mini).stored == plan.predicted_size(model).stored
    plain, same = lab.slimgpt(model, batches, counts=counts, compensate=False, **options)
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.parameters(), lab.shrink(model, same).parameters(), strict=True)
    )

    def error(cut) -> float:
        found = [
            logits(cut, batch["input_ids"]) - logits(model, batch["input_ids"]) for batch in batches
        ]
        return float(torch.cat(found).square().sum())

    assert error(mini) < error(plain)


@pytest.mark.parametrize("name", ["bloom", "llama"])
def test_an_interrupted_run_goes_on_where_it_was(name, tmp_path, monkeypatch):
    model, batches = random_model(name), windows()
    dropped = Anatomy(model).units("ffn")[0]
    counts = site_counts(model, "kv_group", ffn=(dropped, 3, 7))
    arguments = {"counts": counts, "progress": False}
    options = {"bias": "add", "out_dir": tmp_path / "run"}
    expected, plan = lab.slimgpt(model, batches, **arguments, bias="add")
    solve, solved = projection.eliminate_levels, []

    def counted(*args):
        solved.append(solve(*args))
        return solved[-1]

    def interrupted(*args):
        if len(solved) == 3:
            raise KeyboardInterrupt
        return counted(*args)

    monkeypatch.setattr(projection, "eliminate_levels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lab.slimgpt(model, batches, **arguments, **options)
    monkeypatch.setattr(projection, "eliminate_levels", counted)
    found, again = lab.slimgpt(model, iter(batches), **arguments, **options)
    assert len(solved) == 3 + 4  # one layer was done
    assert same(found, expected) and again == plan
    found, again = lab.slimgpt(model, batches, **arguments, **options)
    assert len(solved) == 7 and same(found, expected) and again == plan
    assert not list((tmp_path / "run").glob("hidden-[013]*"))
    with pytest.raises(ValueError, match="another damping"):
        lab.slimgpt(model, batches, **arguments, **options, damping=0.5)
    with pytest.raises(ValueError, match="other calibration tokens"):
        lab.slimgpt(model, windows(7), **arguments, **options)


def test_a_full_disk_keeps_what_is_done(tmp_path, monkeypatch):
    model, batches = random_model("llama"), windows()
    arguments = {"ratio": 0.3, "progress": False}
    real, calls = tensor_files.save_file, []

    def full(*args):
        calls.append(args)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(OSError, match=r"layer 1 could not be written.*No space left.*make room"):
        lab.slimgpt(model, batches, **arguments, out_dir=tmp_path)
    monkeypatch.setattr(tensor_files, "save_file", real)
    found, _ = lab.slimgpt(model, batches, **arguments, out_dir=tmp_path)
    assert same(found, lab.slimgpt(model, batches, **arguments)[0])


def test_a_device_too_small_for_a_layer_says_what_would_fit(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(projection, "eliminate_levels", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"layer 0 does not fit on cpu.*GiB.*offload="):
        lab.slimgpt(random_model("llama"), windows(), ratio=0.3, progress=False)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_hidden_states_may_wait_elsewhere(place):
    model, batches = random_model("gemma2"), windows()
    arguments = {"ratio": 0.3, "progress": False}
    found, _ = lab.slimgpt(model, batches, **arguments, offload=place)
    assert same(found, lab.slimgpt(model, batches, **arguments)[0])


@pytest.mark.parametrize("allocation", ["log-increase", "uniform", [1, 2, 3]])
def test_channels_take_up_what_whole_heads_leave(allocation):
    model = random_model("llama")
    _, plan = lab.slimgpt(
        model, windows(), ratio=0.3, allocation=allocation, ratio_of="decoder", progress=False
    )
    anatomy = Anatomy(model)
    channel = anatomy.unit_parameters("ffn", 0)
    sites = ("ffn", "attention")
    total = sum(
        anatomy.unit_parameters(site, layer) * anatomy.units(site)[layer]
        for layer in range(3)
        for site in sites
    )
    gone = plan.origin["removed"]["units"] * total
    wanted = 0.3 * lab.model_size(model).layers_dense
    assert abs(gone - wanted) <= 2 * channel


def test_a_model_changes_in_place_only_if_told(tiny, tiny_domain):
    model, tokenizer = tiny
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=512)
    copied = copy.deepcopy(model)
    found, plan = lab.slimgpt(copied, batches, ratio=0.2, inplace=True, progress=False)
    assert found is copied and not same_shapes(found, model)
    fresh, other = lab.slimgpt(model, batches, ratio=0.2, progress=False)
    assert same(fresh, found) and other == plan
    assert model.config.to_dict() == tiny[0].config.to_dict()


def same_shapes(a, b) -> bool:
    return [p.shape for p in a.parameters()] == [p.shape for p in b.parameters()]


def test_it_is_saved_and_loaded_and_goes_on_training(tiny, tiny_domain, tmp_path):
    model, tokenizer = tiny
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=2_048)
    mini, plan = lab.slimgpt(model, batches, ratio=0.3, bias="add", progress=False)
    lab.save_model(mini, tokenizer, tmp_path / "mini")
    loaded, _ = lab.load_model(tmp_path / "mini", device="cpu")
    assert torch.equal(
        logits(loaded, batches[0]["input_ids"]), logits(mini, batches[0]["input_ids"])
    )
    assert loaded.pruning_plans[-1] == plan
    assert lab.PruningPlan.from_dict(plan.to_dict()) == plan
    loss = loaded(**batches[0], labels=batches[0]["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_it_beats_cuts_of_the_same_size_without_compensation(tiny, tiny_domain):
    model, tokenizer = tiny
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=4_096)
    protocol = {"max_tokens": 2_048, "seq_len": 64}
    arguments = {"ratio": 0.3, "sites": ["ffn"], "progress": False}

    def held_out(cut) -> float:
        return lab.perplexity(cut, tokenizer, tiny_domain.test, **protocol).value

    mini, _ = lab.slimgpt(model, batches, **arguments)
    plain, _ = lab.slimgpt(model, batches, **arguments, compensate=False)
    scores = lab.score(model, "random", batches, sites=("ffn",))
    random = lab.shrink(model, lab.plan_from_scores(model, scores, ratio=0.3))
    assert held_out(model) < held_out(mini) < held_out(plain) < held_out(random)


def test_too_few_tokens_are_said_and_survived():
    model = random_model("llama")
    with pytest.warns(UserWarning, match="12 calibration tokens for 32 features"):
        mini, _ = lab.slimgpt(
            model, [{"input_ids": torch.arange(3, 15)[None]}], ratio=0.3, progress=False
        )
    assert torch.isfinite(logits(mini, torch.arange(3, 15)[None])).all()


def test_a_broken_layer_is_named():
    model = random_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"transformer\.h\.1\.mlp\.c_proj reads NaN"):
        lab.slimgpt(model, windows(), ratio=0.5, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of ratio, parameters, counts"),
        ({"ratio": 0.2, "parameters": 9}, "exactly one"),
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"ratio": "0.3"}, "ratio is '0.3'; expected a number"),
        ({"ratio": 0.2, "dampng": 1}, "unknown option 'dampng'; did you mean 'damping'"),
        ({"ratio": 0.2, "damping": float("nan")}, "damping is nan"),
        ({"ratio": 0.2, "block_size": None}, "block_size is None"),
        ({"ratio": 0.2, "allocation": "global"}, "is 'global'; expected one of 'search'"),
        ({"ratio": 0.2, "sites": ()}, "sites is "),
        ({"ratio": 0.2, "sites": "ffn"}, "sites is 'ffn'; expected"),
        ({"parameters": 10}, "cannot be met"),
        ({"counts": {"ffn": [21, 0, 0], "attention": [0, 0, 0]}}, "21 of 20 ffn units of layer 0"),
        ({"counts": {"ffn": [20] * 3, "attention": [2] * 3}}, "FFN of every layer"),
        ({"counts": {"ffn": [1, 1]}}, "expected .*'attention': 3"),
        ({"ratio": 0.2, "allocation": "log-incrase"}, "log-increase"),
        ({"ratio": 0.2, "allocation": [1, 2]}, "lists 2 shares"),
        ({"ratio": 0.2, "units": "heads"}, "units is 'heads'"),
        ({"ratio": 0.2, "sites": ["fnn"]}, "is 'fnn'"),
        ({"ratio": 0.2, "bias": "refited"}, "did you mean 'refit'"),
        ({"ratio": 0.2, "damping_mode": "meen"}, "did you mean 'mean'"),
        ({"ratio": 0.2, "saliency": "exat"}, "did you mean 'exact'"),
        ({"ratio": 0.2, "offload": "gpu"}, "offload is 'gpu'"),
        ({"ratio": 0.2, "keep_layers": (2, 1)}, "leaves nothing"),
        ({"ratio": 0.2, "keep_layers": 1}, "keep_layers is 1; expected a list"),
        ({"ratio": 0.2, "multiple_of": "4"}, "multiple_of is '4'"),
        ({"ratio": 0.2, "multiple_of": {"fnn": 4}}, "multiple_of has 'fnn'; did you mean 'ffn'"),
        ({"ratoi": 0.2}, "unknown option 'ratoi'; did you mean 'ratio'"),
        ({"parameters": float("nan")}, "parameters is nan; expected a whole number"),
        ({"ratio": 0.2, "allocation": 3}, "allocation is 3; expected"),
        (
            {"counts": {"ffn": [1.5, 0, 0], "attention": [0, 0, 0]}},
            "counts.* is 1.5; expected a whole number of at least 0",
        ),
        ({"counts": [1, 2]}, r"counts is \[1, 2\]; expected .* a dictionary"),
        ({"ratio": 0.2, "dtype": torch.bfloat16}, "torch.float32 or torch.float64"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lab.slimgpt(random_model("llama"), windows(), **arguments, progress=False)


LIMITED = """
import json, resource, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
import minigpt_lab as lab

dense, out, layers, room = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
places = {f"model.layers.{i}": "disk" for i in range(layers)}
places |= {f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
places["lm_head"] = "cpu"
model = AutoModelForCausalLM.from_pretrained(dense, device_map=places, offload_folder=out / "in")
generator = torch.Generator().manual_seed(0)
batches = [{"input_ids": torch.randint(3, 97, (1, 64), generator=generator)} for _ in range(12)]
lab.label(model), torch.linalg.cholesky(torch.eye(64))
used = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + room, used + room))
mini, plan = lab.slimgpt(
    model, batches, ratio=0.5, inplace=True, offload="disk", out_dir=out / "run", progress=False,
    reconstruct=int(sys.argv[5]) or False,
)
with torch.no_grad():
    torch.save(mini(batches[0]["input_ids"]).logits, out / "logits.pt")
plan.save(out / "plan.json")
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
@pytest.mark.parametrize("reconstruct", [0, 1])  # epochs
def test_a_model_larger_than_memory_is_pruned(reconstruct, tmp_path):
    layers = 40
    config = copy.deepcopy(CONFIGS["llama"])
    config.update({"hidden_size": 512, "intermediate_size": 1_024, "num_hidden_layers": layers})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "dense", max_shard_size="10MB")
    size = sum(parameter.nbytes for parameter in model.parameters())
    room = size // 3
    arguments = [sys.executable, "-c", LIMITED, tmp_path / "dense", tmp_path, layers, room]
    arguments.append(reconstruct)
    # malloc would reserve an arena for every thread, and keep what is freed, in pieces
    calm = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    calm |= {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
    arguments = [str(argument) for argument in arguments]
    done = subprocess.run(arguments, capture_output=True, text=True, env=calm)
    assert done.returncode == 0, done.stderr[-2_000:]
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 97, (1, 64), generator=generator)} for _ in range(12)]
    options = {"reconstruct": reconstruct or False, "progress": False}
    mini, plan = lab.slimgpt(model, batches, ratio=0.5, **options)
    assert lab.PruningPlan.load(tmp_path / "plan.json").keep == plan.keep
    found = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(found, logits(mini, batches[0]["input_ids"]), atol=1e-5, rtol=1e-4)


def test_padding_changes_nothing():
    model, ids = random_model("qwen2"), torch.randint(3, 97, (3, 16))
    padded = torch.zeros(3, 20, dtype=torch.long)
    padded[:, 4:], mask = ids, torch.ones(3, 20, dtype=torch.long)
    mask[:, :4] = 0
    options = {"ratio": 0.3, "progress": False, "dtype": torch.float64}
    found, plan = lab.slimgpt(model, [{"input_ids": padded, "attention_mask": mask}], **options)
    rows = [{"input_ids": row[None]} for row in ids]
    expected, other = lab.slimgpt(model, rows, **options)
    assert plan.keep == other.keep
    for a, b in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_cut_model_and_one_of_a_single_layer_are_cut(family):
    once, first = lab.slimgpt(random_model(family), windows(), ratio=0.3, progress=False)
    twice, second = lab.slimgpt(once, windows(), ratio=0.2, sites=["ffn"], progress=False)
    assert lab.model_size(twice).stored < lab.model_size(once).stored
    assert twice.pruning_plans == [first, second]
    assert lab.model_size(twice) == lab.model_size(twice, random_model(family))
    single, plan = lab.slimgpt(random_model(family, layers=1), windows(), ratio=0.3, progress=False)
    assert torch.isfinite(logits(single, windows()[0]["input_ids"])).all()
    assert any(map(any, plan.removed.values()))


def test_text_is_not_taken_for_batches(tiny_domain, tiny):
    with pytest.raises(ValueError, match=r"batches\[0\] is 'A.*lab.tokenize"):
        lab.slimgpt(tiny[0], tiny_domain.calibration, ratio=0.3, progress=False)


@pytest.mark.parametrize("given", [float("nan"), None, "two", True])
def test_a_users_allocation_gives_numbers_or_is_refused(given):
    model = random_model("llama")
    shares = {"allocation": lambda ratio, groups: [given] * len(groups)}
    with pytest.raises(ValueError, match=r"\[0\] is .*expected a number"):
        lab.slimgpt(model, windows(), ratio=0.5, **shares, progress=False)
    with pytest.raises(ValueError, match="gives 1 shares; expected one for each of"):
        lab.slimgpt(model, windows(), ratio=0.5, allocation=lambda *_: [0.5], progress=False)


def test_a_function_of_any_kind_is_an_allocation(tmp_path):
    class Rule:
        def __call__(self, first, *_):
            return [first] * 6

    for rule in (Rule(), partial(Rule().__call__), lambda *given: Rule()(*given)):
        options = {"allocation": rule, "out_dir": tmp_path / str(id(rule))}
        _, plan = lab.slimgpt(
            random_model("llama"), windows(), ratio=0.3, **options, progress=False
        )
        assert lab.PruningPlan.load(plan.save(tmp_path / "plan.json")).origin == plan.origin


@pytest.mark.parametrize("bias", ["refit", "add", "keep"])
def test_large_and_nearly_constant_channels_are_pruned_in_float32(bias):
    """The second moment of 10⁴ ± 1 in float32 sums is off by more than the variance."""
    exact, rough = random_model("opt"), random_model("opt")
    for model in (exact, rough):
        with torch.no_grad():
            for layer in model.model.decoder.layers:
                layer.fc1.bias += 1e4
    sizes = {"ratio": 0.5, "sites": ("ffn",), "bias": bias, "progress": False}
    _, found = lab.slimgpt(rough, windows(), **sizes)
    _, expected = lab.slimgpt(exact, windows(), **sizes, dtype=torch.float64)
    assert found.keep["ffn"][0] == expected.keep["ffn"][0] or bias == "keep"
    assert found.origin["error"]["ffn"][0] == pytest.approx(
        expected.origin["error"]["ffn"][0], abs=0.02
    )
