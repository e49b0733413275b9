"""An executed notebook as a page: what needs a kernel or names a machine is left out."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import nbformat
from nbformat import NotebookNode

_WIDGET = "application/vnd.jupyter.widget-view+json"
_PICTURES = {"image/png", "image/jpeg", "image/svg+xml"}
_SAVED = re.compile(r"save_figure\([^\"]*\"[^\"]*/(\w+)\"")
_NO_ALT = re.compile(r"<img(?![^>]*\balt=)")
_INJECTED = "injected-parameters"
_PAPERMILLS = "# Parameters\n"
_OURS = "# parameters of this run, in place of those above\n"
_RUNNER = re.compile(r"^(out_dir|interactive) = .*\n?", re.MULTILINE)


def stripped(notebook: NotebookNode) -> NotebookNode:
    """The notebook without outputs and without what a run put into it, to be run again."""
    bare = copy.deepcopy(notebook)
    bare.cells = [cell for cell in bare.cells if _INJECTED not in cell.metadata.get("tags", ())]
    for cell in bare.cells:
        cell.metadata = _tags(cell)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    bare.metadata = _language(bare)
    return bare


def published(notebook: NotebookNode, run: Path) -> NotebookNode:
    """The executed notebook without what needs a kernel or names a machine; pictures get words.

    Parameters
    ----------
    notebook : nbformat.NotebookNode
        As the run left it.
    run : pathlib.Path
        Folder of the run, with the figures that the notebook saved.
    """
    page = copy.deepcopy(notebook)
    folder = page.metadata.get("papermill", {}).get("parameters", {}).get("out_dir")
    page.metadata = _language(page)
    heading = ""
    for cell in page.cells:
        cell.metadata = _tags(cell)
        if cell.cell_type == "markdown":
            titles = re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE)
            heading = titles[-1] if titles else heading
            continue
        if _INJECTED in cell.metadata.get("tags", ()):
            given = cell.source.removeprefix(_PAPERMILLS).removeprefix(_OURS)
            given = _RUNNER.sub("", given).strip()
            cell.source = f"{_OURS}{given}" if given else ""
        alt = _words_of_figure(cell.source, run) or f"Picture of the section “{heading}”"
        cell.outputs = [each for each in cell.get("outputs", ()) if _make_static(each, alt)]
    page.cells = [cell for cell in page.cells if cell.source]  # none but the runner's
    text = nbformat.writes(page)
    return nbformat.reads(text.replace(folder, "runs") if folder else text, as_version=4)


def as_page(notebook: NotebookNode, facts: str, relink: Callable[[str], str]) -> NotebookNode:
    """A published or stripped notebook as a page of the site.

    Parameters
    ----------
    notebook : nbformat.NotebookNode
        Of `published` or `stripped`.
    facts : str
        Markdown to stand below its title.
    relink : callable
        Turns the links of Markdown into the site's.
    """
    page = copy.deepcopy(notebook)
    page.metadata.setdefault("language_info", {"name": "python"})  # by which code is coloured
    for cell in page.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source)
        for output in cell.get("outputs", ()):
            for kind in _PICTURES & {*output.get("metadata", ())}:
                cell.metadata["mystnb"] = {"image": {"alt": output.metadata[kind]["alt"]}}
    head, _, rest = page.cells[0].source.partition("\n")
    page.cells[0].source = f"{head}\n\n{facts}\n{rest}"
    return page


def question(notebook: NotebookNode) -> str:
    """The question that the first cell asks: its first words in bold."""
    found = re.search(r"\*\*(.+?)\*\*", notebook.cells[0].source, re.DOTALL)
    return found[1] if found else ""


def title(notebook: NotebookNode) -> str:
    """The heading of the first cell."""
    return notebook.cells[0].source.split("\n")[0].lstrip("# ")


def pictures(notebook: NotebookNode) -> list[str]:
    """The pictures in the notebook's words, in Markdown; those of results first."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    found = re.findall(r"!\[[^]]*\]\([^)]+\)", "\n".join(texts))
    return sorted(found, key=lambda picture: "figures/" not in picture)


def _tags(cell: NotebookNode) -> NotebookNode:
    kept = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
    return nbformat.from_dict(kept)


def _language(notebook: NotebookNode) -> NotebookNode:
    names = ("kernelspec", "language_info")
    kept = {name: notebook.metadata[name] for name in names if name in notebook.metadata}
    return nbformat.from_dict(kept)


def _make_static(output: NotebookNode, alt: str) -> bool:
    """Take from an output what needs a kernel, give its pictures words; False if nothing is left.

    Of a widget the picture and the text stay that it carries along; a progress bar carries none.
    """
    data = output.get("data")
    if data is None:
        return output.get("name") != "stderr"  # progress too
    if data.pop(_WIDGET, None) and data.keys() <= {"text/plain"}:
        return False
    for kind in _PICTURES & data.keys():
        output.metadata.setdefault(kind, {}).setdefault("alt", alt)
    if "text/html" in data:
        words = alt.replace("&", "&amp;").replace('"', "&quot;")
        data["text/html"] = _NO_ALT.sub(lambda _: f'<img alt="{words}"', data["text/html"])
    return True


def _words_of_figure(source: str, run: Path) -> str:
    """Title and caption of the figure that a cell saves, from the SVG in the run folder."""
    saved = _SAVED.search(source)
    drawn = run / f"{saved[1]}.svg" if saved else None
    if drawn is None or not drawn.is_file():
        return ""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    figure = ElementTree.parse(drawn, parser).find(".//*[@id='figure_1']")
    texts = [] if figure is None else [e for e in figure if e.get("id", "").startswith("text")]
    comments = [c.text or "" for e in texts for c in e.iter() if c.tag is ElementTree.Comment]
    return " ".join(" ".join(comments).split())
