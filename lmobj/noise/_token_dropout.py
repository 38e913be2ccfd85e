"""Token dropout: ordinary tokens of a row replaced at random by one that says nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from lmobj.errors import UserError

__all__ = ["drop_tokens"]


def drop_tokens(
    key: Key[Array, ""],
    tokens: Int[Array, " L"],
    candidates: Bool[Array, " L"],
    *,
    rate: float,
    replacement_id: int,
) -> Int[Array, " L"]:
    """The row with each candidate replaced by `replacement_id` with probability `rate`, but never all of them.

    Where every candidate was drawn, the one with the largest draw stays: of n candidates each is replaced with
    probability rate - rate^n / n. Nothing moves, so tags and spans keep their places.

    Args:
      key: the row's threefry key.
      tokens: the row.
      candidates: True for tokens that may be replaced; False for special tokens and padding.
      rate: probability of replacement, in [0, 1); 0 returns `tokens`.
      replacement_id: id of the token put in their place, [MASK] or the unknown token.

    Raises:
      UserError: a rate out of range.

    Source: word dropout in the form of Bowman et al. 2016, "Generating Sentences from a Continuous Space", section 3.1,
    where words become the unknown word; Dai and Le 2015, "Semi-supervised Sequence Learning", tune classifiers with it.
    Iyyer et al. 2015, "Deep Unordered Composition Rivals Syntactic Methods for Text Classification", leave the words
    out instead. Deviations: tokens, not words, and one of them always stays.
    """
    if not 0 <= rate < 1:
        raise UserError(f"rate is {rate}; it is the probability that a token is replaced, in [0, 1).")
    if rate == 0:
        return tokens
    draws = jax.random.bits(key, tokens.shape, jnp.uint32)
    largest = jnp.max(jnp.where(candidates, draws, jnp.uint32(0)))
    dropped = candidates & (draws < jnp.uint32(min(round(rate * 2**32), 2**32 - 1))) & (draws < largest)
    return jnp.where(dropped, jnp.asarray(replacement_id, tokens.dtype), tokens)
