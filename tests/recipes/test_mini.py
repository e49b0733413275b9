"""`make_mini`: one call to a small model that reloads; it resumes, and refuses bad input."""

from __future__ import annotations

import copy
import dataclasses
import io
import os
import re
import sys
import time
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from helpers import windows
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

import minigpt_lab as lab
from minigpt_lab import __main__ as command_line
from minigpt_lab import models
from minigpt_lab.compensation import layer_by_layer
from minigpt_lab.models import Anatomy
from minigpt_lab.recipes import mini, timed_run
from minigpt_lab.recovery.texts import training_windows

HOW = {"minutes": 60, "seq_len": 64, "calibration_tokens": 512, "progress": False}
TRAINING = timed_run.TimedRun.training


@pytest.fixture(scope="module")
def general():
    return lab.load_domain("tiny-games")


@pytest.fixture(scope="module", autouse=True)
def few_tokens():
    """Short trials, and so few tokens to train on that a test ends soon."""

    def training(self, *arguments):
        self.known = {"tokens": 2048, "test_tokens": 1024, **self.known}
        return TRAINING(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timed_run, "_TRIAL", 256)
        patch.setattr(timed_run.TimedRun, "training", training)
        yield


@pytest.fixture(scope="module")
def made(tiny, tiny_domain, general, few_tokens, tmp_path_factory):
    folder, before = tmp_path_factory.mktemp("mini") / "run", copy.deepcopy(tiny[0].state_dict())
    result = lab.make_mini(
        *tiny, tiny_domain, size=0.6, general_domain=general, out_dir=folder, gguf="Q8_0", **HOW
    )
    assert all(torch.equal(value, before[name]) for name, value in tiny[0].state_dict().items())
    return result


def test_a_mini_has_its_size_and_reloads(made, tiny, tiny_domain):
    dense = lab.model_size(tiny[0]).stored
    assert 0.55 * dense < lab.model_size(made.model).stored <= 0.6 * dense
    model, tokenizer = lab.load_model(made.folder, device="cpu")
    text = lab.excerpt(tiny_domain.test, tiny[1], max_tokens=1024)
    again = lab.perplexity(model, tokenizer, text, seq_len=64, max_characters=None)
    row = made.table.query("variant == 'mini' and text == 'tiny-law/test'").iloc[0]
    assert again.bits_per_character == pytest.approx(row["bits_per_character"], rel=1e-4)
    assert row["stored"] == lab.model_size(model).stored
    assert row["bytes"] == sum(p.nbytes for p in model.parameters())


def test_its_card_has_the_table(made):
    row = made.table[made.table["variant"] == "mini"].iloc[0]
    assert f"| {row['text']} | mini | {row['perplexity']:.2f} |" in made.card
    assert made.protocol in made.card and "license: apache-2.0" in made.card
    assert re.search(
        r"trained on [\d,]+ tokens, 30% of them general text \(tiny-games\)", made.card
    )
    assert "read in " in made.protocol


def test_its_file_for_llama_cpp_is_of_the_size_and_loss_in_the_table(made):
    row = made.table.query("variant == 'mini, Q8_0'").iloc[0]
    file = made.folder.parent / "mini-Q8_0.gguf"
    assert file.stat().st_size == row["bytes"]
    mini_row = made.table.query("variant == 'mini'").iloc[0]
    assert row["bits_per_character"] == pytest.approx(mini_row["bits_per_character"], rel=0.01)
    assert row["bytes"] < 0.5 * mini_row["bytes"]


def test_the_table_has_every_control_on_both_texts(made):
    table = made.to_frame()
    assert set(table["text"]) == {"tiny-law/test", "tiny-games/test"} and len(table) == 14
    own = table[table["text"] == "tiny-law/test"].set_index("variant")["bits_per_character"]
    assert own["mini"] < own["pruned"] < own["random"]
    assert own["dense, fine-tuned"] < own["dense"] <= own["only trimmed"] + 0.05
    sizes = table.drop_duplicates("variant").set_index("variant")["stored"]
    assert sizes["random"] == pytest.approx(sizes["mini"], rel=0.02)
    pd.testing.assert_series_equal(
        pd.read_csv(made.folder.parent / "table.csv")["perplexity"], table["perplexity"]
    )
    assert "bits per character on tiny-law/test (dense" in repr(made) and len(repr(made)) < 400
    assert "<table" in made._repr_html_() and "passages" not in made._repr_html_()
    points = [c for axis in made.figure().axes for c in axis.containers]
    assert len(points) == 14


@pytest.mark.slow
def test_a_call_goes_on_where_it_was_stopped(tiny, tiny_domain, general, tmp_path, monkeypatch):
    """At every step in turn; steps that are done are not done again."""
    how = {**HOW, "size": 0.7, "general_domain": general, "out_dir": tmp_path / "run"}
    calls = []

    def counted(name, stop):
        real, left = getattr(mini, name), [stop]

        def call(*arguments, **options):
            calls.append(name)
            if left and left.pop():
                raise KeyboardInterrupt
            return real(*arguments, **options)

        monkeypatch.setattr(mini, name, call)

    steps = ("trim_vocabulary", "slimgpt", "recover", "_random", "model_card")
    for name in steps:
        counted(name, True)
        with pytest.raises(KeyboardInterrupt):
            lab.make_mini(*tiny, tiny_domain, **how)
    found = lab.make_mini(*tiny, tiny_domain, **how)
    assert calls.count("slimgpt") == 2 and {*calls} == {*steps}
    again = lab.make_mini(*tiny, tiny_domain, **how)
    assert calls.count("slimgpt") == 2
    pd.testing.assert_frame_equal(again.table, found.table)
    same = map(torch.equal, again.model.state_dict().values(), found.model.state_dict().values())
    assert all(same)
    with pytest.raises(ValueError, match=r"holds a run with another size \(0.7, now 0.6\)"):
        lab.make_mini(*tiny, tiny_domain, **{**how, "size": 0.6})


def stopped(*arguments, **options) -> pd.DataFrame:
    """What `recover` returns after Ctrl-C: the best state so far stands in the model."""
    history = pd.DataFrame({"seconds": [1.0, 2.0]})
    history.attrs["stopped"] = "interrupted"
    return history


@pytest.mark.parametrize("name", ["search/state.json", "recovery/last/model.safetensors"])
def test_the_minutes_of_a_step_that_was_killed_count(name, tmp_path):
    """Up to its last checkpoint; the time between the two calls does not."""
    with tqdm(disable=True) as bar:
        timed_run.TimedRun(tmp_path, {}, 60, bar).enter("prune")
        checkpoint, state = tmp_path / name, tmp_path / "state.json"
        checkpoint.parent.mkdir(parents=True)
        for path, age in ((checkpoint, 3600), (state, 3600 + 90), (tmp_path / "notes.txt", 0)):
            path.touch()
            os.utime(path, (time.time() - age,) * 2)
        os.utime(checkpoint.parent, (time.time() - 3600,) * 2)
        again = timed_run.TimedRun(tmp_path, {}, 60, bar)
        assert 85 < time.monotonic() - again.began < 100
        again.enter("recover")
        assert 85 < timed_run.TimedRun(tmp_path, {}, 60, bar).known["seconds"] < 100


def test_an_interrupted_training_ends_the_call(tiny, tiny_domain, general, tmp_path, monkeypatch):
    """Or half a training would be measured, saved and taken for the whole one."""
    how = {**HOW, "size": 0.6, "general_domain": general, "out_dir": tmp_path, "gguf": "Q8_0"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mini, "recover", stopped)
        lab.make_mini(*tiny, tiny_domain, **how)
    assert {path.name for path in tmp_path.iterdir()} == {"pruned", "pruning", "state.json"}
    assert lab.make_mini(*tiny, tiny_domain, **how).table["variant"].nunique() == 7


def test_an_interrupted_trial_plans_nothing(tiny, tiny_domain, tmp_path, monkeypatch):
    run = timed_run.TimedRun(tmp_path, {}, 10, tqdm(disable=True))
    run.known["reading"] = 5e-4
    monkeypatch.setattr(timed_run, "recover", stopped)
    with pytest.raises(KeyboardInterrupt):
        TRAINING(run, [(*tiny, {})], tiny_domain, {"seq_len": 64})
    assert "tokens" not in run.known


@pytest.mark.parametrize("slow", [1, 3])
def test_training_fills_the_minutes_that_measuring_leaves(
    slow, tiny, tiny_domain, tmp_path, monkeypatch
):
    """On a machine whose clock is made up: reading, training twice, evaluations, checkpoints."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])

    def recover(model, tokenizer, domain, *, max_tokens, eval_characters, eval_every, **options):
        now[0] += 2  # made ready
        began, evaluation = now[0], eval_characters * 1e-4
        now[0] += evaluation
        rows = [evaluation]
        for _ in range(max_tokens // eval_every):
            now[0] += slow * eval_every * (3e-3 if "teacher" in options else 2e-3) + evaluation
            rows.append(now[0] - began)
            now[0] += 1  # a checkpoint
        return pd.DataFrame({"seconds": rows})

    bar = tqdm(disable=True)
    monkeypatch.setattr(timed_run, "time", clock)
    monkeypatch.setattr(timed_run, "recover", recover)
    monkeypatch.setattr(timed_run, "tokenize", lambda *_, **__: [{"input_ids": torch.zeros(10**6)}])
    run = timed_run.TimedRun(tmp_path, {}, 10, bar)
    run.known["reading"] = 5e-4
    monkeypatch.setattr(timed_run.TimedRun, "training", TRAINING)
    options = {"seq_len": 64}
    trainings = [(*tiny, {"teacher": tiny[0]}), (*tiny, {})]
    how = run.training(trainings, tiny_domain, options)
    for _, _, own in trainings:
        timed_run.recover(None, None, None, **own, **options, **how)
    assert now[0] == pytest.approx(600 * (1 - timed_run._MEASURING), rel=0.05)


@pytest.mark.slow
def test_a_size_by_its_loss(tiny, tiny_domain, general, tmp_path, monkeypatch):
    # training is another test's
    monkeypatch.setattr(mini, "recover", lambda *_, **__: pd.DataFrame())
    how = {**HOW, "general_domain": general, "out_dir": tmp_path, "vocabulary": False}
    found = lab.make_mini(*tiny, tiny_domain, increase=0.05, general=0, **how)
    assert found.table["stored"].min() < lab.model_size(tiny[0]).stored
    assert {"kl", "agreement"} <= set(found.table) and found.table["kl"].notna().all()


@pytest.mark.slow
def test_all_tokens_stay_where_losing_some_exceeds_the_limit(
    tiny, tiny_domain, tmp_path, monkeypatch
):
    """The limit is beside the dense model: here its rare tokens alone are worth more."""
    monkeypatch.setattr(mini, "recover", lambda *_, **__: pd.DataFrame())
    games = lab.load_domain("tiny-games")
    other = dataclasses.replace(
        games, validation=lab.Part("tiny-games", "validation", tuple(tiny_domain.validation))
    )
    how = {**HOW, "general": 0, "general_domain": tiny_domain, "out_dir": tmp_path}
    found = lab.make_mini(*tiny, other, increase=0.02, **how)
    assert len(found.tokenizer) == len(tiny[1])
    assert "only trimmed" not in {*found.table["variant"]}


@pytest.mark.slow
def test_a_searched_mini_may_lose_a_whole_block(tiny, tiny_domain, general, tmp_path, monkeypatch):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    with torch.no_grad():  # attention of layer 1 does nothing
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    quick = partial(lab.search_counts, rounds=1, steps=24)
    monkeypatch.setattr(layer_by_layer, "search_counts", quick)
    how = {**HOW, "general_domain": general, "out_dir": tmp_path, "vocabulary": False}
    how |= {"size": 0.6, "allocation": "search", "drop_blocks": True}
    found = lab.make_mini(model, tokenizer, tiny_domain, **how)
    reloaded, _ = lab.load_model(found.folder, device="cpu")
    assert Anatomy(reloaded).units("attention")[1] == 0
    assert lab.model_size(reloaded).stored <= 0.6 * lab.model_size(model).stored
    assert lab.make_mini(model, tokenizer, tiny_domain, **how).table.equals(found.table)


@pytest.mark.slow
def test_blocks_are_fitted_before_the_training_if_asked(tiny, tiny_domain, general, tmp_path):
    losses = []
    for reconstruct in (False, True):
        how = {**HOW, "general_domain": general, "out_dir": tmp_path / str(reconstruct)}
        found = lab.make_mini(*tiny, tiny_domain, size=0.6, reconstruct=reconstruct, **how)
        losses.append(found.table.query("variant == 'pruned'")["perplexity"].iloc[0])
        assert ("blocks fitted to the dense model" in found.card) == reconstruct
    assert losses[1] < losses[0]


@pytest.mark.slow
def test_what_was_refused_leaves_the_folder_for_the_next_call(tiny, general, tmp_path):
    """As a first-time user meets it: too few minutes, then a size out of reach; general text."""
    how = {**HOW, "general_domain": general, "out_dir": tmp_path}
    with pytest.raises(ValueError, match="minutes is 0.001, too few"):
        lab.make_mini(*tiny, general, size=0.02, **{**how, "minutes": 1e-3})
    with pytest.raises(ValueError, match="the target cannot be met"):
        lab.make_mini(*tiny, general, size=0.02, **how)
    found = lab.make_mini(*tiny, general, size=0.5, **how)
    assert set(found.table["text"]) == {"tiny-games/test"} and "tiny-games/test" in repr(found)
    assert not found.table["variant"].duplicated().any()


def test_what_no_run_left_there_is_not_taken_for_one(tiny, tiny_domain, general, tmp_path):
    for name in ("pruned", "model", "mini-Q8_0.gguf", "table.csv", "measured.json"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(ValueError, match=f"holds {name} and no run of make_mini "):
            lab.make_mini(
                *tiny, tiny_domain, size=0.5, general_domain=general, out_dir=folder, **HOW
            )
        assert (folder / name).read_text() == "mine" and len([*folder.iterdir()]) == 1


def test_a_damaged_state_is_no_run_and_a_refused_call_leaves_anothers(tmp_path):
    with tqdm(disable=True) as bar:
        begun = timed_run.TimedRun(tmp_path, {"size": 0.6}, 60, bar)
        begun.enter("prune")
        again = timed_run.TimedRun(tmp_path, {"size": 0.6}, 60, bar)
        for run, stays in ((again, True), (begun, False)):
            with pytest.raises(ValueError), run.given_up_unless(tmp_path / "pruned"):
                raise ValueError("refused")
            assert (tmp_path / "state.json").exists() == stays
        begun.enter("prune")
        (tmp_path / "pruned").mkdir()
        (tmp_path / "state.json").write_text("{")
        with (
            pytest.warns(UserWarning),
            pytest.raises(ValueError, match="its state.json is damaged"),
        ):
            timed_run.TimedRun(tmp_path, {"size": 0.5}, 60, bar)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_the_training_holds_no_more_than_its_share_of_general_text(
    share, tiny, tiny_domain, general, tmp_path
):
    """A planned training can always be made, however much time there is."""
    few = general.train[: len(general.train) // 8]
    short = dataclasses.replace(general, train=lab.Part("tiny-games", "train", tuple(few)))
    with tqdm(disable=True) as bar:
        run = timed_run.TimedRun(tmp_path, {}, 1e4, bar)
    run.known |= {"tokens": 10**7, "reading": 1e-9}
    options = {"seq_len": 64, "general": short, "generality": share}
    planned = TRAINING(run, [(*tiny, {})], tiny_domain, options)
    windows = training_windows(tiny[1], tiny_domain, short, share, 64, planned["max_tokens"])
    trained = windows.numel() * planned["epochs"]
    assert 0.7 * run.known["trained"] < trained < 1.05 * run.known["trained"]
    assert planned["epochs"] == pytest.approx(4, abs=0.01)
    how = {**HOW, "size": 0.5, "general_domain": short, "general": share, "out_dir": tmp_path / "a"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timed_run, "_TRIAL", 2048)
        with pytest.raises(ValueError, match="tiny-games/train has .* shortest training"):
            lab.make_mini(*tiny, tiny_domain, **how)


@pytest.mark.slow
def test_a_mini_of_the_general_text_has_nothing_else_mixed_in(tiny, general, tmp_path):
    found = lab.make_mini(*tiny, general, size=0.7, general_domain=general, out_dir=tmp_path, **HOW)
    assert "0% of them general text" in found.card


def test_a_bfloat16_model_is_measured_as_its_file(tiny, tiny_domain, general, tmp_path):
    model = copy.deepcopy(tiny[0]).bfloat16()
    how = {**HOW, "size": 0.6, "general_domain": general, "out_dir": tmp_path, "gguf": "Q8_0"}
    found = lab.make_mini(model, tiny[1], tiny_domain, vocabulary=False, **how)
    assert found.model.dtype == torch.bfloat16 and "read in float32" in found.protocol
    assert {*found.table["precision"]} == {"float32"}


def test_bad_input_is_refused_before_the_work(tiny, tiny_domain, general, tmp_path, monkeypatch):
    monkeypatch.setattr(mini, "slimgpt", None)
    how = {**HOW, "general_domain": general, "out_dir": tmp_path}
    short = {
        part: dataclasses.replace(tiny_domain, **{part: lab.Part("tiny-law", part, ("A word.",))})
        for part in ("calibration", "train", "validation", "test")
    }
    few = tuple(tiny_domain.calibration[:2])
    few = dataclasses.replace(tiny_domain, calibration=lab.Part("tiny-law", "calibration", few))
    brief = {"calibration_tokens": 256, "seq_len": 512}
    namesake = dataclasses.replace(general, name="tiny-law")
    for domain, options, words in (
        (tiny_domain, {}, "give exactly one of size, increase; got none"),
        (tiny_domain, {"size": 0.5, "increase": 0.1}, "give exactly one of size, increase"),
        (tiny_domain, {"size": 1.5}, "size is 1.5; expected a number above 0 and below 1"),
        (tiny_domain, {"size": 0.5, "minutes": 0}, "minutes is 0; expected a number above 0"),
        (tiny_domain, {"size": 0.5, "minutes": 1e-3}, "minutes is 0.001, too few: pruning and a"),
        (tiny_domain, {"size": 0.5, "general": 1}, "general is 1; expected"),
        (tiny_domain, {"size": 0.5, "drop_blocks": True}, "only a search chooses which"),
        (tiny_domain, {"size": 0.5, "gguf": "Q9"}, "gguf is 'Q9'; expected one of"),
        *((each, {"size": 0.5}, f"tiny-law/{part} has .* less") for part, each in short.items()),
        (few, {"size": 0.5}, "tiny-law/calibration has .* tokens; to prune .* give .* times as"),
        (general, {"size": 0.5, "general_domain": short["train"]}, "tiny-law/train has .* less"),
        (tiny_domain, {"size": 0.5, **brief}, "max_tokens is 256, less than one window"),
        (namesake, {"size": 0.5, "general_domain": tiny_domain}, "both called 'tiny-law'"),
    ):
        with pytest.raises(ValueError, match=words):
            lab.make_mini(*tiny, domain, **{**how, **options})
    scores = lab.score(tiny[0], "magnitude", sites=("ffn",))
    plan = lab.plan_from_scores(tiny[0], scores, ratio=0.2)
    with lab.masked(tiny[0], plan), pytest.raises(ValueError, match="mask"):
        lab.make_mini(*tiny, tiny_domain, size=0.5, **how)
    with pytest.raises(TypeError, match="domain is 'law'; expected a Domain"):
        lab.make_mini(*tiny, "law", size=0.5)


@pytest.mark.slow
def test_the_command_makes_one_of_a_folder_of_texts(tmp_path, monkeypatch, capsys, general):
    monkeypatch.setattr(mini, "load_domain", lambda name: general)
    texts = tmp_path / "my texts"
    texts.mkdir()
    passages = [text for part in lab.load_domain("tiny-law").parts.values() for text in part]
    for number in range(8):
        (texts / f"{number}.txt").write_text("\n\n".join(passages[number::8]))
    out = tmp_path / "out"
    command = f"make --model tiny-llama --size 0.7 --minutes 60 --out {out} --domain".split()
    monkeypatch.setattr(sys, "argv", ["minigpt_lab", *command, str(texts)])
    command_line.main()
    printed = capsys.readouterr().out
    assert "dense, fine-tuned" in printed and f"in {out / 'model'}" in printed
    model, tokenizer = lab.load_model(out / "model", device="cpu")
    assert lab.generate(model, tokenizer, "The court", max_new_tokens=3)
    refused = [*sys.argv, "--drop-blocks"]
    monkeypatch.setattr(sys, "argv", refused)
    with pytest.raises(SystemExit, match="error: .*only a search chooses which"):
        command_line.main()
    asked = {"all_tokens": True, "allocation": "search", "drop_blocks": True, "reconstruct": True}
    given = command_line._parser().parse_args(
        "make --domain x --all-tokens --allocation search --drop-blocks --reconstruct".split()
    )
    assert asked.items() <= vars(given).items()


@pytest.mark.slow
def test_the_same_command_goes_on_where_the_run_lies_beside_the_texts(
    tmp_path, monkeypatch, capsys, general
):
    monkeypatch.setattr(mini, "load_domain", lambda name: general)
    passages = [text for part in lab.load_domain("tiny-law").parts.values() for text in part]
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text("\n\n".join(passages[number::8]))
    monkeypatch.chdir(tmp_path)
    command = "make --model tiny-llama --size 0.7 --domain .".split()
    monkeypatch.setattr(sys, "argv", ["minigpt_lab", *command])
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="the same command"):
        patch.setattr(mini, "recover", stopped)
        command_line.main()
    pruned = next(tmp_path.glob("runs/mini/*/pruned/model.safetensors"))
    written = pruned.stat().st_mtime_ns
    command_line.main()
    assert "bits per character" in capsys.readouterr().out
    assert pruned.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--size 0.5 --increase 0.1", "give exactly one of size, increase"),
        ("", "give exactly one of size, increase; got none"),
        ("--size 1", "size is 1.0; expected a number above 0 and below 1"),
        ("--increase 0", "increase is 0.0; expected a number above 0"),
        ("--size 0.5 --gguf Q4_K_M", "gguf is 'Q4_K_M'; expected one of"),
        ("--size 0.5 --minutes -1", "minutes is -1.0; expected"),
        ("--size 0.5 --seq-len 2", "seq_len is 2; expected"),
        ("--size 0.5 --calibration-tokens 2", "calibration_tokens is 2; expected"),
        ("--size 0.5 --drop-blocks", "only a search chooses which"),
        ("--size 0.5 --domain notes.csv", "say which column holds the text"),
        ("--size 0.5 --domain notes.csv --column titel", "no column 'titel'; did you mean 'title'"),
    ],
)
def test_the_command_refuses_before_it_loads_a_model(given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pd.DataFrame({"title": ["One."], "body": ["A word."]}).to_csv("notes.csv", index=False)
    monkeypatch.setattr(models, "load_model", None)
    argv = ["minigpt_lab", "make", "--domain", "tiny-law", *given.split()]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match=f"error: .*{words}"):
        command_line.main()


def test_the_minutes_on_the_bar_go_on_within_a_step(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timed_run, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(timed_run, "_REDRAW", 0.01)
    with tqdm(total=2, file=io.StringIO()) as bar:
        with timed_run.TimedRun(tmp_path, {}, 60, bar) as run:
            run.enter("prune")
            assert bar.postfix == "0.0 min gone, 60.0 to go"
            now[0], last = 1500.0, time.monotonic() + 60
            while "25.0 min gone, 35.0 to go" not in bar.postfix and time.monotonic() < last:
                time.sleep(0.01)
            assert bar.postfix == "25.0 min gone, 35.0 to go" and bar.desc == "prune"
            assert bar.n == 0
        assert not run._clock.is_alive()


@pytest.mark.parametrize("size", [0.55, 0.5])
def test_the_control_has_the_size_of_the_mini_where_heads_are_few(size):
    """Three key/value groups in a layer, as SmolLM2 has: whole heads alone would miss it."""
    shape = {"vocab_size": 200, "hidden_size": 144, "intermediate_size": 384, "head_dim": 16}
    shape |= {"num_hidden_layers": 8, "num_attention_heads": 9, "num_key_value_heads": 3}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, tie_word_embeddings=True))
    target = round(size * model.num_parameters())
    how = {"allocation": "uniform", "multiple_of": {"ffn": 32}, "progress": False}
    pruned, _ = lab.slimgpt(model, windows(count=3), parameters=target, **how)
    control = mini._random(model, pruned.num_parameters(), 0)
    assert control.num_parameters() == pytest.approx(pruned.num_parameters(), rel=0.01)
