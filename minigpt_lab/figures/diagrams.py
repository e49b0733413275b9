"""The diagrams at the head of the notebooks; ``tasks.py diagrams`` writes them.

They show how something works; what was measured is in the other figures.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..checks import Location, checked, to_path
from ..store import atomic_write
from . import measure_diagrams, model_diagrams  # noqa: F401  (fill the registry)
from .drawing import DIAGRAMS, svg_text


@checked(folder=Location())
def write_diagrams(folder: str | os.PathLike) -> None:
    """Write every diagram into a folder, as ``NAME.svg``."""
    for name in DIAGRAMS:
        with atomic_write(to_path(folder) / f"{name}.svg") as staging:
            staging.write_text(svg_text(name), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write_diagrams(Path(__file__).parents[2] / "notebooks" / "diagrams")
