"""From thresholds or scores to a pruning plan; allocation of a ratio over layers."""

from .allocations import ALLOCATIONS, BY_DEPTH, RANKINGS, Allocation, LayerSite, allocation_name
from .counts import (
    check_keep_layers,
    one_target,
    parameters_to_remove,
    plan_from_scores,
    prunable_sites,
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
    "LayerSite",
    "allocation_name",
    "check_keep_layers",
    "contextual_plan",
    "one_target",
    "parameters_to_remove",
    "plan_from_scores",
    "prunable_sites",
    "removed_shares",
    "unit_counts",
    "unit_steps",
]
