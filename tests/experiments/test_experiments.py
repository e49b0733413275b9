"""The command line around notebooks: names, parameters and what is printed, without running one."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest

from minigpt_lab import __main__ as command_line
from minigpt_lab import experiments
from minigpt_lab.experiments.parameters import notebook_names
from minigpt_lab.experiments.records import write_record

WRONG = [
    ("02", "epsilon_linear", 0.1, "a list"),
    ("02", "epsilon_linear", ["a"], "a number"),
    ("03", "seq_len", 64.5, "a whole number"),
    ("04", "losses", "label", "a dictionary"),
    ("03", "seq_len", True, "a whole number"),
    ("03", "seq_len", None, "a whole number"),
    ("03", "quantile_activation", "0.1", "a number or None"),
    ("03", "domain_name", 3, "a string"),
    ("03", "epsilon_linear", {"a": 1}, "a number or a string or a list"),
    ("03", "epsilon_linear", True, "a number or a string or a list"),
]


@pytest.mark.parametrize(("notebook", "name", "value", "expected"), WRONG)
def test_values_of_another_kind_are_refused_before_anything_runs(
    notebook, name, value, expected, tmp_path
):
    with pytest.raises(ValueError, match=f"{name}.* is .*; expected .*{expected}"):
        experiments.run_notebook(notebook, {name: value}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_values_of_the_right_kind_reach_the_kernel(monkeypatch, tmp_path):
    handed = {}
    monkeypatch.setattr(
        "papermill.execute_notebook", lambda *_, parameters, **__: handed.update(parameters)
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    given = {
        "quantile_activation": None,
        "epsilon_embedding": 1,
        "epsilon_linear": 0.1,
        "seq_len": 8,
    }
    experiments.run_notebook("03", {**given, "domain_name": "./texts"}, tmp_path / "run")
    assert given.items() <= handed.items()
    assert handed["domain_name"] == str(tmp_path / "texts")  # the kernel works elsewhere
    experiments.run_notebook("01", {"domain_names": ["./texts", "tiny-law"]}, tmp_path / "run")
    assert handed["domain_names"] == [str(tmp_path / "texts"), "tiny-law"]


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Call the command line with a run that is made up; its arguments and what was printed."""
    calls = []

    def run_notebook(notebook, parameters, out_dir, *, smoke):
        calls.append((notebook.stem, parameters, out_dir, smoke))
        table = pd.DataFrame(
            {"text": ["z", "a"], "stored": [134_515_008, 7], "loss": [1.23456, 2e7]}
        )
        table.to_csv(tmp_path / "summary.csv", index=False)
        model = {"label": "tiny"}
        content = {"model": model, "protocol": "quickly", "tables": ["summary"]}
        run = {"notebook": "02", "status": "completed", "parameters": {}, "metrics": {}}
        write_record(tmp_path, {**run, **content})
        return tmp_path

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["minigpt_lab", "run", *words])
        command_line.main()
        return calls, capsys.readouterr().out

    monkeypatch.setattr(experiments, "run_notebook", run_notebook)
    return call


def test_parameters_of_the_command_line(command):
    words = ["02", "-p", "domain_name=law", "-p", "controls=[]", "-p", "model_name=a=b"]
    words += ["--out", "x"]
    calls, printed = command(*words, "-p", "epsilon_all=[1e-3]")
    given = {"domain_name": "law", "controls": [], "model_name": "a=b", "epsilon_all": [1e-3]}
    assert calls == [("02_threshold_sweep", given, "x", False)]
    rows = [line.split() for line in printed.splitlines()[4:7]]
    assert rows == [
        ["text", "stored", "loss"],
        ["z", "134515008", "1.235"],
        ["a", "7", "20,000,000"],
    ]
    found = command("-p", "epsilon_activation=nan", "-p", "epsilon_linear=inf")[0][-1][1]
    assert np.isnan(found["epsilon_activation"]) and found["epsilon_linear"] == np.inf
    assert command("--smoke")[0][-1] == (command_line.DEFAULT, {}, None, True)


def test_help_lists_notebooks_and_parameters(command):
    _, printed = command("--help")
    assert all(name in printed for name in notebook_names())
    calls, printed = command("03", "--help")
    assert 'domain_name = "medical"' in printed and not calls
    _, printed = command("1", "--help")  # by its number, though 10 begins so too
    assert "domain_names = " in printed
    with pytest.raises(SystemExit, match="no notebook '99'"):
        command("99", "--help")
