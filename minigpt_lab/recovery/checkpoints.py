"""The folder of a training run: what identifies it, and which of its checkpoints are complete.

A call may be killed at any moment, also while a checkpoint is written. ``sha256.json`` is written
last: what the Trainer wrote into a checkpoint without it, or with a file that has changed, is
removed. Copies with other names (``checkpoint-64-backup``) are a user's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checks import writable_folder
from ..models import dtype_name, fingerprint, reading_dtype
from ..store import (
    RunState,
    Scratch,
    clear_scratch,
    content_hash,
    make_folder,
    read_json,
    remove_empty,
    sha256,
    write_json,
)

#: What a run was begun with, beside its checkpoints.
RUN = "run.json"
STATE = "trainer_state.json"
_OPTIMIZER = "optimizer.pt"
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


def identity(
    model: PreTrainedModel,
    windows: torch.Tensor,
    texts: Mapping[str, Sequence[str]],
    precision: str,
) -> dict[str, str]:
    """Hashes of the model and the texts of a run, and the type that evaluations read it in."""

    def digest(value: list) -> str:
        return content_hash([json.dumps(value)])[:16]

    return {
        **of_model("model", model, precision),
        "training text": digest(windows.tolist()),
        "validation text": digest([list(text) for text in texts.values()]),
    }


def of_model(name: str, model: PreTrainedModel, precision: str) -> dict[str, str]:
    """Hash of a model's weights, and the type that they are read in."""
    read_in = dtype_name(reading_dtype(model, precision))
    return {name: fingerprint(model)[:16], f"type that the {name} is read in": read_in}


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


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as complete by the hashes of its files.

    Those of torch hold checksums of their own, and are the largest: their names are enough.
    """
    files = [path for path in _written(checkpoint) if path.name != _HASHES]
    hashes = {p.name: None if p.suffix in (".pt", ".pth") else sha256(p) for p in files}
    write_json(checkpoint / _HASHES, hashes)


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint is sealed and its files are unchanged; the optimizer may be missing."""
    try:
        hashes: Any = read_json(checkpoint / _HASHES)
        files = {checkpoint / name: digest for name, digest in hashes.items()}
        return all(
            _is_intact(path, digest)
            for path, digest in files.items()
            if path.name != _OPTIMIZER or path.exists()
        )
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile):
        return False


def _is_intact(path: Path, digest: str | None) -> bool:
    if digest is not None:
        return sha256(path) == digest
    with zipfile.ZipFile(path) as file:
        return file.testzip() is None


def last_complete(folder: Path) -> Path | None:
    """The last checkpoint that can be resumed from; later ones are broken and removed.

    That of the best state must be complete too: a run ends with it.
    """
    for checkpoint in reversed(_checkpoints(folder)):
        if is_complete(checkpoint):
            state: Any = read_json(checkpoint / STATE)
            resumable = has_ended(state) or (checkpoint / _OPTIMIZER).is_file()
            if resumable and is_complete(folder / f"checkpoint-{state['best_global_step']}"):
                return checkpoint
        discard_checkpoint(checkpoint)
    return None


def has_ended(state: dict) -> bool:
    """Whether a checkpoint's state is the end of its run."""
    return state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]


def rotate(folder: Path, best: str | None) -> None:
    """Keep two checkpoints: the last, and that of the best state or the one before.

    The Trainer's own rotation would also remove a user's copies.
    """
    *earlier, _ = _checkpoints(folder)
    kept = [path for path in earlier if best is not None and path.name == Path(best).name]
    for checkpoint in earlier:
        if checkpoint not in (kept or earlier[-1:]):
            discard_checkpoint(checkpoint)


def discard_checkpoint(checkpoint: Path) -> None:
    """Remove what the Trainer wrote into a checkpoint, and the folder if that was all."""
    for path in _written(checkpoint):
        path.unlink(missing_ok=True)
    remove_empty(checkpoint)


def drop_optimizers(folder: Path) -> None:
    """Remove what only resuming needs, two thirds of the bytes, from a run that has ended."""
    checkpoints = _checkpoints(folder)
    state: Any = read_json(checkpoints[-1] / STATE) if checkpoints else None
    if state and has_ended(state):
        for checkpoint in checkpoints:
            (checkpoint / _OPTIMIZER).unlink(missing_ok=True)


def _written(checkpoint: Path) -> list[Path]:
    """Files in a checkpoint that the Trainer or `seal` wrote."""
    return [p for p in checkpoint.glob("*") if _WRITTEN.fullmatch(p.name) and not p.is_dir()]


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of the run in a folder, by their steps; no copies that a user made of them."""
    names = {path: _NAME.fullmatch(path.name) for path in folder.glob("checkpoint-*")}
    numbered = {path: int(name[1]) for path, name in names.items() if name and path.is_dir()}
    return sorted(numbered, key=lambda path: numbered[path])
