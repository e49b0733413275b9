"""Write figures/README.md from the records beside it: ``python3.11 tasks.py results-page``.

With ``--from RUNS`` the newest completed run of every notebook under RUNS (sweeps and smoke runs
apart) is copied to figures/records first: its record, and the tables and figures that page.toml
names. page.toml says what stands on the page, claims.toml what the papers say and how it is
measured here. The numbers are the records' own.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from minigpt_lab.experiments.records import RECORD, read_record, read_records

HERE = Path(__file__).resolve().parent
RECORDS, README = HERE / "records", HERE / "README.md"
SECTIONS = tomllib.loads((HERE / "page.toml").read_text("utf-8"))["section"]
CLAIMS = tomllib.loads((HERE / "claims.toml").read_text("utf-8"))["claim"]
HEADER = """\
# Results

Written by `python3.11 tasks.py results-page` from the records in `figures/records`; do not edit.
With `--from runs` it takes the newest runs of your own first. Intervals are 95 % (bootstrap over
passages). Perplexities compare only under one protocol. The words are in the
[glossary](../notebooks/README.md#glossary).
"""
CLAIMS_HEADER = """\
## What the papers say, and what is measured here

The papers prune models of 1.3 to 13 billion parameters and measure by other protocols: what is
compared is the direction of a claim, not its numbers. "×" is a ratio of two perplexities, the first
over the second, on the text of the domain that was pruned for, with its 95 % interval over the
passages, which both read. The intervals are not corrected for the number of claims. A claim holds,
or does not, only if its whole interval says so.

| paper | says | published | measured here | verdict |
| --- | --- | --- | --- | --- |
"""


def copy_runs(runs: Path, *, smoke: bool = False) -> None:
    """Copy the newest run of every notebook on the page: record, tables, figures."""
    newest: dict[str, tuple[str, Path]] = {}
    for folder, record in read_records(runs, smoke=smoke):
        if "sweeps" not in folder.relative_to(runs).parts:
            found = record["finished"] or "", folder
            newest[record["notebook"]] = max(found, newest.get(record["notebook"], found))
    for section in SECTIONS:
        notebook = section["notebook"]
        if notebook not in newest:
            continue
        source, target = newest[notebook][1], RECORDS / notebook
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        shutil.copy(source / RECORD, target)
        tables = {table["file"] for table in section.get("table", [])}
        tables |= {claim["table"] for claim in CLAIMS if claim["notebook"] == notebook}
        for name in tables:
            if (source / f"{name}.csv").is_file():
                shutil.copy(source / f"{name}.csv", target)
        for name, file in section.get("figures", {}).items():
            if (source / f"{file}.png").is_file():
                shutil.copy(source / f"{file}.png", HERE / f"{name}.png")
        print(f"{notebook}: {source}")


def write_page() -> str:
    """The page, from the records alone."""
    parts = [HEADER, *map(section_text, SECTIONS), CLAIMS_HEADER + "".join(map(claim_row, CLAIMS))]
    return "\n".join(parts)


def section_text(section: dict) -> str:
    """A notebook's part of the page: what it asks, how it was measured, figures, tables."""
    notebook = section["notebook"]
    lines = [f"## {section['title']}", "", f"`{notebook}`: {section['text']}", ""]
    try:
        record = read_record(RECORDS / notebook)
    except ValueError:
        return "\n".join([*lines, "Not measured yet.", ""])
    lines += [provenance(record, notebook), ""]
    for name in section.get("figures", {}):
        if (HERE / f"{name}.png").is_file():
            lines += [f"![{section['title']}]({name}.png)", ""]
    for spec in section.get("table", []):
        try:
            lines += [*([spec["title"], ""] if "title" in spec else []), *table_lines(spec, record)]
        except (OSError, KeyError, pd.errors.UndefinedVariableError):
            lines += [f"(This run has no such table: {spec['file']}.)"]
        lines += [""]
    return "\n".join(lines)


def provenance(record: dict, notebook: str) -> str:
    """Model, protocol, precision, device, time and version of a run, as one paragraph."""
    used = record["parameters"]
    tokens = [f"{used[k]:,} {k.replace('_', ' ')}" for k in sorted(used) if k.endswith("_tokens")]
    frames = [pd.read_csv(path) for path in (RECORDS / notebook).glob("*.csv")]
    found = [frame["precision"].dropna() for frame in frames if "precision" in frame]
    precisions = sorted({*pd.concat(found)}) if found else []
    processor = (record.get("machine") or {}).get("processor")
    facts = [
        (record.get("model") or {}).get("label", "no model"),
        record.get("protocol"),
        ", ".join(tokens),
        f"read in {', '.join(precisions)}" if precisions else "",
        f"{record.get('device')}{f' ({processor})' if processor else ''}",
        f"{(record.get('wall_seconds') or 0) / 60:.0f} min",
        f"{(record.get('finished') or '')[:10]}, "
        f"commit {((record.get('git') or {}).get('commit') or 'unknown')[:10]}",
    ]
    return f"<sub>{'; '.join(fact for fact in facts if fact)}.</sub>"


def read_table(notebook: str, file: str, where: str, parameters: dict) -> pd.DataFrame:
    """Rows of a record's table; ``{name}`` in the query is a parameter of the notebook."""
    frame = pd.read_csv(RECORDS / notebook / f"{file}.csv")
    return frame.query(where.format(**parameters)) if where else frame


def table_lines(spec: dict, record: dict) -> list[str]:
    """A table in Markdown: means per row (and, if it is spread sideways, per column)."""
    notebook = record["notebook"]
    frame = read_table(notebook, spec["file"], spec.get("where", ""), record["parameters"])
    rows, across = spec["rows"], spec.get("across", [])
    how = {
        name: "mean" if is_numeric_dtype(column) and not is_bool_dtype(column) else "first"
        for name, column in frame.drop(columns=[*rows, *across]).items()
    }
    means = frame.groupby([*rows, *across], sort=False, dropna=False).agg(how)
    lines: dict[tuple, dict[str, str]] = {}
    for values in means.reset_index().to_dict("records"):
        place = " · ".join(label(values[name]) for name in across)
        for name, template in spec["cells"].items():
            line = lines.setdefault(tuple(label(values[row]) for row in rows), {})
            line[" ".join(filter(None, (name, place)))] = filled(template, values)
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


def claim_row(claim: dict) -> str:
    """A line of the table of claims."""
    measured, verdict = judged(claim)
    source = f"{claim['paper']}, {claim['where']}"
    return f"| {source} | {claim['says']} | {claim['published']} | {measured} | {verdict} |\n"


def judged(claim: dict) -> tuple[str, str]:
    """What was measured for a claim, and whether it holds."""
    try:
        record = read_record(RECORDS / claim["notebook"])
        found = np.array([*intervals(claim, record)])
    except (ValueError, OSError, KeyError, pd.errors.UndefinedVariableError):
        found = np.empty((0, 3))
    if not len(found):
        return "–", "not measured"
    value, low, high = found.T
    if "above" in claim:
        holds, fails = low > claim["above"], high < claim["above"]
        shown = [f"{v:+.3f} [{a:+.3f}, {b:+.3f}]" for v, a, b in found]
        ends = f"{value.min():+.3f} to {value.max():+.3f}"
    else:
        bound = np.log(claim.get("below", 1.0))
        holds, fails = high < bound, low > bound
        shown = [f"× {v:.3f} [{a:.3f}, {b:.3f}]" for v, a, b in np.exp(found)]
        ends = f"× {np.exp(value.min()):.3f} to {np.exp(value.max()):.3f}"
    verdict = "holds" if holds.all() else "does not hold" if fails.any() else "cannot be told"
    counts = f"{holds.sum()} of {len(found)} hold, {fails.sum()} do not; {ends}"
    text = shown[0] if len(found) == 1 else counts
    return filled(f"{text} (`{claim['notebook'][:2]}`)", {}), verdict


def intervals(claim: dict, record: dict) -> Iterator[tuple[float, float, float]]:
    """Value and 95 % interval of every comparison that a claim is about.

    With ``difference`` (three columns) each row is one; with ``along`` (a column) each row and the
    one before it; else the rows of ``first`` and of ``second``: logarithms of ratios.
    """
    where, parameters = claim.get("rows", ""), record["parameters"]
    frame = read_table(claim["notebook"], claim["table"], where, parameters)
    if "difference" in claim:
        yield from frame[claim["difference"]].itertuples(index=False, name=None)
        return
    if "along" in claim:
        levels = [group for _, group in frame.groupby(claim["along"])]
        pairs = [*zip(levels[1:], levels, strict=False)]
    else:
        pairs = [tuple(frame.query(claim[k].format(**parameters)) for k in ("first", "second"))]
    for first, second in pairs:
        if len(first) and len(second):
            yield log_ratio(first, second)


def log_ratio(first: pd.DataFrame, second: pd.DataFrame) -> tuple[float, float, float]:
    r"""Logarithm of the ratio of two perplexities, and its 95 % interval over passages.

    With :math:`D_i` the difference of the summed losses of passage *i* (means over calibration
    samples) and :math:`n_i` its tokens, :math:`d = \sum D_i / \sum n_i`, with the standard error
    of a ratio of sums, :math:`\sqrt{\sum (D_i - d n_i)^2} / \sum n_i`.
    """
    (loss, n), (other, n_other) = passages(first), passages(second)
    if not np.array_equal(n, n_other):
        raise ValueError("the two were not measured on the same passages")
    D = loss - other
    d = D.sum() / n.sum()
    error = 1.96 * np.sqrt(np.square(D - d * n).sum()) / n.sum() if len(n) > 1 else np.inf
    return d, d - error, d + error


def passages(rows: pd.DataFrame) -> np.ndarray:
    """Loss and tokens of every passage, means over the rows: ``[2, passage]``."""
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
