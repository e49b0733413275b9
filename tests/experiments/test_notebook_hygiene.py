"""Committed notebooks are stripped, thin, and say what their parameters are."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import pytest

from minigpt_lab.store import cache_key

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


def run_cells(name: str, ids: str, changed: dict, **variables) -> dict:
    """What some cells of a notebook define, with changed parameters and made-up objects."""
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    source = {cell.id: cell.source for cell in cells}
    namespace: dict = {"cache_key": cache_key, "copy": copy, "require_ended": str}
    exec(source["parameters"], namespace)
    namespace |= variables | changed
    for each in ids.split():
        exec(source[each], namespace)
    return namespace


@pytest.mark.parametrize(
    "changed",
    [{"general": 0.6}, {"vocabulary": False}, {"gguf": ""}, {"seq_len": 128},
     {"size": 0.4}, {"minutes": 5.0}, {"domain": "law"}],
)  # fmt: skip
def test_another_choice_in_notebook_12_is_another_run(changed):
    def run(**changed) -> dict:
        chosen = {"size": 0.5, "minutes": 60.0, "domain": "medical", **changed}
        domain = SimpleNamespace(value=chosen.pop("domain"))
        sizes = {name: chosen.pop(name) for name in ("size", "minutes")}
        form = SimpleNamespace(domain=domain, chosen=sizes)
        named = [SimpleNamespace(name=name) for name in (domain.value, "general")]
        lab = SimpleNamespace(load_domains=lambda names: named)
        return run_cells("12_your_own_mini", "choice", chosen, lab=lab, form=form)

    other = run(**changed)
    assert run()["run"] == run()["run"] != other["run"]
    assert re.match(r"mini-(medical|law)-0\.\d-\d+min-", other["run"])
    chosen = {"size": other["size"], "minutes": other["minutes"], "domain": other["domain_name"]}
    assert {**other, **chosen}.items() >= changed.items()  # so the record holds it


def test_other_parameters_of_notebook_13_are_other_runs():
    def folders(**changed) -> list[str]:
        found = []

        def call(*_, out_dir, **options):
            found.append(out_dir)
            return None, None

        lab = SimpleNamespace(tokenize=lambda *_, **__: [], slimgpt=call, recover=call)
        part = SimpleNamespace(calibration=None)
        variables = {"model": None, "trimmed": None, "words": None, "mixed": {}, "sizes": [0.5]}
        variables |= {"domain": part, "other_domain": part, "lab": lab}
        variables |= {"dense_size": SimpleNamespace(stored=100)}
        run_cells("13_how_small", "recovery-how sizes", changed, **variables)
        return found

    pruning, recovery = folders()
    for changed in ({"recovery_tokens": 1024}, {"learning_rate": 1e-4}):
        same, other = folders(**changed)
        assert same == pruning and other != recovery
    for changed in ({"domain_name": "law"}, {"vocabulary": False}, {"generality": 0.5}):
        assert not {pruning, recovery} & {*folders(**changed)}
