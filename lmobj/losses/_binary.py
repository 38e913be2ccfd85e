"""Losses of yes-or-no decisions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmobj.errors import UserError

__all__ = ["binary_nll"]


def binary_nll(
    logits: Float[Array, "*N"], labels: Bool[Array, "*N"] | Int[Array, "*N"] | Float[Array, "*N"]
) -> Float[Array, "*N"]:
    """Negative log-likelihood in nats of independent yes-or-no labels, unreduced (sigmoid cross-entropy).

    -y log sigmoid(x) - (1 - y) log sigmoid(-x) = y softplus(-x) + (1 - y) softplus(x), where neither part overflows nor
    loses small values. Computed in `promote_types(logits, float32)`.

    Args:
      logits: [...] x, the log-odds of the label 1.
      labels: [...] y: 0 or 1, or a probability between.

    Raises:
      UserError: the shapes differ.
    """
    if logits.shape != labels.shape:
        raise UserError(f"binary_nll: logits {logits.shape} and labels {labels.shape} must have the same shape.")
    x = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    y = labels.astype(x.dtype)
    # Not max(x, 0) - x y + log(1 + exp(-|x|)): its parts have kinks, which make the gradient wrong at x = 0.
    return y * jax.nn.softplus(-x) + (1 - y) * jax.nn.softplus(x)
