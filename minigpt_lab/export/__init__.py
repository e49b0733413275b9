"""The ways out: GGUF files for llama.cpp, and copies rounded to a GGUF type."""

from .gguf_file import export_gguf, gguf_size
from .rounding import KINDS, quantised
