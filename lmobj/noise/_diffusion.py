"""Absorbing-state noise: at a time t drawn evenly, each token becomes [MASK] with a chance that grows with t.

    u ~ U[0, 1),  t = (1 - eps) u + eps
    LLaDA:  chance t,              weight of a masked token 1 / t
    MDLM:   chance (1 - eps) t,    weight of a masked token 1 / t

In training t is drawn. To evaluate, k of n tokens are masked, k even in 1 .. n, with weight n / k: the same mean
without the noise of how many are masked, for int_0^1 t^k (1 - t)^(n - k) / t dt = 1 / (k C(n, k)).

LLaDA's code calls its u the time, and our t the chance p = (1 - eps) u + eps. Nie et al. 2025, "Large Language
Diffusion Models", eq. 3; Sahoo et al. 2024, "Simple and Effective Masked Diffusion Language Models", eq. 11 with the
log-linear schedule, for which the weight sigma' / (exp(sigma) - 1) is 1 / t.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lmobj.errors import UserError
from lmobj.noise._masking import select_exactly

__all__ = ["DiffusedTokens", "diffuse_count", "diffuse_tokens"]


class DiffusedTokens(NamedTuple):
    """A noised row."""

    tokens: Int[Array, " L"]
    """The row with the masked tokens replaced."""
    weights: Float[Array, " L"]
    """1 / t of a masked token's document, or n / k, and 0 elsewhere; float32."""


def diffuse_tokens(
    key: Key[Array, ""],
    tokens: Int[Array, " L"],
    candidates: Bool[Array, " L"],
    segments: Int[Array, " L"],
    *,
    mask_id: int,
    epsilon: float = 1e-3,
    chance: float = 1.0,
    stratum: tuple[Int[Array, ""] | int, int] | None = None,
) -> DiffusedTokens:
    """Masks one row, each of its documents at a time of its own.

    Args:
      key: the row's threefry key.
      tokens: the row.
      candidates: True for tokens that may be masked.
      segments: 0 for padding, and from 1 to L the documents, each with its own time.
      mask_id: id of the mask token.
      epsilon: the least t, in (0, 1).
      chance: what t is multiplied by to give the chance of being masked: 1 (LLaDA) or 1 - eps (MDLM).
      stratum: (i, n): u is drawn evenly from [i / n, (i + 1) / n), so that n rows, each with an i of its own from 0 to
        n - 1, cover all times (MDLM's antithetic sampling); None: from [0, 1).

    Raises:
      UserError: `epsilon` out of range.
    """
    if not 0 < epsilon < 1:
        raise UserError(f"epsilon is {epsilon}; it is the least time of the noise and must be above 0 and below 1.")
    time_key, mask_key = jax.random.split(key)
    # A draw for each segment number there can be: one-dimensional, so that padding changes none.
    even = jax.random.uniform(time_key, (tokens.shape[0] + 1,), jnp.float32)
    if stratum is not None:
        place, count = stratum
        even = (even + place) / count
    time = ((1 - epsilon) * even + epsilon)[segments]
    masked = candidates & (jax.random.uniform(mask_key, tokens.shape, jnp.float32) < chance * time)
    noised = jnp.where(masked, jnp.asarray(mask_id, tokens.dtype), tokens)
    return DiffusedTokens(noised, jnp.where(masked, 1 / time, 0).astype(jnp.float32))


def diffuse_count(
    key: Key[Array, ""],
    tokens: Int[Array, " L"],
    candidates: Bool[Array, " L"],
    count: Int[Array, ""] | int,
    *,
    mask_id: int,
) -> DiffusedTokens:
    """Masks `count` of the n candidates of one row, drawn without replacement, each with the weight n / count.

    Args:
      key: the row's threefry key.
      tokens: the row.
      candidates: True for tokens that may be masked.
      count: from 1 to n; drawn evenly from these, the weighted losses have the mean that they have under
        `diffuse_tokens` with an epsilon of zero.
      mask_id: id of the mask token.

    Source: Nie et al. 2025, eq. 6.
    """
    masked = select_exactly(key, candidates, jnp.asarray(count))
    noised = jnp.where(masked, jnp.asarray(mask_id, tokens.dtype), tokens)
    return DiffusedTokens(noised, jnp.where(masked, jnp.sum(candidates) / count, 0).astype(jnp.float32))
