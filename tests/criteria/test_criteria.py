"""Criteria: numbers against naive computations, and the registry."""

from __future__ import annotations

import copy
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import CONFIGS, random_model
from transformers import AutoModelForCausalLM

import minigpt_lab as lab
from minigpt_lab.models import ALL_SITES, Anatomy, set_units


@pytest.fixture(autouse=True)
def _registry():
    """Criteria that a test adds go when it ends."""
    before = dict(lab.CRITERIA)
    yield
    lab.CRITERIA.clear()
    lab.CRITERIA.update(before)


def test_magnitude_is_the_sum_over_a_units_weights():
    model = random_model("llama")
    values = lab.score(model, "magnitude", norm="l1").values
    mlp, attention = model.model.layers[1].mlp, model.model.layers[1].self_attn
    weights = [mlp.gate_proj.weight[5], mlp.up_proj.weight[5], mlp.down_proj.weight[:, 5]]
    assert values["ffn"][1][5] == pytest.approx(sum(w.abs().sum().item() for w in weights))
    rows, group = slice(16, 32), slice(8, 16)  # two query heads of 8 to one key/value head
    weights = [
        attention.q_proj.weight[rows], attention.k_proj.weight[group],
        attention.v_proj.weight[group], attention.o_proj.weight[:, rows],
    ]  # fmt: skip
    assert values["attention"][1][1] == pytest.approx(sum(w.abs().sum().item() for w in weights))


def test_query_heads_are_scored_over_all_groups_and_leave_them_alike(probe):
    model = random_model("llama")
    values = lab.score(model, "magnitude", norm="l1", units="balanced_heads").values
    attention = model.model.layers[1].self_attn
    rows = [*range(8, 16), *range(24, 32)]  # the second of the two query heads of both groups
    weights = [attention.q_proj.weight[rows], attention.o_proj.weight[:, rows]]
    assert [*values] == ["ffn", "balanced_heads"]
    expected = sum(w.abs().sum().item() for w in weights)
    assert values["balanced_heads"][1][1] == pytest.approx(expected)
    scores = lab.score(model, "contextual", [{"input_ids": probe}], units="balanced_heads")
    plan = lab.plan_from_scores(model, scores, ratio=0.5)
    assert plan.units["balanced_heads"] == [2, 2, 2] and plan.removed["balanced_heads"] == [1, 1, 1]
    mini = lab.shrink(model, plan)
    assert Anatomy(mini).units("attention") == [2, 2, 2]
    assert (mini.config.num_attention_heads, mini.config.num_key_value_heads) == (2, 2)
    assert mini(input_ids=probe).logits.isfinite().all()


def test_criteria_score_what_uneven_cuts_left(probe):
    model = random_model("phi3")
    keep = {"attention": [[0], [0, 1], [1]], "balanced_heads": [[0, 1], [1], [0]]}
    units = {"attention": [2, 2, 2], "balanced_heads": [2, 2, 2]}
    mini = lab.shrink(model, lab.PruningPlan("", units, keep))
    for name in ("magnitude", "contextual", "random"):
        values = lab.score(mini, name, [{"input_ids": probe}], sites=ALL_SITES).values
        assert [len(v) for v in values["attention"]] == [1, 2, 1]
        assert [len(v) for v in values["balanced_heads"]] == [2, 1, 1]


def test_magnitude_of_the_consumer_is_a_norm_per_column():
    model = random_model("llama")
    values = lab.score(model, "magnitude", scope="consumer").values
    columns = model.model.layers[1].self_attn.o_proj.weight[:, 16:32]
    assert values["attention"][1][1] == pytest.approx(columns.norm(dim=0).sum().item(), rel=1e-5)


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "prod", "last"])
def test_structures_are_reduced_as_asked(reduce):
    mlp = (model := random_model("llama")).model.layers[0].mlp
    weights = [mlp.gate_proj.weight.T, mlp.up_proj.weight.T, mlp.down_proj.weight]
    structures = np.stack([w.detach().abs().sum(0).numpy() for w in weights])
    last = {"last": lambda found, _axis: found[-1]}
    expected = (last.get(reduce) or getattr(np, reduce))(structures, 0)
    values = lab.score(model, "magnitude", norm="l1", reduce=reduce).values
    np.testing.assert_allclose(values["ffn"][0], expected, rtol=1e-5)


#: Criteria whose scores follow from the model and the text alone, with options that make it so.
DETERMINED = {
    "magnitude": {}, "contextual": {}, "wanda": {}, "fluctuation": {}, "sparsegpt": {},
    "taylor": {"variant": "mix"}, "sensitivity": {"gradient": "backprop"},
}  # fmt: skip


@pytest.mark.parametrize("name", DETERMINED)
def test_scores_move_with_their_units(model, probe, name):
    """Reordering channels changes no output, and no channel's score."""
    model = model.double()  # standardised scores near 0 are all rounding
    channels = Anatomy(model).units("ffn")[0]
    batches = [{"input_ids": probe}]
    order = np.random.default_rng(0).permutation(channels).tolist()
    before = lab.score(model, name, batches, **DETERMINED[name]).values
    anatomy = Anatomy(model)
    whole = {site: [list(range(n)) for n in anatomy.units(site)] for site in before}
    set_units(anatomy, {**whole, "ffn": [order] * 3})
    after = lab.score(model, name, batches, **DETERMINED[name]).values
    for layer in range(3):
        moved = before["ffn"][layer][order]
        np.testing.assert_allclose(after["ffn"][layer], moved, rtol=1e-3, atol=2e-3)
        np.testing.assert_allclose(
            after["attention"][layer], before["attention"][layer], rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("name", DETERMINED)
def test_padding_changes_no_score(model, probe, name, dtype):
    """Wherever it is and whatever id it has: a tokenizer's own need not be one of the model's."""
    model = model.double()
    short = [probe[:1, :8], probe[1:, :10]]
    ids, mask = torch.full((2, 12), -100, dtype=dtype), torch.zeros(2, 12, dtype=torch.long)
    ids[0, :8], mask[0, :8] = short[0][0], 1  # padded on the right
    ids[1, 2:], mask[1, 2:] = short[1][0], 1  # and on the left
    alone = lab.score(model, name, [{"input_ids": row} for row in short], **DETERMINED[name])
    padded = lab.score(model, name, [{"input_ids": ids, "attention_mask": mask}], **DETERMINED[name]
    )  # fmt: skip
    assert alone.n_tokens == padded.n_tokens == 18
    for site, layers in alone.values.items():
        for found, expected in zip(padded.values[site], layers, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_random_is_seeded(model):
    a, b, c = (lab.score(model, "random", seed=seed).to_frame()["score"] for seed in (1, 1, 2))
    assert a.equals(b) and not a.equals(c)


def test_contextual_scores_are_the_statistics(model, probe):
    batches = [{"input_ids": probe}]
    found = lab.collect_statistics(model, batches, progress=False)
    values = lab.score(model, "contextual", batches, sites=("ffn", "attention")).values
    np.testing.assert_allclose(
        values["ffn"][2], found.mean(found.activations[2], "activation", "absolute")
    )
    assert [len(v) for v in values["attention"]] == Anatomy(model).units("attention")
    again = lab.score(model, "contextual", statistics=found).values
    np.testing.assert_array_equal(again["ffn"][0], values["ffn"][0])


def test_a_users_criterion_joins_the_registry(model):
    @lab.criterion("first-units-first")
    def ascending(model, batches=None, statistics=None, *, sites):
        return {site: [np.arange(n) for n in Anatomy(model).units(site)] for site in sites}

    scores = lab.score(model, "first-units-first", sites=("ffn",))
    plan = lab.plan_from_scores(model, scores, ratio=0.25)
    channels = Anatomy(model).units("ffn")[0]
    assert plan.keep["ffn"] == [list(range(channels // 4, channels))] * 3


def test_unknown_names_get_the_nearest(model):
    with pytest.raises(ValueError, match="did you mean 'magnitude'"):
        lab.score(model, "magnitud")
    with pytest.raises(ValueError, match="'head'; expected one of 'ffn'"):
        lab.score(model, "random", sites=("head",))
    with pytest.raises(ValueError, match="units is 'heads'; .* did you mean 'balanced_heads'"):
        lab.score(model, "random", units="heads")
    with pytest.raises(ValueError, match="one query head per key/value group.*units='kv_group'"):
        lab.score(random_model("opt"), "random", units="balanced_heads")
    with pytest.raises(ValueError, match="needs batches"):
        lab.score(model, "contextual")


def test_every_file_with_a_criterion_is_imported():
    files = Path(lab.criteria.__file__).parent.glob("*.py")
    written = [re.findall(r'^@criterion\("(.+)"\)', path.read_text(), re.M) for path in files]
    assert sorted(itertools.chain(*written)) == sorted(lab.CRITERIA)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "gives no ffn scores that are numbers; expected one array"),
        ({"attention": []}, "gives no ffn scores"),
        ({"ffn": [[0]], "attention": [[0]]}, "gives other ffn scores than one for each unit"),
        ({"ffn": [[0]] * 3, "attention": []}, r"gives other ffn .*; expected arrays of length \["),
    ],
)
def test_scores_for_other_units_are_refused(model, given, message):
    lab.criterion("short")(lambda *_, sites: given)
    with pytest.raises(ValueError, match=f"the short criterion {message}"):
        lab.score(model, "short")


def test_scores_may_be_lists(model):
    lab.criterion("listed")(
        lambda model, *_, sites: {s: [[*range(n)] for n in Anatomy(model).units(s)] for s in sites}
    )
    scores = lab.score(model, "listed")
    assert lab.plan_from_scores(model, scores, ratio=0.25, allocation="global-standardised")


def test_scores_that_are_no_numbers_are_refused(model):
    @lab.criterion("lost")
    def lost(model, batches=None, statistics=None, *, sites):
        return {site: [np.full(n, np.nan) for n in Anatomy(model).units(site)] for site in sites}

    with pytest.raises(ValueError, match="the lost criterion gives NaN"):
        lab.score(model, "lost")


def test_a_criterion_that_changes_the_model_is_refused(model):
    @lab.criterion("vandal")
    def vandal(model, batches=None, statistics=None, *, sites):
        with torch.no_grad():
            next(model.parameters())[0] += 1
        return {}

    with pytest.raises(RuntimeError, match="vandal criterion changed"):
        lab.score(model, "vandal")


def test_saved_scores_are_the_same_and_know_their_model(
    tmp_path, tiny, tiny_statistics, monkeypatch
):
    model, _ = tiny
    scores = lab.score(model, "magnitude", statistics=tiny_statistics, norm="l1")
    again = lab.Scores.load(scores.save(tmp_path / "scores.safetensors"))
    assert again.to_frame().equals(scores.to_frame()) and again.options == {"norm": "l1"}
    assert (again.domain, again.n_tokens) == ("tiny-law/calibration", 512)
    assert again.content_hash == tiny_statistics.content_hash
    expected = lab.plan_from_scores(model, scores, ratio=0.2).keep
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", None)  # a pass would fail
        assert lab.plan_from_scores(model, again, ratio=0.2).keep == expected
    with pytest.raises(ValueError, match="of another model"):
        lab.plan_from_scores(random_model("llama"), again, ratio=0.2)
    (tmp_path / "scores.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ValueError, match="no readable scores"):
        lab.Scores.load(tmp_path / "scores.safetensors")


def test_the_cache_finds_the_same_question_only(tmp_path, model, probe):
    passes = []

    @lab.criterion("counted")
    def counted(model, batches=None, statistics=None, *, sites, power=1):
        passes.append(power)
        return {site: [np.arange(n) ** power for n in Anatomy(model).units(site)] for site in sites}

    def ask(tokens=probe, sites=("ffn",), **options):
        batches = ({"input_ids": rows} for rows in [tokens])  # read once, yet hashed and used
        return lab.score(model, "counted", batches, sites=sites, cache=tmp_path, **options)

    first, second = ask(), ask()
    assert len(passes) == 1 and first.to_frame().equals(second.to_frame())
    assert first.n_tokens == probe.numel()
    ask(power=2), ask(probe + 1), ask(sites=("attention",))
    assert len(passes) == 4
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    ask()
    assert len(passes) == 5
    lab.score(model, "counted", sites=("ffn",))
    assert len(passes) == 6 and len(list(tmp_path.iterdir())) == 5


def test_quantised_models_are_refused(model):
    linear = next(iter(Anatomy(model).linears()))[2]
    packed = torch.zeros(linear.weight.shape, dtype=torch.uint8)
    linear.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match="its weights are torch.uint8"):
        lab.score(model, "magnitude")


def test_models_of_one_layer_have_scores_too(probe):
    config = copy.deepcopy(CONFIGS["llama"])
    config.num_hidden_layers = 1
    model = AutoModelForCausalLM.from_config(config).eval()
    for name in lab.CRITERIA:
        scores = lab.score(model, name, [{"input_ids": probe}])
        plan = lab.plan_from_scores(model, scores, ratio=0.5)
        assert list(plan.removed.values()) == [[10], [1]]


def tensors(model, **options):
    total = Anatomy(model).units("ffn")
    return {"ffn": [torch.ones(n, requires_grad=True, **options) for n in total]}


@pytest.mark.parametrize(
    ("gives", "words"),
    [
        (lambda model: tensors(model), None),
        (lambda model: tensors(model, dtype=torch.bfloat16), None),
        (lambda model: {"ffn": [["a"] * 20] * 3}, "mine criterion gives no ffn scores that are"),
        (lambda model: {"ffn": None}, "mine criterion gives no ffn scores"),
        (lambda model: {"ffn": [np.full(20, np.nan)] * 3}, "mine criterion gives NaN"),
        (lambda model: float("x"), "the mine criterion: could not convert"),
    ],
)
def test_what_a_users_criterion_gives_is_checked_and_named(gives, words):
    model = random_model("llama")
    lab.criterion("mine")(lambda model, *_, sites: gives(model))
    if words is None:
        scores = lab.score(model, "mine", sites=("ffn",))
        assert lab.plan_from_scores(model, scores, ratio=0.5)
        return
    with pytest.raises(ValueError, match=words) as error:
        lab.score(model, "mine", sites=("ffn",))
    assert "\n" not in str(error.value)


def test_scores_changed_by_hand_give_no_plan():
    model = random_model("llama")
    scores = lab.score(model, "random")
    for ffn in ([np.full(20, np.nan)] * 3, [np.ones(19)] * 3, [np.ones(20)] * 2):
        with pytest.raises(ValueError, match="the random criterion gives"):
            lab.plan_from_scores(model, replace(scores, values={"ffn": ffn}), ratio=0.5)


def test_numbers_of_numpy_and_torch_end_up_as_plain_ones():
    model = random_model("llama")
    scores = lab.score(model, "random", seed=np.int64(3))
    plan = lab.plan_from_scores(
        model, scores, ratio=np.float32(0.5), keep_layers=np.array([1, 0]), allocation=torch.ones(3)
    )
    assert json.loads(json.dumps(plan.to_dict())) == plan.to_dict()
    with pytest.raises(
        ValueError, match="the random criterion: .* unexpected keyword argument 'sed'"
    ):
        lab.score(model, "random", sed=3)
