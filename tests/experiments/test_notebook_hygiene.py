"""Committed notebooks are stripped, thin, and say what their parameters are."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import papermill
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-z-]+", i) for i in ids)
    for cell in code:
        assert len(cell.source.splitlines()) <= 20, cell.id
        defines = re.search(r"^(def|class|async def) ", cell.source, re.MULTILINE)
        assert not defines or "lab.check(" in cell.source, (
            cell.id
        )  # an exercise asks for a function
        assert not re.search(r"^#(?! )|^# *\w+ ?[=(]", cell.source, re.MULTILINE), cell.id
    assert notebook.cells[0].cell_type == "markdown" and "**" in notebook.cells[0].source
    if path.stem != "solutions":
        source = "\n".join(cell.source for cell in code)
        needed = {"model_name", "interactive", "seq_len"} if "load_model" in source else set()
        assert {"out_dir"} | needed <= set(papermill.inspect_notebook(str(path)))
        places = [i for i, cell in enumerate(notebook.cells) if "lab.check(" in cell.source]
        assert 2 <= len(places) <= 3
        assert notebook.cells[places[0] - 1].source.startswith("## Exercises\n")
