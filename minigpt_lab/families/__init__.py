"""Where each architecture keeps what can be pruned: one declarative entry per family.

Everything else in the package asks an `Anatomy` and never an architecture by name. To add a family,
add an entry to `FAMILIES` in ``architectures.py``; the property tests then run on it.
"""

from .anatomy import Anatomy, is_linear, weight_axis
from .architectures import ALL_SITES, ATTENTION_UNITS, FAMILIES, SITES, Family, Projection

__all__ = [
    "ALL_SITES",
    "ATTENTION_UNITS",
    "FAMILIES",
    "SITES",
    "Anatomy",
    "Family",
    "Projection",
    "is_linear",
    "weight_axis",
]
