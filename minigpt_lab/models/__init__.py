"""What knows a model's structure: architectures, anatomy, sizes, plans, surgery, load and save."""

from .anatomy import Anatomy, weight_axis
from .architectures import ALL_SITES, ATTENTION_UNITS, FAMILIES, SITES, Projection
from .by_name import load_model
from .layers import add_bias
from .offloading import execution_device, is_offloaded, materialized
from .plan import PruningPlan, keep_all
from .resizing import rebuild_layer, set_units, update_config
from .runtime import check_token_ids, fingerprint, inference, label, require_weights, seeded
from .saving import save_model
from .sizes import Size, describe, layer_parameters, model_size, token_parameters
from .surgery import masked, refuse_masked, shrink
from .vocabulary import (
    close_over_merges,
    merge_table,
    protected_tokens,
    require_byte_pairs,
    tokenizer_for,
    trim_tokenizer,
)

__all__ = [
    "ALL_SITES",
    "ATTENTION_UNITS",
    "FAMILIES",
    "SITES",
    "Anatomy",
    "Projection",
    "PruningPlan",
    "Size",
    "add_bias",
    "check_token_ids",
    "close_over_merges",
    "describe",
    "execution_device",
    "fingerprint",
    "inference",
    "is_offloaded",
    "keep_all",
    "label",
    "layer_parameters",
    "load_model",
    "masked",
    "materialized",
    "merge_table",
    "model_size",
    "protected_tokens",
    "rebuild_layer",
    "refuse_masked",
    "require_byte_pairs",
    "require_weights",
    "save_model",
    "seeded",
    "set_units",
    "shrink",
    "token_parameters",
    "tokenizer_for",
    "trim_tokenizer",
    "update_config",
    "weight_axis",
]
