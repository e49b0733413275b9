"""The bridge to lm-eval: its accuracy is ours, on every kind of model, without a network."""

from __future__ import annotations

import copy
import json
import math
import socket

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers.processors import TemplateProcessing

import minigpt_lab as lab

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  cache_dir: {folder}/cache
  data_files:
    train: {folder}/train.jsonl
    test: {folder}/test.jsonl
training_split: train
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 1.5
"""


@pytest.fixture(scope="module")
def items(tiny_domain) -> list[dict]:
    """Which words go on a passage: its own, or those of others."""
    words = [passage.split() for passage in tiny_domain.test if len(passage.split()) > 20]
    endings = [" ".join(own[12:15]) for own in words]
    return [
        {
            "question": " ".join(own[:12]),
            "choices": [endings[index - place] for place in ((0, 1, 2), (1, 0, 2))[index % 2]],
            "answer": index % 2,
        }
        for index, own in enumerate(words)
    ]


@pytest.fixture(scope="module")
def task(tmp_path_factory, items):
    """A task file over local lines."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in (("train", items[:8]), ("test", items[8:])):
        lines = "\n".join(map(json.dumps, rows))
        (folder / f"{name}.jsonl").write_text(lines)
    path = folder / "endings.yaml"
    path.write_text(TASK.format(name="endings", folder=folder))
    return path


@pytest.fixture(scope="module")
def mini(tiny, tiny_domain):
    """Layers of different widths, and fewer tokens."""
    model, tokenizer = tiny
    batches = lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=512)
    found = lab.collect_statistics(model, batches, progress=False)
    plan = lab.contextual_plan(model, found, epsilon_activation=0.05, epsilon_embedding=0.0)
    mini = lab.shrink(model, plan)
    widths = [layer.mlp.up_proj.out_features for layer in mini.model.layers]
    assert len(set(widths)) > 1 and mini.get_input_embeddings().num_embeddings < 1024
    return mini


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refused(*_args, **_options):
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refused)


def own_accuracy(model, tokenizer, items) -> float:
    """Share of questions whose right ending is the likeliest, by one forward pass per ending."""
    words, right = lab.tokenizer_for(model, tokenizer), 0
    for item in items:
        scores = []
        for choice in item["choices"]:
            ids = words(item["question"] + " " + choice, return_tensors="pt")["input_ids"]
            start = len(words(item["question"])["input_ids"])
            with torch.no_grad():
                logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            scores.append(logs.gather(1, ids[0, 1:, None])[start - 1 :].sum().item())
        right += scores.index(max(scores)) == item["answer"]
    return right / len(items)


@pytest.mark.slow
@pytest.mark.parametrize("around", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("kind", ["dense", "mini"])
def test_its_accuracy_is_our_own(kind, around, tiny, mini, task, items):
    model, tokenizer = copy.deepcopy((mini, tiny[1]) if kind == "mini" else tiny)
    given, special = copy.deepcopy(tokenizer), [("<s>", tokenizer.bos_token_id)]
    for words, template in ((tokenizer, around.removesuffix(" </s>")), (given, around)):
        words.backend_tokenizer.post_processor = TemplateProcessing(
            single=template, special_tokens=[*special, ("</s>", tokenizer.eos_token_id)]
        )
    table = lab.benchmark(model, given, task, batch_size=3)
    assert table["metric"].tolist() == ["acc", "acc_norm"]
    row = table.iloc[0]
    expected = own_accuracy(model, tokenizer, items[8:])  # nothing behind the continuation
    assert 0.34 < expected < 1 and row["value"] == pytest.approx(expected)
    assert row["n"] == len(items) - 8 and row["num_fewshot"] == 0 and row["version"] == 1.5
    spread = (expected * (1 - expected) / (row["n"] - 1)) ** 0.5
    assert row["stderr"] == pytest.approx(spread)
    assert (row["low"], row["high"]) == pytest.approx(
        (expected - 1.96 * spread, expected + 1.96 * spread)
    )
    assert row["higher_is_better"] and row["task"] == "endings" and row["precision"] == "float32"


@pytest.mark.slow
def test_tasks_are_files_folders_and_names(tiny, task, items):
    model, tokenizer = tiny
    by_file = lab.benchmark(model, tokenizer, str(task), limit=5)
    rounded = lab.benchmark(model, tokenizer, str(task), limit=5, precision="bfloat16")
    assert {*rounded["precision"]} == {"bfloat16"} and model.dtype == torch.float32
    np.testing.assert_allclose(rounded["value"], by_file["value"], atol=0.21)  # one of five
    assert by_file["n"].tolist() == [5, 5]
    pd.testing.assert_frame_equal(lab.benchmark(model, tokenizer, [task.parent], limit=5), by_file)
    named = lab.benchmark(model, tokenizer, "endings", limit=5, include_path=task.parent)
    pd.testing.assert_frame_equal(named, by_file)


@pytest.mark.slow
def test_examples_come_before_the_question(tiny, task):
    model, tokenizer = tiny
    shots, again = (
        lab.benchmark(model, tokenizer, task, num_fewshot=2, limit=20, seed=1) for _ in range(2)
    )
    pd.testing.assert_frame_equal(shots, again)
    assert shots["num_fewshot"].tolist() == [2, 2]


def test_the_model_is_left_as_it_was(tiny, task):
    model, tokenizer = copy.deepcopy(tiny)
    model.config.use_cache = True
    model.train()
    model.model.layers[0].eval()
    before, pad = copy.deepcopy(model.state_dict()), tokenizer.pad_token
    tokenizer.pad_token = None
    lab.benchmark(model, tokenizer, task, limit=2)
    assert tokenizer.pad_token is None and pad is not None
    assert model.training and not model.model.layers[0].training and model.config.use_cache
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_what_is_not_there_is_named(tiny, task, tmp_path, monkeypatch):
    model, tokenizer = tiny
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (tmp_path / "empty.yaml").write_text("a: 1")
    for tasks, error, words in (
        ("arc_esy", ValueError, "no task 'arc_esy'; did you mean 'arc_easy'"),
        ("xqzw" * 9, ValueError, "see lm_eval ls"),
        ("arc_easy", OSError, "the data of arc_easy cannot be had .* hub, which is out of reach"),
        (tmp_path / "none.yaml", FileNotFoundError, "none.yaml does not exist"),
        (tmp_path / "empty.yaml", ValueError, "empty.yaml defines no task"),
    ):
        with pytest.raises(error, match=words):
            lab.benchmark(model, tokenizer, tasks)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        lab.benchmark(model, tokenizer, "endings", include_path=tmp_path / "none")
    for name, value in (
        ("limit", 0), ("limit", 0.1), ("batch_size", 0), ("num_fewshot", -1), ("seed", -1),
        ("tasks", None), ("tasks", []), ("include_path", 3), ("tokenizer", None),
    ):  # fmt: skip
        given = {"model": model, "tokenizer": tokenizer, "tasks": task, name: value}
        with pytest.raises(ValueError, match=f"{name} is .*; expected "):
            lab.benchmark(**given)


ROLLING = (
    TASK.split("training_split")[0]
    + """
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: bits_per_byte
metadata:
  version: 1
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("special", ["all", "none", "a pad too many"])
def test_a_whole_text_begins_once(tiny, task, items, begins, special):
    """Bits per byte by hand: every token after one that begins the text, none besides."""
    model, tokenizer = copy.deepcopy(tiny)
    path = task.parent / f"rolling_{begins}_{special[0]}.yaml"
    path.write_text(ROLLING.format(name=path.stem, folder=task.parent))
    first = tokenizer.bos_token_id
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", first)]
        )
    if special == "none":
        tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = None
        first = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    elif special == "a pad too many":
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    bits, size = 0.0, 0
    for item in items[8:]:
        ids = [first, *tokenizer(item["question"], add_special_tokens=False)["input_ids"]]
        with torch.no_grad():
            bits += model(input_ids=(row := torch.tensor([ids])), labels=row).loss.item() * (
                len(ids) - 1
            )
        size += len(item["question"].encode())
    found = lab.benchmark(model, tokenizer, path, batch_size=3)
    assert found["value"].item() == pytest.approx(bits / math.log(2) / size, rel=1e-5)
    assert lab.benchmark(model, tokenizer, task, limit=3)["n"].tolist() == [3, 3]


WRITTEN = TASK.replace("multiple_choice", "generate_until").split("doc_to_choice")[0] + (
    """doc_to_target: "{{{{question}}}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
"""
)


@pytest.mark.parametrize("kind", ["choices", "written"])
def test_predictions_that_are_not_finite_are_read_again_in_float32(tiny, task, kind):
    """lm-eval takes NaN for the first choice, the right one of every second question."""
    model, tokenizer = copy.deepcopy(tiny)
    path = task
    if kind == "written":
        path = task.parent / "written.yaml"
        path.write_text(WRITTEN.format(name="written", folder=task.parent))
    expected = lab.benchmark(model, tokenizer, path, limit=4)

    def overflow(_module, _inputs, output):
        return output * float("nan") if output.dtype in spoilt else output

    model.model.layers[0].mlp.down_proj.register_forward_hook(overflow)
    spoilt = (torch.bfloat16,)
    with pytest.warns(UserWarning, match=f"NaN on {path.stem} in bfloat16; all is read again"):
        found = lab.benchmark(model, tokenizer, path, limit=4, precision="bfloat16")
    pd.testing.assert_frame_equal(found, expected)
    spoilt = (torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match=f"the model gives NaN on {path.stem}: check its weights"):
        lab.benchmark(model, tokenizer, path, limit=4)


def test_a_token_that_is_ruled_out_is_no_fault(tiny, task):
    model, tokenizer = copy.deepcopy(tiny)
    unused = torch.tensor([tokenizer.bos_token_id])
    model.lm_head.register_forward_hook(lambda _m, _i, o: o.index_fill(-1, unused, -math.inf))
    assert lab.benchmark(model, tokenizer, task, limit=4)["n"].tolist() == [4, 4]
