"""The glossary of notebooks/README.md: its terms, and the page that explains them."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

_ITEM = re.compile(r"^\* (.*?)(?=^\* |^\*\*|^#|\Z)", re.MULTILINE | re.DOTALL)
_BOLD = re.compile(r"\*\*(.+?)\*\*", re.DOTALL)


@dataclass(frozen=True)
class Term:
    """A word of the glossary.

    Attributes
    ----------
    anchor : str
        Its place on the glossary's page.
    meaning : str
        The entry that explains it, as plain text.
    """

    anchor: str
    meaning: str


def glossary_section(readme: str) -> str:
    """What stands under the heading "Glossary", up to the next heading of its level.

    Raises
    ------
    ValueError
        If there is no such heading.
    """
    _, found, rest = readme.partition("\n## Glossary\n")
    if not found:
        raise ValueError("notebooks/README.md has no heading '## Glossary'; write one")
    return rest.split("\n## ")[0]


def read_terms(section: str) -> dict[str, Term]:
    """Terms by name: the words in bold of every entry of the list.

    A name is in small letters unless a letter after the first is large (LoRA).
    """
    terms: dict[str, Term] = {}
    for entry in _ITEM.findall(section):
        meaning = re.sub(r"[*`$\\]", "", " ".join(entry.split()))
        for name in _names(entry):
            key = name.lower() if name[1:].islower() else name
            terms.setdefault(key, Term(anchor(name), meaning))
    return terms


def glossary_page(section: str) -> str:
    """The glossary as a page: groups are headings, each term is a place to link to."""
    seen: set[str] = set()

    def marked(match: re.Match) -> str:
        parts = []
        for name in _split(match[1]):
            new = name not in seen
            seen.add(name)
            parts.append(f"[**{name}**]{{#{anchor(name)}}}" if new else f"**{name}**")
        return ", ".join(parts)

    headed = re.sub(r"^\*\*(.+?)\*\*$", r"## \1", section, flags=re.MULTILINE)
    return f"# Glossary\n\n{_BOLD.sub(marked, headed).strip()}\n"


def anchor(name: str) -> str:
    """Name of a term's place in an address: ASCII letters; a Greek letter by its name."""
    spelled = "".join(c if c.isascii() else unicodedata.name(c).split()[-1] for c in name)
    return "term-" + re.sub(r"[^a-z0-9]+", "-", spelled.lower()).strip("-")


def _names(entry: str) -> list[str]:
    return [name for bold in _BOLD.findall(entry) for name in _split(bold)]


def _split(bold: str) -> list[str]:
    """The terms that stand in one pair of stars, between commas."""
    return [" ".join(name.split()) for name in bold.split(",")]
