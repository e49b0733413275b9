"""The pages' sources: a folder that Sphinx turns into the site."""

from __future__ import annotations

import posixpath
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import nbformat

from ..experiments import notebook_names
from ..store import DATA
from . import notebook_pages
from .api_reference import api_pages
from .glossary import glossary_page, glossary_section

ROOT = DATA.parent
NOTEBOOKS = ROOT / "notebooks"
_HERE = Path(__file__).resolve().parent
#: Files of the project that are pages, and under which names.
_PAGES = {
    "README.md": "index.md",
    "figures/README.md": "results.md",
    "notebooks/README.md": "glossary.md",
    "notebooks/TEACHING.md": "teaching.md",
    "data/README.md": "data.md",
}
_PICTURES = (".png", ".svg")
_BLOCK = "lab-explorer"  # class of an explorer that needs no kernel
_LINK = re.compile(r"(!?)\[((?:!\[[^]]*\]\([^)]*\)|[^]!])*)\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its record, and its executed notebook."""

    folder: Path
    record: Mapping[str, Any]
    notebook: Path


def write_sources(runs: Mapping[str, Run], folder: Path) -> None:
    """Write what the site is made of.

    Parameters
    ----------
    runs : mapping
        Runs by the name of their notebook. Notebooks of the series without one are shown without
        outputs.
    folder : pathlib.Path
        To write into; it exists.
    """
    for name in ("notebooks", "downloads", "api"):
        (folder / name).mkdir()
    for picture in (*ROOT.glob("figures/*"), *ROOT.glob("notebooks/**/*")):
        if picture.suffix in _PICTURES:
            target = folder / picture.relative_to(ROOT)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(picture, target)
    names = list(dict.fromkeys([*notebook_names(), *sorted(runs)]))
    shown = {name: _write_notebook(name, runs.get(name), folder) for name in names}
    for path in ("figures/README.md", "data/README.md", "notebooks/TEACHING.md"):
        text = relinked((ROOT / path).read_text("utf-8"), path)
        (folder / _PAGES[path]).write_text(text, "utf-8")
    section = glossary_section((NOTEBOOKS / "README.md").read_text("utf-8"))
    (folder / "glossary.md").write_text(glossary_page(section), "utf-8")
    for name, text in api_pages().items():
        (folder / f"{name}.rst").write_text(text, "utf-8")
    (folder / "index.md").write_text(_index(shown, runs), "utf-8")


def relinked(text: str, path: str, page: str | None = None) -> str:
    """Markdown of a file of the project whose links lead to the site's pages.

    Parameters
    ----------
    text, path : str
        The Markdown, and the file that it is from.
    page : str, optional
        Page that it is for; by default that of the file. A link to what is no part of the site
        becomes its text alone.
    """
    here, home = PurePosixPath(page or _PAGES.get(path, path)), PurePosixPath(path).parent

    def new_link(match: re.Match) -> str:
        target, hash_, anchor = match[3].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        old = posixpath.normpath(home / target)
        new = _PAGES.get(old, old)
        if old not in _PAGES and PurePosixPath(old).suffix not in (*_PICTURES, ".ipynb"):
            return match[2]
        return f"{match[1]}[{match[2]}]({posixpath.relpath(new, here.parent)}{hash_}{anchor})"

    return _LINK.sub(new_link, text)


def _write_notebook(name: str, run: Run | None, folder: Path) -> nbformat.NotebookNode:
    """Write a notebook's page and its download; return it as it was."""
    text = run.notebook.read_text("utf-8") if run else _committed(NOTEBOOKS / f"{name}.ipynb")
    notebook = nbformat.reads(text, as_version=4)
    bare = notebook_pages.stripped(notebook)
    nbformat.write(bare, folder / "downloads" / f"{name}.ipynb")
    download = f"{{download}}`Download the notebook </downloads/{name}.ipynb>` to run it yourself."
    facts = f"{{.facts}}\n{_facts(run)} {download}"
    relink = partial(relinked, path=f"notebooks/{name}.ipynb")
    shown = notebook_pages.published(notebook, run.folder) if run else bare
    page = notebook_pages.as_page(shown, facts, relink)
    nbformat.write(page, folder / "notebooks" / f"{name}.ipynb")
    return bare


def _committed(path: Path) -> str:
    """A file as the project has it, without what a reader typed into it; as it is if git is not."""
    show = ["git", "-C", str(path.parent), "show", f"HEAD:./{path.name}"]
    try:
        return subprocess.run(show, capture_output=True, check=True, encoding="utf-8").stdout
    except (OSError, subprocess.CalledProcessError):
        return path.read_text("utf-8")


def _facts(run: Run | None) -> str:
    """When and how a notebook was run, in a line."""
    if run is None:
        return "**Not run here**: shown without its outputs."
    record = run.record
    minutes = (record.get("wall_seconds") or 0) / 60
    commit = (record.get("git") or {}).get("commit")
    facts = [
        (record.get("model") or {}).get("label"),
        record.get("protocol"),
        f"{minutes:.0f} min on {record.get('device') or 'an unknown device'}",
        f"commit {commit[:10]}" if commit else "",
    ]
    smoke = "**A smoke run**: it shows that all works, and measures nothing. "
    day = (record.get("finished") or "")[:10]
    told = "; ".join(" ".join(str(fact).split()) for fact in facts if fact)
    return f"{smoke if record.get('smoke') else ''}Run on {day}: {told}."


def _index(notebooks: Mapping[str, nbformat.NotebookNode], runs: Mapping[str, Run]) -> str:
    """The first page: what it is about, and every notebook's question and picture."""
    lines = [(_HERE / "index.md").read_text("utf-8")]
    if missing := [name[:2] for name in notebooks if name not in runs]:
        lines += [f"Not run here, and so shown without outputs: notebooks {', '.join(missing)}.\n"]
    texts = {name: run.notebook.read_text("utf-8") for name, run in runs.items()}
    still = [n for n, text in texts.items() if "ThresholdExplorer(" in text and _BLOCK not in text]
    if still:
        names = ", ".join(name[:2] for name in sorted(still))
        lines += [
            f"Run without their explorer: notebooks {names}; "
            f"`python -m minigpt_lab run {still[0][:2]}`, and the pages of that run have one.\n"
        ]
    seen: set[str] = set()
    for name, notebook in notebooks.items():
        here = f"notebooks/{name}.ipynb"
        lines += [f"## {notebook_pages.title(notebook)}\n"]
        lines += [f"{notebook_pages.question(notebook)} [To the notebook]({here})\n"]
        drawn = notebook_pages.pictures(notebook)
        if (current := NOTEBOOKS / f"{name}.ipynb").is_file():  # the run may be of an older one
            drawn += notebook_pages.pictures(nbformat.read(current, as_version=4))
        pictures = [relinked(picture, here, "index.md") for picture in drawn]
        if new := [p for p in pictures if p.partition("](")[2] not in seen]:
            lines += [f"[{new[0]}]({here})\n"]
            seen.add(new[0].partition("](")[2])
    for caption, pages in (
        ("Notebooks", [f"notebooks/{name}" for name in notebooks]),
        ("Reference", ["results", "glossary", "teaching", "data", "api"]),
    ):
        lines += ["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""]
    return "\n".join(lines)
