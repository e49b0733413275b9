"""One truth for the environment, and the files that a newcomer meets."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import minigpt_lab as lab
import tasks
from minigpt_lab.planning.allocations import ALLOCATIONS

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text().splitlines()


def name(requirement: str) -> str:
    return re.split(r"[<>=\[ ]", requirement)[0].lower().replace("_", "-")


def test_environment_yml_is_derived_from_pyproject():
    assert (ROOT / "environment.yml").read_text() == tasks.environment()
    content = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(entry["pip"] for entry in content["dependencies"] if isinstance(entry, dict))
    assert [r for r in pip if not r.startswith("-")] == PROJECT["dependencies"]
    card = "jupyterlab ipywidgets torch transformers datasets peft matplotlib seaborn pandas"
    assert {*card.split(), "papermill"} <= set(map(name, pip))


def test_lock_pins_every_dependency_and_no_cuda():
    pins = {name(line): line for line in LOCK if not line.startswith("#")}
    assert all("==" in line and "+" not in line for line in pins.values())
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["test"], *extras["pages"], *extras["ray"]]
    assert {name(r) for r in wanted} - {PROJECT["name"]} <= set(pins)
    assert pins["torch"] == "torch==2.13.0"
    assert not [pin for pin in pins if re.match("nvidia|triton|cuda", pin)]


def test_every_declared_package_is_used():
    files = [*ROOT.glob("minigpt_lab/**/*.py"), *ROOT.glob("notebooks/*.ipynb")]
    files += [ROOT / "tasks.py"]
    text = "\n".join(path.read_text() for path in files)
    indirect = {"accelerate"}  # transformers imports it to read the embedded model
    for package in {name(r) for r in PROJECT["dependencies"]} - indirect:
        module = {"pyyaml": "yaml", "jupyterlab": "jupyter"}.get(package, package.replace("-", "_"))
        assert re.search(rf"(import|from|-m\"?,?) *\"?{module}\b", text), package


@pytest.mark.slow
def test_top_level_is_what_the_readme_says():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    top = {path.split("/")[0] for path in tracked.stdout.splitlines()}
    assert top == {
        ".ci", ".github", ".gitignore", ".pre-commit-config.yaml", "CONTRIBUTING.md", "LICENSE",
        "README.md", "data", "environment.yml", "figures", "minigpt_lab", "notebooks",
        "pyproject.toml", "requirements.lock", "tasks.py", "tests",
    }  # fmt: skip


def test_ci_runs_the_readmes_test_command():
    assert "python3.11 tasks.py test" in (ROOT / "README.md").read_text()
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("exec python3.11 tasks.py test")


def test_the_sites_workflow_builds_and_runs_no_notebook():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "pages.yml").read_text())
    steps = workflow["jobs"]["publish"]["steps"]
    (command,) = [step["run"] for step in steps if "run" in step]
    assert command == "python3.11 tasks.py pages figures/records --out site"
    assert (
        next(step["with"]["path"] for step in steps if "upload" in step.get("uses", "")) == "site"
    )
    assert "pages" in tasks.TASKS and list((ROOT / "figures" / "records").rglob("*.ipynb"))


@pytest.mark.slow
def test_code_is_clean():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, ROOT], capture_output=True)
        assert done.returncode == 0, done.stdout.decode()


@pytest.mark.slow
def test_tasks_explain_themselves():
    def run(*arguments, **keywords):
        command = [sys.executable, str(ROOT / "tasks.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, **keywords)

    assert "run   install" in run().stderr and run().returncode == 1
    assert run("dance").returncode == 1


def test_paths_are_those_from_where_the_user_stands(tmp_path, monkeypatch, capfd):
    """`tasks.py make --domain texts/` in any folder reads the folder that she sees."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    assert tasks.kit("make", ["--domain", "texts", "--size", "0.5"]) == 1
    assert "domain 'texts' is empty" in capfd.readouterr().err
    assert tasks.kit("results", ["none"]) == 1 and not (tmp_path / "none").exists()


def test_wrong_python_and_missing_venv_get_one_line(tmp_path, monkeypatch):
    assert "tomllib" not in vars(tasks)  # new in 3.11: its import must not come before the check
    monkeypatch.setattr(sys, "argv", ["tasks.py", "test"])
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    with pytest.raises(SystemExit, match="Python 3.11 is needed, this is 3.9"):
        tasks.main()
    monkeypatch.setattr(tasks, "VENV", tmp_path / "venv")
    monkeypatch.setattr(tasks, "PYTHON", tmp_path / "venv" / "bin" / "python")
    failed = subprocess.CompletedProcess([], 1, "", "No module named ensurepip")
    monkeypatch.setattr(tasks.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match="install python3.11-venv"):
        tasks.install()
    monkeypatch.setattr(tasks, "PYTHON", Path(sys.executable))
    with pytest.raises(SystemExit, match="no network"):
        tasks.install()


def test_a_second_call_installs_nothing(monkeypatch):
    monkeypatch.setattr(tasks.subprocess, "run", lambda *_, **__: pytest.fail("installed again"))
    assert (tasks.VENV / "installed").is_file(), "run the suite with `python3.11 tasks.py test`"
    tasks.install()


def test_lists_of_names_match_the_data():
    readme = (ROOT / "README.md").read_text()
    for file in ("domains.toml", "models.toml"):
        for entry in tomllib.loads((ROOT / "data" / file).read_text()):
            assert f"`{entry}`" in readme, entry
    ways = [*lab.CRITERIA, *lab.RECOVERY_PRESETS, *lab.PERPLEXITY_PRESETS]
    notebooks = [path.stem for path in ROOT.glob("notebooks/[0-9]*.ipynb")]
    assert not [name for name in [*ways, *notebooks] if f"`{name}`" not in readme]
    assert not [name for name in ALLOCATIONS if f'`"{name}"`' not in readme]
    assert shutil.which("git")
