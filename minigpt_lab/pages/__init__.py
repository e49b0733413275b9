"""The executed notebooks of some runs as one static site, built by Sphinx."""

from .publishing import write_site
