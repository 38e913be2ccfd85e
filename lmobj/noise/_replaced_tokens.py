"""ELECTRA's corruption: some tokens hidden from a generator, and then replaced by what it sampled in their place.

Every function works on one row and is meant for `jax.vmap`, as in `_masking`. Clark et al. 2020, "ELECTRA: Pre-training
Text Encoders as Discriminators Rather Than Generators", section 3; counts and draws follow the authors' code.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lmobj.noise._masking import MaskedTokens, check_masking, mask_tokens, masked_count

__all__ = ["ReplacedTokens", "mask_tokens_electra", "replace_tokens"]


class ReplacedTokens(NamedTuple):
    """A row in which tokens were replaced, and which of its tokens differ from the original."""

    tokens: Int[Array, " L"]
    """The row with samples in the place of the selected tokens."""
    replaced: Bool[Array, " L"]
    """True where a selected token's sample is another token; False where it is the original one, and elsewhere."""


def mask_tokens_electra(
    key: Key[Array, ""],
    tokens: Int[Array, " L"],
    candidates: Bool[Array, " L"],
    *,
    length: Int[Array, ""] | int,
    num_predictions: int,
    mask_id: int,
    mask_rate: float = 0.15,
    mask_share: float = 0.85,
    replacement: bool = True,
) -> MaskedTokens:
    """The generator's input: tokens drawn uniformly, most of them masked and the rest left as they are.

    n = min(num_predictions, max(1, round(length * mask_rate))) slots are used, rounding half to even. With
    `replacement` each slot draws a candidate by itself, so that a token can be drawn more than once and is then
    predicted by several slots, which all count in the loss: 19 slots find 17.7 of 126 candidates on average. A drawn
    token becomes `mask_id` if any of its slots says so, each with probability `mask_share`; no token becomes a random
    one. Without candidates there are no predictions.

    Args:
      key: the row's threefry key.
      tokens: the row.
      candidates: True for tokens that may be drawn; False for special tokens and padding.
      length: tokens in the row that are not padding, special tokens included.
      num_predictions: K, the number of slots (static); int((mask_rate + 0.005) * L) in the authors' code.
      mask_id: id of the mask token.
      mask_rate: share of `length` to draw, in (0, 1] (static).
      mask_share: probability that a slot masks its token.
      replacement: False: n different tokens, or all candidates if they are fewer (`mask_tokens` without random
        tokens).

    Returns:
      The masked row and its slots: in order of the draw with `replacement`, otherwise in order of position.

    Raises:
      UserError: a rate or share out of range, or `num_predictions` below 1.

    Source: `mask` in `pretrain_helpers.py` of the authors' code. Deviation: unused slots are known by their weight, and
    not by their position 0, so that a row whose first token is an ordinary one can have it drawn.
    """
    check_masking(mask_rate, mask_share, 0.0, num_predictions)
    if not replacement:
        return mask_tokens(
            key,
            tokens,
            candidates,
            length=length,
            num_predictions=num_predictions,
            mask_id=mask_id,
            vocab_size=1,  # of the random tokens, of which there are none
            mask_rate=mask_rate,
            mask_share=mask_share,
            random_share=0.0,
        )
    L, slots = tokens.shape[0], (num_predictions,)
    select_key, mask_key = jax.random.split(key)
    found = jnp.sum(candidates, dtype=jnp.int32)
    count = jnp.where(found > 0, masked_count(length, L, mask_rate, num_predictions), 0)
    used = jnp.arange(num_predictions) < count
    drawn = jax.random.randint(select_key, slots, 0, jnp.maximum(found, 1), jnp.int32)
    positions = jnp.where(used, jnp.nonzero(candidates, size=L)[0].astype(jnp.int32)[drawn], 0)
    masked = used & (jax.random.uniform(mask_key, slots, jnp.float32) < mask_share)
    return MaskedTokens(
        tokens=tokens.at[jnp.where(masked, positions, L)].set(jnp.asarray(mask_id, tokens.dtype), mode="drop"),
        positions=positions,
        targets=jnp.where(used, tokens[positions], 0),
        weights=used.astype(jnp.float32),
    )


def replace_tokens(
    tokens: Int[Array, " L"],
    positions: Int[Array, " K"],
    weights: Float[Array, " K"],
    sampled: Int[Array, " K"],
) -> ReplacedTokens:
    """The discriminator's input and labels: `sampled` in the place of the tokens at `positions`.

    A token is labelled as replaced if and only if it was selected and its sample is another token than the original.
    Slots of weight 0 change nothing. Where several slots have the same position, the first one's sample is taken.

    Deviation: the authors' code (`scatter_update`) writes floor(mean of the ids) where several samples meet in one
    position, which is a token that nobody sampled.

    Args:
      tokens: the original row, before it was masked.
      positions, weights: the slots of `mask_tokens_electra`.
      sampled: the generator's sample for each slot.
    """
    L, K = tokens.shape[0], positions.shape[0]
    slots = jnp.arange(K, dtype=jnp.int32)
    first = jnp.full((L,), K, jnp.int32).at[jnp.where(weights > 0, positions, L)].min(slots, mode="drop")
    selected = first < K
    corrupted = jnp.where(selected, sampled[jnp.minimum(first, K - 1)].astype(tokens.dtype), tokens)
    return ReplacedTokens(corrupted, corrupted != tokens)
