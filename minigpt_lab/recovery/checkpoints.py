"""The folder of a training run: what it was begun with, and which of its checkpoints are whole.

A call may be killed at any moment, also while a checkpoint is written. The Trainer writes
``trainer_state.json`` last: a checkpoint without it, or with a file that cannot be read, is
removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..assets import staged

#: What a run was begun with, beside its checkpoints.
RUN = "run.json"
STATE = "trainer_state.json"
OPTIMIZER = "optimizer.pt"


@contextlib.contextmanager
def run_folder(out_dir: str | os.PathLike | None) -> Iterator[Path]:
    """The folder of a run, created if need be; a temporary one for None.

    Raises
    ------
    ValueError
        If several processes train together and no folder is given for all of them.
    """
    if out_dir is not None:
        folder = Path(out_dir).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise ValueError(
            f"out_dir is None, but {processes} processes train together (torchrun); give a folder "
            "that all of them see"
        )
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


def begin_run(folder: Path, facts: dict, start: dict) -> None:
    """Note what a run is and where it started, for the call that resumes it."""
    with staged(folder / RUN) as staging:
        staging.write_text(json.dumps({"facts": facts, "start": start}, indent=1))


def resume_run(folder: Path, facts: dict) -> dict | None:
    """Where the run in a folder started, or None if there is none.

    Raises
    ------
    ValueError
        If the folder holds another run: facts differ, or it has checkpoints and no ``run.json``.
    """
    if not (folder / RUN).is_file():
        if list(_checkpoints(folder)):
            raise ValueError(
                f"{folder} holds checkpoints of something else (no {RUN}); choose another out_dir"
            )
        return None
    run = json.loads((folder / RUN).read_text())
    here = json.loads(json.dumps(facts))  # tuples become lists, as they did on disk
    there = run["facts"]
    differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    if differing:
        raise ValueError(
            f"{folder} holds a run with another "
            + ", ".join(f"{key} ({there.get(key)}, now {here.get(key)})" for key in differing)
            + "; repeat that call to resume it, or choose another out_dir"
        )
    return run["start"]


def last_whole(folder: Path) -> Path | None:
    """The last checkpoint that can be resumed from; later ones are broken and removed.

    That of the best state must be whole too: it is what a run ends with.
    """
    for checkpoint in sorted(_checkpoints(folder), key=_step, reverse=True):
        if is_whole(checkpoint):
            state = json.loads((checkpoint / STATE).read_text())
            resumable = has_ended(state) or (checkpoint / OPTIMIZER).is_file()
            if resumable and is_whole(folder / f"checkpoint-{state['best_global_step']}"):
                return checkpoint
        shutil.rmtree(checkpoint)
    return None


def has_ended(state: dict) -> bool:
    """Whether a checkpoint's state is the end of its run."""
    return state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]


def slim(folder: Path) -> None:
    """Drop what only resuming needs, two thirds of the bytes, from a run that has ended."""
    checkpoints = sorted(_checkpoints(folder), key=_step)
    if checkpoints and has_ended(json.loads((checkpoints[-1] / STATE).read_text())):
        for checkpoint in checkpoints:
            (checkpoint / OPTIMIZER).unlink(missing_ok=True)


def is_whole(checkpoint: Path) -> bool:
    """Whether the files that a state needs are there, and every file can be read to its end."""
    found = {path.name: path for path in checkpoint.glob("*")}
    weights = {"model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json"}
    generators = [name for name in found if name.startswith("rng_state")]
    if not ({STATE, "scheduler.pt"} <= set(found) and weights & set(found)):
        return False
    try:
        for path in found.values():
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):  # compares the lengths in its header with the file's
                    pass
            elif path.suffix in (".pt", ".pth"):
                with zipfile.ZipFile(path) as file:
                    if file.testzip():
                        return False
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile):
        return False
    return bool(generators)


def _checkpoints(folder: Path) -> Iterator[Path]:
    return folder.glob("checkpoint-[0-9]*")


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
