"""Sweeps: every run once, through kills, failures and a second call; and what a grid may say."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from minigpt_lab import __main__ as command_line
from minigpt_lab import experiments
from minigpt_lab.experiments import executors, grids, sweeps
from minigpt_lab.experiments.records import RECORD, read_record, results, write_record
from minigpt_lab.experiments.runs import is_finished

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


@pytest.fixture
def small(tmp_path):
    """A notebook that keeps a diary, and a function that writes grids of it."""
    code = [
        f'number = 1\nseconds = 0.0\nwrong = 0\ndiary = "{tmp_path}/diary"\nout_dir = "."',
        "import os, time\nfile = open(diary, 'a', buffering=1)\nprint('start', number, file=file)",
        "time.sleep(seconds)\nassert number != wrong, 'no luck'\nif wrong < 0: os._exit(1)",
        "print('end', number, file=file)",
    ]
    cells = [nbformat.v4.new_code_cell(source) for source in code]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "small.ipynb")

    def write(text: str) -> Path:
        path = tmp_path / "grid.yaml"
        path.write_text(f"notebook: small.ipynb\n{text}")
        return path

    return write


def diary(folder: Path) -> list[str]:
    """What runs wrote: when each started and ended."""
    path = folder / "diary"
    return path.read_text().splitlines() if path.exists() else []


def ends(folder: Path) -> list[str]:
    return sorted(line for line in diary(folder) if line.startswith("end"))


@pytest.mark.parametrize("own", [None, "3"])
def test_runs_get_one_thread_unless_the_user_says_otherwise(small, tmp_path, monkeypatch, own):
    monkeypatch.delenv("OMP_NUM_THREADS")
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    handed = []

    def process(command, **options):
        if "run" in command:  # a kernel inherits what its run was given
            handed.append(options["env"]["OMP_NUM_THREADS"])
            command = [sys.executable, "-c", ""]
        return real(command, **options)

    real = subprocess.Popen
    monkeypatch.setattr(executors.subprocess, "Popen", process)
    table = sweeps.sweep(grids.read_grid(small("grid: {number: [1]}\n")), tmp_path / "runs")
    assert handed == [own or "1"] and table["status"].tolist() == ["failed"]  # it left no record


def sweep_command(grid: Path, folder: Path, *words: str) -> list[str]:
    """A sweep in a process of its own."""
    return [sys.executable, "-m", "minigpt_lab", "sweep", str(grid), "--out", str(folder), *words]


def wait_for(condition, seconds: float = 1200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.xdist_group("sweep")
def test_a_killed_sweep_of_a_real_notebook_goes_on(tiny_sweep):
    assert tiny_sweep.status == 0, tiny_sweep.printed
    assert 1 <= len(tiny_sweep.before) <= 2
    runs = {path.parent.name: path.read_bytes() for path in tiny_sweep.folder.glob(f"*/{RECORD}")}
    assert len(runs) == 3 and tiny_sweep.before.items() <= runs.items()  # not done again
    counts = {
        word: int(n)
        for n, word in re.findall(r"(\d+) (skipped|completed|failed)", tiny_sweep.printed)
    }
    # a run that was under way when the sweep was killed may have ended before the second call
    assert counts["skipped"] >= len(tiny_sweep.before) and sum(counts.values()) == 3
    assert set(counts) <= {"skipped", "completed"}
    frame = results(tiny_sweep.folder)
    shrunk = frame[frame["metric"] == "shrunk stored"]
    pairs = set(zip(shrunk["domain_name"], shrunk["quantile_activation"], strict=True))
    assert pairs == {("tiny-law", 0.1), ("tiny-law", 0.5), ("tiny-games", 0.1)}
    assert set(shrunk["better"]) == {"lower"} and shrunk["value"].between(1e5, 1e6).all()
    record = read_record(tiny_sweep.folder / shrunk["run"].iloc[0])
    assert "tiny-law" in record["data"] and record["git"]["commit"] and record["model"]["sha256"]
    assert not list((tiny_sweep.folder / ".unfinished").iterdir())


@pytest.mark.slow
@pytest.mark.xdist_group("sweep")
def test_results_of_a_sweep(tiny_sweep, monkeypatch, capsys, tmp_path):
    table = tmp_path / "table.csv"
    for words in (["--csv", str(table)], []):
        argv = ["minigpt_lab", "results", str(tiny_sweep.folder), *words]
        monkeypatch.setattr(sys, "argv", argv)
        command_line.main()
    assert "metric,value,better" in table.read_text().splitlines()[0]
    assert re.search(r"tiny-law +0\.5 +shrunk stored +[\d,]+ +lower", capsys.readouterr().out)


@pytest.mark.slow
def test_a_failed_run_stops_no_other_and_gets_another_chance(small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = small("grid: {number: [1, 2]}\nparameters: {wrong: 1}\n")
    monkeypatch.setattr(sys, "argv", ["minigpt_lab", "sweep", str(grid)])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert "1 completed" in printed.out and "1 failed" in printed.out
    assert "AssertionError: no luck" in printed.err
    home = tmp_path / "runs" / "sweeps" / "grid"
    [failed] = (home / "failed").iterdir()
    assert read_record(failed)["error"] == "AssertionError: no luck"
    assert "no luck" in (failed / "small.ipynb").read_text()
    assert len(results(tmp_path / "runs")) == 1
    assert ends(tmp_path) == ["end 2"]
    table = sweeps.sweep(grids.read_grid(grid))
    assert sorted(table["status"]) == ["failed", "skipped"]
    assert diary(tmp_path).count("start 1") == 2 and len(diary(tmp_path)) == 4


@pytest.mark.slow
def test_a_run_that_dies_without_a_word_gets_a_record(small, tmp_path):
    table = sweeps.sweep(grids.read_grid(small("parameters: {wrong: -1}\n")), tmp_path / "runs")
    assert table["status"].tolist() == ["failed"]
    assert "Kernel died" in table["error"].iloc[0]
    [failed] = (tmp_path / "runs" / "failed").iterdir()
    assert (failed / "small.ipynb").is_file() and (failed / RECORD).is_file()


@pytest.mark.slow
def test_a_killed_run_is_finished_by_whoever_comes_next(small, tmp_path):
    """The sweep and all it started are killed; its runs are done again, finished ones are not."""
    grid = small("grid: {number: [1, 2]}\nparameters: {seconds: 3}\n")
    first = subprocess.Popen(sweep_command(grid, tmp_path / "s"), stderr=subprocess.DEVNULL)
    wait_for(lambda: "start 2" in diary(tmp_path))
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(first.pid)], capture_output=True, text=True, check=True
    )
    for pid in [first.pid, *map(int, children.stdout.split())]:
        os.kill(pid, signal.SIGKILL)
    first.wait()
    table = sweeps.sweep(grids.read_grid(grid), tmp_path / "s")
    assert table["status"].tolist() == ["skipped", "completed"]
    assert ends(tmp_path) == ["end 1", "end 2"] and diary(tmp_path).count("start 2") == 2


@pytest.mark.slow
def test_ctrl_c_stops_runs_and_kernels_cleanly(small, tmp_path):
    grid = small("parameters: {seconds: 600}\n")
    command = sweep_command(grid, tmp_path / "s")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: diary(tmp_path))
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=600)
    assert process.returncode == 1 and printed.strip().endswith("goes on from it")
    assert "Traceback" not in printed and not ends(tmp_path)


def test_two_sweeps_do_not_share_a_folder(small, tmp_path):
    grid = grids.read_grid(small("grid: {number: [1]}\n"))
    with (
        sweeps.locked(tmp_path),
        pytest.raises(RuntimeError, match="another sweep works in .*--out"),
    ):
        sweeps.sweep(grid, tmp_path)
    with sweeps.locked(tmp_path):
        pass  # free again
    assert not diary(tmp_path)


@pytest.mark.slow
def test_runs_of_a_notebook_of_ones_own(small, tmp_path, monkeypatch):
    small("")
    monkeypatch.chdir(tmp_path)
    first = experiments.run_notebook("small.ipynb", {"number": 4})
    second = experiments.run_notebook(tmp_path / "small.ipynb", {"number": 4})
    assert first != second and first.parent == tmp_path / "runs" / "small"
    record = read_record(first)
    assert record["parameters"]["number"] == 4 and "out_dir" not in record["parameters"]
    with pytest.raises(RuntimeError, match="no luck; see .*runs/failed/small/.*ipynb"):
        experiments.run_notebook("small.ipynb", {"wrong": 1})
    [failed] = (tmp_path / "runs" / "failed" / "small").iterdir()
    assert (failed / "small.ipynb").is_file() and read_record(failed)["status"] == "failed"
    assert len(results("runs")) == 2 and len(results("runs", smoke=True, failed=True)) == 3


def test_no_kernel_is_one_clear_line(small, tmp_path, monkeypatch):
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    def none(self, name):
        raise NoSuchKernel(name)

    small("")
    monkeypatch.setattr(KernelSpecManager, "get_kernel_spec", none)
    with pytest.raises(RuntimeError, match="no Jupyter kernel 'python3'.*ipykernel install"):
        experiments.run_notebook(tmp_path / "small.ipynb", {}, tmp_path / "run")
    assert read_record(tmp_path / "run")["status"] == "failed"


def test_a_full_disk_is_one_clear_line(small, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    small("")
    monkeypatch.setattr("papermill.execute_notebook", full)
    with pytest.raises(OSError, match="run could not be written .No space left.*make room"):
        experiments.run_once(tmp_path / "small.ipynb", {}, tmp_path / "run")
    assert not (tmp_path / "run").exists()  # a folder of that name is whole


def test_smoke_runs_are_kept_apart(tmp_path, monkeypatch):
    handed = {}
    monkeypatch.setattr(
        "papermill.execute_notebook", lambda *_, parameters, **__: handed.update(parameters)
    )
    monkeypatch.chdir(tmp_path)
    folder = experiments.run_notebook("03", {"test_tokens": 99}, smoke=True)
    assert folder.parent == tmp_path / "runs" / "smoke" / "03_contextual_pruning"
    assert handed["model_name"] == "tiny-llama" and handed["test_tokens"] == 99
    assert read_record(folder)["smoke"] and results("runs").empty


def test_defaults_that_are_paths_start_at_the_notebook(tmp_path, monkeypatch):
    handed = {}
    monkeypatch.setattr(
        "papermill.execute_notebook", lambda *_, parameters, **__: handed.update(parameters)
    )
    cell = nbformat.v4.new_code_cell('texts = "../texts"', metadata={"tags": ["parameters"]})
    for folder in ("notebooks", "texts"):
        (tmp_path / folder).mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "notebooks" / "own.ipynb")
    experiments.run_notebook(tmp_path / "notebooks" / "own.ipynb", {}, tmp_path / "run")
    assert handed == {"texts": str(tmp_path / "texts")}


WRONG = {
    "notebook: 3_contextual\ngrid: {prompt: [law]}": "no notebook '3_contextual'; did you mean",
    "grid: {prompt: [law]}": "notebook is None; expected a string",
    "notebook: [03": "is no YAML",
    "notebook: 03\ngrid: {prompt: [law]}": "notebook is 3; expected a string",
    "notebook: '03'\ngird: {prompt: [law]}": "key of the grid is 'gird'; .*did you mean 'grid'",
    "notebook: '03'\ngrid: {prompt: []}": r"prompt is \[\]; expected a list of one or more",
    "notebook: '03'\ngrid: {prompt: law}": "prompt is 'law'; expected a list",
    "notebook: '03'\ngrid: {promt: [law]}": "no parameter 'promt'; did you mean 'prompt'",
    "notebook: '03'\ngrid: {seq_len: [64, 1.5]}": "seq_len is 1.5; expected a whole number",
    "notebook: '03'\ngrid: {e: [{epsilon: 1}]}": "no parameter 'epsilon'; did you mean",
    "notebook: '03'\nparameters: {seq_len: '64'}": "seq_len is '64'; expected a whole number",
    "notebook: '03'\nparameters: [1]": r"parameters is \[1\]; expected a dict",
    "notebook: '03'\nparameters: {out_dir: x}": "out_dir is set by the runner",
    "notebook: '03'\nparameters: {prompt: a}\ngrid: {prompt: [b]}": "under parameters and grid",
    "notebook: '03'\ngrid: {prompt: [a]}\nexclude: [{prompt: b}]": "none of the combinations",
    "notebook: '03'\ngrid: {prompt: [a]}\nexclude: [{prompt: a}]": "exclude leaves no run",
    "notebook: '03'\nresources: {gpu: 1}": "key of resources is 'gpu'; .*did you mean",
    "notebook: '03'\njobs: many": "jobs is 'many'; expected a whole number of at least 1",
    "notebook: '03'\nsmoke: 3": "smoke is 3; expected True or False",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_grid_is_one_clear_line(text, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"wrong.yaml.* {WRONG[text]}") as error:
        grids.read_grid(path)
    assert "\n" not in str(error.value)


def test_a_grid_is_a_product_with_bundles_and_exceptions(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(
        "notebook: '03'\nsmoke: true\nresources: {cpus: 2, gpus: 1}\n"
        "grid:\n  domain_name: [tiny-law, tiny-games, tiny-law]\n"
        "  epsilon: [{epsilon_linear: 1e-3, epsilon_activation: 1e-3}, {epsilon_linear: 0.1}]\n"
        "exclude: [{domain_name: tiny-law, epsilon_linear: 0.1}]\n"
    )
    grid = grids.read_grid(path)
    assert (grid.name, grid.cpus, grid.gpus, grid.smoke) == ("grid", 2, 1, True)
    chosen = [(r["domain_name"], r["epsilon_linear"]) for r in grid.runs.values()]
    assert chosen == [("tiny-law", 1e-3), ("tiny-games", 1e-3), ("tiny-games", 0.1)]
    assert all(r["model_name"] == "tiny-llama" for r in grid.runs.values())


def test_an_id_changes_with_code_and_parameters_alone(small, tmp_path):
    small("")
    path = tmp_path / "small.ipynb"
    one = grids.run_id(path, {"number": 2})
    assert grids.run_id(path, {"number": 2, "wrong": 0}) == one  # a default, spelt out
    assert grids.run_id(path, {"number": 3}) != one
    content = json.loads(path.read_text())
    content["cells"][-1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "x"}]
    path.write_text(json.dumps(content))
    assert grids.run_id(path, {"number": 2}) == one
    content["cells"][-1]["source"] = "print('done')"
    path.write_text(json.dumps(content))
    assert grids.run_id(path, {"number": 2}) != one


def test_shipped_grids_are_whole():
    counts = {path.stem: len(grids.read_grid(path).runs) for path in NOTEBOOKS.glob("grids/*.yaml")}
    assert counts == {
        "smollm2_sizes": 5, "paper_tables_3_and_5": 30, "paper_recovery": 15, "paper_table_4": 30,
        "tinyllama_methods": 3, "tinyllama_questions": 6, "tinyllama_thresholds": 6,
        "how_small": 5, "method_ratios": 1, "dropped_blocks": 2, "recovered_domains": 5,
    }  # fmt: skip


def test_wrong_executor_address_and_missing_ray(small, tmp_path, monkeypatch):
    grid = grids.read_grid(small(""))
    for arguments in ({"executor": "slurm"}, {"jobs": 0}):
        with pytest.raises(ValueError, match="expected (one of|a whole number of at least 1)"):
            sweeps.sweep(grid, tmp_path / "s", **arguments)
    with pytest.raises(RuntimeError, match="no Ray cluster at .*ray start --head"):
        sweeps.sweep(grid, tmp_path / "s", executor="ray", address="127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install \.\[ray\]"):
        sweeps.sweep(grid, tmp_path / "s", executor="ray")
    assert not diary(tmp_path)


@pytest.mark.slow
def test_ray_completes_every_run_once_though_a_node_dies(small, tmp_path):
    """Two nodes; one is killed while it works. Completions are counted in the diary."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    node = {"num_cpus": 1, "object_store_memory": 80_000_000}
    cluster = cluster_utils.Cluster(
        initialize_head=True, head_node_args={**node, "include_dashboard": False}
    )
    # so long that a run on the node is in its middle when the node is gone, on a slow machine too
    grid = small("grid: {number: [1, 2, 3, 4]}\nparameters: {seconds: 5}\n")
    words = ["--executor", "ray", "--address", cluster.address]
    try:
        doomed = cluster.add_node(**node)
        sweep = subprocess.Popen(
            sweep_command(grid, tmp_path / "s", *words),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        # two have ended and both nodes are at the next
        wait_for(lambda: len(ends(tmp_path)) >= 2 and len(diary(tmp_path)) >= 6)
        cluster.remove_node(doomed, allow_graceful=False)
        printed, _ = sweep.communicate(timeout=1800)
    finally:
        cluster.shutdown()
    assert sweep.returncode == 0 and "4 completed" in printed, printed
    assert ends(tmp_path) == [f"end {number}" for number in range(1, 5)]
    assert len([run for run in (tmp_path / "s").iterdir() if is_finished(run)]) == 4


def test_a_finished_run_is_not_run_again(tmp_path, small):
    small("")
    write_record(tmp_path / "run", {"notebook": "small", "status": "completed", "parameters": {},
                                    "metrics": {}})  # fmt: skip
    experiments.run_once(tmp_path / "small.ipynb", {}, tmp_path / "run")
    assert not diary(tmp_path)
