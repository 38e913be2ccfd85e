"""Layer-wise learning rates: the lower a layer, the more slowly it learns.

    rate of layer l of N (from 1) = rate * decay^(N + 1 - l)
    rate of the embeddings        = rate * decay^(N + 1)
    rate of what is above         = rate                      heads, and norms after the last layer

Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification", section 3.2; Clark et al. 2020,
"ELECTRA", appendix B, whose code has one factor more for everything but the heads. Decoupled weight decay
is part of what is scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from lmobj.train._depths import Depth, by_depth

__all__ = ["decayed_by_layer"]


def decayed_by_layer(
    optimizer: optax.GradientTransformation, decay: float, logical_axes: Mapping[str, Any]
) -> optax.GradientTransformation:
    """The optimizer, with every update scaled by the depth of its parameter. Parameters are {role: nested dict}."""
    if decay == 1:
        return optimizer

    def scaled(x: Any, depth: Depth) -> Any:
        return x * jnp.asarray(decay**depth, x.dtype)

    return optax.chain(optimizer, optax.stateless(lambda updates, params: by_depth(scaled, updates, logical_axes)))
