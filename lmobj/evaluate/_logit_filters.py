"""What reshapes next-token logits before one is drawn: pure functions, over the last axis.

A removed token gets -inf. Each filter keeps at least the most probable token, and keeps or removes equal logits
together.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = ["min_p_filter", "repetition_penalty", "top_k_filter", "top_p_filter"]


def top_k_filter(logits: Float[Array, "... V"], k: int) -> Float[Array, "... V"]:
    """Keeps the k largest logits (and any equal to the k-th). Fan et al. 2018, section 5.4.

    Args:
      logits: unnormalised log-probabilities.
      k: at least 1; V or more keeps all.
    """
    kth = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return _keep(logits, logits >= kth)


def top_p_filter(logits: Float[Array, "... V"], p: float) -> Float[Array, "... V"]:
    """Keeps the smallest set of most probable tokens whose probabilities sum to p or more (nucleus sampling).

    Holtzman et al. 2020, eq. 2. Tokens as probable as the last one of the set stay too.

    Args:
      logits: unnormalised log-probabilities.
      p: in (0, 1]; 1 keeps all.
    """
    if p >= 1:
        return logits
    descending = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    last = jnp.min(jnp.where(before < p, descending, jnp.inf), axis=-1, keepdims=True)
    return _keep(logits, logits >= last)


def min_p_filter(logits: Float[Array, "... V"], p: float) -> Float[Array, "... V"]:
    """Keeps tokens at least p times as probable as the most probable one. Nguyen et al. 2024, eq. 2.

    Args:
      logits: unnormalised log-probabilities.
      p: in (0, 1].
    """
    return _keep(logits, logits >= jnp.max(logits, axis=-1, keepdims=True) + math.log(p))


def repetition_penalty(
    logits: Float[Array, "... V"], seen: Bool[Array, "... V"], penalty: float
) -> Float[Array, "... V"]:
    """Makes tokens that were seen less likely: their logits are divided by the penalty if positive, else multiplied.

    Keskar et al. 2019 (CTRL), section 4.1, which divides negative logits too and so favours them; the form here is
    that of later implementations.

    Args:
      logits: unnormalised log-probabilities.
      seen: True for tokens of the prompt and those generated so far.
      penalty: above 0; 1 changes nothing, above 1 discourages repetition.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _keep(logits: Float[Array, "... V"], kept: Bool[Array, "... V"]) -> Float[Array, "... V"]:
    return jnp.where(kept, logits, -jnp.inf)
