"""Pinned packages of weights and texts: fetched once, checked by hash, kept in the cache."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from platformdirs import user_cache_path

from ..checks import to_path
from .storage import (
    DamagedFile,
    Scratch,
    explain_disk_errors,
    read_cached,
    read_json,
    sha256,
    warn_if_unsaved,
    write_failed,
    write_json,
)

#: The kit runs from its checkout, where data/ and notebooks/ stand beside the package.
DATA = Path(__file__).resolve().parents[2] / "data"


#: What to do when the disk of the cache is full.
CACHE_REMEDY = "set MINIGPT_LAB_CACHE to a folder on another disk"
_NO_SPACE = re.compile(r"no space left|disk quota exceeded", re.IGNORECASE)


class SourceUnavailable(OSError):
    """A pinned source could not be had: the message says which, why, and what to use instead."""


@dataclass(frozen=True)
class Package:
    """A file in a package registry, pinned by version and content.

    Parameters
    ----------
    name, version : str
        Name and exact version in the registry.
    kind : {"wheel", "deb", "npm"}
        PyPI wheel (had with ``pip download``), Debian package (``apt-get download``) or npm package
        (``npm pack``).
    sha256 : str
        Expected hash of the downloaded file.
    licence : str
        Licence of the package itself; the texts in it may state another.
    """

    name: str
    version: str
    kind: str
    sha256: str
    licence: str


def read_toml(path: Path) -> dict:
    """Parse a TOML file of ``data/``."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


def pinned_packages() -> dict[str, Package]:
    """Every pinned package of ``data/packages.toml``, by name."""
    entries = read_toml(DATA / "packages.toml")
    return {name: Package(name=name, **entry) for name, entry in entries.items()}


def cache_folder() -> Path:
    """Folder for downloads and conversions: ``MINIGPT_LAB_CACHE``, or the user's cache folder.

    Raises
    ------
    PermissionError
        If the folder cannot be created or written.
    """
    folder = to_path(os.environ.get("MINIGPT_LAB_CACHE") or user_cache_path("minigpt_lab"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PermissionError(
            f"cache folder {folder} cannot be written ({error.strerror}); "
            "set MINIGPT_LAB_CACHE to a folder that can"
        ) from error
    return folder


def hub_reachable() -> bool:
    """Whether the Hugging Face hub's name resolves (or a proxy may do so for us).

    Its clients retry for most of a minute before they say that there is no network.
    """
    if {"https", "all"} & set(getproxies()):
        return True
    try:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        socket.getaddrinfo(urlsplit(endpoint).hostname, 443)
    except OSError:
        return False
    return True


def cached(kind: str, name: str, recipe: list, make: Callable[[], dict]) -> dict:
    """Plain data from the cache, or (first use) made and kept there with its hash.

    A file that is damaged or was changed is set aside, and the data made anew.

    Parameters
    ----------
    kind, name : str
        Folder of the cache, and what the file's name begins with.
    recipe : list
        All that the data depends on, as plain data.
    make : callable
        Gives the data.
    """
    key = hashlib.sha256(json.dumps(["hashed", *recipe]).encode()).hexdigest()[:12]
    cached = cache_folder() / kind / f"{name}-{key}.json"
    known = read_cached(cached, _read_hashed, ".json")
    if known is not None:
        return known
    made = make()
    with warn_if_unsaved(f"{name} is"):
        write_json(cached, {"sha256": _json_hash(made), "made": made})
    return made


def _read_hashed(path: Path) -> dict:
    content = read_json(path)
    if not isinstance(content, dict) or content.get("sha256") != _json_hash(content.get("made")):
        raise DamagedFile(f"{path} is not what was written")
    return content["made"]


def _json_hash(data: object) -> str:
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def verify(path: Path, expected: str, what: str) -> Path:
    """Return `path` if its hash is `expected`; else set the file aside and refuse it.

    Raises
    ------
    ValueError
        If the hash differs. The file is moved to ``quarantine/`` in the cache for inspection.
    """
    found = sha256(path)
    if found == expected:
        return path
    aside = cache_folder() / "quarantine" / f"{found[:16]}-{path.name}"
    aside.parent.mkdir(exist_ok=True)
    shutil.move(path, aside)
    raise ValueError(
        f"{what}: expected sha256 {expected}, got {found}; not used, kept aside as {aside}"
    )


def fetch(package: Package, instead: str) -> Path:
    """Download a pinned package into the cache, or return the copy that is already there.

    A copy that has changed is set aside and fetched again.

    Parameters
    ----------
    package : Package
        What to fetch.
    instead : str
        What the user can do when the package is not to be had; ends the error message.

    Raises
    ------
    SourceUnavailable
        If the registry or its client cannot be reached.
    ValueError
        If the downloaded file's hash differs from the pinned one.
    minigpt_lab.store.WriteFailed
        If the disk is full.
    """
    final = cache_folder() / "packages" / f"{package.name}-{package.version}.{package.kind}"
    what = f"{package.kind} {package.name} {package.version}"
    if final.exists():
        try:
            return verify(final, package.sha256, what)
        except ValueError as error:
            warnings.warn(f"{error}; fetched again", stacklevel=2)
    clients = {"wheel": _download_wheel, "deb": _download_deb, "npm": _download_npm}
    with explain_disk_errors(final), Scratch(cache_folder(), package.name) as scratch:
        reason = clients[package.kind](package, str(scratch.path))
        suffixes = (".whl", ".deb", ".tgz")
        found = [path for path in scratch.path.iterdir() if path.suffix in suffixes]
        if _NO_SPACE.search(reason or ""):
            # what there is of the file is cut off, and removed: it would keep the disk full
            raise write_failed(final, errno.ENOSPC, CACHE_REMEDY)
        if len(found) != 1:
            raise SourceUnavailable(f"{what} could not be downloaded ({reason}); {instead}")
        verify(found[0], package.sha256, what)
        final.parent.mkdir(exist_ok=True)
        found[0].replace(final)
    return final


def _run(*command: str, cwd: str) -> str:
    """Run a client of a registry; return the last line it complained with."""
    # its own temporary files, as large as the package, go where they are removed with the rest
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False,
        env={**os.environ, "TMPDIR": cwd, "LC_ALL": "C"},
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    full = [line for line in lines if _NO_SPACE.search(line)]
    return (full or lines)[-1].strip() if lines else f"exit status {done.returncode}"


def _download_wheel(package: Package, folder: str) -> str:
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:")
    pinned = f"{package.name}=={package.version}"
    return _run(*pip, "--disable-pip-version-check", "--dest", folder, pinned, cwd=folder)


def _download_deb(package: Package, folder: str) -> str:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return "it is a Debian package and this system has no apt-get"
    download = ("apt-get", "--quiet", "download", f"{package.name}={package.version}")
    reason = _run(*download, cwd=folder)
    if not any(Path(folder).glob("*.deb")) and os.access("/var/lib/apt/lists", os.W_OK):
        _run("apt-get", "--quiet", "update", cwd=folder)  # a fresh machine has no package lists
        reason = _run(*download, cwd=folder)
    return reason


def _download_npm(package: Package, folder: str) -> str:
    if shutil.which("npm") is None:
        return "it is an npm package and this system has no npm"
    return _run("npm", "pack", "--silent", f"{package.name}@{package.version}", cwd=folder)


def read_archive(archive: Path, pattern: str) -> dict[str, bytes]:
    """Content of an archive's files whose path matches a glob, by path, sorted.

    Parameters
    ----------
    archive : pathlib.Path
        What `fetch` returned: a wheel (zip), a Debian or an npm package (tar).
    pattern : str
        Glob in which ``*`` also crosses folders.

    Raises
    ------
    ValueError
        If nothing matches.
    """
    if archive.suffix == ".wheel":
        with zipfile.ZipFile(archive) as file:
            found = {name: file.read(name) for name in file.namelist() if fnmatch(name, pattern)}
    elif archive.suffix == ".npm":
        with tarfile.open(archive) as file:
            found = _matching(file, pattern)
    else:
        unpack = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE)
        with unpack, tarfile.open(fileobj=unpack.stdout, mode="r|") as file:
            found = _matching(file, pattern)
    if not found:
        raise ValueError(f"{archive.name} holds no file {pattern!r}")
    return dict(sorted(found.items()))


def _matching(archive: tarfile.TarFile, pattern: str) -> dict[str, bytes]:
    return {
        entry.name: archive.extractfile(entry).read()
        for entry in archive
        if entry.isfile() and fnmatch(entry.name, pattern)
    }
