"""Exercises: asked once, solved, and helpful about whatever a student may write."""

from __future__ import annotations

import ast
import re
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from helpers import random_model
from hypothesis import given
from hypothesis import strategies as st

import minigpt_lab as lab
from minigpt_lab.exercises.checking import EXERCISES
from minigpt_lab.exercises.verdicts import KINDS, Answer
from minigpt_lab.models.anatomy import Anatomy

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def asked(path: Path) -> dict[str, ast.Call]:
    """Exercise to its ``lab.check`` call, of a notebook's code cells."""
    found = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code" or "lab.check(" not in cell.source:
            continue
        (call,) = (
            node
            for node in ast.walk(ast.parse(cell.source))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "lab.check"
        )
        if path.stem != "solutions":  # running all cells of a fresh notebook answers nothing
            stub = "    return ...  #" if "def " in cell.source else "answer = None  #"
            assert stub in cell.source, cell.id
        found[call.args[0].value] = call
    return found


def test_exercises_say_how_hard_they_are_and_one_of_each_notebook_asks_for_a_function():
    for path in NOTEBOOKS[:-1]:
        cells = nbformat.read(path, as_version=4).cells
        places = [i for i, cell in enumerate(cells) if "lab.check(" in cell.source]
        for number, place in enumerate(places, 1):
            head = rf"\*\*{number}\.\*\* (●○○|●●○|●●●) \d+ min\. "
            assert re.search(head, cells[place - 1].source), (path.stem, number)
        kinds = [EXERCISES[name].kind for name in asked(path)]
        assert "function" in kinds, path.stem


def test_the_first_cell_tells_time_needs_and_gain():
    form = r"\*\*Time:\*\* [^*]*(?:minutes|an hour)[^*]*, and (\d+) for the exercises\. "
    form += r"\*\*You should know\*\* .+\. \*\*Afterwards you can\*\* .+\."
    for path in NOTEBOOKS[:-1]:
        first, *cells = nbformat.read(path, as_version=4).cells
        told = re.search(form, first.source)
        asked_for = [re.findall(r"^\*\*\d\.\*\* \S+ (\d+) min\. ", c.source, re.M) for c in cells]
        assert told, path.stem
        assert int(told[1]) == sum(int(n) for some in asked_for for n in some), path.stem


def test_every_exercise_is_asked_once_and_solved():
    names = [name for path in NOTEBOOKS for name in asked(path) if path.stem != "solutions"]
    assert sorted(names) == sorted(EXERCISES)
    assert list(asked(NOTEBOOKS[-1])) == names  # in the same order
    for path in NOTEBOOKS:
        for name, call in asked(path).items():
            named = {keyword.arg for keyword in call.keywords} - {None}
            needed = set(EXERCISES[name].parameters)
            starred = any(keyword.arg is None for keyword in call.keywords)
            assert named <= needed if starred else named == needed, (path.stem, name)


ENDLESS = [
    "from minigpt_lab.exercises import functions\n"
    "functions.LIMIT = 0.3\n"
    "def endless(W, X):\n    while True:\n        W = W + 0\n"
    'lab.check("wanda scores", endless)',
    'lab.check("wanda scores", wanda_scores)',
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "domains", [["tiny-law", "tiny-games", "tiny-medical"], ["tiny-games", "tiny-economics"]]
)
def test_every_solution_is_right(domains, tmp_path):
    path = NOTEBOOKS[-1]
    assert path.stem == "solutions"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in ENDLESS]
    nbformat.write(notebook, tmp_path / "asked.ipynb")
    executed = papermill.execute_notebook(
        str(tmp_path / "asked.ipynb"), str(tmp_path / path.name), {"domain_names": domains},
        kernel_name="python3",
        cwd=str(tmp_path), progress_bar=False, extra_arguments=["--log-level=ERROR"],
    )  # fmt: skip
    *cells, looped, after = executed.cells
    assert "ran for more than 0.3 s" in looped.outputs[-1].data["text/plain"]
    assert "✓ wanda scores" in after.outputs[-1].data["text/plain"]  # the kernel lives on
    said = {
        cell.id: cell.outputs[-1].data["text/plain"]
        for cell in cells
        if cell.cell_type == "code" and "lab.check(" in cell.source
    }
    assert len(said) == len(EXERCISES)
    assert not {key: line for key, line in said.items() if not line.startswith("✓")}


@pytest.mark.parametrize("name", EXERCISES)
@pytest.mark.parametrize("empty", [None, ...])
def test_no_answer_yet_is_no_error(name, empty):
    verdict = lab.check(name, empty, **dict.fromkeys(EXERCISES[name].parameters))
    assert verdict.right is None and not verdict
    assert str(verdict).startswith(f"· {name}: not answered yet; expected is a ")


def test_what_is_no_answer_but_a_slip_of_the_call_is_an_error():
    with pytest.raises(ValueError, match="no exercise 'chance'; did you mean 'chance "):
        lab.check("chance", 0.2, share=0.3)
    with pytest.raises(TypeError, match="'chance overlap' is computed from share; got q"):
        lab.check("chance overlap", 0.2, q=0.3)


UNKNOWN = {"text": "a", "recovered": False, "cut": ["a", "b"], "perplexity": 2.0,
           "difference": np.nan}  # fmt: skip
LEVELS = {"text": "law/test", "variant": ["dense", "mild", "mild, full"], "perplexity": 7.0}


@pytest.mark.parametrize(
    ("name", "held", "reason"),
    [
        ("recovered share", {"table": pd.DataFrame(LEVELS), "text": "law/test", "pruned": "mild",
                             "recovered": "mild, lora"}, "there is no 'mild, lora'"),
        ("recovered share", {"table": pd.DataFrame(LEVELS), "text": "law/test", "pruned": "mild",
                             "recovered": "mild, full"}, "zero"),  # nothing was lost
        ("price as a factor", {"table": pd.DataFrame(UNKNOWN), "cut": "b", "text": "a"},
         "would be nan"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_a_verdict(name, held, reason):
    verdict = lab.check(name, 0.5, **held)
    assert verdict.right is None and "\n" not in verdict.message
    assert f"{name}: cannot be computed from what was measured here: " in verdict.message
    assert reason in verdict.message


RIGHT = 0.3 / 1.7


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (RIGHT, "right"),
        (round(RIGHT, 3), "right"),
        (np.float32(RIGHT), "right"),
        (torch.tensor(RIGHT), "right"),
        (pd.Series([RIGHT]), "right"),
        (0.09, "this is the expected intersection; divide it by the expected union"),
        (17.647, "this is a percentage; divide by 100"),
        (1 - RIGHT, "this is the rest, 1 minus what is asked for"),
        (0.05, "too small, by a factor of about 3.5"),
        (0.18, "close, but too large"),
        (0, "too small"),
        (3, "a share lies between 0 and 1, this is 3"),
        (float("nan"), "answer is nan; expected a number"),
        ("0.176", "answer is '0.176'; expected a number"),
        (True, "answer is True; expected a number"),
        (np.bool_(False), "answer is False; expected a number"),
        ([0.1, 0.2], "answer is [0.1, 0.2]; expected a number"),
        (np.zeros((2, 3)), "answer is a ndarray of shape [2, 3]; expected a number"),
        (pd.DataFrame({"a": [1, 2]}), "answer is a DataFrame; expected a number"),
        (lab.perplexity, "answer is a function; expected a number"),
        (object(), "answer is a object; expected a number"),
        (1j, "answer is a complex; expected a number"),
        (10**400, "expected a number"),
    ],
)  # fmt: skip
def test_a_share(answer, message):
    verdict = lab.check("chance overlap", answer, share=0.3)
    assert verdict.right == (message == "right") == bool(verdict)
    assert message in verdict.message and "\n" not in str(verdict)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.complex_numbers(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
)


@given(ANYTHING)
def test_no_answer_is_an_exception(answer):
    right = dict.fromkeys(("number", "share"), 0.25) | {"count": 3, "set": {3, 5}}
    right |= dict.fromkeys(("plan", "function"), lambda _: pytest.fail("neither plan nor function"))
    for kind in KINDS:
        problem = Answer(right[kind]).problem(kind, answer)
        assert problem is None or (problem and "\n" not in problem)


def test_numbers_know_their_sign_and_counts_are_whole():
    assert "wrong sign" in Answer(-0.2).problem("number", 0.2)
    assert Answer(-0.2).problem("number", -0.1) == "too large, by a factor of about 2"
    assert Answer(0.0).problem("number", 0.1) == "too large"
    assert Answer(0.0).problem("number", 0.0) is None
    count = partial(Answer(1152).problem, "count")
    assert count(np.int64(1152)) is None and count(1152.0) is None
    assert count(1152.5) == "answer is 1152.5; expected a whole number"
    assert count(1153) == "close, but too large"
    half = Answer(0.5, {"one half of all": 0.25})
    assert half.problem("share", 0.25) == "this is one half of all"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({3, 5, 8}, None),
        ([8, 5, 3, 3], None),
        (np.array([3, 5, 8]), None),
        (pd.Index([3.0, 5.0, 8.0]), None),
        ([np.int32(3), 5, 8], None),
        ({3, 5}, "1 of 3 missing, 8 is one"),
        ({3, 5, 8, 9}, "1 too many, 9 is one"),
        ({5, 9}, "2 of 3 missing, 3 is one; 1 too many, 9 is one"),
        (set(), "3 of 3 missing, 3 is one"),
        ({1, 2}, "this is the other way round"),
        (np.array([False, True]), "answer[0] is False; expected a whole number"),
        ({(0, 3), (0, 5)}, "answer[0] is (0, "),
        ([[3, 5, 8]], "answer[0] is [3, 5, 8]; expected a whole number"),
        (["3"], "answer[0] is '3'; expected a whole number"),
        (3, "answer is 3; expected a list, each item a whole number"),
    ],
)
def test_a_set(answer, message):
    problem = Answer({3, 5, 8}, {"the other way round": {1, 2}}).problem("set", answer)
    assert (problem is None) if message is None else message in problem


def test_a_plan_of_the_wrong_size_shape_or_choice(tiny, tiny_statistics):
    model, _ = tiny
    cut = lab.contextual_plan(model, tiny_statistics, epsilon_activation=0.1)
    held = {"model": model, "statistics": tiny_statistics, "uneven": cut}
    share = sum(cut.removed["ffn"]) / sum(cut.units["ffn"])
    scores = lab.score(model, "contextual", statistics=tiny_statistics, sites=("ffn",))
    stored = cut.predicted_size(model).stored
    assert lab.check("even pruning", lab.plan_from_scores(model, scores, parameters=stored), **held)

    def problem(plan) -> str:
        verdict = lab.check("even pruning", plan, **held)
        assert verdict.right is False
        return verdict.message

    assert "take the same share of each" in problem(cut)
    smaller = lab.contextual_plan(model, tiny_statistics, quantile=share / 2)
    assert "of the parameters of the plan by ε" in problem(smaller)
    at_random = lab.score(model, "random", sites=("ffn",))
    assert "a removed channel is more active" in problem(
        lab.plan_from_scores(model, at_random, parameters=stored)
    )
    heads = lab.score(model, "contextual", statistics=tiny_statistics)
    assert "heads, tokens or single weights" in problem(
        lab.plan_from_scores(model, heads, ratio=0.5)
    )
    other = random_model("llama")
    foreign = lab.contextual_plan(other, _statistics(other), quantile=0.3)
    assert "the model it was made for" in problem(foreign)
    assert problem(0.3) == "even pruning: answer is 0.3; expected a PruningPlan"


def _statistics(model):
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    return lab.collect_statistics(model, [{"input_ids": ids}], progress=False)


def test_a_channel_costs_what_leaves_with_it(model):
    """On every family, gated or not, with biases or without."""
    one = 1.2 / Anatomy(model).units("ffn")[0]
    plan = lab.contextual_plan(model, _statistics(model), quantile=one)
    assert plan.removed["ffn"] == [1, 1, 1]
    size = plan.predicted_size(model)
    cost = (size.dense - size.stored) // 3
    assert lab.check("channel cost", cost, model=model)
    assert lab.check("channels alone", 3 * cost, model=model, plan=plan)
    one_matrix = lab.check("channel cost", model.config.hidden_size, model=model)
    assert "what one of the FFN's matrices loses" in one_matrix.message
    matrices = lab.check("channel cost", cost // model.config.hidden_size, model=model)
    assert "this is the number of matrices" in matrices.message
    assert (
        "the number of channels" in lab.check("channels alone", 3, model=model, plan=plan).message
    )


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda moment, block: torch.linalg.inv(block), None),
        (lambda moment, block: moment, "the error without compensation"),
        (lambda moment, block: block, "invert that block"),
        (lambda moment, block: torch.diag(1 / block.diagonal()), "diagonal of H⁻¹ alone"),
    ],
)
def test_an_exact_loss_and_what_it_is_taken_for(answer, message):
    torch.manual_seed(0)
    x = torch.randn(5, 60, dtype=torch.float64)
    x[4] += x[0] + x[1]
    weight, hessian, leaves = torch.randn(3, 5, dtype=torch.float64), x @ x.T / 60, [1, 4]
    gone, block = weight[:, leaves], torch.linalg.inv(hessian)[leaves][:, leaves]
    found = torch.trace(gone @ answer(hessian[leaves][:, leaves], block) @ gone.T)
    verdict = lab.check("exact loss", found, W=weight, H=hessian, removed=leaves)
    assert verdict.right == (message is None) and (message or "right") in verdict.message


def test_the_loss_of_the_other_pair_and_the_share_of_the_channels_have_sentences():
    W, H = torch.tensor([[1.0, 2, 3, 4]]), torch.eye(4)
    given = {"W": W, "H": H, "removed": [2, 3]}
    assert lab.check("exact loss", 25, **given)
    assert "the pair that was removed above" in lab.check("exact loss", 5, **given).message
    model = random_model("llama")
    mini = lab.shrink(model, lab.contextual_plan(model, _statistics(model), quantile=0.25))
    kept = sum(Anatomy(mini).units("ffn")) / sum(Anatomy(model).units("ffn"))
    said = lab.check("stored share", kept, model=model, mini=mini).message
    assert "this is the share of the FFN channels" in said


def test_the_tokens_that_invert_a_moment(model):
    channels = Anatomy(model).units("ffn")[0]
    assert lab.check("tokens to invert", channels, model=model)
    assert "one too few" in lab.check("tokens to invert", channels - 1, model=model).message


@pytest.mark.parametrize("name", EXERCISES)
@pytest.mark.parametrize("held", [None, 3, "x", (), pd.DataFrame(), np.zeros(3), float("nan")])
def test_an_exercise_given_anything_answers_with_a_verdict(name, held):
    verdict = lab.check(name, 0.5, **dict.fromkeys(EXERCISES[name].parameters, held))
    assert not verdict and "\n" not in str(verdict)


@pytest.mark.parametrize("name", [None, 3, [], "", float("nan")])
def test_an_exercise_has_a_name(name):
    with pytest.raises(ValueError, match="no exercise"):
        lab.check(name, 1)
