"""The command line: ``python -m minigpt_lab make | run | sweep | results | report | pages``."""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import pandas as pd

# pandas and the rooms are imported by the task that needs them: --help answers at once
DEFAULT = "03_contextual_pruning"  # the notebook of a bare `run`


def parse_value(text: str, default: object = None) -> object:
    """A parameter from the command line: JSON or a Python literal where it is one, else text.

    Where the default is a text, ``2024`` is one too.
    """
    value = _literal(text)
    return text if isinstance(default, str) and not isinstance(value, str) else value


def _literal(text: str) -> object:
    if text.lower().lstrip("+-") in ("nan", "inf"):  # numbers, and refused as such
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


def _assignment(word: str) -> tuple[str, str]:
    """Name and value of ``NAME=VALUE``; the value may have an equals sign."""
    name, equals, value = word.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{word!r} is no NAME=VALUE")
    return name, value


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message):
        """Exit with the error, and where help is."""
        self.exit(2, f"error: {message}; {self.prog} --help says what can be given\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="minigpt_lab", description="Run notebooks as experiments, and sweeps of them."
    )
    tasks = parser.add_subparsers(dest="task", required=True)
    run = tasks.add_parser("run", help="run a notebook and print what it measured", add_help=False)
    run.add_argument("notebook", nargs="?", help=f"default: {DEFAULT}")
    assign = run.add_argument("-p", type=_assignment, action="append", default=[])
    assign.metavar, assign.help = "NAME=VALUE", "set a parameter"
    run.add_argument("--out", help="run folder; default: runs/NOTEBOOK/TIME")
    run.add_argument("--smoke", action="store_true", help="small parameters on a tiny model")
    run.add_argument("--once", action="store_true", help="do nothing if --out holds a finished run")
    run.add_argument("-h", "--help", action="store_true", help="of a NOTEBOOK: its parameters")
    run.set_defaults(do=_run, parser=run)
    make = tasks.add_parser("make", help="make a small model for a domain, and measure its loss")
    make.add_argument(
        "--model", default="smollm2-135m", help="name or folder; default: %(default)s"
    )
    make.add_argument("--domain", required=True, help="name, folder of texts, file, or hub dataset")
    make.add_argument("--size", type=float, help="share of the parameters to keep, e.g. 0.5")
    make.add_argument(
        "--increase",
        type=float,
        help="instead: how much perplexity may grow, e.g. 0.1, before the training wins some back; "
        "to search for that size takes time beyond --minutes",
    )
    make.add_argument("--general", type=float, default=0.3, help="share of general text (0.3)")
    make.add_argument("--minutes", type=float, default=60, help="time for all of it (60)")
    make.add_argument("--gguf", metavar="KIND", help="also a file for llama.cpp, e.g. Q8_0")
    make.add_argument("--all-tokens", action="store_true", help="keep the whole vocabulary")
    make.add_argument(
        "--allocation", default="uniform", help="over layers: uniform, log-increase, search"
    )
    make.add_argument("--drop-blocks", action="store_true", help="the search may drop whole blocks")
    make.add_argument("--reconstruct", action="store_true", help="fit blocks before the training")
    make.add_argument("--column", help="of a table of texts: the one that holds them")
    make.add_argument("--seq-len", type=int, default=256, help="tokens per window (256)")
    make.add_argument(
        "--calibration-tokens", type=int, default=16_384, help="that the pruning reads (16384)"
    )
    make.add_argument("--out", help="folder, continued if it exists; default: runs/mini/DOMAIN")
    make.set_defaults(do=_make)
    sweep = tasks.add_parser("sweep", help="run what is missing of a grid of parameters")
    sweep.add_argument("grid", help="YAML file, see notebooks/grids/")
    sweep.add_argument("--out", help="sweep folder; default: runs/sweeps/GRID")
    sweep.add_argument("--jobs", type=int, help="runs at a time on this machine")
    sweep.add_argument("--executor", default="local", help="local (default) or ray")
    sweep.add_argument("--address", help="of the Ray cluster; default: the one of this machine")
    sweep.set_defaults(do=_sweep)
    table = tasks.add_parser("results", help="all records as one table")
    table.add_argument("folder", nargs="?", default="runs")
    table.add_argument("--all", action="store_true", help="smoke and failed runs too")
    table.add_argument(
        "--metric", default="", metavar="WORDS", help="only metrics with these words"
    )
    table.add_argument("--csv", help="write every column to this file instead")
    table.set_defaults(do=_results)
    report = tasks.add_parser("report", help="notebook 07 over a folder of runs, as an HTML page")
    report.add_argument("folder")
    report.add_argument("--out", help="HTML file; default: FOLDER/report.html")
    report.add_argument("--all", action="store_true", help="smoke runs too")
    report.set_defaults(do=_report)
    pages = tasks.add_parser("pages", help="the notebooks of some runs as a static site")
    pages.add_argument("folder", metavar="RUNS", help="folder of runs, the newest of each notebook")
    pages.add_argument("--out", default="site", help="folder of the site; default: site")
    pages.add_argument("--smoke", action="store_true", help="smoke runs too")
    pages.set_defaults(do=_pages)
    return parser


def _run_help(arguments: argparse.Namespace) -> None:
    from .experiments import find_notebook, notebook_names, parameters_cell

    if arguments.notebook:
        notebook = find_notebook(arguments.notebook)
        print(f"{notebook.stem}: its parameters and their defaults\n")
        print(parameters_cell(notebook))
    else:
        arguments.parser.print_help()
        print("\nnotebooks (a beginning will do: run 03; or the path of your own):")
        print(*(f"  {name}" for name in notebook_names()), sep="\n")


def _run(arguments: argparse.Namespace) -> None:
    if arguments.help:
        _run_help(arguments)
        return
    import pandas as pd

    from .experiments import default_parameters, find_notebook, read_record, run_notebook, run_once

    if arguments.once and not arguments.out:
        raise ValueError("--once needs --out, the folder to look into")
    notebook = find_notebook(arguments.notebook or DEFAULT)
    defaults = default_parameters(notebook)
    parameters = {name: parse_value(text, defaults.get(name)) for name, text in arguments.p}
    run = run_once if arguments.once else run_notebook
    folder = run(notebook, parameters, arguments.out, smoke=arguments.smoke)
    content = read_record(folder)
    print(f"\n{(content.get('model') or {}).get('label', content['notebook'])}")
    print(f"{content.get('protocol', '')}\n")
    for name in content["tables"]:
        if name.startswith("summary"):
            table = pd.read_csv(folder / f"{name}.csv")
            _print_table(table.drop(columns="passages", errors="ignore"))
    for path in sorted(folder.iterdir()):
        if path.suffix in (".ipynb", ".png", ".json") or path.is_dir():
            print(path)


def _make(arguments: argparse.Namespace) -> None:
    from .domains import load_domain
    from .models import load_model
    from .recipes import make_mini, require_options

    options = {
        "size": arguments.size,
        "increase": arguments.increase,
        "general": arguments.general,
        "vocabulary": not arguments.all_tokens,
        "allocation": arguments.allocation,
        "drop_blocks": arguments.drop_blocks,
        "reconstruct": arguments.reconstruct,
        "minutes": arguments.minutes,
        "gguf": arguments.gguf,
        "calibration_tokens": arguments.calibration_tokens,
        "seq_len": arguments.seq_len,
    }
    require_options(**options)  # before a model is loaded, which may take minutes
    domain = load_domain(arguments.domain, column=arguments.column)
    model, tokenizer = load_model(arguments.model)
    out_dir = arguments.out or f"runs/mini/{domain.name}"
    mini = make_mini(model, tokenizer, domain, **options, out_dir=out_dir)
    columns = ["text", "variant", "stored", "bytes", "perplexity", "bits_per_character"]
    print()
    _print_table(mini.table[columns].sort_values("text", kind="stable"))
    print(f"\n{mini!r}")
    for path in sorted(mini.folder.parent.glob("mini-*.gguf")):
        print(f"for llama.cpp: {path}")


def _sweep(arguments: argparse.Namespace) -> int:
    from .experiments import read_grid, sweep

    table = sweep(
        read_grid(arguments.grid),
        arguments.out,
        jobs=arguments.jobs,
        executor=arguments.executor,
        address=arguments.address,
    )
    _print_table(table)
    counts = table["status"].value_counts()
    print(", ".join(f"{count} {status}" for status, count in counts.items()), table.attrs["folder"])
    return int("failed" in counts)


def _results(arguments: argparse.Namespace) -> None:
    from .checks import writable_file
    from .experiments import results, varying
    from .store import atomic_write

    frame = results(arguments.folder, smoke=arguments.all, failed=arguments.all)
    names = frame["metric"].fillna("")
    shown = frame[names.str.contains(arguments.metric, regex=False)]
    if shown.empty and not frame.empty:
        some = ", ".join(names[names != ""].unique()[:5])
        raise ValueError(f"no metric's name holds {arguments.metric!r}; some are: {some}")
    if arguments.csv:
        with atomic_write(writable_file(arguments.csv)) as staging:
            shown.to_csv(staging, index=False)
        print(arguments.csv)
    elif shown.empty:
        print(f"no records in {arguments.folder}; --all shows smoke and failed runs too")
    else:
        last = ["metric", "value", "better", *(["error"] if shown["error"].notna().any() else [])]
        always = ["run", "commit", "finished", "seconds", "protocol", *last]
        _print_table(shown[["run", *varying(shown, list(shown.columns.difference(always))), *last]])


def _print_table(frame: pd.DataFrame) -> None:
    """Print a frame, with nothing where a value is missing."""
    filled = frame.astype(object).where(frame.notna(), "")
    print(filled.to_string(index=False, float_format=_digits) if len(frame) else "")


def _report(arguments: argparse.Namespace) -> None:
    from .experiments import write_report

    print(write_report(arguments.folder, arguments.out, smoke=arguments.all))


def _pages(arguments: argparse.Namespace) -> None:
    from .pages import write_site

    print(write_site(arguments.folder, arguments.out, smoke=arguments.smoke))


def main() -> None:
    """Do what the command line asks; an error is one line, and a status that is not 0."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    with contextlib.suppress(AttributeError):  # names in any alphabet, whatever the terminal's
        cast(Any, sys.stdout).reconfigure(errors="backslashreplace")
    try:
        arguments = _parser().parse_args()
        status = arguments.do(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, head for one, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split()) or type(error).__name__}")
    except KeyboardInterrupt:
        sys.exit("stopped; what is finished is kept, and the same command goes on from it")
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
