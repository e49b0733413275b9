"""Notebooks as experiments: run with parameters, swept over grids, recorded and compared."""

from .comparisons import measurements, pareto, select, smallest
from .grids import read_grid
from .parameters import default_parameters, find_notebook, notebook_names, parameters_cell
from .recording import metrics_from, record
from .records import provenance, read_record, read_records, results, varying
from .reports import write_report
from .runs import run_notebook, run_once
from .sweeps import EXECUTORS, sweep
