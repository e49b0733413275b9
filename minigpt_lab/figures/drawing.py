"""SVG drawings in the series' one look, readable on light and dark pages; a list of diagrams."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape, quoteattr

WIDTH = 900  # pixels; text is large enough for half of it
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
# name: on a light page, on a dark one (the preference of the browser; the page is its own ground)
_TINTS = {
    "page": ("#ffffff", "#12161c"),
    "edge": ("#d0d7de", "#3b444f"),
    "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#57606a", "#a2acb7"),
    "soft": ("#e6eaee", "#2a323c"),
    "keep": ("#0072b2", "#4aa3df"),
    "gone": ("#b34700", "#ff9a5c"),
    "new": ("#00795a", "#3cc79b"),
    "other": ("#8a4a78", "#d79bc4"),
}


def _styles(theme: int) -> str:
    """CSS rules of a theme: 0 for light pages, 1 for dark ones."""
    tint = {name: tints[theme] for name, tints in _TINTS.items()}
    fills = "".join(f".{name}{{fill:{colour}}}" for name, colour in tint.items())
    lines = "".join(f".l-{name}{{stroke:{colour};fill:none}}" for name, colour in tint.items())
    empty = f".empty{{fill:{tint['page']};stroke:{tint['gone']};stroke-dasharray:3 2}}"
    zero = f".zero{{fill:{tint['page']};stroke:{tint['muted']}}}"
    framed = f".frame{{fill:{tint['page']};stroke:{tint['ink']};stroke-width:1.5}}"
    return f"{fills}{lines}{empty}{zero}{framed}"


def _with_subscripts(line: str, size: float) -> str:
    """A line of text with ``_{…}`` set lower and smaller."""
    pieces, drop = re.split(r"_\{([^}]*)\}", escape(line)), size / 4
    for place, piece in enumerate(pieces[1:], 1):
        small = f' font-size="{0.75 * size:g}"' if place % 2 else ""
        pieces[place] = f'<tspan dy="{drop if place % 2 else -drop:g}"{small}>{piece}</tspan>'
    return "".join(pieces)


class Drawing:
    """Shapes and words on a page of its own, as the text of an SVG file.

    Parameters
    ----------
    height : int
        In pixels; all drawings are `WIDTH` wide.
    alt : str
        What the drawing shows, for readers who do not see it.
    """

    def __init__(self, height: int, alt: str):
        self.height, self.alt, self.parts = height, alt, []

    def text(
        self, x: float, y: float, words: str, look: str = "ink", anchor: str = "middle",
        size: float = 15, bold: bool = False,
    ) -> None:  # fmt: skip
        """Write words, with line breaks, and subscripts as in ``W_{up}``."""
        weight = ' font-weight="600"' if bold else ""
        for row, line in enumerate(words.split("\n")):
            self.parts.append(
                f'<text x="{x:g}" y="{y + row * size * 1.3:g}" class="{look}" font-size="{size:g}" '
                f'text-anchor="{anchor}"{weight}>{_with_subscripts(line, size)}</text>'
            )

    def head(self, x: float, words: str, below: str = "", y: float = 34) -> None:
        """Write a panel's heading and a line below it."""
        self.text(x, y, words, size=17, bold=True)
        self.text(x, y + 22, below, "muted", size=14)

    def box(self, x: float, y: float, width: float, height: float, look: str = "keep") -> None:
        """Draw a rectangle; one that is removed (``"gone"``) is empty, dashed and crossed out."""
        fill = "empty" if look == "gone" else look
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" '
            f'class="{fill}"/>'
        )
        if look == "gone":
            self.line([(x + 2, y + height - 2), (x + width - 2, y + 2)], "gone")

    def cells(
        self, x: float, y: float, rows: int, columns: int,
        look: Callable[[int, int], str] = lambda row, column: "keep", size: float = 15,
    ) -> None:  # fmt: skip
        """Draw a matrix, a square per entry."""
        for row in range(rows):
            for column in range(columns):
                place = x + column * (size + 2), y + row * (size + 2)
                self.box(*place, size, size, look(row, column))

    def line(
        self, points: Sequence[tuple[float, float]], look: str = "ink", width: float = 1.5,
        dashed: bool = False, arrow: bool = False,
    ) -> None:  # fmt: skip
        """Draw a line through points."""
        path = " ".join(f"{x:.5g},{y:.5g}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{path}" class="l-{look}" stroke-width="{width:g}"{dashes}/>'
        )
        if arrow:
            self._point(*points[-2], *points[-1], look)

    def _point(self, x0: float, y0: float, x: float, y: float, look: str) -> None:
        """Draw the head of an arrow from one point to another."""
        length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
        u, v = 9 * (x - x0) / length, 9 * (y - y0) / length
        corners = [(x, y), (x - u - v / 2, y - v + u / 2), (x - u + v / 2, y - v - u / 2)]
        self.area(corners, look)

    def arrow(
        self, x0: float, y0: float, x: float, y: float, words: str = "", look: str = "ink"
    ) -> None:
        """Draw an arrow, with words above its middle."""
        self.line([(x0, y0), (x, y)], look, arrow=True)
        self.text((x0 + x) / 2, min(y0, y) - 8, words, "muted", size=13)

    def area(self, corners: Sequence[tuple[float, float]], look: str) -> None:
        """Fill a polygon."""
        path = " ".join(f"{x:.5g},{y:.5g}" for x, y in corners)
        self.parts.append(f'<polygon points="{path}" class="{look}"/>')

    def dot(self, x: float, y: float, radius: float, look: str) -> None:
        """Draw a filled circle."""
        self.parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" class="{look}"/>')

    def svg(self) -> str:
        """The drawing as the text of an SVG file."""
        dark = f"@media (prefers-color-scheme:dark){{{_styles(1)}}}"
        page = (
            f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{self.height - 1}" rx="8" '
            'class="page"/>'
            f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{self.height - 1}" rx="8" '
            'class="l-edge"/>'
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" '
                f'width="{WIDTH}" height="{self.height}" font-family="{_FONTS}" role="img" '
                f"aria-label={quoteattr(self.alt)}>",
                f"<title>{escape(self.alt)}</title>",
                f"<style>{_styles(0)}{dark}</style>",
                page,
                *self.parts,
                "</svg>\n",
            ]
        )


#: Diagrams by name: their height, and what puts the shapes on a drawing.
DIAGRAMS: dict[str, tuple[int, Callable[[Drawing], None]]] = {}


def diagram(height: int) -> Callable:
    """Register a function as a diagram of a height, under its name (decorator).

    The docstring is the text for readers who do not see the picture.
    """

    def register(function: Callable[[Drawing], None]) -> Callable[[Drawing], None]:
        DIAGRAMS[function.__name__] = (height, function)
        return function

    return register


def alt_text(name: str) -> str:
    """What a diagram shows, in words."""
    return " ".join(inspect.cleandoc(DIAGRAMS[name][1].__doc__ or "").split())


def svg_text(name: str) -> str:
    """A diagram as the text of an SVG file."""
    height, draw = DIAGRAMS[name]
    drawing = Drawing(height, alt_text(name))
    draw(drawing)
    return drawing.svg()
