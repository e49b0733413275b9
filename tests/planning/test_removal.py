"""All plans at once, against the plans themselves, one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import CONFIGS, random_model

import minigpt_lab as lab
from minigpt_lab.planning import EPSILONS, SHARES, removals, token_removals


def statistics_of(model) -> lab.Statistics:
    ids = torch.randint(3, 97, (4, 16), generator=torch.Generator().manual_seed(0))
    return lab.collect_statistics(model, [{"input_ids": ids}], progress=False)


def removed_units(found, index: int) -> dict[str, list[int]]:
    """Units removed from every layer at a threshold, of which one is always kept."""
    return {
        site: [min(int((layer <= index).sum()), len(layer) - 1) for layer in layers]
        for site, layers in found.items()
    }


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("rule", ["epsilon", "share"])
def test_every_plan_is_counted(family, rule):
    model = random_model(family)
    statistics = statistics_of(model)
    found = removals(model, statistics, rule=rule)
    thresholds = EPSILONS if rule == "epsilon" else SHARES
    components = {"activation": {"ffn": found.activation}, "linear": found.linear}
    largest = max(statistics.magnitude(*key).max() for key in statistics.sides())
    wanted = [0, 0.05, 0.3, 0.6, 0.9, 0.99]
    if rule == "epsilon":
        magnitudes = [statistics.magnitude(*key) for key in statistics.sums]
        wanted = [0, *np.quantile(np.concatenate(magnitudes), [0.1, 0.5, 0.9, 0.99]), largest, 1e6]
    for value in wanted:
        index = int(np.searchsorted(thresholds, value))
        value = float(thresholds[index])
        for component, units in components.items():
            if rule == "share":
                plan = lab.contextual_plan(model, statistics, quantile={component: value})
            else:
                plan = lab.contextual_plan(model, statistics, **{f"epsilon_{component}": value})
            expected = removed_units(units, index)
            assert {site: plan.removed[site] for site in expected} == expected
            size = plan.predicted_size(model)
            zeroed = found.zeroed[index] if component == "linear" else 0
            assert size.stored - size.nonzero == zeroed, (component, value)


def test_tokens_go_after_all_that_are_merged_from_them(tiny, tiny_statistics):
    own, removal = token_removals(tiny[0], tiny_statistics)
    shares = tiny_statistics.token_counts / tiny_statistics.n_tokens
    for epsilon in (0.0, 0.002, 0.01, 0.5):
        index = int(np.searchsorted(EPSILONS, epsilon))
        plan = lab.contextual_plan(tiny[0], tiny_statistics, epsilon_embedding=epsilon)
        assert plan.vocabulary == np.flatnonzero(removal > index).tolist()
        assert (own <= index).tolist() == (shares <= epsilon).tolist()
