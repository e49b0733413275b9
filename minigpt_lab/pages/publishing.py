"""Write the site: choose the runs, make the sources, let Sphinx build, put it in its place."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm.auto import tqdm

from ..checks import Flag, Location, checked, writable_folder
from ..experiments import read_records
from ..store import atomic_write, read_json, write_json
from .glossary import glossary_section, read_terms
from .source_tree import NOTEBOOKS, Run, write_sources

_MANIFEST = "site.json"
_HERE = Path(__file__).resolve().parent
_NEEDED = ("sphinx", "myst_nb", "furo", "latex2mathml")
_SETTINGS = {
    "project": "minigpt_lab",
    "html_title": "minigpt_lab",
    "extensions": [
        *("myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.githubpages"),
        "minigpt_lab.pages.sphinx_extension",
    ],
    "html_theme": "furo",
    "html_static_path": [str(_HERE / "static")],
    "html_css_files": ["pages.css"],
    "html_favicon": str(_HERE / "static" / "favicon.svg"),
    "html_math_renderer": "mathml",  # made here, so that pages need no script for it
    "html_show_search_summary": False,  # it would be fetched, which a page from a file may not
    "html_copy_source": False,
    "html_use_index": False,
    "html_show_copyright": False,
    "exclude_patterns": ["downloads/*"],
    "default_role": "py:obj",
    "add_module_names": False,
    "autodoc_typehints": "none",  # the docstrings give them
    "napoleon_google_docstring": False,
    "napoleon_use_ivar": True,
    "napoleon_use_rtype": False,
    "myst_enable_extensions": ["dollarmath", "attrs_inline", "attrs_block"],
    "myst_heading_anchors": 3,
    "nb_execution_mode": "off",
    "nb_ipywidgets_js": {},  # they would be loaded from the network, and have no kernel here
}


@checked(runs=Location(), out_dir=Location(), smoke=Flag(), progress=Flag())
def write_site(
    runs: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    smoke: bool = False,
    progress: bool = True,
) -> Path:
    """Write the notebooks of some runs as a static site that needs no network to be read.

    Its first page tells the story in pictures. Beside a page per notebook there are the results,
    the glossary, models and texts, and the API reference. Of every notebook the newest completed
    run is shown; notebooks of the series that have none are shown without outputs.

    Parameters
    ----------
    runs : str or path
        A run folder, or any folder above some. Runs below it in a folder ``sweeps`` or ``failed``
        are left out.
    out_dir : str or path
        Folder of the site: a new or empty one, or that of an earlier call, which is replaced.
    smoke : bool
        Smoke runs too.
    progress : bool
        Show what is being done.

    Returns
    -------
    pathlib.Path
        The first page, to be opened in a browser.

    Raises
    ------
    ValueError
        If there is no such folder, or no completed run in it, or of a notebook only a failed one.
    FileExistsError
        If `out_dir` holds something that is no site.
    RuntimeError
        If the packages that build it are not installed, or they fail.
    """
    out_dir = writable_folder(out_dir).resolve()
    if out_dir.is_dir() and any(out_dir.iterdir()) and not _own_files(out_dir):
        raise FileExistsError(f"{out_dir} holds something that is no site; choose another folder")
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise RuntimeError(
            f"a site needs {missing[0]}; install what builds it: pip install .[pages]"
        )
    chosen = choose_runs(Path(runs), smoke=smoke)
    with atomic_write(out_dir, _own_files) as staging, TemporaryDirectory() as scratch:
        sources = Path(scratch) / "sources"
        sources.mkdir()
        write_sources(chosen, sources)
        for line in _build(sources, staging, Path(scratch) / "trees", progress):
            warnings.warn(f"on the site: {line}", stacklevel=3)
        files = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
        listed = sorted(path.as_posix() for path in files)
        write_json(staging / _MANIFEST, {"site": "minigpt_lab", "files": [*listed, _MANIFEST]})
    return out_dir / "index.html"


def choose_runs(root: Path, *, smoke: bool = False) -> dict[str, Run]:
    """The newest completed run of every notebook, by the notebook's name.

    Raises
    ------
    ValueError
        If there is none, or of a notebook only a failed one.
    """
    found = [
        (folder, record)
        for folder, record in read_records(root, smoke=smoke, failed=True)
        if not {"sweeps", "failed"}.intersection(folder.relative_to(root).parts)
    ]
    found.sort(key=lambda each: each[1].get("finished") or "")
    chosen: dict[str, Run] = {}
    failed: dict[str, Mapping] = {}
    for folder, record in found:
        name = str(record["notebook"])
        notebook = folder / f"{name}.ipynb"
        if record["status"] != "completed":
            failed[name] = record
        elif notebook.is_file():
            chosen[name] = Run(folder, record, notebook)
    for name in failed.keys() - chosen.keys():
        reason = failed[name].get("error") or "no reason recorded"
        raise ValueError(f"the run of {name} in {root} failed ({reason}); run it again, or move it")
    if not chosen:
        some = "" if smoke else "; --smoke takes smoke runs too"
        raise ValueError(f"no completed run with its executed notebook in {root}{some}")
    return chosen


def _build(sources: Path, site: Path, trees: Path, progress: bool) -> list[str]:
    """Let Sphinx turn the sources into the site; return what it complains of.

    Raises
    ------
    RuntimeError
        If it fails.
    """
    from sphinx.application import Sphinx  # slow to import
    from sphinx.errors import SphinxError
    from sphinx.util.console import nocolor
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    section = glossary_section((NOTEBOOKS / "README.md").read_text("utf-8"))
    settings = {**_SETTINGS, "glossary_terms": read_terms(section)}
    complaints = StringIO()
    nocolor()
    pages = sum(len([*sources.rglob(kind)]) for kind in ("*.md", "*.rst", "notebooks/*.ipynb"))
    try:
        with (
            patch_docutils(),
            docutils_namespace(),
            tqdm(total=2 * pages + 1, desc="pages", unit="page", disable=not progress) as bar,
        ):
            app = Sphinx(sources, None, site, trees, "html", settings, None, complaints)
            app.connect("source-read", lambda *_: bar.update())  # each is read, then written,
            app.connect("html-page-context", lambda *_: bar.update() and None)  # and the search
            app.build()
    except SphinxError as error:
        raise RuntimeError(f"Sphinx could not build the site: {error}") from error
    return [line for line in complaints.getvalue().splitlines() if line.strip()]


def _own_files(folder: Path) -> set[str]:
    """Files of a site that an earlier call wrote; none if it is something else."""
    try:
        content = read_json(folder / _MANIFEST)
    except (ValueError, OSError):
        return set()
    if not isinstance(content, dict) or content.get("site") != "minigpt_lab":
        return set()
    return {str(name) for name in content.get("files", ())}
