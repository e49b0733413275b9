"""Reports: notebook 07 over the runs of a folder, as one HTML file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from ..checks import Flag, Location, checked, writable_file
from ..store import atomic_write
from .records import read_records
from .runs import run_notebook

_NOTEBOOK = "07_compare_runs"
_GENERATOR = '<meta name="generator" content="minigpt_lab">'


@checked(folder=Location(), path=Location() | None, smoke=Flag())
def write_report(
    folder: str | os.PathLike, path: str | os.PathLike | None = None, *, smoke: bool = False
) -> Path:
    """Write an HTML page of the runs under a folder: notebook 07, executed, without its code.

    Parameters
    ----------
    folder : str or path
        A sweep folder, or any folder above runs.
    path : str or path, optional
        The page; by default ``report.html`` in the folder.
    smoke : bool
        Smoke runs too.

    Returns
    -------
    pathlib.Path
        The page.

    Raises
    ------
    ValueError
        If there is no such folder, or no run in it.
    FileExistsError
        If ``report.html`` in it is another page; with `path` given, a file there is replaced.
    """
    folder = Path(folder).resolve()
    page = writable_file(path or folder / "report.html")
    if not path and page.exists() and _GENERATOR not in page.read_text("utf-8", "replace"):
        raise FileExistsError(f"{page} is no report of runs; name another file for it (--out)")
    if not any(read_records(folder, smoke=smoke, failed=True)):
        raise ValueError(f"no run ended in {folder}; --all takes smoke runs too")
    with TemporaryDirectory() as scratch:
        run_notebook(_NOTEBOOK, {"runs": str(folder), "smoke": smoke}, scratch)
        body = _as_html(Path(scratch) / f"{_NOTEBOOK}.ipynb", title=folder.name)
    with atomic_write(page) as staging:
        staging.write_text(body, encoding="utf-8")
    return page


def _as_html(notebook: Path, title: str) -> str:
    """An executed notebook up to its record, as HTML with the figures inside."""
    import nbformat  # both are slow to import
    from nbconvert import HTMLExporter

    content = nbformat.read(notebook, as_version=4)
    sources = [cell.source for cell in content.cells]
    end = next(i for i, source in enumerate(sources) if "experiments.record(" in source)
    content.cells = content.cells[:end]
    exporter = HTMLExporter(
        exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True
    )
    body, _ = exporter.from_notebook_node(content, {"metadata": {"name": title}})
    return re.sub("<head>", f"<head>{_GENERATOR}", body, count=1)
