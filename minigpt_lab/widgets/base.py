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
        self.words, self.picture = "", b""
        self.shown = ipywidgets.HTML()  # words and picture in one, so that both change at once
        self.shown.add_class("lab-summary")
        self.view = ipywidgets.VBox([*controls, self.shown])
        for control in inputs:
            control.observe(lambda _change: self.render(), "value")
        self.render()

    def choose(self) -> tuple[str, bytes]:
        """The numbers (HTML) and the picture (PNG) for the controls' values."""
        raise NotImplementedError

    def render(self) -> None:
        """Show numbers and picture; an error shows in their place, with the last picture."""
        try:
            self.words, self.picture = self.choose()
        except Exception as error:  # noqa: BLE001 - a front end would swallow it
            self.words = alarm(error)
        self.shown.value = self.to_html()

    def to_html(self) -> str:
        """Numbers and picture as HTML that needs no kernel."""
        if not self.picture:
            return self.words
        encoded = base64.b64encode(self.picture).decode("ascii")
        source = f"data:image/png;base64,{encoded}"
        return f'{self.words}<br><img style="max-width: 100%" src="{source}">'

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
        explorer = self.explorer
        bundle = dict(explorer.view._repr_mimebundle_()) if self.interactive else {}
        if explorer.picture:
            bundle["image/png"] = base64.b64encode(explorer.picture).decode("ascii")
        return bundle | {"text/html": explorer.to_html()}


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
    """Dropdowns, and sliders for numbers, that choose among finished results without a model.

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
            name: _control(name, texts(name, choices)) for name, choices in options.items()
        }
        row = ipywidgets.HBox(list(self.controls.values()))
        super().__init__([row], list(self.controls.values()))

    def choose(self) -> tuple[str, bytes]:
        """The figure or the table that `draw` gives for the choice."""
        drawn = self.draw(**{name: control.value for name, control in self.controls.items()})
        if isinstance(drawn, Figure):
            return "", png_bytes(drawn)
        table = Instance(pd.DataFrame, "or a Figure")("what draw returned", drawn)
        return _table_html(table), b""


def _control(name: str, choices: Sequence[str]) -> ipywidgets.Widget:
    """A slider for several numbers in order, else a dropdown."""
    try:
        numbers = [float(choice) for choice in choices]
    except ValueError:
        numbers = []
    ordered = len(numbers) > 1 and numbers == sorted(numbers)
    kind = ipywidgets.SelectionSlider if ordered else ipywidgets.Dropdown
    return kind(options=choices, description=name)


def _table_html(table: pd.DataFrame) -> str:
    """A table as HTML: texts in full and at the left, numbers short and at the right."""
    numbers = [*table.select_dtypes("number")]
    right = {name: [{"selector": "", "props": "text-align: right"}] for name in numbers}
    look = "text-align: left; padding: 0.2em 1.5em 0.2em 0; line-height: 1.4"
    cells = {"selector": "th, td", "props": look}
    shown = table.reset_index(drop=True).style.hide(axis="index")
    shown.format(escape="html", na_rep="–").format_index(escape="html", axis=1)
    shown.format(_number, subset=numbers, na_rep="–")
    shown.set_table_styles([cells]).set_table_styles(right, overwrite=False)
    with pd.option_context("styler.html.mathjax", False):
        return shown.to_html()


def _number(value: float) -> str:
    """Three digits, or all that stand before the decimal point."""
    whole = value == round(value) or abs(value) >= 100
    return f"{value:,.0f}" if whole else f"{value:.3g}"
