"""figures/README.md, the records that it is made of, and the README that points to it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from minigpt_lab.experiments.parameters import smoke_cases

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "figures"))
import results_page  # noqa: E402


def test_page_is_what_its_records_say():
    assert results_page.README.read_text("utf-8") == results_page.write_page(), (
        "call `python3.11 tasks.py results-page`"
    )


def test_figures_are_all_shown_and_all_there():
    pages = [ROOT / "README.md", results_page.README, *ROOT.glob("notebooks/*.ipynb")]
    shown = {
        (page.parent / name).resolve()
        for page in pages
        for name in re.findall(r"!\[[^]]*\]\(([^)]+\.png)\)", page.read_text("utf-8"))
    }
    assert shown == {*(ROOT / "figures").glob("*.png")}


def test_sections_are_notebooks():
    notebooks = {path.stem for path in ROOT.glob("notebooks/*.ipynb")}
    grids = {path.stem for path in ROOT.glob("notebooks/grids/*.yaml")}
    sections = results_page.SECTIONS
    assert {entry["notebook"] for entry in [*sections, *results_page.CLAIMS]} <= notebooks
    assert {section["sweep"] for section in sections if "sweep" in section} <= grids
    known = {results_page.name_of(section) for section in sections}
    assert {path.name for path in results_page.RECORDS.glob("*_*")} <= known


def test_readme_is_short_and_has_no_results():
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) < 200
    assert not [line for line in lines if line.startswith("|") and re.search(r"\| *×? ?\d", line)]
    text = "\n".join(lines)
    for link in re.findall(r"\]\(([\w/]+\.md)(?:#\w+)?\)", text):
        assert (ROOT / link).is_file(), link
    assert "## Glossary" in (ROOT / "notebooks" / "README.md").read_text("utf-8")


def test_readme_says_what_the_records_say():
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    said = re.search(
        r"rounded to 4 bits \((\d+) MB\) loses ([\d.]+) bits per character on medicine; with a "
        r"trimmed vocabulary and trained \((\d+) MB\) ([\d.]+), pruned to half as well "
        r"\((\d+) MB\) ([\d.]+), and more outside",
        text,
    ).groups()
    (folder,) = results_page.run_folders("13_how_small")
    rows = pd.read_csv(folder / "summary.csv").query("text == 'medical/test'").set_index("variant")
    bits = rows["bits_per_character"] - rows["bits_per_character"]["dense F16"]
    found = []
    for name in ("dense Q4_0", "unpruned Q4_0", "50% Q4_0"):
        found += [f"{rows['bytes'][name] / 1e6:.0f}", f"{bits[name]:.2f}"]
    assert [*said] == found


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A folder for a page of its own, and one for runs."""
    monkeypatch.setattr(results_page, "HERE", tmp_path)
    monkeypatch.setattr(results_page, "RECORDS", tmp_path / "records")
    return tmp_path / "runs"


def write_run(folder, finished, tables, **changes):
    record = {
        "schema": 2, "notebook": "10_slimgpt", "status": "completed", "smoke": False,
        "parameters": {"domain_name": "law", "test_tokens": 512}, "metrics": {},
        "protocol": "windows", "model": {"label": "a model"}, "device": "cpu",
        "finished": finished, "wall_seconds": 90,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps({**record, **changes}))
    for name, rows in tables.items():
        frame = pd.DataFrame(rows, columns="text variant perplexity low high passages".split())
        frame["stored"], frame["kl"] = 1000, 0.25
        frame.to_csv(folder / f"{name}.csv", index=False)
    (folder / "sizes.png").write_bytes(b"picture")


def test_newest_run_makes_the_page(fresh):
    rows = [
        ("law/test", "dense", 10, 9, 11, "20.0/10 30.0/10"),
        ("law/test", "uniform", 40, 38, 42, "40.0/10 42.0/10"),
        ("law/test", "log-increase", 20, 19, 21, "33.0/10 35.2/10"),
        ("law/test", "linear-increase", 20.5, 19, 22, "32.5/10 35.8/10"),
        ("law/test", "log-decrease", 30, 29, 31, "35.0/10 36.0/10"),
    ]
    write_run(fresh / "a", "2026-01-01", {"allocations": rows[:1]})
    write_run(fresh / "b", "2026-01-02", {"allocations": rows})
    write_run(fresh / "c", "2026-01-03", {}, smoke=True)
    write_run(fresh / "d", "2026-01-03", {}, status="failed")
    write_run(fresh / "sweeps" / "e", "2026-01-04", {})
    for name in "fg":
        changes = {"notebook": "09_method_comparison", "parameters": {"domain_name": name}}
        folder = fresh / "sweeps" / "tinyllama_methods" / name
        write_run(folder, "2026-01-04", {}, **changes)
        more = pd.DataFrame({"method": ["dense"], "text": "x/test", "recovered": True})
        more.assign(perplexity=3, low=2, high=4).to_csv(folder / "recovered.csv", index=False)
    results_page.copy_runs(fresh)
    page = results_page.write_page()
    assert (fresh.parent / "slimgpt.png").is_file() and "](slimgpt.png)" in page
    assert "| uniform | 1,000 | 40.00 [38.00, 42.00] | 0.250 |" in page
    assert "a model; windows; 512 test tokens; cpu (unnamed); 2 min; 2026-01-02" in page
    assert "2 runs; a model" in page and "| g | dense | 3.00 [2.00, 4.00] |" in page
    assert "(Not measured in this run.)" in page
    verdicts = {
        claim["says"][:30]: results_page.judged(claim)
        for claim in results_page.CLAIMS
        if claim["table"] == "allocations"
    }
    holds, open_, wrong, missing = verdicts.values()
    assert holds == ("× 0.502 [0.495, 0.509] (`10`)", "holds")
    assert open_[1] == "cannot be told" and wrong[1] == "does not hold"
    assert missing == ("–", "not measured")


def test_without_records_nothing_is_claimed(fresh):
    page = results_page.write_page()
    assert page.count("Not measured yet.") == len(results_page.SECTIONS)
    assert page.count("not measured |") == len(results_page.CLAIMS)


def test_numbers_that_are_missing_leave_nothing_behind():
    row = {"p": float("nan"), "low": float("nan")}
    assert results_page.filled("1.2 [{low:+.1f}, {low:+.1f}] {p:.1%}", row) == "1.2 –"


def test_no_interval_of_a_single_passage_and_none_without_passages():
    first, second = (pd.DataFrame({"passages": [f"{nats}/10 0.0/0"]}) for nats in (20.0, 30.0))
    value, low, high = results_page.ratio(first, second)
    assert value == pytest.approx(np.exp(-1)) and (low, high) == (0, np.inf)
    with pytest.raises(ValueError, match="without its passages"):
        results_page.ratio(first, pd.DataFrame({"passages": ["20.0/10 0.0/0", None]}))


def test_numbers_for_teachers_are_those_of_records_and_expectations():
    """Every row of the table in notebooks/TEACHING.md; the small cases are the first of each."""
    text = (ROOT / "notebooks" / "TEACHING.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\w-]+) \| .+ \| (.+) \| ([\d.]+) \|$", text, re.M)
    assert len(rows) == text.count("| tiny-llama |") + text.count("| SmolLM2-135M |") >= 15
    for notebook, model, metric, number in rows:
        if model == "tiny-llama":
            case = next(iter(smoke_cases()[notebook]))
            assert smoke_cases()[notebook][case]["model_name"] == model
            found = json.loads((ROOT / f"tests/expected/{notebook}-{case}.json").read_text())
        else:
            record = results_page.RECORDS / notebook / "record.json"
            found = json.loads(record.read_text())["metrics"]
        assert float(number) == pytest.approx(found[metric], rel=0.01), (notebook, metric)
