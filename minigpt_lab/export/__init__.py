"""The ways out: GGUF files for llama.cpp, folders for vLLM, copies rounded to a GGUF type."""

from .gguf_file import export_gguf, gguf_size
from .rounding import KINDS, block_size, quantised
from .vllm_folder import export_vllm
