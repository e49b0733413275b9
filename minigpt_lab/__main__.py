"""The command line: ``python -m minigpt_lab run | sweep | results | report``."""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import re
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

# pandas and the rooms are imported by the task that needs them: --help answers at once
DEFAULT = "03_contextual_pruning"  # what `run` runs unasked
_FACTS = ("notebook", "status", "smoke", "model", "device")  # shown where they differ


def value(text: str, default: object = None) -> object:
    """A parameter from the command line: JSON or a Python literal where it is one, else text.

    Where the default is a text, ``2024`` is one too.
    """
    found = _literal(text)
    return text if isinstance(default, str) and not isinstance(found, str) else found


def _literal(text: str) -> object:
    if text.lower().lstrip("+-") in ("nan", "inf"):  # no text: what is wrong with it can be said
        return float(text)
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError):
            continue
        except (RecursionError, MemoryError):
            raise ValueError(f"{text[:20]!r}… is nested too deeply for a parameter") from None
    return text


def _digits(number: float) -> str:
    return f"{number:.4g}" if abs(number) < 1e4 else f"{number:,.0f}"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        """Name the fault, and where help is."""
        self.exit(2, f"error: {message}; {self.prog} --help says what can be given\n")


def _arguments() -> argparse.Namespace:
    parser = _Parser(prog="minigpt_lab", description=__doc__.split(":")[0])
    tasks = parser.add_subparsers(dest="task", required=True)
    run = tasks.add_parser(
        "run",
        help="run a notebook with parameters",
        description="Run a notebook with parameters; print what it measured.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    run.add_argument("notebook", nargs="?", help=f"default: {DEFAULT}")
    run.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                     help="set a parameter; -p NAME=VALUE is the same")  # fmt: skip
    run.add_argument("--out", default="", help="run folder; default: runs/NOTEBOOK/TIME")
    run.add_argument("--smoke", action="store_true", help="small parameters on a tiny model")
    run.add_argument("--once", action="store_true", help="do nothing if --out holds a finished run")
    run.add_argument("-h", "--help", action="store_true", help="show this and exit")
    many = tasks.add_parser("sweep", help="run a grid of parameters; called again, what is missing")
    many.add_argument("grid", help="YAML file, see notebooks/grids/")
    many.add_argument("--out", default="", help="sweep folder; default: runs/sweeps/GRID")
    many.add_argument("--jobs", type=int, help="runs at a time on this machine")
    many.add_argument("--executor", default="local", help="local (default) or ray")
    many.add_argument("--address", help="of the Ray cluster; default: the one this machine is in")
    table = tasks.add_parser("results", help="all records as one table")
    table.add_argument("folder", nargs="?", default="runs")
    table.add_argument("--all", action="store_true", help="smoke and failed runs too")
    table.add_argument(
        "--metric", default="", metavar="WORDS", help="only metrics with these words"
    )
    table.add_argument("--csv", help="write every column to this file instead")
    page = tasks.add_parser("report", help="an HTML page of a sweep, with its Pareto front")
    page.add_argument("folder")
    page.add_argument("--out", default="", help="HTML file; default: FOLDER/report.html")
    page.add_argument("--all", action="store_true", help="smoke runs too")
    words = []  # a value may itself hold an equals sign
    for before, word in zip(["", *sys.argv[1:]], sys.argv[1:], strict=False):
        joined = before == "-p" and re.match(r"\w+=", word)
        words += word.split("=", 1) if joined else [word]
    arguments = parser.parse_args(words)
    if arguments.task == "run" and arguments.help and not arguments.notebook:
        from .experiments import notebook_names

        run.epilog = (
            "notebooks (a beginning will do: run 03; or the path of your own):\n  "
            + "\n  ".join(notebook_names())
            + "\nrun NOTEBOOK --help shows its parameters."
        )
        run.print_help()
        parser.exit()
    return arguments


def _run(arguments: argparse.Namespace) -> None:
    import pandas as pd

    from .experiments import (
        default_parameters,
        find_notebook,
        parameters_cell,
        read_record,
        run_notebook,
        run_once,
    )

    notebook = find_notebook(arguments.notebook or DEFAULT)
    if arguments.help:
        print(f"{notebook.stem}: its parameters and their defaults\n\n{parameters_cell(notebook)}")
        return
    if arguments.once and not arguments.out:
        raise ValueError("--once needs --out, the folder to look into")
    known = default_parameters(notebook)
    parameters = {key: value(text, known.get(key)) for key, text in arguments.p}
    runner = run_once if arguments.once else run_notebook
    folder = runner(notebook, parameters, arguments.out, arguments.smoke)
    content = read_record(folder)
    print(f"\n{(content.get('model') or {}).get('label', content['notebook'])}")
    print(f"{content.get('protocol', '')}\n")
    for name in content["tables"]:
        if name.startswith("summary"):
            table = pd.read_csv(folder / f"{name}.csv")
            if not table.empty:
                print(table.to_string(index=False, float_format=_digits), "\n")
    for path in sorted(folder.iterdir()):
        if path.suffix in (".ipynb", ".png", ".json") or path.is_dir():
            print(path)


def _sweep(arguments: argparse.Namespace) -> int:
    from .experiments import read_grid, sweep

    grid = read_grid(arguments.grid)
    given = (arguments.out, arguments.jobs, arguments.executor, arguments.address)
    table = sweep(grid, *given)
    print(_blank(table).to_string(index=False, float_format=_digits))
    counts = table["status"].value_counts()
    print(", ".join(f"{count} {status}" for status, count in counts.items()), table.attrs["folder"])
    return int("failed" in counts)


def _results(arguments: argparse.Namespace) -> None:
    from .checks import writable_file
    from .experiments import results, varying
    from .store import atomic_write

    frame = results(arguments.folder, arguments.all)
    names = frame["metric"].fillna("")
    chosen = frame[names.str.contains(arguments.metric, regex=False)]
    if chosen.empty and not frame.empty:
        some = ", ".join(names[names != ""].unique()[:5])
        raise ValueError(f"no metric's name holds {arguments.metric!r}; some are: {some}")
    frame = chosen
    if arguments.csv:
        with atomic_write(writable_file(arguments.csv)) as staging:
            frame.to_csv(staging, index=False)
        print(arguments.csv)
        return
    if frame.empty:
        print(f"no records in {arguments.folder}; --all shows smoke and failed runs too")
        return
    last = ["metric", "value", "better", *(["error"] if frame["error"].notna().any() else [])]
    known = frame.columns.difference(["run", "commit", "finished", "seconds", "protocol", *last])
    shown = _blank(frame[["run", *varying(frame, list(known)), *last]])
    print(shown.to_string(index=False, float_format=_digits))


def _blank(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame to print, nothing where a value is missing."""
    return frame.astype(object).where(frame.notna(), "")


def _report(arguments: argparse.Namespace) -> None:
    from .experiments import write_report

    print(write_report(arguments.folder, arguments.out, arguments.all))


def main() -> None:
    """Do what the command line asks; an error is one line, and a status that is not 0."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    arguments = _arguments()
    tasks = {"run": _run, "sweep": _sweep, "results": _results, "report": _report}
    with contextlib.suppress(AttributeError):  # names in any alphabet, whatever the terminal's
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = tasks[arguments.task](arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, head for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split()) or type(error).__name__}")
    except KeyboardInterrupt:
        sys.exit("stopped; finished runs stay, and the same sweep goes on from them")
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
