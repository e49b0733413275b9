"""The ways out: GGUF files for llama.cpp, folders for vLLM, copies rounded to a GGUF type."""

from .gguf_file import export_gguf, gguf_size
from .rounded_copy import quantised
from .rounding import KINDS, block_size
from .vllm_folder import export_vllm
