"""Write figures/README.md from the records beside it: ``python3.11 tasks.py results-page``.

With ``--from RUNS`` the newest completed run of every notebook under RUNS (smoke runs apart; of
sweeps, all runs of those that page.toml names) is copied to figures/records first: its record, the
executed notebook (not of sweeps; `tasks.py pages figures/records` shows it), and the tables and
figures that page.toml names. page.toml says what stands on the page, claims.toml what the papers
say and how it is measured here. The numbers are the records' own.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from minigpt_lab.experiments.records import RECORD, read_record, read_records
from minigpt_lab.pages.notebook_pages import published

HERE = Path(__file__).resolve().parent
RECORDS, README = HERE / "records", HERE / "README.md"
SECTIONS = tomllib.loads((HERE / "page.toml").read_text("utf-8"))["section"]
CLAIMS = tomllib.loads((HERE / "claims.toml").read_text("utf-8"))["claim"]
HEADER = """\
# Results

Written by `python3.11 tasks.py results-page` from the records in `figures/records`; do not edit.
With `--from runs` it takes the newest runs of your own first. Intervals are 95 % (bootstrap over
passages). Perplexities compare only under one protocol. The words are in the
[glossary](../notebooks/README.md#glossary). Where a section says "Not measured yet", the picture at
the top of its notebook is of an older run, on less text: it shows the kind of figure, not a result.
"""
CLAIMS_HEADER = """\
## What the papers say, and what is measured here

The papers prune models of 1.3 to 13 billion parameters and measure by other protocols: what is
compared is the direction of a claim, not its numbers. "×" is a ratio of two perplexities, the first
over the second, with its 95 % interval over the passages, which both read: text of the domain that
was pruned for, unless the claim names another. The intervals are not corrected for the number of
claims. A claim holds, or does not, only if its whole interval says so.

| paper | says | published | measured here | verdict |
| --- | --- | --- | --- | --- |
"""


def copy_runs(runs: Path, *, smoke: bool = False) -> None:
    """Copy what the page needs of every notebook's newest run, and of all runs of its sweeps."""
    sweeps = {section["sweep"] for section in SECTIONS if "sweep" in section}
    chosen: dict[str, list[Path]] = {}
    records = sorted(read_records(runs, smoke=smoke), key=lambda each: each[1]["finished"] or "")
    for folder, record in records:
        parts = folder.relative_to(runs).parts
        if named := sweeps.intersection(parts):
            chosen.setdefault(named.pop(), []).append(folder)
        elif "sweeps" not in parts:
            chosen[record["notebook"]] = [folder]
    for section in SECTIONS:
        name = name_of(section)
        if name in chosen:
            shutil.rmtree(RECORDS / name, ignore_errors=True)
        for source in chosen.get(name, ()):
            target = RECORDS / name / (source.name if "sweep" in section else "")
            target.mkdir(parents=True)
            tables = {table["file"] for table in section.get("table", [])}
            tables |= {claim["table"] for claim in CLAIMS if name_of(claim) == name}
            for file in [RECORD, *(f"{table}.csv" for table in tables)]:
                if (source / file).is_file():
                    shutil.copy(source / file, target)
            notebook = source / f"{name}.ipynb"  # a sweep has another name
            if notebook.is_file():
                executed = published(nbformat.read(notebook, as_version=4), source)
                nbformat.write(executed, target / notebook.name)
            for figure, file in section.get("figures", {}).items():
                if (source / f"{file}.png").is_file():
                    shutil.copy(source / f"{file}.png", HERE / f"{figure}.png")
            print(f"{name}: {source}")


def name_of(entry: dict) -> str:
    """Of the folder that holds the records of a section or a claim."""
    return entry.get("sweep", entry["notebook"])


def write_page() -> str:
    """The page, from the records alone."""
    parts = [HEADER, *map(section_text, SECTIONS), CLAIMS_HEADER + claim_rows()]
    return "\n".join(parts)


def section_text(section: dict) -> str:
    """A section of the page: what it asks, how it was measured, figures, tables."""
    name = name_of(section)
    asked = f"`{section['notebook']}`: {section['text']}"
    lines = [f"## {section['title']}", "", asked, ""]
    if not (folders := run_folders(name)):
        return "\n".join([*lines, "Not measured yet.", ""])
    lines += [provenance(folders), ""]
    for figure in section.get("figures", {}):
        if (HERE / f"{figure}.png").is_file():
            lines += [f"![{section['title']}]({figure}.png)", ""]
    for spec in section.get("table", []):
        try:
            lines += [*([spec["title"], ""] if "title" in spec else []), *table_lines(spec, name)]
        except (OSError, KeyError, pd.errors.UndefinedVariableError):
            lines += ["(Not measured in this run.)"]
        lines += [""]
    return "\n".join(lines)


def run_folders(name: str) -> list[Path]:
    """Folders of a section's records: one, or one for every run of a sweep."""
    return sorted(path.parent for path in (RECORDS / name).rglob(RECORD))


def provenance(folders: list[Path]) -> str:
    """Model, protocol, precision, device, time and version of a run, the first of several."""
    record = read_record(folders[0])
    used = record["parameters"]
    tokens = [f"{used[k]:,} {k.replace('_', ' ')}" for k in sorted(used) if k.endswith("_tokens")]
    frames = [pd.read_csv(path) for folder in folders for path in folder.glob("*.csv")]
    found = [frame["precision"].dropna() for frame in frames if "precision" in frame]
    known = (record.get("model") or {}).get("read_in", "")
    precisions = sorted({*pd.concat(found)}) if found else [known]
    protocol = record.get("protocol") or ""
    unsaid = [precision for precision in precisions if precision not in protocol]
    device = record.get("device") or ""
    if device == "cpu":
        device += f" ({(record.get('machine') or {}).get('processor') or 'unnamed'})"
    facts = [
        f"{len(folders)} runs" if len(folders) > 1 else "",
        (record.get("model") or {}).get("label"),
        protocol,
        ", ".join(tokens),
        f"read in {', '.join(unsaid)}" if unsaid else "",
        device,
        f"{(record.get('wall_seconds') or 0) / 60:.0f} min",
        f"{(record.get('finished') or '')[:10]}, "
        f"commit {((record.get('git') or {}).get('commit') or 'unknown')[:10]}",
    ]
    return f"<sub>{'; '.join(fact for fact in facts if fact)}.</sub>"


def read_table(name: str, file: str, where: str) -> pd.DataFrame:
    """Rows of a table of a section's records, with the parameters of the run as columns too.

    In the query ``{name}`` is a parameter as well.
    """
    parts = []
    for folder in run_folders(name):
        used = read_record(folder)["parameters"]
        frame = pd.read_csv(folder / f"{file}.csv")
        plain = {k: v for k, v in used.items() if k not in frame and not isinstance(v, list | dict)}
        frame = frame.assign(**plain)
        parts.append(frame.query(where.format(**used)) if where else frame)
    return pd.concat(parts, ignore_index=True)


def table_lines(spec: dict, name: str) -> list[str]:
    """A table in Markdown: means per row (and, if it is spread sideways, per column)."""
    frame = read_table(name, spec["file"], spec.get("where", ""))
    if frame.empty:
        return ["(This run has no rows for this table.)"]
    rows, across = spec["rows"], spec.get("across", [])
    how = {
        name: "mean" if is_numeric_dtype(column) and not is_bool_dtype(column) else "first"
        for name, column in frame.drop(columns=[*rows, *across]).items()
    }
    means = frame.groupby([*rows, *across], sort=False, dropna=False).agg(how)
    lines: dict[tuple, dict[str, str]] = {}
    for values in means.reset_index().to_dict("records"):
        place = " · ".join(label(values[name]) for name in across)
        for head, template in spec["cells"].items():
            line = lines.setdefault(tuple(label(values[row]) for row in rows), {})
            line[" ".join(filter(None, (head, place)))] = filled(template, values)
    heads = list(dict.fromkeys(head for line in lines.values() for head in line))
    body = [[*key, *(line.get(head, "") for head in heads)] for key, line in lines.items()]
    ruled = [[*rows, *heads], ["---"] * (len(rows) + len(heads)), *body]
    return [f"| {' | '.join(line)} |" for line in ruled]


def label(value: object) -> str:
    """What names a line or column."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def filled(template: str, values: dict) -> str:
    """A cell; numbers that are missing leave nothing behind."""
    text = re.sub(r" ?\[\+?nan, \+?nan\]", "", template.format(**values))
    return re.sub(r"\bnan\b%?", "–", text)


def claim_rows() -> str:
    """Lines of the table of claims, the measured ones first."""
    lines = []
    for claim in CLAIMS:
        measured, verdict = judged(claim)
        source = f"{claim['paper']}, {claim['where']}"
        line = f"| {source} | {claim['says']} | {claim['published']} | {measured} | {verdict} |\n"
        lines.append((verdict == "not measured", line))
    return "".join(line for _, line in sorted(lines, key=lambda each: each[0]))


def judged(claim: dict) -> tuple[str, str]:
    """What was measured for a claim, and whether it holds."""
    try:
        found = np.array([*intervals(claim)])
    except (ValueError, OSError, KeyError, pd.errors.UndefinedVariableError):
        found = np.empty((0, 3))
    if not len(found):
        return "–", "not measured"
    value, low, high = found.T
    bound = claim.get("above", claim.get("below", 1.0))
    holds, fails = (low > bound, high < bound) if "above" in claim else (high < bound, low > bound)
    verdict = "holds" if holds.all() else "does not hold" if fails.any() else "cannot be told"
    number = "{:+.3f}" if "difference" in claim else "× {:.3f}"
    if len(found) == 1:
        text = f"{number} [{number}, {number}]".replace("[× ", "[").replace(", × ", ", ")
        text = "× < 0.001" if "×" in number and high < 0.001 else text.format(*found[0])
    else:
        ends = f"{number} to {number}".format(value.min(), value.max())
        text = f"{holds.sum()} of {len(found)} hold, {fails.sum()} do not; {ends}"
    return f"{text} (`{claim['notebook'][:2]}`)", verdict


def intervals(claim: dict) -> Iterator[tuple[float, float, float]]:
    """Value and 95 % interval of every comparison that a claim is about.

    With ``difference`` (three columns) each row is one; with ``along`` (a column) each row and the
    one before it; else the rows of ``first`` and of ``second``: ratios of perplexities.
    """
    frame = read_table(name_of(claim), claim["table"], claim.get("rows", ""))
    if "difference" in claim:
        yield from frame[claim["difference"]].itertuples(index=False, name=None)
        return
    if "along" in claim:
        levels = [group for _, group in frame.groupby(claim["along"])]
        pairs = [*zip(levels[1:], levels, strict=False)]
    else:
        used = read_record(run_folders(name_of(claim))[0])["parameters"]
        pairs = [tuple(frame.query(claim[key].format(**used)) for key in ("first", "second"))]
    for first, second in pairs:
        if len(first) and len(second):
            yield ratio(first, second)


def ratio(first: pd.DataFrame, second: pd.DataFrame) -> tuple[float, float, float]:
    r"""Ratio of two perplexities, and its 95 % interval over passages.

    With :math:`D_i` the difference of the summed losses of passage *i* (means over calibration
    samples) and :math:`n_i` its tokens, it is :math:`e^d` with :math:`d = \sum D_i / \sum n_i`,
    whose standard error is that of a ratio of sums, :math:`\sqrt{\sum (D_i - d n_i)^2} / \sum n_i`.
    """
    (loss, n), (other, n_other) = passages(first), passages(second)
    if not np.array_equal(n, n_other):
        raise ValueError("the two were not measured on the same passages")
    D = loss - other
    d = D.sum() / n.sum()
    error = 1.96 * np.sqrt(np.square(D - d * n).sum()) / n.sum() if (n > 0).sum() > 1 else np.inf
    return np.exp(d), np.exp(d - error), np.exp(d + error)


def passages(rows: pd.DataFrame) -> np.ndarray:
    """Loss and tokens of every passage, means over the rows: ``[2, passage]``."""
    if rows["passages"].isna().any():
        raise ValueError("a row was measured without its passages")
    pairs = [[pair.split("/") for pair in text.split()] for text in rows["passages"]]
    return np.array(pairs, dtype=float).mean(0).T


def main() -> None:
    """Copy runs if asked to, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--from", dest="runs", type=Path, help="folder of runs to copy first")
    arguments = parser.parse_args()
    if arguments.runs:
        copy_runs(arguments.runs)
    README.write_text(write_page(), encoding="utf-8")
    print(README)


if __name__ == "__main__":
    main()
