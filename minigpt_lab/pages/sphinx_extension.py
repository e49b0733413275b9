"""What the site adds to Sphinx: formulas as MathML, links to the glossary, pictures to enlarge."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from pathlib import Path

import imagesize
import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

from .api_reference import escape_bars
from .glossary import Term

_LOGGER = logging.getLogger(__name__)
GLOSSARY = "glossary"
#: Parts of a page in which no term is linked: what is a link, code, a formula or a heading.
_CLOSED = (
    *(nodes.reference, nodes.literal, nodes.literal_block, nodes.math, nodes.math_block),
    *(nodes.title, nodes.raw, nodes.target, nodes.comment, nodes.Invisible, nodes.topic),
)
_BAR = r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>'


def setup(app: Sphinx) -> dict:
    """Register with Sphinx, as it asks of an extension."""
    app.add_config_value("glossary_terms", {}, "env")
    app.add_html_math_renderer("mathml", (_inline_math, None), (_display_math, None))
    app.connect("autodoc-process-docstring", prepare_docstring, priority=100)
    app.connect("doctree-read", link_terms)
    app.connect("doctree-read", size_pictures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def mathml(formula: str, display: str = "inline") -> str:
    """A formula of TeX as MathML, with TeX's spaces around bars and after functions.

    One that cannot be converted stays as it is written.
    """
    try:
        text = latex2mathml.converter.convert(formula, display=display)
    except Exception:  # noqa: BLE001 - of the converter, of many kinds
        _LOGGER.warning("no MathML for the formula %s", formula)
        return f"<code>{html.escape(formula)}</code>"
    text = re.sub(r"<mo[^>]*>(&#x(?:0007C|02016);)</mo>", _BAR, text)
    return re.sub(r"(<mi>(?:log|exp)</mi>)(?=<m(?!o))", r'\1<mspace width="0.167em"/>', text)


def _inline_math(translator, node: nodes.math) -> None:
    translator.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def _display_math(translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def prepare_docstring(app: Sphinx, what: str, name: str, value: object, options, lines: list[str]):
    """Keep Sphinx from reading more in a docstring than numpydoc means.

    Bars are no substitutions, and the first words of a property no type.
    """
    lines[:] = [escape_bars(line) for line in lines]
    if what == "property" and lines:
        lines[0] = f": {lines[0]}"  # an empty type


def size_pictures(app: Sphinx, doctree: nodes.document) -> None:
    """Give each picture its width, for which Sphinx makes it a link to the picture alone."""
    for image in doctree.findall(nodes.image):
        path = Path(app.srcdir) / image["uri"]
        width, _ = imagesize.get(path) if path.is_file() else (-1, -1)
        if width > 0 and "width" not in image:
            image["width"] = f"{width:.0f}px"


def link_terms(app: Sphinx, doctree: nodes.document) -> None:
    """Link the first use of each term on a page to the glossary."""
    terms: Mapping[str, Term] = app.config.glossary_terms
    page = app.env.docname
    if page == GLOSSARY or not terms:
        return
    pattern, left = _pattern(terms), dict(terms)
    for text in [*doctree.findall(nodes.Text)]:
        if not _is_closed(text) and (parts := _linked(app, page, text.astext(), pattern, left)):
            text.parent.replace(text, parts)


def _is_closed(node: nodes.Node) -> bool:
    while node := node.parent:
        kind = node.tagname
        if isinstance(node, _CLOSED) or kind.startswith("desc_") and kind != "desc_content":
            return True
        if "cell_output" in node.get("classes", ()) or "facts" in node.get("classes", ()):
            return True
    return False


def _linked(
    app: Sphinx, page: str, text: str, pattern: re.Pattern, left: dict[str, Term]
) -> list[nodes.Node]:
    """The parts of a text with links for the terms that are left; nothing if there are none."""
    parts: list[nodes.Node] = []
    end = 0
    for match in pattern.finditer(text):
        known = (match[1], match[1].lower(), re.sub("ies$", "y", match[1].lower()))
        name = next((name for name in known if name in left), None)
        if name is None:
            continue
        term = left.pop(name)
        address = f"{app.builder.get_relative_uri(page, GLOSSARY)}#{term.anchor}"
        link = nodes.reference("", match[0], refuri=address, internal=True, classes=["term"])
        link["reftitle"] = term.meaning
        parts += [nodes.Text(text[end : match.start()]), link]
        end = match.end()
    return [*parts, nodes.Text(text[end:])] if parts else []


def _pattern(terms: Mapping[str, Term]) -> re.Pattern:
    """Matches any term as a whole word, in the plural too; small letters match large ones."""
    longest = sorted(terms, key=len, reverse=True)
    escaped = [re.sub("y$", "(?:y|ies)", re.escape(name)) for name in longest]
    words = "|".join(f"(?i:{word})" if word.islower() else word for word in escaped)
    return re.compile(rf"(?<![\w-])({words})(?:e?s)?(?![\w-])")
