"""Records: written whole, read back as one table, and clear about what cannot be read."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from helpers import running_notebook
from IPython.lib.pretty import pretty

from minigpt_lab import __main__ as command_line
from minigpt_lab import experiments
from minigpt_lab.experiments import parameters
from minigpt_lab.experiments.records import (
    RECORD,
    SCHEMA,
    better,
    read_record,
    results,
    write_record,
)
from minigpt_lab.experiments.runs import is_finished

RUN = {
    "notebook": "03_contextual_pruning", "status": "completed", "smoke": False,
    "parameters": {"domain": "law", "sizes": [1, 2]}, "model": {"label": "tiny"},
    "metrics": {"shrunk stored": np.int64(7), "nothing": float("nan")}, "protocol": "quickly",
}  # fmt: skip


def test_a_record_comes_back_as_plain_data(tmp_path):
    write_record(tmp_path / "run", RUN)
    found = read_record(tmp_path / "run")
    assert found["schema"] == SCHEMA and found["metrics"] == {"shrunk stored": 7, "nothing": None}


UNREADABLE = {
    "cut short": ('{"notebook": "03_con', "cut short or no JSON .*delete its folder and run"),
    "empty": ("", "cut short or no JSON"),
    "older": ('{"notebook": "x", "status": "completed"}', "has schema None.*run it again"),
    "newer": (f'{{"schema": {SCHEMA + 1}}}', f"has schema {SCHEMA + 1}.*update minigpt_lab"),
    "a list": ("[]", "has schema None"),
    "without metrics": (
        f'{{"schema": {SCHEMA}, "notebook": "x", "status": "completed", "parameters": {{}}}}',
        "metrics is None; expected a dictionary",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_records_are_one_line_and_left_out(case, tmp_path):
    text, line = UNREADABLE[case]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / RECORD).write_text(text)
    with pytest.raises(ValueError, match=line) as error:
        read_record(tmp_path / "broken")
    assert "\n" not in str(error.value) and "broken" in str(error.value)
    write_record(tmp_path / "whole", RUN)
    with pytest.warns(UserWarning, match=f"left out: .*{line}"):
        assert set(results(tmp_path)["run"]) == {"whole"}
    assert not is_finished(tmp_path / "broken")


def test_results_are_tidy_and_know_which_way_is_better(tmp_path):
    write_record(tmp_path / "a" / "one", RUN)
    write_record(tmp_path / "a" / "two", {**RUN, "smoke": True})
    failed = {**RUN, "status": "failed", "metrics": {}, "error": "no luck", "parameters": {"p": 1}}
    write_record(tmp_path / "failed" / "three", failed)
    write_record(tmp_path / ".unfinished" / "four", RUN)
    frame = results(tmp_path)
    assert set(frame["run"]) == {"a/one"}  # real ones only
    assert frame["sizes"].tolist() == ["[1, 2]"] * 2 and frame["model"].tolist() == ["tiny"] * 2
    row = frame.set_index("metric").loc["shrunk stored"]
    assert (row["value"], row["better"]) == (7, "lower")
    assert frame["value"].isna().sum() == 1
    every = results(tmp_path, smoke=True, failed=True)
    assert list(every["run"].unique()) == ["a/one", "a/two", "failed/three"]
    assert every.iloc[-1]["error"] == "no luck" and pd.isna(every.iloc[-1]["metric"])


def test_a_folder_without_runs_gives_an_empty_table(tmp_path):
    assert results(tmp_path).empty
    assert {"run", "notebook", "metric", "value", "better"} <= set(results(tmp_path).columns)
    with pytest.raises(ValueError, match="no folder .*nowhere: name one that holds runs"):
        results(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("metric", "way"),
    [
        ("tiny-law dense accuracy", "higher"), ("pruned columns won", "higher"),
        ("shrunk law/test bits", "lower"), ("dense stored", "lower"), ("layers", "lower"),
        ("all contextual loss", "lower"), ("mild, lora law/test test", "lower"),
        ("pruned law on games", "lower"), ("overlap law games", None), ("knee all", None),
    ],
)  # fmt: skip
def test_directions(metric, way):
    assert better(metric) == way


def test_record_finds_data_and_seed_and_needs_no_model(tmp_path, monkeypatch, tiny_domain):
    monkeypatch.chdir(tmp_path)
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": ["seed = 3\n"]}
    (tmp_path / "mine.ipynb").write_text(json.dumps({"cells": [cell]}))
    variables = {"seed": 4, "out_dir": str(tmp_path / "run"), "domains": [tiny_domain], "other": 1}
    table = pd.DataFrame({"a": [1]})
    with running_notebook(variables):
        path = experiments.record({"a": 1}, {"summary": table}, notebook="mine.ipynb")
    assert path == tmp_path / "run" / "record.json"
    assert pretty(path) == f"recorded in {path}"  # as a notebook shows it
    found = read_record(tmp_path / "run")
    assert found["seed"] == 4 and found["parameters"] == {"seed": 4} and found["model"] is None
    parts = found["data"]["tiny-law"]
    assert set(parts) == {"calibration", "train", "validation", "test"}
    assert len(set(parts.values())) == 4 and all(len(digest) == 64 for digest in parts.values())
    assert pd.read_csv(tmp_path / "run" / "summary.csv").equals(table)
    assert found["git"]["commit"] and found["versions"]["torch"] and found["device"] is None


def _results_of(folder, *words) -> list[str]:
    return [sys.executable, "-m", "minigpt_lab", "results", str(folder), *words]


def test_a_metric_that_no_run_has(tmp_path, monkeypatch):
    write_record(tmp_path / "one", RUN)
    monkeypatch.setattr(sys, "argv", _results_of(tmp_path, "--metric", "accuracy")[2:])
    line = "error: no metric's name holds 'accuracy'; some are: shrunk stored, nothing"
    with pytest.raises(SystemExit, match=line):
        command_line.main()


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    metrics = {f"metric {n}": n for n in range(3000)}  # more than a pipe holds
    write_record(tmp_path / "one", {**RUN, "metrics": metrics})
    process = subprocess.Popen(
        _results_of(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert "metric" in process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


def test_every_notebook_has_small_parameters():
    for name in parameters.notebook_names():
        assert parameters.smoke_parameters(parameters.find_notebook(name)) is not None
