"""From thresholds or scores to a pruning plan; allocation of a ratio over layers."""

from .allocations import ALLOCATIONS, BY_DEPTH, RANKINGS, Allocation, Group, allocation_name
from .counts import (
    kept_ends,
    leaving_parameters,
    one_target,
    plan_from_scores,
    prunable,
    removed_shares,
    unit_counts,
    unit_steps,
)
from .thresholds import contextual_plan

__all__ = [
    "ALLOCATIONS",
    "BY_DEPTH",
    "RANKINGS",
    "Allocation",
    "Group",
    "allocation_name",
    "contextual_plan",
    "kept_ends",
    "leaving_parameters",
    "one_target",
    "plan_from_scores",
    "prunable",
    "removed_shares",
    "unit_counts",
    "unit_steps",
]
