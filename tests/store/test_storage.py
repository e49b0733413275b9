"""Nothing is lost: folders and files of a user, what was there before a kill, a finished pass."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import warnings
import zipfile
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import full_disk, random_model

import minigpt_lab as lab
from minigpt_lab import figures
from minigpt_lab.calibration.moments import FeatureSums
from minigpt_lab.checks.paths import UnusablePath, writable_file, writable_folder
from minigpt_lab.compensation.workspace import Workspace, discard
from minigpt_lab.experiments import reports
from minigpt_lab.experiments.records import RECORD, discard_run, own_files, write_record
from minigpt_lab.experiments.runs import install_run, run_notebook, run_once
from minigpt_lab.models import by_name as models
from minigpt_lab.models import conversion, saving
from minigpt_lab.models.loading import SIDECAR
from minigpt_lab.recovery.checkpoints import discard_checkpoint, last_complete, rotate
from minigpt_lab.store import (
    ResultCache,
    WriteFailed,
    atomic,
    atomic_write,
    cache_folder,
    cached,
    clear_scratch,
    packages,
    read_archive,
)
from minigpt_lab.store.shards import Shards


@pytest.fixture(scope="module")
def things(tiny, tiny_domain, tiny_statistics):
    """A model, its tokenizer, batches, and what can be saved."""
    model, tokenizer = tiny
    batches = list(lab.tokenize(tiny_domain.calibration, tokenizer, seq_len=64, max_tokens=256))
    return {
        "model": model,
        "tokenizer": tokenizer,
        "domain": tiny_domain,
        "batches": batches,
        "statistics": tiny_statistics,
        "scores": lab.score(model, "magnitude"),
        "plan": lab.contextual_plan(model, tiny_statistics, quantile=0.3),
    }


def figure():
    return plt.figure(figsize=(1, 1))


#: Every call that writes a file, given its path.
FILES = {
    "plan": lambda t, path: t["plan"].save(path),
    "statistics": lambda t, path: t["statistics"].save(path),
    "scores": lambda t, path: t["scores"].save(path),
    "collect": lambda t, path: lab.collect_statistics(
        t["model"], t["batches"], path=path, progress=False
    ),
    "ledger": lambda _, path: ResultCache(path).get(["a"], lambda: {"x": 1}),
    "figure": lambda _, path: figures.save_figure(figure(), f"{path}.png", pd.DataFrame()),
    "table": lambda _, path: results_csv(path),
}
#: Every call that works in a folder, given its path.
FOLDERS = {
    "model": lambda t, path: lab.save_model(t["model"], t["tokenizer"], path),
    "score": lambda t, path: lab.score(t["model"], "magnitude", cache=path),
    "slimgpt": lambda t, path: lab.slimgpt(
        t["model"], t["batches"], ratio=0.3, out_dir=path, progress=False
    ),
    "recover": lambda t, path: lab.recover(
        copy.deepcopy(t["model"]), t["tokenizer"], t["domain"], max_tokens=512, seq_len=64,
        eval_characters=500, out_dir=path, progress=False,
    ),
    "record": lambda _, path: write_record(Path(path), {"notebook": "x"}),
    "finished": lambda _, path: Workspace(out_dir=path),
    "shards": lambda _, path: Shards("disk", path).update({0: torch.ones(2)}),
}  # fmt: skip


def results_csv(path) -> None:
    with atomic_write(writable_file(path)) as staging:
        pd.DataFrame({"a": [1]}).to_csv(staging)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def users_folder(folder: Path) -> dict[str, bytes]:
    """Make a folder with a user's files, some named as ours might be."""
    (folder / "more").mkdir(parents=True)
    for name in ("notes.txt", "more/thesis.tex", ".hidden"):
        (folder / name).write_text(f"years of work on {name}")
    return snapshot(folder)


def one_sentence(error: BaseException) -> bool:
    return "\n" not in str(error) and len(str(error)) < 700


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("kind", FILES)
def test_a_folder_is_never_replaced_by_a_file(kind, slash, things, tmp_path, monkeypatch):
    monkeypatch.setattr(FeatureSums, "watching", None)  # refused before the pass
    target = tmp_path / ("mine.png" if kind == "figure" else "mine")
    before = users_folder(target)
    with pytest.raises(OSError, match="is no file and never replaced") as error:
        FILES[kind](things, f"{tmp_path / 'mine'}{'' if kind == 'figure' else slash}")
    assert one_sentence(error.value) and snapshot(target) == before
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_file_is_never_replaced_by_a_folder(kind, things, tmp_path):
    (tmp_path / "mine").write_text("years of work")
    for path in (tmp_path / "mine", tmp_path / "mine" / "deeper"):
        with pytest.raises(OSError, match="is no folder|is a file, so") as error:
            FOLDERS[kind](things, str(path))
        assert one_sentence(error.value)
    assert snapshot(tmp_path) == {"mine": b"years of work"}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_with_files_of_a_user_keeps_them(kind, things, tmp_path):
    before = users_folder(tmp_path / "mine")
    with contextlib.suppress(FileExistsError):
        FOLDERS[kind](things, tmp_path / "mine")
    assert before.items() <= snapshot(tmp_path / "mine").items()


FOREIGN = {  # a user's file under the name that a call would write
    "plan": ("plan.json", '{"plan": "learn Greek"}'),
    "plan as text": ("plan", "learn Greek"),
    "statistics": ("statistics.md", "12 apples"),
    "statistics as model": ("model.safetensors", None),
    "scores": ("scores.csv", "1 : 0"),
    "collect": ("notes.txt", "not to be lost"),
    "collect as model": ("model.safetensors", None),
    "ledger": ("notes.txt", "not to be lost"),
    "ledger as texts": ("texts.jsonl", '{"text": "mine"}\n{"text": "too"}\n'),
    "record": ("record.json", '{"title": "Blue Train"}'),
    "finished": ("state.json", '{"open": true}'),
    "finished as layer": ("layer-0.safetensors", None),
    "recover": ("run.json", '{"script": "jog"}'),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_file_of_another_kind_is_left_alone(case, things, tmp_path, monkeypatch):
    monkeypatch.setattr(FeatureSums, "watching", None)  # refused before the pass
    name, content = FOREIGN[case]
    if content is None:
        shutil.copy(models.DATA / "models" / "tiny-llama" / "model.safetensors", tmp_path / name)
    else:
        (tmp_path / name).write_text(content)
    before, kind = snapshot(tmp_path), case.split()[0]
    with pytest.raises(FileExistsError) as error:
        if kind in FILES:
            FILES[kind](things, tmp_path / name)
        else:
            FOLDERS[kind](things, tmp_path)
    assert one_sentence(error.value) and name in str(error.value) and "left alone" in str(error)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("kind", ["plan", "statistics", "scores"])
def test_a_file_of_ours_is_replaced_links_are_followed_and_folders_made(kind, things, tmp_path):
    path = tmp_path / "new" / ".hidden" / "file"
    FILES[kind](things, path)
    first = path.read_bytes()
    (tmp_path / "link").symlink_to(path)
    path.write_bytes(first)
    FILES[kind](things, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and path.read_bytes() == first
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["file"]


def odd_paths(folder: Path) -> dict[str, Path]:
    """Places where nothing can be written."""
    (folder / "file").touch()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder / "loop")
    return {
        "below a file": folder / "file" / "x",
        "pipe": folder / "pipe",
        "loop": folder / "loop",
        "device": Path("/dev/null"),
        "name too long": folder / ("x" * 300),
        "null": f"{folder}/\0",
        "no system": Path("/proc/nothing/x"),
    }


@pytest.mark.parametrize("name", ["below a file", "pipe", "loop", "device", "name too long",
                                  "null", "no system"])  # fmt: skip
@pytest.mark.parametrize("kind", [*FILES, *FOLDERS])
def test_where_nothing_can_be_written_one_sentence_says_so(kind, name, things, tmp_path):
    path = odd_paths(tmp_path)[name]
    if kind == "figure" and name != "below a file":
        pytest.skip("its suffix makes another path of it")
    if name == "no system" and kind in ("score", "collect", "ledger"):
        pytest.skip("returned, with a warning")
    with pytest.raises((OSError, ValueError)) as error:
        (FILES | FOLDERS)[kind](things, path)
    assert one_sentence(error.value) and not str(error.value).startswith("[Errno")
    assert Path("/dev/null").is_char_device() and (tmp_path / "pipe").is_fifo()


def test_a_tilde_is_the_home_folder_and_a_pipe_is_not_waited_for(things, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for kind, name in (("plan", "~/plan.json"), ("scores", "~/scores.safetensors")):
        FILES[kind](things, name)
        assert (tmp_path / name[2:]).is_file()
    assert lab.PruningPlan.load("~/plan.json") == things["plan"]
    os.mkfifo(tmp_path / "pipe")
    for kind in (lab.PruningPlan, lab.Scores, lab.Statistics):
        with pytest.raises(OSError, match="is no file"):
            kind.load(tmp_path / "pipe")
        with pytest.raises(FileNotFoundError, match="does not exist"):
            kind.load(tmp_path / "none")


# --- kills -----------------------------------------------------------------------------------

KILLED = """
import os, random, signal, sys, time
import torch
import minigpt_lab as lab
from transformers.models.llama import modeling_llama, tokenization_llama
lab.load_model, lab.save_model  # imported here, once, and not by every child
folder, home = sys.argv[1], os.path.dirname(sys.argv[1])


def save(factor):
    with torch.no_grad():
        model.lm_head.weight.copy_(weight * factor)
    lab.save_model(model, tokenizer, folder)


def forked(work):  # of a process that never runs a model itself: it has no threads to lose
    child = os.fork()
    if child == 0:
        try:
            global model, tokenizer, weight
            model, tokenizer = lab.load_model("tiny-llama", device="cpu")
            weight = model.lm_head.weight.detach().clone()
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def done(work):
    return os.waitpid(forked(work), 0)[1] == 0


def prepare():
    save(1)
    with open(folder + "/notes.txt", "w") as file:
        file.write("mine")


def check():
    found = lab.load_model(folder, device="cpu")[0].lm_head.weight
    assert torch.equal(found, weight) or torch.equal(found, weight * 2)
    with open(folder + "/notes.txt") as file:
        assert file.read() == "mine"


def save_forever():
    check()  # what the last kill left
    while True:
        for factor in (2, 1):
            os.write(ready, b"x")
            save(factor)


assert done(prepare)
random.seed(0)
for kill in range(8):
    wait, ready = os.pipe()
    child = forked(save_forever)
    os.close(ready)
    assert os.read(wait, 1)
    started = time.monotonic()
    assert os.read(wait, 1)  # a save has ended, the next begins: kill it at any moment of it
    time.sleep(random.random() * 1.2 * (time.monotonic() - started))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(wait)
    assert len(os.listdir(home)) <= 2, os.listdir(home)  # the model, and what the last kill left
assert done(check)
assert done(lambda: save(1))
assert os.listdir(home) == [os.path.basename(folder)]
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_after_a_kill_there_is_a_whole_model_and_little_else(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "mini")]
    with (tmp_path.parent / "said").open("w+") as said:
        done = subprocess.run(command, stdout=said, stderr=said, check=False)
        assert done.returncode == 0, (tmp_path.parent / "said").read_text()[-2000:]


class Killed(BaseException):
    """The process ends here: nothing after it runs."""


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("moment", range(4))
def test_killed_at_any_step_of_a_replacement(moment, exchange, things, tmp_path, monkeypatch):
    """Every step that changes a name is where a process may end; locks go with the process."""
    folder = tmp_path / "mini"
    lab.save_model(things["model"], things["tokenizer"], folder)
    (folder / "notes.txt").write_text("mine")
    steps = []

    def step(real):
        def before(*arguments):
            if len(steps) == moment:
                raise Killed
            steps.append(real)
            return real(*arguments)

        return before

    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    monkeypatch.setattr(atomic, "_swap", step(atomic._swap))
    monkeypatch.setattr(Path, "rename", step(Path.rename))
    monkeypatch.setattr(atomic.Scratch, "close", lambda self: self._lock.release())
    with contextlib.suppress(Killed):
        lab.save_model(things["model"], things["tokenizer"], folder)
    monkeypatch.undo()
    found, _ = lab.load_model(folder, device="cpu")
    assert torch.equal(found.lm_head.weight, things["model"].lm_head.weight)
    lab.save_model(things["model"], things["tokenizer"], folder)
    assert [path.name for path in tmp_path.iterdir()] == ["mini"]
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_scratch_of_a_living_writer_is_left_and_that_of_a_dead_one_cleared(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from minigpt_lab.store import atomic_write\n"
        "with atomic_write(Path(sys.argv[1]) / 'file') as staging:\n"
        "    staging.write_text('x' * 1000); print('ready', flush=True); time.sleep(1000)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout.readline() == "ready\n"
            with atomic_write(tmp_path / "other") as staging:
                staging.write_text("y")
            (left,) = tmp_path.glob(".*.writing")
            assert snapshot(left)["new/file"] == b"x" * 1000
        finally:
            writer.send_signal(signal.SIGKILL)
    users = {".mine.writing/poem": b"o", ".mine.writing/new": b"p", ".his.writing/new": b"q"}
    for name, content in users.items():  # names like ours, and a user's content
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with atomic_write(tmp_path / "other") as staging:
        staging.write_text("z")
    assert snapshot(tmp_path) == {"other": b"z", **users}
    with contextlib.suppress(KeyboardInterrupt), atomic_write(tmp_path / "other") as staging:
        staging.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "other").read_bytes() == b"z" and not left.exists()


def test_many_writers_of_one_file_leave_one_whole_file(tmp_path):
    texts = [str(number) * 10_000 for number in range(8)]

    def write(text: str) -> None:
        for _ in range(10):
            with atomic_write(tmp_path / "file") as staging:
                staging.write_text(text)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() in texts


@pytest.mark.parametrize("exchange", [True, False])
def test_many_writers_of_one_folder_leave_one_whole_folder(exchange, tmp_path, monkeypatch):
    """Also where the folder is removed meanwhile, and a scratch folder just before it is locked."""
    if not exchange:  # as on systems that cannot exchange two names
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    failed, ended = [], threading.Event()

    def write(number: int) -> None:
        for turn in range(60):
            try:
                with atomic_write(tmp_path / "mini") as staging:
                    staging.mkdir()
                    for name in "ab":
                        (staging / name).write_text(f"{number} {turn}")
                if turn % 3 == 0:
                    shutil.rmtree(tmp_path / "mini", ignore_errors=True)
            except OSError as error:
                failed.append(error)

    def clear() -> None:
        while not ended.is_set():
            clear_scratch(tmp_path)

    clearing = threading.Thread(target=clear)
    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in (clearing, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    clearing.join()
    assert not failed and [path.name for path in tmp_path.iterdir()] == ["mini"]
    content = snapshot(tmp_path / "mini")
    assert content["a"] == content["b"]


def test_a_relative_path_stays_what_it_was_when_the_working_folder_changes(tmp_path, monkeypatch):
    (tmp_path / "begun").mkdir()
    (tmp_path / "later").mkdir()
    monkeypatch.chdir(tmp_path / "begun")
    ledger, finished, shards = (
        ResultCache("l.json"),
        Workspace(out_dir="run"),
        Shards("disk", "shards"),
    )
    shards[0] = torch.ones(2)
    monkeypatch.chdir(tmp_path / "later")
    ledger.get([1], lambda: {"x": 1})
    assert torch.equal(shards[0], torch.ones(2)) and finished._weights(0).parent.is_dir()
    del shards
    assert snapshot(tmp_path).keys() == {"begun/l.json"}
    assert not any((tmp_path / "begun" / "shards").iterdir())


def test_a_model_saved_again_keeps_a_users_files_and_no_stale_ones(things, tmp_path):
    folder = lab.save_model(things["model"], things["tokenizer"], tmp_path / "mini")
    sidecar = json.loads((folder / SIDECAR).read_text())
    (folder / "stale.txt").write_text("of an earlier version")
    (folder / SIDECAR).write_text(
        json.dumps({**sidecar, "files": [*sidecar["files"], "stale.txt"]})
    )
    before = users_folder(folder / "mine")
    (folder / "link").symlink_to("mine/notes.txt")
    lab.save_model(things["model"], things["tokenizer"], folder)
    assert snapshot(folder / "mine") == before and (folder / "link").is_symlink()
    assert not (folder / "stale.txt").exists()
    (folder / SIDECAR).write_text("{broken")  # its error says: save it again
    lab.save_model(things["model"], things["tokenizer"], folder)
    lab.load_model(folder, device="cpu")
    assert snapshot(folder / "mine") == before


def test_a_linked_folder_is_written_through(things, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "mini").symlink_to(tmp_path / "disk")
    lab.save_model(things["model"], things["tokenizer"], tmp_path / "mini")
    lab.save_model(things["model"], things["tokenizer"], tmp_path / "mini")
    assert (tmp_path / "mini").is_symlink()
    lab.load_model(tmp_path / "disk", device="cpu")


# --- full disks ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plan", "statistics", "scores", "model"])
def test_what_cannot_be_saved_is_said_and_the_old_kept(kind, things, tmp_path):
    save = (FILES | FOLDERS)[kind]
    save(things, tmp_path / "mine")
    (tmp_path / "mine").parent.mkdir(exist_ok=True)
    before = snapshot(tmp_path)
    with full_disk(), pytest.raises(WriteFailed, match=r"mine could not be written \(") as error:
        save(things, tmp_path / "mine")
    assert one_sentence(error.value) and snapshot(tmp_path) == before


RETURNED = {
    "statistics": lambda t, folder: (
        lab.collect_statistics(
            t["model"], t["batches"], path=folder / "x.safetensors", progress=False
        ).n_tokens
    ),
    "scores": lambda t, folder: lab.score(t["model"], "magnitude", cache=folder).n_tokens,
    "ledger": lambda _, folder: ResultCache(folder / "x.json").get([1], lambda: {"x": "y" * 99})[
        "x"
    ],
    "cache": lambda _, folder: cached(folder / "x.json", lambda: {"x": "y" * 99})["x"],
}


@pytest.mark.parametrize("kind", RETURNED)
def test_a_finished_result_is_returned_though_it_cannot_be_kept(
    kind, things, tmp_path, monkeypatch
):
    monkeypatch.setenv("MINIGPT_LAB_CACHE", str(tmp_path))
    with full_disk(), pytest.warns(UserWarning, match=r"returned, but not kept: .*written \("):
        found = RETURNED[kind](things, tmp_path)
    assert found == RETURNED[kind](things, tmp_path)  # and is kept once there is room


def test_a_full_disk_is_named_when_a_package_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT_LAB_CACHE", str(tmp_path))

    def pip(command, cwd, **_):
        (Path(cwd) / "fake.whl").write_bytes(b"cut off")
        said = "WARNING: x\nERROR: Could not install: [Errno 28] No space left on device\nnotice: y"
        return subprocess.CompletedProcess(command, 1, "", said)

    monkeypatch.setattr(packages.subprocess, "run", pip)
    with pytest.raises(OSError, match=r"No space left.*MiB free.*MINIGPT_LAB_CACHE") as error:
        lab.load_model("smollm2-135m")
    assert one_sentence(error.value) and snapshot(tmp_path) == {}


# --- the cache -------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(things, tmp_path, monkeypatch):
    """A pinned checkpoint whose conversion gives the tiny model; counts how often."""
    monkeypatch.setenv("MINIGPT_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(conversion, "pinned_packages", dict.fromkeys("p"))
    monkeypatch.setattr(conversion, "pinned_packages", lambda: {"p": None})
    monkeypatch.setattr(conversion, "fetch", lambda _package, _instead: "archive")
    monkeypatch.setattr(conversion, "read_archive", lambda _archive, path: {path: b"weights"})
    made = []

    def dequantised(_source):
        made.append(1)
        return things["model"], things["tokenizer"]

    monkeypatch.setattr(conversion, "_dequantised", dequantised)
    digest = hashlib.sha256(b"weights").hexdigest()
    facts = {"sha256": digest, "hub": "a/b", "title": "t", "note": "n", "licence": "l"}
    return {**facts, "parts": [["p", "m"]]}, made


CHANGES = {
    "weights flipped": lambda f: flip(f / "model.safetensors"),
    "weights cut": lambda f: cut(f / "model.safetensors"),
    "config changed": lambda f: (f / "config.json").write_text("{}"),
    "tokenizer gone": lambda f: (f / "tokenizer.json").unlink(),
    "code added": lambda f: (f / "modeling.py").write_text("boom"),
    "hashes gone": lambda f: (f / "hashes.json").unlink(),
    "hashes broken": lambda f: (f / "hashes.json").write_text("[[["),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_conversion_is_set_aside_and_made_again(change, checkpoint):
    entry, made = checkpoint
    folder = conversion.converted_folder("x", entry)
    assert conversion.converted_folder("x", entry) == folder and len(made) == 1
    before = snapshot(folder)
    CHANGES[change](folder)
    with pytest.warns(UserWarning, match=r"is damaged .*set aside as x-.*\.damaged-1"):
        conversion.converted_folder("x", entry)
    assert len(made) == 2 and snapshot(folder) == before


def test_a_full_disk_is_named_when_a_model_is_converted(checkpoint):
    entry, _ = checkpoint
    cache_folder()
    with (
        full_disk(),
        pytest.raises(WriteFailed, match=r"could not be written .*; set .*_CACHE") as error,
    ):
        conversion.converted_folder("x", entry)
    assert one_sentence(error.value) and snapshot(cache_folder()) == {}


def kept_files(things, folder: Path) -> dict:
    """Calls that keep what they made below a folder, and what they give."""
    return {
        "statistics": lambda: (
            lab.collect_statistics(
                things["model"], things["batches"], path=folder / "s.safetensors", progress=False
            ).sums
        ),
        "scores": lambda: lab.score(things["model"], "magnitude", cache=folder).values,
        "cache": lambda: cached(folder / "x.json", lambda: {"x": [1, 2.5]}),
        "ledger": lambda: ResultCache(folder / "l.json").get([1], lambda: {"x": 1.5}),
        "resumption": lambda: lab.slimgpt(
            things["model"], things["batches"], ratio=0.3, out_dir=folder, progress=False
        )[0].state_dict(),
    }


def plain(found: dict) -> dict:
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in found.items()}


DAMAGE = {
    "flipped": flip,
    "cut": cut,
    "garbage": lambda path: path.write_bytes(b"\x80\x01garbage\xff" * 9),
    "empty": lambda path: path.write_bytes(b""),
    "deep": lambda path: path.write_text("[" * 100_000),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["statistics", "scores", "cache", "ledger", "resumption"])
def test_a_damaged_file_is_set_aside_and_made_anew(kind, damage, things, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT_LAB_CACHE", str(tmp_path))
    make = kept_files(things, tmp_path)[kind]
    expected, there = make(), snapshot(tmp_path)
    for name in there:
        damaged = copy.deepcopy(there)
        DAMAGE[damage](tmp_path / name)
        damaged[name] = (tmp_path / name).read_bytes()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = make()
        np.testing.assert_equal(plain(found), plain(expected))
        after = snapshot(tmp_path)
        if damaged[name]:  # nothing of it is lost, and it is said in one line
            assert damaged[name] in after.values() or damaged[name] in after[name]
            lines = [str(w.message) for w in said if name.split("/")[-1] in str(w.message)]
            assert len(lines) == 1 and "anew" in lines[0] and "\n" not in lines[0]
        for path in tmp_path.rglob("*.damaged-*"):
            path.unlink()


def test_archives_are_read_never_unpacked(tmp_path):
    wheel, npm = tmp_path / "x.wheel", tmp_path / "x.npm"
    (tmp_path / "evil").write_bytes(b"boom")
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("../../evil.txt", "boom")
    with tarfile.open(npm, "w") as file:
        file.add(tmp_path / "evil", "../../evil.txt")
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    before = snapshot(tmp_path.parent)
    for archive in (wheel, npm):
        assert read_archive(archive, "*.txt") == {"../../evil.txt": b"boom"}
    assert snapshot(tmp_path.parent) == before


# --- runs ------------------------------------------------------------------------------------


def checkpoint_folder(folder: Path, step: int, **more: str) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name, text in {"trainer_state.json": "{}", "optimizer.pt": "x", **more}.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def test_copies_of_checkpoints_are_a_users(tmp_path):
    for step in (4, 8, 12, 16):
        checkpoint_folder(tmp_path, step)
    for name in ("checkpoint-4-backup", "checkpoint-8 (copy)", "checkpoint-", "checkpoint-x"):
        shutil.copytree(tmp_path / "checkpoint-4", tmp_path / name)
    (tmp_path / "checkpoint-20").write_text("a file")
    (tmp_path / "checkpoint-4" / "notes.txt").write_text("mine")
    rotate(tmp_path, str(tmp_path / "checkpoint-8"))
    left = {path.name for path in tmp_path.iterdir()}
    copies = {"checkpoint-4-backup", "checkpoint-8 (copy)", "checkpoint-", "checkpoint-x"}
    assert left == {*copies, "checkpoint-20", "checkpoint-4", "checkpoint-8", "checkpoint-16"}
    assert snapshot(tmp_path / "checkpoint-4") == {"notes.txt": b"mine"}
    assert last_complete(tmp_path) is None  # none of them has weights
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*copies, "checkpoint-20", "checkpoint-4"}
    discard_checkpoint(tmp_path / "checkpoint-4")
    assert snapshot(tmp_path / "checkpoint-4") == {"notes.txt": b"mine"}


def test_recover_goes_on_beside_a_backup(things, tmp_path):
    arguments = {"max_tokens": 1024, "seq_len": 64, "eval_every": 256, "eval_characters": 500}
    arguments |= {"out_dir": tmp_path, "progress": False}
    run = lambda: lab.recover(  # noqa: E731
        copy.deepcopy(things["model"]), things["tokenizer"], things["domain"], **arguments
    )
    history = run()
    last = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.copytree(last, tmp_path / f"{last.name}-backup")
    before = snapshot(tmp_path / f"{last.name}-backup")
    cut(last / "trainer_state.json")
    pd.testing.assert_frame_equal(run().drop(columns="seconds"), history.drop(columns="seconds"))
    assert snapshot(tmp_path / f"{last.name}-backup") == before


def test_what_a_cut_kept_goes_and_a_users_files_stay(things, tmp_path):
    folder = tmp_path / "run"
    lab.slimgpt(things["model"], things["batches"], ratio=0.3, out_dir=folder, progress=False)
    before = users_folder(folder / "mine")
    shutil.copy(models.DATA / "models/tiny-llama/model.safetensors", folder / "layer-9.safetensors")
    discard(folder)
    assert {path.name for path in folder.iterdir()} == {"mine", "layer-9.safetensors"}
    assert snapshot(folder / "mine") == before


def test_a_run_never_replaces_the_users_notebook_or_folder(tmp_path):
    source = '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
    (tmp_path / "mine.ipynb").write_text(source)
    with pytest.raises(FileExistsError, match=r"would be replaced.*another folder"):
        run_notebook(tmp_path / "mine.ipynb", out_dir=tmp_path)
    before = users_folder(tmp_path / "folder")
    with pytest.raises(FileExistsError, match="is no run"):
        run_once(tmp_path / "mine.ipynb", {}, tmp_path / "folder")
    assert snapshot(tmp_path / "folder") == before
    assert (tmp_path / "mine.ipynb").read_text() == source


def test_a_run_done_again_keeps_what_a_user_put_beside_it(tmp_path):
    old, new = tmp_path / "failed" / "run", tmp_path / "scratch"
    for folder, text in ((old, "old"), (new, "new")):
        (folder / "figures").mkdir(parents=True)
        (folder / "figures" / f"{text}.png").write_text(text)
        files = [f"figures/{text}.png", "../../../outside"]
        write_record(folder, {"notebook": "x", "files": files})
    (tmp_path.parent / "outside").write_text("not ours")
    before = users_folder(old / "mine")
    assert own_files(old) == {RECORD, "figures/old.png"}
    install_run(new, old)
    assert {*snapshot(old)} == {RECORD, "figures/new.png", *(f"mine/{name}" for name in before)}
    assert not new.exists()
    discard_run(old)
    assert snapshot(tmp_path / "failed" / "run" / "mine") == before
    assert {path.name for path in old.iterdir()} == {"mine"}
    assert (tmp_path.parent / "outside").read_text() == "not ours"


def test_a_report_replaces_a_report_only(tmp_path, monkeypatch):
    def run_notebook(name, _, folder):  # executed in `test_report_is_one_page_with_everything`
        cells = [nbformat.v4.new_code_cell("experiments.record(metrics)")]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), f"{folder}/{name}.ipynb")

    monkeypatch.setattr(reports, "run_notebook", run_notebook)
    facts = {"status": "completed", "parameters": {}, "metrics": {"a": 1}, "smoke": False}
    write_record(tmp_path / "run", {"notebook": "x", **facts})
    (tmp_path / "report.html").write_text("<p>my own")
    with pytest.raises(FileExistsError, match="is no report"):
        reports.write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "<p>my own"
    (tmp_path / "report.html").unlink()
    for _ in range(2):
        assert reports.write_report(tmp_path).read_text() != "<p>my own"


def test_figures_of_like_stems_do_not_replace_each_other(tmp_path):
    for ratio in (0.5, 0.6):
        figures.save_figure(figure(), tmp_path / f"cut-{ratio}", pd.DataFrame({"r": [ratio]}))
    assert len(list(tmp_path.iterdir())) == 6


def test_a_read_only_folder_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    for check in (writable_file, writable_folder):
        with pytest.raises(UnusablePath, match="is read-only, so .* choose another path"):
            check(tmp_path / "x")
    (tmp_path / "x").touch()
    with pytest.raises(UnusablePath, match="is read-only"):
        writable_file(tmp_path / "x")


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_folder_that_another_writer_just_removed_is_not_called_read_only(
    comes_back, tmp_path, monkeypatch
):
    folder, access = tmp_path / "mini", os.access
    folder.mkdir()

    def removed_before(path, mode):
        if Path(path) == folder:
            folder.rename(tmp_path / "old")
            if comes_back:
                folder.mkdir()
            return False
        return access(path, mode)

    monkeypatch.setattr(os, "access", removed_before)
    assert writable_folder(folder) == folder


def test_what_a_user_keeps_under_the_name_of_a_new_folder_gives_way(tmp_path):
    """A link to a folder, or a file, where the new folder has a folder; nothing is made twice."""
    mini = tmp_path / "mini"
    (tmp_path / "elsewhere").mkdir()
    users_folder(mini)
    (mini / "link").symlink_to(tmp_path / "elsewhere")
    with atomic_write(mini) as staging:
        for name in ("link", "notes.txt"):
            (staging / name).mkdir(parents=True)
            (staging / name / "a").write_text("ours")
    assert [*(mini / "link").iterdir()] == [mini / "link" / "a"] and not (
        mini / "link"
    ).is_symlink()
    assert [*(mini / "notes.txt").iterdir()] == [mini / "notes.txt" / "a"]
    assert (mini / ".hidden").exists() and not any((tmp_path / "elsewhere").iterdir())


def test_saving_refuses_what_is_no_model(things, tmp_path):
    for arguments, name in (
        ((None, things["tokenizer"], tmp_path / "x"), "model is None"),
        ((things["model"], "tiny-llama", tmp_path / "x"), "tokenizer is 'tiny-llama'"),
        ((things["model"], things["tokenizer"], None), "path is None"),
    ):
        with pytest.raises(ValueError, match=f"{name}; expected"):
            saving.save_model(*arguments)
    for kind, path in ((things["plan"], 3), (things["scores"], None), (things["statistics"], "")):
        with pytest.raises(ValueError, match="path is .*; expected a path"):
            kind.save(path)
    assert not any(tmp_path.iterdir())
    assert random_model("llama") is not None
