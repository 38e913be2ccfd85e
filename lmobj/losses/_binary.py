"""Losses of yes-or-no decisions, of which several at once are multi-label classification."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmobj.errors import UserError

__all__ = ["binary_nll", "check_binary"]


def binary_nll(
    logits: Float[Array, "*N"], labels: Bool[Array, "*N"] | Int[Array, "*N"] | Float[Array, "*N"]
) -> Float[Array, "*N"]:
    """Negative log-likelihood in nats of independent yes-or-no labels, unreduced (sigmoid cross-entropy).

        -y log sigmoid(x) - (1 - y) log sigmoid(-x) = y softplus(-x) + (1 - y) softplus(x)

    where neither part overflows nor loses small values. Computed in `promote_types(logits, float32)`. For multi-label
    classification the last axis is the labels, each with a logit of its own.

    Args:
      logits: [...] x, the log-odds of the label 1.
      labels: [...] y: 0 or 1, or a probability between.

    Raises:
      UserError: the shapes differ.

    Source: Bishop 2006, "Pattern Recognition and Machine Learning", eq. 4.90; of many labels Nam et al. 2014,
    "Large-scale Multi-label Text Classification: Revisiting Neural Networks".
    """
    check_binary("binary_nll", logits, labels)
    x = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    y = labels.astype(x.dtype)
    # Not max(x, 0) - x y + log(1 + exp(-|x|)): its parts have kinks, which make the gradient wrong at x = 0.
    return y * jax.nn.softplus(-x) + (1 - y) * jax.nn.softplus(x)


def check_binary(name: str, logits: Array, labels: Array) -> None:
    """Raises UserError, for the function `name`, where the shapes differ."""
    if logits.shape != labels.shape:
        raise UserError(f"{name}: logits {logits.shape} and labels {labels.shape} must have the same shape.")
