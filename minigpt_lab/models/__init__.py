"""A model's structure: anatomy, sizes, plans, surgery, loading and saving."""

from ..architectures import ALL_SITES, ATTENTION_UNITS, FAMILIES, SITES, Projection
from .anatomy import Anatomy, is_linear, weight_axis
from .auto_classes import pruned_classes, update_config
from .by_name import load_model, refuse_non_finite
from .feature_masks import Masks, all_features, without_features
from .layers import add_bias, set_forward
from .loading import SIDECAR
from .model_cards import model_card
from .offloading import execution_device, is_offloaded, materialized
from .plan import PruningPlan, keep_all
from .precision import PRECISION, dtype_name, has_fast_bfloat16, product_dtype, reading_dtype
from .resizing import padding, rebuild_layer, set_units
from .runtime import (
    check_token_ids,
    fingerprint,
    inference,
    label,
    origin_of,
    quiet,
    require_room,
    require_weights,
    seeded,
)
from .saving import save_model
from .sizes import Size, dense_counts, describe, layer_parameters, model_size, token_parameters
from .surgery import is_masked, masked, refuse_masked, shrink
from .vocabulary import (
    TrimmedVocabulary,
    close_over_merges,
    merge_table,
    protected_tokens,
    require_byte_pairs,
    tokenizer_for,
    trim_tokenizer,
)
