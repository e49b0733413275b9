"""From thresholds or scores to a pruning plan; allocation of a ratio over layers."""

from .allocations import ALLOCATIONS, BY_DEPTH, Allocation, allocation_name
from .counts import (
    RATIO,
    RATIOS,
    one_target,
    parameters_to_remove,
    plan_from_scores,
    removed_shares,
    unit_counts,
)
from .dropping import plan_dropping
from .layer_sites import LayerSite, check_keep_layers, most_units, prunable_sites, unit_steps
from .removal import EPSILONS, SHARES, removals, token_removals
from .thresholds import contextual_plan
