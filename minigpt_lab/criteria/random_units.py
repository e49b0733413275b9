"""Random scores, the control that every criterion must beat."""

from __future__ import annotations

import numpy as np

from ..checks import Integer, checked
from ..models import Anatomy
from .scores import criterion


@criterion("random")
@checked(seed=Integer(0))
def random_scores(model, batches=None, statistics=None, *, sites, seed: int = 0):
    """Independent uniform scores, the same for the same seed.

    Parameters
    ----------
    seed : int
        Seed of NumPy's default generator.
    """
    anatomy, generator = Anatomy(model), np.random.default_rng(seed)
    return {site: [generator.random(n) for n in anatomy.units(site)] for site in sites}
