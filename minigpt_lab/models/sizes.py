"""Parameter counts of a model, and a table of the units that can be pruned."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd
from transformers import PreTrainedModel

from ..architectures import ALL_SITES
from ..checks import Model, checked
from .anatomy import Anatomy
from .runtime import noted_dense


@dataclass(frozen=True, repr=False)
class Size:
    """Parameters of a model: stored, non-zero and inside the decoder layers.

    Parameters
    ----------
    stored : int
        Parameters on disk and in memory.
    nonzero : int
        Stored parameters that are not zero.
    dense : int
        Parameters of the model before pruning.
    layers_stored, layers_dense : int
        Parameters inside the decoder layers, after and before pruning.
    paper_nonzero : int, optional
        Parameters that the code of the Mini-GPTs paper, which removes none, would count as
        non-zero: for a pruned channel it zeroes the row of the first projection, but not the column
        of the second. Set only by `PruningPlan.predicted_size`.
    """

    stored: int
    nonzero: int
    dense: int
    layers_stored: int
    layers_dense: int
    paper_nonzero: int | None = field(default=None, compare=False)

    @property
    def layer_ratio(self) -> float:
        """Share of the decoder layers' parameters that is kept."""
        return self.layers_stored / self.layers_dense

    def to_frame(self) -> pd.DataFrame:
        """One row with the counts and their shares of the dense model."""
        shares = {
            "stored_ratio": self.stored / self.dense,
            "nonzero_ratio": self.nonzero / self.dense,
            "layer_ratio": self.layer_ratio,
            "paper_nonzero_ratio": self.paper_nonzero and self.paper_nonzero / self.dense,
        }
        return pd.DataFrame([asdict(self) | shares])

    def __repr__(self) -> str:
        paper = ""
        if self.paper_nonzero is not None:
            share = self.paper_nonzero / self.dense
            paper = f"; Mini-GPTs' code would count {self.paper_nonzero:,} ({share:.1%}) non-zero"
        return (
            f"stored {self.stored:,} ({self.stored / self.dense:.1%}), non-zero {self.nonzero:,} "
            f"({self.nonzero / self.dense:.1%}) of {self.dense:,}; "
            f"{self.layer_ratio:.1%} of the decoder layers{paper}"
        )

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False)


@checked(model=Model(), dense=Model() | None)
def model_size(model: PreTrainedModel, dense: PreTrainedModel | None = None) -> Size:
    """Count a model's parameters as they are; tied weights count once.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Any supported model.
    dense : transformers.PreTrainedModel, optional
        The model before pruning, for the ratios; by default its size as `model` recorded it when it
        was pruned.
    """
    before = (noted_dense(model) or _counts(model)) if dense is None else _counts(dense)
    return Size(
        stored=model.num_parameters(),
        nonzero=sum(int(p.count_nonzero()) for p in model.parameters()),
        dense=before["parameters"],
        layers_stored=layer_parameters(model),
        layers_dense=before["layers"],
    )


def dense_counts(model: PreTrainedModel) -> dict[str, Any]:
    """``"parameters"`` of the model before it was first pruned, and of its decoder ``"layers"``.

    Also its ``"tokens"``, and the units of a layer, as text by their site. Pruning writes all of
    them into the config, as ``minigpt_lab_dense``; they are saved with it.
    """
    if known := noted_dense(model):
        return known
    anatomy, rows = Anatomy(model), len(model.get_input_embeddings().weight)
    units = {site: span(anatomy.units(site)) for site in ALL_SITES}
    return {**_counts(model), "tokens": rows, **units}


def _counts(model: PreTrainedModel) -> dict[str, int]:
    return {"parameters": model.num_parameters(), "layers": layer_parameters(model)}


def layer_parameters(model: PreTrainedModel) -> int:
    """Parameters inside the decoder layers."""
    return sum(p.numel() for layer in Anatomy(model).layers for p in layer.parameters())


@checked(model=Model(lock=False))
def describe(model: PreTrainedModel) -> pd.DataFrame:
    """Tabulate the sites of a model that can be pruned: units, their number and their size.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model of a supported family.

    Returns
    -------
    pandas.DataFrame
        One row per site: the unit, units per layer (``min``–``max`` where layers differ), the legal
        ratios of units removed per layer, parameters that one unit costs, and the share of the
        model's parameters that all units of the site hold. Under grouped-query attention the query
        heads of the site ``"attention"`` appear again as ``"balanced_heads"``, whose units are one
        query head of every key/value group: the other way to prune the same weights.
    """
    anatomy = Anatomy(model)
    grouped = max(anatomy.units("balanced_heads")) > 1
    names = {"ffn": "channel", "attention": "key/value group" if grouped else "head"}
    if grouped:
        names["balanced_heads"] = "query head of every group"
    total, rows = model.num_parameters(), []
    for site, unit in names.items():
        units = anatomy.units(site)
        costs = [anatomy.unit_parameters(site, layer) for layer in range(len(units))]
        share = sum(map(int.__mul__, units, costs)) / total
        present = [i for i, n in enumerate(units) if n] or [0]  # layers whose block is not dropped
        ratios = f"k/n for 0 ≤ k < n = {span([units[i] for i in present])}"
        per_unit = span([costs[i] for i in present])
        rows.append((site, unit, len(units), span(units), ratios, per_unit, share))
    tokens, cost = len(model.get_input_embeddings().weight), token_parameters(model)
    ratios = "tokens unseen or rare; bytes and special tokens are kept"
    rows.append(("vocabulary", "token", 1, str(tokens), ratios, str(cost), tokens * cost / total))
    columns = "site unit layers units_per_layer legal_ratios parameters_per_unit share_of_model"
    return pd.DataFrame(rows, columns=columns.split())


def token_parameters(model: PreTrainedModel) -> int:
    """Parameters that are removed with one token: its rows of embedding and untied head."""
    cost = model.get_input_embeddings().weight.shape[1]
    head = model.get_output_embeddings()
    if not Anatomy(model).head_is_tied():
        cost += head.weight.shape[1]
    return cost + int(head is not None and getattr(head, "bias", None) is not None)


def span(values: list[int]) -> str:
    """Values as text: one number, or ``lowest–highest`` if they differ."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"
