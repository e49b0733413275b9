"""The form of a recipe: what to make, chosen before the cell that makes it."""

from __future__ import annotations

import ipywidgets
from transformers import PreTrainedModel

from ..checks import Model, Number, Text, checked
from ..domains import domain_names
from ..models import model_size
from .base import Explorer


class MiniForm(Explorer):
    """Domain, size and minutes of `make_mini`; the next cell reads what was chosen.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Whose share is kept.
    domain : str
        Name of a domain, or a folder or file of texts.
    size : float
        Share of the stored parameters to keep.
    minutes : float
        Time for all of it.
    """

    @checked(
        model=Model(lock=False),
        domain=Text(),
        size=Number(above=0, below=1),
        minutes=Number(above=0),
    )
    def __init__(self, model: PreTrainedModel, *, domain: str, size: float, minutes: float):
        self.parameters = model_size(model).stored
        wide = {"style": {"description_width": "7em"}, "layout": {"width": "30em"}}
        self.domain = ipywidgets.Combobox(
            value=domain, options=tuple(domain_names()), description="domain", **wide
        )
        self.size = ipywidgets.FloatSlider(
            value=size, min=0.05, max=0.95, step=0.05, description="size", **wide
        )
        self.minutes = ipywidgets.BoundedFloatText(
            value=minutes, min=0.1, max=10_000, description="minutes", **wide
        )
        controls = [self.domain, self.size, self.minutes]
        super().__init__(controls, controls)

    @property
    def chosen(self) -> dict[str, float]:
        """Arguments of `make_mini`; the domain is loaded by its name, ``form.domain.value``."""
        return {"size": self.size.value, "minutes": self.minutes.value}

    def choose(self) -> tuple[str, bytes]:
        """How many parameters that keeps."""
        kept = round(self.size.value * self.parameters)
        return f"at most {kept:,} of {self.parameters:,} parameters; run the next cell", b""
