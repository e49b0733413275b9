#!/usr/bin/env python3
"""Every task of the project, with nothing but Python 3.11: ``python3.11 tasks.py run``.

make  install, then make a small model for a domain: --domain my_texts/ --size 0.5
run   install, then execute notebook 03 on SmolLM2-135M and the medical domain
test  install, then run the whole test suite; with --fast what is not marked slow (three minutes)
lab   install, then open JupyterLab on notebooks/
sweep, results, report: a grid of runs, all records as a table, an HTML page (--help says more)
pages  the notebooks of some runs as a static site: tasks.py pages runs --out site
tiny  install, then train the tiny models of data/models again
diagrams      write the diagrams at the head of the notebooks, notebooks/diagrams/*.svg
results-page  write figures/README.md from its records (--from RUNS: take the newest runs first)
lock  resolve pyproject.toml anew into requirements.lock and environment.yml
Anything after the task's name goes to it: ``tasks.py run 01_activation_histograms -p epsilon=0.1``.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
LOCK, PROJECT = ROOT / "requirements.lock", ROOT / "pyproject.toml"
CPU_WHEELS = "download.pytorch.org"  # torch without 3 GB of CUDA libraries


def main() -> None:
    """Install if needed, then do the task."""
    if len(sys.argv) < 2 or sys.argv[1] not in TASKS:
        sys.exit(__doc__)
    if sys.version_info[:2] != (3, 11):
        found = ".".join(map(str, sys.version_info[:2]))
        sys.exit(f"error: Python 3.11 is needed, this is {found}; call python3.11 tasks.py")
    task, arguments = sys.argv[1], sys.argv[2:]
    install()
    sys.exit(TASKS[task](arguments))


def install() -> None:
    """Make .venv with the locked versions; a second call only compares a hash."""
    wanted = hashlib.sha256(LOCK.read_bytes() + PROJECT.read_bytes()).hexdigest()
    stamp = VENV / "installed"
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    print("installing into .venv (a few minutes, about 2 GB on disk) …", flush=True)
    if not PYTHON.is_file():
        fresh = not VENV.exists()
        made = subprocess.run([sys.executable, "-m", "venv", VENV], capture_output=True, text=True)
        if made.returncode:
            if fresh:  # else it is somebody's own
                shutil.rmtree(VENV, ignore_errors=True)
            sys.exit(
                "error: Python's venv module is missing or broken; on Debian and Ubuntu install "
                "python3.11-venv"
            )
    command = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if shutil.which("nvidia-smi") is None and resolves(CPU_WHEELS):
        command += ["--extra-index-url", f"https://{CPU_WHEELS}/whl/cpu"]
    done = subprocess.run([*command, "-c", LOCK, "-e", f"{ROOT}[test]"], cwd=ROOT)
    if done.returncode:
        sys.exit(
            "error: pip could not install the packages of requirements.lock (no network? see pip's "
            "words above); call the same command again"
        )
    stamp.write_text(wanted)


def resolves(host: str) -> bool:
    """Whether a name server knows the host; an index out of reach would stall pip for minutes."""
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def python(*arguments: str | Path, cwd: Path | None = ROOT) -> int:
    """Run the project's Python."""
    return subprocess.run([PYTHON, *arguments], cwd=cwd).returncode


def kit(task: str, arguments: list[str]) -> int:
    """Do a task of the package's command line, on paths from where the user stands."""
    return python("-m", "minigpt_lab", task, *arguments, cwd=None)


def lock(arguments: list[str]) -> int:
    """Pin what pip would install now, and list it for conda."""
    command = [PYTHON, "-m", "pip", "freeze", "--exclude-editable"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    pins = [re.sub(r"\+.*", "", line) for line in done.stdout.splitlines() if "==" in line]
    pins = [pin for pin in pins if not re.match(r"(nvidia|triton|cuda|pip==|uv==)", pin)]
    header = "# Constraints derived from pyproject.toml by `tasks.py lock`; do not edit.\n"
    LOCK.write_text(header + "\n".join(sorted(pins, key=str.lower)) + "\n")
    (ROOT / "environment.yml").write_text(environment())
    return 0


def environment() -> str:
    """The text of environment.yml: the dependencies of pyproject.toml for conda."""
    import tomllib  # new in 3.11; older versions must come as far as the clear line in main()

    project = tomllib.loads(PROJECT.read_text())["project"]
    requirements = ["-c requirements.lock", *project["dependencies"], "-e ."]
    header = (
        "# Derived from pyproject.toml by `tasks.py lock`; do not edit.\n"
        "name: minigpt-lab\n"
        "channels: [conda-forge, nodefaults]\n"
        "dependencies:\n"
        "  - python=3.11\n"
        "  - pip\n"
        "  - pip:\n"
    )
    return header + "".join(f"      - {requirement}\n" for requirement in requirements)


def test(arguments: list[str]) -> int:
    """Run the tests on two workers."""
    fast = ["-m", "not slow"] if "--fast" in arguments else []
    rest = [argument for argument in arguments if argument != "--fast"]
    workers = ["-n", "2", "--dist", "loadgroup", "--no-loadscope-reorder"]
    return python("-m", "pytest", *workers, *fast, *rest)


# the root is the project, so that pictures in figures/ are served too
LAB = ("--ServerApp.root_dir=.", "--LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb")
TASKS = {
    **{task: partial(kit, task) for task in ("make", "run", "sweep", "results", "report", "pages")},
    "test": test,
    "lab": lambda rest: python("-m", "jupyter", "lab", *LAB, *rest),
    "tiny": lambda rest: python("data/models/train.py", *rest),
    "diagrams": lambda rest: python("-m", "minigpt_lab.figures.diagrams", *rest),
    "results-page": lambda rest: python("figures/results_page.py", *rest),
    "lock": lock,
}

if __name__ == "__main__":
    main()
