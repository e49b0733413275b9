"""The folder of a training run: what it was begun with, and which of its checkpoints are whole.

A call may be killed at any moment, also while a checkpoint is written. The Trainer writes
``trainer_state.json`` last: of a checkpoint without it, or with a file that cannot be read, what
the Trainer wrote is removed. Copies with other names (``checkpoint-64-backup``) are a user's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..checks import writable_folder
from ..store import (
    RunState,
    Scratch,
    clear_scratch,
    make_folder,
    remove_empty,
    sha256,
    write_json,
)

#: What a run was begun with, beside its checkpoints.
RUN = "run.json"
STATE = "trainer_state.json"
OPTIMIZER = "optimizer.pt"
_HASHES = "sha256.json"
_NAME = re.compile(r"checkpoint-([0-9]+)")
#: Files of a checkpoint.
_WRITTEN = re.compile(
    r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|(adapter_|generation_)?config\.json"
    r"|(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|training_args\.bin"
    r"|trainer_state\.json|README\.md|sha256\.json"
)


@contextlib.contextmanager
def run_folder(out_dir: str | os.PathLike | None) -> Iterator[Path]:
    """The folder of a run, created if need be; a temporary one for None.

    Raises
    ------
    ValueError
        If several processes train together and no folder is given for all of them.
    """
    if out_dir is not None:
        folder = writable_folder(out_dir).resolve()
        make_folder(folder)
        clear_scratch(folder)
        yield folder
        return
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise ValueError(
            f"out_dir is None, but {processes} processes train together (torchrun); give a folder "
            "that all of them see"
        )
    with Scratch(Path(tempfile.gettempdir()), "recover") as scratch:
        yield scratch.path


def open_run(folder: Path, facts: dict) -> RunState:
    """State of the run in a folder, or of a new one: its `progress` holds where it started.

    Raises
    ------
    ValueError
        If the folder holds another run: facts differ, or it has checkpoints and no readable
        ``run.json``.
    FileExistsError
        If its ``run.json`` is something else.
    """
    run = RunState(folder / RUN)
    if run.progress is None and _checkpoints(folder):
        raise ValueError(
            f"{folder} holds checkpoints of something else (no {RUN}); choose another out_dir"
        )
    run.require(facts)
    return run


def last_whole(folder: Path) -> Path | None:
    """The last checkpoint that can be resumed from; later ones are broken and removed.

    That of the best state must be whole too: it is what a run ends with.
    """
    for checkpoint in reversed(_checkpoints(folder)):
        if is_whole(checkpoint):
            state = _state(checkpoint)
            resumable = has_ended(state) or (checkpoint / OPTIMIZER).is_file()
            if resumable and is_whole(folder / f"checkpoint-{state['best_global_step']}"):
                return checkpoint
        discard_checkpoint(checkpoint)
    return None


def rotate(folder: Path, best: str | None) -> None:
    """Keep two checkpoints: the last, and that of the best state or the one before."""
    earlier = _checkpoints(folder)[:-1]
    other = [path for path in earlier if best is not None and path.name == Path(best).name]
    for checkpoint in earlier:
        if checkpoint not in (other or earlier[-1:]):
            discard_checkpoint(checkpoint)


def discard_checkpoint(checkpoint: Path) -> None:
    """Remove what the Trainer wrote into a checkpoint, and the folder if that was all."""
    for path in checkpoint.glob("*"):
        if _WRITTEN.fullmatch(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)
    remove_empty(checkpoint)


def has_ended(state: dict) -> bool:
    """Whether a checkpoint's state is the end of its run."""
    return state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]


def slim(folder: Path) -> None:
    """Drop what only resuming needs, two thirds of the bytes, from a run that has ended."""
    checkpoints = _checkpoints(folder)
    if checkpoints and has_ended(_state(checkpoints[-1])):
        for checkpoint in checkpoints:
            if (checkpoint / OPTIMIZER).is_file():
                (checkpoint / OPTIMIZER).unlink()


def seal(checkpoint: Path) -> None:
    """Note the content of a finished checkpoint's files that hold no checksum of their own."""
    hashes = {path.name: sha256(path) for path in _unsealed(checkpoint)}
    write_json(checkpoint / _HASHES, hashes)


def _unsealed(checkpoint: Path) -> list[Path]:
    found = [p for p in checkpoint.iterdir() if _WRITTEN.fullmatch(p.name) and p.name != _HASHES]
    return [path for path in found if path.suffix in (".json", ".safetensors") and path.is_file()]


def _state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / STATE).read_text())


def is_whole(checkpoint: Path) -> bool:
    """Whether the files that a state needs are there, and every file can be read to its end."""
    found = {p.name: p for p in checkpoint.glob("*") if _WRITTEN.fullmatch(p.name) and p.is_file()}
    weights = {"model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json"}
    generators = [name for name in found if name.startswith("rng_state")]
    if not ({STATE, "scheduler.pt"} <= set(found) and weights & set(found)):
        return False
    try:
        for path in found.values():
            if path.suffix == ".json" and not isinstance(json.loads(path.read_text()), dict):
                return False
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):  # compares the lengths in its header with the file's
                    pass
            elif path.suffix in (".pt", ".pth"):
                with zipfile.ZipFile(path) as file:
                    if file.testzip():
                        return False
        state = _state(checkpoint)
        has_ended(state), state["best_global_step"]
        if _HASHES in found:  # else of an earlier version, or killed as it was about to be written
            known = json.loads(found[_HASHES].read_text())
            if any(known.get(path.name) != sha256(path) for path in _unsealed(checkpoint)):
                return False
    except (OSError, ValueError, LookupError, TypeError, SafetensorError, zipfile.BadZipFile):
        return False
    return bool(generators)


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of the run in a folder, by their steps; no copies that a user made of them."""
    found = [p for p in folder.glob("checkpoint-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))
