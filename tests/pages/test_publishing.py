"""What the site refuses before any work, which runs it takes, and whose files it replaces."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import nbformat
import pytest
from nbformat import v4

from minigpt_lab import __main__ as command_line
from minigpt_lab.pages import glossary, publishing, source_tree, write_site
from minigpt_lab.pages.notebook_pages import published, stripped


def write_run(folder, notebook="09_method_comparison", **changes):
    record = {"schema": 2, "notebook": notebook, "status": "completed", "smoke": False}
    record |= {"parameters": {}, "metrics": {}, "finished": "2026-01-01"}
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps(record | changes))
    cells = [v4.new_markdown_cell("# Title"), v4.new_code_cell("1")]
    nbformat.write(v4.new_notebook(cells=cells), folder / f"{notebook}.ipynb")


@pytest.fixture
def built(monkeypatch):
    """What the site would be built from; nothing is."""
    calls = []

    def build(sources, site, *_):
        site.mkdir()
        (site / "index.html").write_text(f"page {len(calls)}")
        return []

    monkeypatch.setattr(publishing, "write_sources", lambda runs, folder: calls.append(runs))
    monkeypatch.setattr(publishing, "_build", build)
    return calls


def test_the_newest_completed_run_of_each_notebook_is_taken(tmp_path, built):
    for name, day in (("a", 2), ("b", 3), ("c", 1)):
        write_run(tmp_path / name, finished=f"2026-01-0{day}")
    write_run(tmp_path / "d", "10_slimgpt", finished="2026-01-01")
    write_run(tmp_path / "failed" / "e", "08_mini_llm", status="failed")
    write_run(tmp_path / "sweeps" / "s" / "f", finished="2026-02-01")
    write_run(tmp_path / "smoke" / "g", "02_threshold_sweep", smoke=True)
    write_run(tmp_path / "h", "05_mcq_evaluation")
    (tmp_path / "h" / "05_mcq_evaluation.ipynb").unlink()  # a record alone
    write_site(tmp_path, tmp_path / "site", progress=False)
    write_site(tmp_path, tmp_path / "site", smoke=True, progress=False)
    first, second = ({name: run.folder.name for name, run in runs.items()} for runs in built)
    assert first == {"09_method_comparison": "b", "10_slimgpt": "d"}
    assert second == first | {"02_threshold_sweep": "g"}


def test_what_cannot_be_shown_is_refused_before_the_work(tmp_path, built):
    out = tmp_path / "site"
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "runs" / "a", status="failed", error="ValueError: no")
    write_run(tmp_path / "small" / "a", smoke=True)
    with pytest.raises(ValueError, match=r"no folder .*nowhere"):
        write_site(tmp_path / "nowhere", out)
    with pytest.raises(ValueError, match=r"no completed run with its executed notebook in .*empty"):
        write_site(tmp_path / "empty", out)
    with pytest.raises(ValueError, match=r"--smoke takes smoke runs too"):
        write_site(tmp_path / "small", out)
    for runs in (tmp_path / "runs", tmp_path / "runs" / "a"):
        with pytest.raises(
            ValueError, match=r"09_method_comparison .*failed \(ValueError: no\); run"
        ):
            write_site(runs, out)
    for wrong in (None, 3, b"runs", ""):
        with pytest.raises((ValueError, TypeError), match="runs"):
            write_site(wrong, out)
        with pytest.raises((ValueError, TypeError), match="out_dir"):
            write_site(tmp_path, wrong)
    assert built == [] and not out.exists()


def test_a_failed_run_beside_a_completed_one_is_left_out(tmp_path, built):
    write_run(tmp_path / "a", finished="2026-01-01")
    write_run(tmp_path / "b", finished="2026-01-02", status="failed")
    write_site(tmp_path, tmp_path / "site", progress=False)
    assert built[0]["09_method_comparison"].folder.name == "a"


def test_only_a_site_is_replaced_and_a_users_files_stay(tmp_path, built):
    write_run(tmp_path / "runs" / "a")
    theirs, out = tmp_path / "theirs", tmp_path / "site"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="theirs holds something that is no site; choose"):
        write_site(tmp_path / "runs", theirs, progress=False)
    (theirs / "site.json").write_text('{"mine": true}')
    with pytest.raises(FileExistsError):
        write_site(tmp_path / "runs", theirs, progress=False)
    assert (theirs / "thesis.txt").read_text() == "years of work" and built == []

    write_site(tmp_path / "runs", out, progress=False)
    (out / "CNAME").write_text("example.org")
    site = json.loads((out / "site.json").read_text())
    (out / "old.html").write_text("of an earlier version")
    (out / "site.json").write_text(json.dumps(site | {"files": [*site["files"], "old.html"]}))
    write_site(tmp_path / "runs", out, progress=False)
    assert (out / "index.html").read_text() == "page 2"
    assert {path.name for path in out.iterdir()} == {"CNAME", "index.html", "site.json"}


def test_an_interrupted_build_leaves_the_old_site(tmp_path, built, monkeypatch):
    write_run(tmp_path / "runs" / "a")
    out = tmp_path / "site"
    write_site(tmp_path / "runs", out, progress=False)

    def interrupted(sources, site, *_):
        site.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(publishing, "_build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_site(tmp_path / "runs", out, progress=False)
    assert (out / "index.html").read_text() == "page 1"
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "site"}


def test_without_the_extra_it_says_how_to_install_it(tmp_path, built, monkeypatch):
    write_run(tmp_path / "runs" / "a")
    monkeypatch.setattr(publishing, "find_spec", lambda name: None if name == "furo" else name)
    words = ["minigpt_lab", "pages", str(tmp_path / "runs"), "--out", str(tmp_path / "site")]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which main() replaces
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    assert str(stopped.value) == (
        "error: a site needs furo; install what builds it: pip install .[pages]"
    )


def test_a_notebook_to_be_run_again_is_as_it_was_committed():
    (path, *_) = sorted(source_tree.NOTEBOOKS.glob("[0-9]*.ipynb"))
    committed = nbformat.read(path, as_version=4)
    executed = nbformat.read(path, as_version=4)
    executed.cells.insert(3, v4.new_code_cell("x = 1", metadata={"tags": ["injected-parameters"]}))
    executed.cells[4].metadata["execution"] = {"started": "now"}
    executed.metadata["papermill"] = {"parameters": {"out_dir": "/somewhere"}}
    assert stripped(executed) == committed


def test_what_is_published_once_is_published_again_unchanged(tmp_path):
    output = v4.new_output("display_data", {"image/png": "aGk="})
    cell = v4.new_code_cell('figures.save_figure(f, "x/drawn", t)', outputs=[output])
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell("# Head"), cell])
    (tmp_path / "drawn.svg").write_text(
        '<svg><g id="figure_1"><g id="text_1"><!-- Seen --></g></g></svg>'
    )
    once = published(notebook, tmp_path)
    assert once.cells[1].outputs[0].metadata["image/png"]["alt"] == "Seen"
    assert published(once, tmp_path / "elsewhere") == once


def test_terms_and_their_places():
    section = (
        "* **loss**, **ε**, **full, fine**: in *nats*. **Some\n  words**: `x`.\n\n**Group**\n\n"
    )
    terms = glossary.read_terms(f"{section}* **LoRA**: thin.\n")
    anchors = {name: term.anchor for name, term in terms.items()}
    assert anchors == {
        "loss": "term-loss", "ε": "term-epsilon", "full": "term-full", "fine": "term-fine",
        "some words": "term-some-words", "LoRA": "term-lora",
    }  # fmt: skip
    assert terms["loss"].meaning == "loss, ε, full, fine: in nats. Some words: x."
    page = glossary.glossary_page(section)
    assert "[**full**]{#term-full}, [**fine**]{#term-fine}" in page and "\n## Group\n" in page
    with pytest.raises(ValueError, match="no heading '## Glossary'"):
        glossary.glossary_section("# The notebooks\n")


def test_links_of_the_project_lead_to_the_pages():
    text = "[a](README.md#glossary) ![b](../figures/loss.png) [c](grids/x.yaml) [d](https://e.f)"
    assert source_tree.relinked(text, "notebooks/03_x.ipynb") == (
        "[a](../glossary.md#glossary) ![b](../figures/loss.png) c [d](https://e.f)"
    )
    assert source_tree.relinked("![b](loss.png) [h](#here)", "figures/README.md") == (
        "![b](figures/loss.png) [h](#here)"
    )


def test_the_first_page_has_a_picture_of_a_notebook_whose_run_is_older():
    bare = v4.new_notebook(cells=[v4.new_markdown_cell("# 12 · Without a diagram\n\n**Why?**")])
    page = source_tree._index({"12_your_own_mini": bare}, {})
    assert "(notebooks/diagrams/make_mini.svg)](notebooks/12_your_own_mini.ipynb)" in page


def test_a_notebook_that_was_not_run_is_shown_without_what_a_reader_typed(tmp_path):
    path = tmp_path / "notebooks" / "mine.ipynb"
    path.parent.mkdir()
    path.write_text("answer = None")
    assert source_tree._committed(path) == "answer = None"  # no repository: as it is
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "mine"]):
        subprocess.run([*git, *words], check=True)
    path.write_text("answer = 0.73")
    assert source_tree._committed(path) == "answer = None"
    path.with_name("new.ipynb").write_text("new")
    assert source_tree._committed(path.with_name("new.ipynb")) == "new"


def test_the_parameters_of_a_run_are_said_to_be_its_own(tmp_path):
    given = '# Parameters\nquantile = 0.25\nout_dir = "x"'
    cells = [
        v4.new_markdown_cell("# Title"),
        v4.new_code_cell(given, metadata={"tags": ["injected-parameters"]}),
    ]
    said = "# parameters of this run, in place of those above\nquantile = 0.25"
    once = published(v4.new_notebook(cells=cells), tmp_path)
    assert once.cells[1].source == published(once, tmp_path).cells[1].source == said
    cells[1].source = '# Parameters\nout_dir = "x"'
    assert len(published(v4.new_notebook(cells=cells), tmp_path).cells) == 1
