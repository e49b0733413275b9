"""Files made to harm: nothing in them runs, none is waited for, none is expanded without end."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import running_notebook

import minigpt_lab as lab
from minigpt_lab import __main__ as command_line
from minigpt_lab import experiments
from minigpt_lab.experiments import comparisons, grids, parameters
from minigpt_lab.experiments.records import RECORD, read_record, results, write_record
from minigpt_lab.store import read_text

RUN = {"notebook": "03", "status": "completed", "parameters": {}, "metrics": {"size": 1}}
LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
)
AXES = "".join(
    f"  {name}: {list(range(1, 1001))}\n"
    for name in ("seq_len", "calibration_tokens", "test_tokens")
)
GRIDS = {
    "aliases": (LAUGHS + "notebook: '03'\n", "more than 100,000 values"),
    "merges": (MERGES + "notebook: '03'\n", "more than 100,000 values"),
    "itself": ("notebook: '03'\nparameters: &p {domain_name: *p}\n", "more than 100,000 values"),
    "deep": ("notebook: " + "[" * 50_000, "nested too deeply"),
    "tag": ("notebook: !!python/object/apply:os.system ['touch PLANTED']\n", "is no YAML"),
    "date": ("notebook: '03'\nparameters: {seed: 2024-99-99}\n", "is no YAML"),
    "number": (f"notebook: '03'\nparameters: {{seed: {'9' * 5000}}}\n", "is no YAML"),
    "product": (f"notebook: '03'\ngrid:\n{AXES}", "1,000,000,000 combinations; .* at most 10,000"),
    "set": ("notebook: '03'\nparameters: {domain_name: !!set {a, b}}\n", "expected a string"),
    "hidden date": ("notebook: '02'\nparameters: {controls: [2024-01-01]}\n", "expected a string"),
    "exclude": ("notebook: '03'\nexclude: [3]\n", "exclude.* is 3; expected a dict"),
    "resources": ("notebook: '03'\nresources: {cpus: .nan}\n", "cpus.* is nan; expected a number"),
    "list": ("[1, 2]", "expected a dictionary"),
    "empty": ("", "expected a dictionary"),
    "binary": ("notebook: '03\x00'", "NUL characters"),
}


@pytest.mark.parametrize("case", GRIDS)
def test_a_grid_is_refused_in_a_sentence_before_it_grows(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, words = GRIDS[case]
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        grids.read_grid("grid.yaml")
    assert "\n" not in str(error.value) and "grid.yaml" in str(error.value)
    assert not (tmp_path / "PLANTED").exists()


def _odd(path, kind) -> None:
    """Put something at a path that is no file of text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    makers = {
        "pipe": lambda: os.mkfifo(path), "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
        "nothing": lambda: path.symlink_to(path.parent / "nowhere"),
    }  # fmt: skip
    makers[kind]()


READERS = {  # of a path that a user names: what it is called, and who reads it
    "text": ("a.txt", lab.load_domain),
    "table": ("a.csv", lab.load_domain),
    "grid": ("g.yaml", grids.read_grid),
    "notebook": ("n.ipynb", parameters.parameters_cell),
    "record": (RECORD, lambda path: read_record(path.parent)),
}


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop", "nothing"])
@pytest.mark.parametrize("reader", READERS)
def test_only_regular_files_are_read(kind, reader, tmp_path):
    name, read = READERS[reader]
    if reader in ("text", "table") and kind == "folder":
        pytest.skip("a folder may be called so")
    _odd(tmp_path / "x" / name, kind)
    with pytest.raises((ValueError, OSError)) as error:
        read(tmp_path / "x" / name)
    assert "\n" not in str(error.value)


DEEP = '{"a":' * 100_000
DAMAGED = {
    "pipe": None, "folder": None, "device": None, 
    "deep": DEEP, "empty": "", "null": "null", "list": "[]", "text": '"x"', "cut": '{"schema": 2',
    "latin": b'{"schema": "\xe9"}',
    **{
        f"{key}: {value!r}": json.dumps({"schema": 2, **RUN, key: value})
        for key, value in (
            ("metrics", []), ("metrics", {"a": "b"}), ("metrics", {"a": {"b": 1}}),
            ("metrics", {"a": 10**400}), ("parameters", [1]), ("parameters", None), ("model", "m"),
            ("status", 3), ("notebook", None), ("data", 1), ("versions", []), ("tables", {}),
        )
    },
}  # fmt: skip


def _plant_damaged(folder) -> None:
    """Runs whose record cannot be read."""
    for place, (kind, content) in enumerate(DAMAGED.items()):
        path = folder / str(place) / RECORD
        if content is None:
            _odd(path, kind)
        else:
            path.parent.mkdir(parents=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_one_damaged_record_among_many_is_named_and_the_rest_are_shown(tmp_path):
    summary = pd.DataFrame({"variant": ["dense", "shrunk"], "stored": [9, 8], "text": "law/test",
                            "perplexity": [2.0, 3.0], "nonzero": [9, 8]})  # fmt: skip
    _plant_damaged(tmp_path)
    for name, table in {"whole": None, "pipe": "pipe", "text": b"variant,stored,perplexity\na,b,c",
                        "binary": b"\xff\x00"}.items():  # fmt: skip
        write_record(tmp_path / name, {**RUN, "parameters": {"seq_len": 64}})
        path = tmp_path / name / "summary.csv"
        if table is None:
            summary.to_csv(path, index=False)
        elif table == "pipe":
            _odd(path, "pipe")
        else:
            path.write_bytes(table)
    with pytest.warns(UserWarning, match="left out") as said:
        assert set(results(tmp_path)["run"]) == {"whole", "pipe", "text", "binary"}
    assert len(said) == len(DAMAGED)
    assert not any("\n" in str(warning.message) for warning in said)
    with pytest.warns(UserWarning, match="the summary of .*text"):
        assert set(comparisons.measurements(tmp_path)["run"]) == {"whole"}


EVIL = ["<script>alert(1)</script>", "$\\frac{$", "a\nb", "{x.__class__}", "x" * 200, "' \" &"]


@pytest.mark.slow
def test_a_report_shows_names_and_runs_none(tmp_path):
    for place, name in enumerate(EVIL):
        model = {"label": name, "sha256": name}
        content = {**RUN, "notebook": name, "protocol": name, "model": model,
                   "parameters": {name: name, "domain": name}, "metrics": {name: place},
                   "data": {name: {name: name}}, "versions": {name: name}}  # fmt: skip
        write_record(tmp_path / str(place), content)
        failed = {**content, "status": "failed", "error": name}
        write_record(tmp_path / f"failed-{place}", failed)
        table = pd.DataFrame({"variant": ["dense", name], "stored": [9, 8], "nonzero": [9, 8],
                              "text": f"{name}/test", "perplexity": [2.0, 3.0]})  # fmt: skip
        table.to_csv(tmp_path / str(place) / "summary.csv", index=False)
    _plant_damaged(tmp_path / "damaged")
    page = experiments.write_report(tmp_path).read_text()
    assert f"{len(EVIL)} runs completed" in page
    assert "<script>alert" not in page and "&lt;script&gt;" in page


LITERALS = [
    "[" * 100_000, "(" * 5000, "{1:" * 5000, "10**10**10",
    "__import__('os').system('touch PLANTED')", "{seed.__class__}", "9" * 10_000, "\x00", "{[]: 1}",
]  # fmt: skip


@pytest.mark.parametrize("text", LITERALS, ids=range(len(LITERALS)))
def test_a_parameter_is_data(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["minigpt_lab", "run", "03", "-p", f"seq_len={text}"])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert str(stopped.value.code).startswith("error: ") and "\n" not in str(stopped.value.code)
    assert not (tmp_path / "PLANTED").exists() and not (tmp_path / "runs").exists()


WORDS = [
    ["run", "99"], ["run", "03", "-p", "seq_len", "x"], ["run", "03", "-p", "nothing=1"],
    ["run", "03", "-p", "seq_len"], ["run", "03", "--once"], ["run", "n.ipynb"], ["sweep"],
    ["sweep", "missing.yaml"], ["sweep", "pipe.yaml"], ["sweep", "."], ["results", "missing"],
    ["results", "file.txt"], ["report", "missing"], ["report", "."], ["dance"], [],
    ["sweep", "g.yaml", "--jobs", "0"], ["sweep", "g.yaml", "--jobs", "many"],
    ["sweep", "g.yaml", "--out", "file.txt"], ["sweep", "g.yaml", "--executor", "slurm"],
    ["run", "03", "--out", "file.txt/x", "--smoke"], ["results", ".", "--csv", "file.txt/x.csv"],
]  # fmt: skip


def test_every_failure_of_the_command_line_is_a_line_and_a_status(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "n.ipynb").write_text("{")
    (tmp_path / "g.yaml").write_text("notebook: '03'\n")
    os.mkfifo(tmp_path / "pipe.yaml")
    for words in WORDS:
        monkeypatch.setattr(sys, "argv", ["minigpt_lab", *words])
        with pytest.raises(SystemExit) as stopped:
            command_line.main()
        said = capsys.readouterr().err
        said = stopped.value.code if isinstance(stopped.value.code, str) else said
        assert stopped.value.code not in (0, None), words
        assert said.startswith("error: ") and said.strip().count("\n") == 0, (words, said)


@pytest.mark.slow
def test_a_failure_in_a_process_of_its_own(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    command = [sys.executable, "-m", "minigpt_lab", "sweep", str(tmp_path / "pipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not done.stdout


@pytest.fixture
def handed(monkeypatch):
    """What papermill is given instead of running a notebook."""
    found = {}

    def execute(notebook, output, parameters, **_):
        found.update(parameters, output=output.format(**parameters))

    monkeypatch.setattr("papermill.execute_notebook", execute)
    return found


def test_paths_are_those_of_whoever_calls(tmp_path, monkeypatch, handed):
    home = tmp_path / "{seed} home"  # papermill fills in what stands in braces
    for name in ("notes.txt", "texts/a.txt", "law/a.txt", "model/config.json", "uniform"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("x")
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    given = {"domain_name": "notes.txt", "other_domain_name": "~/texts", "model_name": "model"}
    monkeypatch.setattr(experiments, "read_record", lambda folder: {**RUN, "tables": []})
    words = [word for key, value in given.items() for word in ("-p", f"{key}={value}")]
    monkeypatch.setattr(sys, "argv", ["minigpt_lab", "run", "03", *words, "--out", "run"])
    command_line.main()
    expected = {"domain_name": "notes.txt", "other_domain_name": "texts", "model_name": "model"}
    assert {k: handed[k] for k in given} == {k: str(home / v) for k, v in expected.items()}
    assert handed["output"].startswith(str(home / "run"))
    texts = {"domain_names": ["texts", "law", "./law"]}
    experiments.run_notebook("06", texts, "run", smoke=True)  # "law" is the kit's, "./law" is mine
    assert handed["domain_names"] == [str(home / "texts"), "law", str(home / "law")]
    experiments.run_notebook("04", {"allocation": "uniform"}, "run", smoke=True)
    assert handed["allocation"] == "uniform"  # no path, though there is such a file
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "near.txt").write_text("x")
    path = tmp_path / "grid" / "g.yaml"
    path.write_text("notebook: '03'\ngrid: {domain_name: [near.txt, notes.txt]}\n")
    found = [run["domain_name"] for run in grids.read_grid(path).runs.values()]
    assert found == [str(path.parent / "near.txt"), str(home / "notes.txt")]


def test_numbers_of_any_kind_become_plain_ones_at_the_call(tmp_path, handed, monkeypatch):
    given = {
        "test_tokens": np.int64(3),
        "quantile_activation": np.float32(0.5),
        "seq_len": torch.tensor(8),
    }
    experiments.run_notebook("03", given, tmp_path / "run", smoke=True)
    found = read_record(tmp_path / "run")["parameters"]
    assert {key: found[key] for key in given} == {
        "test_tokens": 3,
        "quantile_activation": 0.5,
        "seq_len": 8,
    }
    assert json.loads(json.dumps({key: handed[key] for key in given}))
    experiments.run_notebook(
        "02", {"epsilon_all": np.array([0.1, 0.2])}, tmp_path / "b", smoke=True
    )
    assert handed["epsilon_all"] == [0.1, 0.2]
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": "seed = 3"}
    (tmp_path / "mine.ipynb").write_text(json.dumps({"cells": [cell]}))
    variables = {"seed": np.int64(4), "out_dir": tmp_path / "c", "other": object()}
    metrics = {"a": np.float32(0.5), "b": np.bool_(True), "c": torch.tensor(2.0), "d": float("nan"),
               "e": None, "f": float("inf")}  # fmt: skip
    mine = tmp_path / "mine.ipynb"
    with running_notebook(variables):
        experiments.record(metrics, notebook=mine)
    found = read_record(tmp_path / "c")
    assert found["metrics"] == {"a": 0.5, "b": True, "c": 2.0, "d": None, "e": None, "f": None}
    assert found["parameters"] == {"seed": 4}
    for wrong in (np.zeros(3), "many", object(), [1], {"x": 1}, 1j):
        with pytest.raises(ValueError, match="metrics..a.. is .*; expected a number or None"):
            experiments.record({"a": wrong}, notebook=mine)
    for tables in ({"../x": pd.DataFrame()}, {"x": [1]}, [1], {3: pd.DataFrame()}):
        with running_notebook(variables), pytest.raises(ValueError, match="expected"):
            experiments.record({}, tables, notebook=mine)
    with running_notebook({}), pytest.raises(ValueError, match="mine has no out_dir, seed"):
        experiments.record({}, notebook=mine)
    with running_notebook({}), pytest.raises(RuntimeError, match="cannot tell which notebook"):
        experiments.record({})
    with pytest.raises(RuntimeError, match="no notebook is running"):
        experiments.record({}, notebook=mine)


@pytest.mark.parametrize("wrong", [None, 3, "", [], float("nan"), pd.DataFrame(), b"x"])
def test_paths_are_checked_at_the_call(wrong):
    calls = (lab.load_domain, results, comparisons.measurements, grids.read_grid,
             experiments.write_report, experiments.find_notebook)  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match="expected a path"):
            call(wrong)
    if isinstance(wrong, int | float | bytes | None):
        for call in (lab.load_domains, lambda value: lab.make_domain("d", value)):
            with pytest.raises(ValueError, match="expected a list"):
                call(wrong)


def test_text_of_every_encoding_with_a_mark(tmp_path):
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / "a.txt").write_bytes("naïve 法律\r\n".encode(encoding))
        assert read_text(tmp_path / "a.txt") == "naïve 法律\n"
