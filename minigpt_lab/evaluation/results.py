"""What results of an evaluation have in common."""

from __future__ import annotations

from dataclasses import asdict

import pandas as pd


class OneRow:
    """A dataclass of numbers that is one row of a table."""

    def row(self) -> dict:
        """The numbers as one row of a table."""
        return asdict(self)  # type: ignore[call-overload]

    def to_frame(self) -> pd.DataFrame:
        """The numbers as a table of one row."""
        return pd.DataFrame([self.row()])

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False)
