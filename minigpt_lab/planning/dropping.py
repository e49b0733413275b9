"""From the influence of layers and blocks to a plan that drops the least of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from ..checks import Instance, Integer, InvalidArgument, Model, Number, checked
from ..models import SITES, Anatomy, PruningPlan, fingerprint, keep_all, layer_parameters
from .counts import one_target

_COLUMNS = ("layer", "site", "influence")


@checked(
    model=Model(),
    influence=Instance(pd.DataFrame, "lab.block_influence gives it"),
    count=Integer(1) | None,
    ratio=Number(above=0, below=1) | None,
)
def plan_dropping(
    model: PreTrainedModel,
    influence: pd.DataFrame,
    *,
    count: int | None = None,
    ratio: float | None = None,
) -> PruningPlan:
    """Plan to drop the attention, the FFN or both of the layers with the lowest influence.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model whose influence was measured.
    influence : pandas.DataFrame
        Columns ``layer, site, influence``, from `block_influence`; only its rows may be dropped
        (``influence.query("layer > 0")`` keeps the first layer whole). The site ``"layer"`` is both
        blocks of a layer.
    count : int, optional
        Rows to drop.
    ratio : float, optional
        Share of the decoder layers' parameters to remove; as few rows are dropped as reach it. Give
        one of the two.

    Returns
    -------
    PruningPlan
        It keeps all units of the other blocks.

    Raises
    ------
    ValueError
        If not exactly one target is given or it cannot be met, a row is no block of the model, two
        rows are of one block, or every block would be dropped.
    """
    target = one_target(count=count, ratio=ratio)
    anatomy = Anatomy(model)
    blocks = _ascending(anatomy, influence)
    # 1. Parameters of every row's blocks, and how many rows the target needs.
    costs = [
        sum(anatomy.units(site)[layer] * anatomy.unit_parameters(site, layer) for site in sites)
        for layer, sites in blocks
    ]
    total = layer_parameters(model)
    needed = count or 0
    if ratio is not None:
        needed = int(np.searchsorted(np.cumsum(costs), ratio * total - 0.5)) + 1
    if needed > len(blocks):
        raise InvalidArgument(
            f"the target {target} cannot be met: the {len(blocks)} rows of influence hold "
            f"{sum(costs) / total:.1%} of the decoder layers' parameters; expected at most these"
        )
    # 2. The plan.
    keep = keep_all(anatomy)
    for layer, sites in blocks[:needed]:
        for site in sites:
            keep[site][layer] = []
    dropped = {site: [i for i, kept in enumerate(keep[site]) if not kept] for site in SITES}
    plan = PruningPlan(
        model_hash=fingerprint(model),
        units={site: anatomy.units(site) for site in SITES},
        keep=keep,
        vocabulary_size=len(model.get_input_embeddings().weight),
        origin={"method": "dropped blocks", **target, "dropped": dropped},
    )
    plan.require(model)
    return plan


def _ascending(anatomy: Anatomy, influence: pd.DataFrame) -> list[tuple[int, tuple[str, ...]]]:
    """Layer and sites of every row, the lowest influence first."""
    missing = [name for name in _COLUMNS if name not in influence]
    if missing or not len(influence):
        raise InvalidArgument(
            f"influence has {len(influence)} rows and the columns {[*influence]}; expected rows "
            f"with {', '.join(_COLUMNS)}, from lab.block_influence"
        )
    blocks: list[tuple[int, tuple[str, ...]]] = []
    seen: set[tuple[int, str]] = set()
    for row in influence.sort_values("influence", kind="stable").itertuples():
        sites = SITES if row.site == "layer" else (row.site,)
        known = row.site in ("layer", *SITES) and row.layer in range(len(anatomy.layers))
        if not known or not np.isfinite(row.influence):
            raise InvalidArgument(
                f"influence has {row.influence} of layer {row.layer!r}'s {row.site!r}; expected "
                f"finite numbers of layer, ffn or attention in {len(anatomy.layers)} layers"
            )
        if seen & {(row.layer, site) for site in sites}:
            raise InvalidArgument(
                f"influence has two rows of a block of layer {row.layer}; expected one of each: "
                "measure whole layers (sites=('layer',)), or blocks (sites=('ffn', 'attention'))"
            )
        seen |= {(row.layer, site) for site in sites}
        blocks.append((int(row.layer), sites))
    return blocks
