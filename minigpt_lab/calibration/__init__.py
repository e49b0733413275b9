"""Collect statistics, second moments and gradients over text; run the layers in turn."""

from .examples import Examples
from .forward import first_output, patched_forward, run_decoder, watch
from .gradients import collect_gradients
from .hessians import DAMPING_MODES, Hessians, Indefinite, collect_hessians, damped_inverse, refit
from .layer_runner import Calls, LayerRunner, catch_inputs
from .losses import logit_blocks, token_losses
from .moments import FeatureSums, Moments, sum_dtype
from .neuron_statistics import Statistics, collect_statistics, tokens_hash
from .spsa import estimate_gradients, gradient_cosine, scored_weights
