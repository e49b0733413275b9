"""What differs between architectures, as data: nothing here loads torch or transformers."""

from .families import (
    ALL_SITES,
    ATTENTION_UNITS,
    FAMILIES,
    SITES,
    Family,
    Projection,
    dense_type,
    pruned_type,
)
