"""The explorers' base: controls, a line of numbers, a picture, and a static page of them."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence

import ipywidgets
import pandas as pd
from matplotlib.figure import Figure

from ..checks import Function, Instance, ListOf, Text
from ..figures import png_bytes
from ..models import Size


class Explorer:
    """Controls above a line of numbers and a picture; redrawn when a control changes.

    Parameters
    ----------
    controls : sequence of ipywidgets.Widget
        Rows of the view.
    inputs : sequence of ipywidgets.Widget
        Controls whose value redraws the explorer.
    """

    def __init__(self, controls: Sequence[ipywidgets.Widget], inputs: Sequence[ipywidgets.Widget]):
        self.summary = ipywidgets.HTML()
        self.summary.add_class("lab-summary")
        self.image = ipywidgets.Image(format="png")
        self.image.layout.align_self = "flex-start"  # else a column stretches it
        self.image.add_class("lab-figure")
        self.view = ipywidgets.VBox([*controls, self.summary, self.image])
        for control in inputs:
            control.observe(lambda _change: self.render(), "value")
        self.render()

    def choose(self) -> tuple[str, bytes]:
        """The numbers (HTML) and the picture (PNG) for the controls' values."""
        raise NotImplementedError

    def render(self) -> None:
        """Show numbers and picture; an error shows in their place, with the last picture."""
        try:
            words, picture = self.choose()
        except Exception as error:  # noqa: BLE001 - a front end would swallow it
            words, picture = alarm(error), self.image.value
        self.summary.value, self.image.value = words, picture

    def show(self, interactive: bool) -> Page:
        """Page for a notebook cell: the live controls, or their numbers and picture alone."""
        return Page(self, interactive)


class Page:
    """Displays as an explorer's widgets, or as its numbers and picture where there are none.

    The live form carries the static one along: a viewer on the web that runs no widgets shows it.
    """

    def __init__(self, explorer: Explorer, interactive: bool):
        self.explorer, self.interactive = explorer, interactive

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        words, picture = self.explorer.summary.value, self.explorer.image.value
        bundle = dict(self.explorer.view._repr_mimebundle_()) if self.interactive else {}
        if picture:
            encoded = base64.b64encode(picture).decode("ascii")
            bundle["image/png"] = encoded
            words += f'<br><img src="data:image/png;base64,{encoded}">'
        return bundle | {"text/html": words}


def alarm(error: Exception) -> str:
    """An error as the reader should see it."""
    return f"<span style='color:#B00020'>{escaped(f'{type(error).__name__}: {error}')}</span>"


def escaped(text: str) -> str:
    """A text in HTML as it is written: no tags, and no formulas between dollar signs."""
    return html.escape(text).replace("$", "<span>$</span>")


def size_words(size: Size) -> str:
    """The three sizes of a plan, in words."""
    return (
        f"stored {size.stored:,} ({size.stored / size.dense:.1%} of dense), non-zero "
        f"{size.nonzero:,} ({size.nonzero / size.dense:.1%}), inside the layers "
        f"{size.layers_stored / size.layers_dense:.1%}"
    )


class Chooser(Explorer):
    """Dropdowns that choose among finished results; no model is needed.

    Parameters
    ----------
    draw : callable
        Takes the chosen values by name; returns a figure, or a data frame to list.
    **options
        Name to its choices, all of them texts.
    """

    def __init__(self, draw: Callable[..., Figure | pd.DataFrame], **options: Sequence[str]):
        self.draw = Function()("draw", draw)
        texts = ListOf(Text(), 1)
        self.controls = {
            name: ipywidgets.Dropdown(options=texts(name, choices), description=name)
            for name, choices in options.items()
        }
        row = ipywidgets.HBox(list(self.controls.values()))
        super().__init__([row], list(self.controls.values()))

    def choose(self) -> tuple[str, bytes]:
        """The figure or the table that `draw` gives for the choice."""
        drawn = self.draw(**{name: control.value for name, control in self.controls.items()})
        if isinstance(drawn, Figure):
            return "", png_bytes(drawn)
        table = Instance(pd.DataFrame, "or a Figure")("what draw returned", drawn)
        # long texts in full, and no formulas
        with pd.option_context("display.max_colwidth", None, "display.html.use_mathjax", False):
            words = table.to_html(index=False, float_format="{:.3g}".format, border=0)
        return words, b""
