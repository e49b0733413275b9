"""Arguments are taken as numbers whoever made them, and refused in one sentence."""

import copy
import json
import threading

import numpy as np
import pytest
import torch

from minigpt_lab.checks import (
    Batches,
    Device,
    DictOf,
    Dtype,
    Flag,
    Integer,
    InvalidArgument,
    ListOf,
    Location,
    Model,
    Number,
    OneOf,
    Text,
    Texts,
    checked,
    locked,
)

RATIO = Number(above=0, below=1)
TAKEN = [
    (RATIO, np.float32(0.5), 0.5),
    (RATIO, torch.tensor(0.5), 0.5),
    (RATIO, np.array(0.25), 0.25),
    (Integer(1), np.int64(3), 3),
    (Integer(1), torch.tensor(3), 3),
    (Integer(1), 1e4, 10_000),
    (Integer(0) | None, None, None),
    (Integer(-1) | OneOf(["all"]), "all", "all"),
    (Flag(), np.bool_(True), True),
    (Text(), np.str_("law"), "law"),
    (ListOf(RATIO), np.array([0.25, 0.5]), (0.25, 0.5)),
    (ListOf(Integer(0)), torch.tensor([1, 2]), (1, 2)),
    (ListOf(Integer(0), kind=list), np.array([1, 2]), [1, 2]),
    (ListOf(Integer(0), kind=list), [1, np.int64(2)], [1, 2]),
    (DictOf(Text(), ListOf(RATIO, kind=list)), {"a": (np.float32(0.5),)}, {"a": [0.5]}),
    (DictOf(Text()), {"a": np.int64(3)}, {"a": 3}),
]


@pytest.mark.parametrize(("check", "value", "taken"), TAKEN)
def test_numbers_become_pythons_own(check, value, taken):
    found = check("x", value)
    assert found == taken and type(found) is type(taken)
    assert json.loads(json.dumps(found)) == (list(taken) if isinstance(taken, tuple) else taken)


REFUSED = [
    (RATIO, 1.5, "x is 1.5; expected a number above 0 and below 1"),
    (RATIO, float("nan"), "x is nan; expected"),
    (RATIO, True, "x is True; expected"),
    (RATIO, "0.5", "x is '0.5'; expected"),
    (RATIO, None, "x is None; expected"),
    (RATIO, np.ones(2), r"x is a ndarray of shape \[2\]; expected"),
    (Number(low=0), float("inf"), "x is inf; expected a number of at least 0"),
    (Integer(1), 0, "x is 0; expected a whole number of at least 1"),
    (Integer(1), 2.5, "x is 2.5; expected a whole number"),
    (Integer(1) | None, "many", "x is 'many'; expected a whole number of at least 1 or None"),
    (OneOf(["uniform", "global"]), "unifrom", "did you mean 'uniform'"),
    (OneOf(["uniform"]), 3, "x is 3; expected one of 'uniform'"),
    (Flag(), 1, "x is 1; expected True or False"),
    (Location(), "", "x is ''; expected a path"),
    (ListOf(RATIO), 0.5, "x is 0.5; expected a list"),
    (ListOf(RATIO), [0.5, 2], r"x\[1\] is 2; expected a number above 0 and below 1"),
    (ListOf(Integer(0), kind=list), [1, -1], "the least of x is -1; expected a whole number"),
    (ListOf(Integer(0), kind=list), [1, True], r"x\[1\] is True; expected a whole number"),
    (DictOf(Text(), Integer(0)), {1: 1}, "a key of x is 1; expected a string"),
    (DictOf(Text(), Integer(0)), [1], "expected a dictionary"),
    (Dtype(), "int8", "x is 'int8'; expected a type of weights: 'float32'"),
    (Dtype(), torch.float8_e4m3fn, "expected a type of weights"),
    (Device(), "gpu0", "x is 'gpu0'; expected a device of this machine: 'cpu'"),
    (Device(), "cuda:99", "x is 'cuda:99'; expected a device"),
    (Texts(), 3, "x is 3; expected texts"),
    (Texts(), ["a", 3], "expected texts"),
    (Batches(), {"input_ids": torch.ones(1, 2)}, "put it into a list"),
    (Batches(), [], r"x is \[\]; .* it holds no tokens"),
    (Batches(), [torch.ones(1, 2)], r"x\[0\] is a Tensor of shape \[1, 2\]; expected a mapping"),
    (
        Batches(),
        [{"input_ids": torch.ones(3).long()}],
        r"\[3\]; expected a tensor of whole numbers",
    ),
    (Batches(), [{"input_ids": torch.ones(1, 3)}], "expected a tensor of whole numbers"),
]


@pytest.mark.parametrize(("check", "value", "words"), REFUSED)
def test_what_is_wrong_what_is_allowed_and_no_more_than_a_sentence(check, value, words):
    with pytest.raises(InvalidArgument, match=words) as error:
        check("x", value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [2, -1, 0.5])
def test_a_mask_is_of_ones_and_zeros(value):
    ids = torch.ones(1, 3, dtype=torch.long)
    mask = torch.tensor([[1, 1, value]])
    with pytest.raises(InvalidArgument, match=f"holds {value}; expected 1 for tokens and 0"):
        Batches()("batches", [{"input_ids": ids, "attention_mask": mask}])
    with pytest.raises(InvalidArgument, match="expected 1 for tokens"):
        Batches()("batches", iter([{"input_ids": ids, "attention_mask": mask}]))


def test_checks_stand_beside_the_signature_and_defaults_pass():
    @checked(ratio=RATIO, seed=Integer(0))
    def cut(name, ratio=None, *, seed=0):
        return name, ratio, seed

    assert cut("a") == ("a", None, 0)
    assert cut("a", np.float64(0.5), seed=torch.tensor(2)) == ("a", 0.5, 2)
    with pytest.raises(InvalidArgument, match="seed is -1; expected a whole number of at least 0"):
        cut("a", seed=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sed'"):
        cut("a", sed=1)


def test_a_model_that_may_be_left_out_is_held_and_checked_like_any_other(tiny):
    model = copy.deepcopy(tiny[0])
    taken = []

    @checked(dense=Model() | None)
    def look(dense=None):
        def other():
            with locked(model):
                taken.append(True)

        thread = threading.Thread(target=other, daemon=True)
        thread.start()
        thread.join(0.2)
        return list(taken), thread

    before, thread = look(model)
    thread.join(60)
    assert before == [] and taken == [True]
    assert look(None)[1] is not None
    with pytest.raises(InvalidArgument, match="its weights are torch.int8"):
        model.lm_head.weight = torch.nn.Parameter(
            torch.zeros(2, 2, dtype=torch.int8), requires_grad=False
        )
        look(model)
