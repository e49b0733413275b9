"""Reports: what a sweep found, as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import os
from pathlib import Path

import pandas as pd

from ..checks import Flag, Location, OneOf, checked, to_path, writable_file
from ..figures import pareto_front, png_bytes
from ..store import atomic_write
from .comparisons import measurements, pareto, select
from .records import read_records, results, varying

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
th, td { padding: 2px 10px; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { text-align: left; } img { max-width: 100%; } .note { color: #555; }
"""
_GENERATOR = '<meta name="generator" content="minigpt_lab">'
_SHOWN = (
    "run", "domain", "method", "stored", "stored_ratio", "perplexity", "low", "high",
    "perplexity_ratio", "front",
)  # fmt: skip
_FACTS = (
    "run", "notebook", "status", "smoke", "finished", "seconds", "protocol", "commit", "error",
    "metric", "value", "better",
)  # fmt: skip


@checked(folder=Location(), path=Location() | OneOf([""]), smoke=Flag())
def write_report(
    folder: str | os.PathLike, path: str | os.PathLike = "", smoke: bool = False
) -> Path:
    """Write an HTML page of the runs under a folder: Pareto figure, tables, protocols, failures.

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
    folder = to_path(folder)
    given, path = bool(path), writable_file(path or folder / "report.html")
    if path.exists() and not given and _GENERATOR not in path.read_text("utf-8", "replace"):
        raise FileExistsError(f"{path} is no report of runs; name another file for it (--out)")
    runs = [
        (place, content)
        for place, content in read_records(folder, everything=True)
        if smoke or not content.get("smoke")
    ]
    if not runs:
        raise ValueError(f"no run ended in {folder}; --all takes smoke runs too")
    failed = [(place, content) for place, content in runs if content["status"] == "failed"]
    frame = results(folder, everything=True)
    frame = frame[(frame["status"] == "completed") & (smoke | ~frame["smoke"])]
    name = folder.resolve().name
    body = [
        f"<h1>{html.escape(name)}</h1>",
        f"<p>{len(runs) - len(failed)} runs completed, {len(failed)} failed.</p>",
        *_pareto(measurements(folder, everything=smoke)),
        *_metrics(frame),
        *_failures(failed, folder),
        *_circumstances([content for _, content in runs]),
    ]
    page = "\n".join(
        ['<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">', _GENERATOR,
         f"<title>{html.escape(name)}</title><style>{_STYLE}</style></head><body>",
         *body, "</body></html>\n"]
    )  # fmt: skip
    with atomic_write(path) as staging:
        staging.write_text(page, encoding="utf-8")
    return path


def _table(frame: pd.DataFrame) -> str:
    return frame.to_html(index=False, border=0, na_rep="", float_format=lambda x: f"{x:.4g}")


def _pareto(table: pd.DataFrame) -> list[str]:
    table = select(table)
    if table.empty:
        return ["<p>No run here records sizes and perplexities side by side: no Pareto front.</p>"]
    table = table.assign(front=pareto(table))
    image = base64.b64encode(png_bytes(pareto_front(table))).decode()
    return [
        "<h2>Size against perplexity</h2>",
        f'<img alt="Pareto front" src="data:image/png;base64,{image}">',
        '<p class="note">Test perplexity on the scale of the dense model\'s tokens, with its 95 % '
        "interval; only points of one model, protocol and text compare. Front: no model that is as "
        "small has so low a perplexity. ×: perplexity ÷ dense.</p>",
        _table(table[list(_SHOWN)].sort_values(["domain", "stored"])),
    ]


def _metrics(frame: pd.DataFrame) -> list[str]:
    """Per notebook, a row per run and a column per metric; an arrow says which way is better."""
    arrows, parts = {"lower": " ↓", "higher": " ↑"}, ["<h2>Metrics</h2>"]
    for notebook, rows in frame.dropna(subset="metric").groupby("notebook"):
        known = rows.columns.difference(_FACTS)
        given = rows[["run", *varying(rows, list(known))]].drop_duplicates("run")
        names = rows["metric"] + [arrows.get(way, "") for way in rows["better"]]
        wide = rows.assign(metric=names).pivot(index="run", columns="metric", values="value")
        table = given.merge(wide.reset_index(), on="run")
        parts += [f"<h3>{html.escape(notebook)}</h3>", _table(table)]
    return parts if len(parts) > 1 else []


def _failures(failed: list[tuple[Path, dict]], folder: Path) -> list[str]:
    if not failed:
        return []
    lines = [
        f"<li>{html.escape(place.relative_to(folder).as_posix())}: "
        f"{html.escape(str(content['error']))}</li>"
        for place, content in failed
    ]
    return ["<h2>Failed</h2><ul>", *lines, "</ul>"]


def _circumstances(records: list[dict]) -> list[str]:
    """With what it was measured: every distinct model, protocol, device, commit and data hash."""
    facts: dict[str, dict] = {}
    for content in records:
        model, git = content.get("model") or {}, content.get("git") or {}
        commit = f"{git.get('commit')}{' (dirty)' if git.get('dirty') else ''}"
        said = {
            "notebook": content["notebook"], "model": model.get("label"),
            "weights": model.get("sha256"), "protocol": content.get("protocol"),
            "device": content.get("device"), "commit": commit,
            "packages": ", ".join(f"{k} {v}" for k, v in content.get("versions", {}).items()),
        }  # fmt: skip
        for domain, parts in (content.get("data") or {}).items():
            said |= {f"text of {domain}/{part}": digest for part, digest in parts.items()}
        for name, words in said.items():
            facts.setdefault(name, {})[str(words or "none")] = None
    rows = [
        f"<tr><th>{html.escape(name)}</th><td>{'<br>'.join(map(html.escape, words))}</td></tr>"
        for name, words in facts.items()
    ]
    return ["<h2>Measured with</h2><table>", *rows, "</table>"]
