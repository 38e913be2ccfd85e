"""Masking for masked language models: which tokens to predict, and what to put in their place.

Every function works on one row and is meant for `jax.vmap`:

    keys = row_keys(seed, row_ids, step)
    mask = functools.partial(noise.mask_tokens, num_predictions=20, mask_id=4, vocab_size=30522)
    masked = jax.vmap(lambda key, row, ok, n: mask(key, row, ok, length=n))(keys, tokens, candidates, lengths)

Each draw is one-dimensional over positions, so position i of a row receives the same draw whatever follows it:
padding the row further changes nothing. Draws have explicit 32-bit types, so enabling x64 changes nothing either.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from lmobj.errors import UserError

__all__ = [
    "MaskedTokens",
    "mask_tokens",
    "mask_tokens_bernoulli",
    "mask_tokens_roberta",
    "prediction_count",
]


class MaskedTokens(NamedTuple):
    """A corrupted row and the at most K tokens to predict, in order of position.

    Unused slots come last and have position 0, target 0 and weight 0. In the in-place form of
    `mask_tokens_bernoulli`, slot i is position i, and every target is filled in.
    """

    tokens: Int[Array, " L"]
    """The row with the selected tokens corrupted."""
    positions: Int[Array, " K"]
    """Where the predicted tokens are; int32."""
    targets: Int[Array, " K"]
    """The original tokens at `positions`, also where the corruption left them as they were."""
    weights: Float[Array, " K"]
    """1 for a prediction, 0 for an unused slot; float32."""


def prediction_count(length: int, mask_rate: float = 0.15) -> int:
    """BERT's number of predictions for a row of `length` tokens: max(1, round(length * mask_rate)).

    `round` is half to even, as Python's (10 tokens at 0.15 give 2, 30 give 4). For rows of at most `length` tokens
    it is the smallest `num_predictions` that never cuts the count.
    """
    return max(1, round(length * mask_rate))


def mask_tokens(
    key: Key[Array, ""],
    tokens: Int[Array, " L"],
    candidates: Bool[Array, " L"],
    *,
    length: Int[Array, ""] | int,
    num_predictions: int,
    mask_id: int,
    vocab_size: int,
    mask_rate: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
) -> MaskedTokens:
    """BERT's masking: an exact number of tokens, uniformly without replacement, replaced 80/10/10.

    The count is n = min(num_predictions, max(1, round(length * mask_rate)), number of candidates), rounding half to
    even. Each selected token is replaced, independently, by `mask_id` with probability `mask_share`, by a token
    drawn uniformly from the whole vocabulary with probability `random_share` (it may be a special token or the
    original), and otherwise kept. A row without candidates has no predictions.

    Args:
      key: the row's threefry key.
      tokens: the row.
      candidates: True for tokens that may be selected; False for special tokens and padding.
      length: tokens in the row that are not padding; BERT counts special tokens too. Required, because nothing
        else here tells padding from a special token.
      num_predictions: K, the number of slots (static). `prediction_count(L, mask_rate)` slots cut nothing.
      mask_id: id of the mask token.
      vocab_size: random replacements are drawn from 0 .. vocab_size - 1.
      mask_rate: share of `length` to select, in (0, 1] (static: the count is rounded exactly, in Python).
      mask_share: probability that a selected token becomes `mask_id`.
      random_share: probability that a selected token becomes a random one.

    Raises:
      UserError: a rate or share out of range, or `num_predictions` below 1.

    Source: Devlin et al. 2019, section 3.1 and appendix A.1; the count and the order of draws follow
    `create_masked_lm_predictions` of the authors' code, without its static duplicates.
    """
    check_masking(mask_rate, mask_share, random_share, num_predictions)
    select_key, replace_key = jax.random.split(key)
    count = masked_count(length, tokens.shape[0], mask_rate, num_predictions)
    selected = select_exactly(select_key, candidates, count)
    corrupted = replace_selected(replace_key, tokens, selected, mask_id, vocab_size, mask_share, random_share)
    return gather_selected(tokens, corrupted, selected, num_predictions)


def mask_tokens_roberta(
    key: Key[Array, ""],
    tokens: Int[Array, " L"],
    candidates: Bool[Array, " L"],
    *,
    length: Int[Array, ""] | int,
    num_predictions: int,
    mask_id: int,
    vocab_size: int,
    special_ids: tuple[int, ...] = (),
    mask_rate: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
) -> MaskedTokens:
    """RoBERTa's masking: as `mask_tokens`, with a randomly rounded count and no special tokens as replacements.

    n = floor(length * mask_rate + U[0, 1)), so that E[n] = length * mask_rate and n may be 0; then capped by
    `num_predictions` and the number of candidates. Random replacements are uniform over the vocabulary without
    `special_ids` (static). The other arguments are those of `mask_tokens`.

    Raises:
      UserError: a rate or share out of range, or `num_predictions` below 1.

    Source: Liu et al. 2019; fairseq `MaskTokensDataset`. Deviation: fairseq also selects the tokens that begin and
    end a sentence; here `candidates` decides.
    """
    check_masking(mask_rate, mask_share, random_share, num_predictions)
    select_key, replace_key, count_key = jax.random.split(key, 3)
    # The product is taken in Python, exactly; P(floor(x + U) = floor(x) + 1) is the fraction of x.
    expected = [i * mask_rate for i in range(tokens.shape[0] + 1)]
    whole = jnp.asarray([math.floor(x) for x in expected], jnp.int32)[length]
    fraction = jnp.asarray([x - math.floor(x) for x in expected], jnp.float32)[length]
    count = whole + (jax.random.uniform(count_key, dtype=jnp.float32) < fraction)
    selected = select_exactly(select_key, candidates, jnp.minimum(count, num_predictions))
    corrupted = replace_selected(
        replace_key, tokens, selected, mask_id, vocab_size, mask_share, random_share, special_ids
    )
    return gather_selected(tokens, corrupted, selected, num_predictions)


def mask_tokens_bernoulli(
    key: Key[Array, ""],
    tokens: Int[Array, " L"],
    candidates: Bool[Array, " L"],
    *,
    mask_id: int,
    vocab_size: int,
    num_predictions: int | None = None,
    mask_rate: Float[Array, ""] | float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
) -> MaskedTokens:
    """Masking by coin flips: each candidate is selected with probability `mask_rate`, then replaced 80/10/10.

    The number of predictions varies and may be 0. The other arguments are those of `mask_tokens`.

    Args:
      num_predictions: None gives the in-place form: L slots with positions 0 .. L - 1, targets `tokens`, and weight 1
        where a token was selected. A number K gives the form of `mask_tokens`; where more than K tokens are selected,
        K of them stay, drawn uniformly.
      mask_rate: probability of selection; may be traced, for schedules.

    Raises:
      UserError: a rate (where it is a Python number) or a share out of range, or `num_predictions` below 1.

    Source: the form of Hugging Face's `DataCollatorForLanguageModeling`.
    """
    rate = mask_rate if isinstance(mask_rate, float | int) else None
    check_masking(rate, mask_share, random_share, num_predictions)
    select_key, replace_key = jax.random.split(key)
    chance = jax.random.uniform(select_key, tokens.shape, jnp.float32)
    selected = candidates & (chance < mask_rate)
    if num_predictions is not None:
        # Given that tokens are selected, their draws are still in uniformly random order: keep the K smallest.
        order = jnp.argsort(jnp.where(selected, chance, 1.0))
        kept = jnp.arange(tokens.shape[0]) < num_predictions
        selected &= jnp.zeros_like(selected).at[order].set(kept, unique_indices=True)
    corrupted = replace_selected(replace_key, tokens, selected, mask_id, vocab_size, mask_share, random_share)
    if num_predictions is not None:
        return gather_selected(tokens, corrupted, selected, num_predictions)
    positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    return MaskedTokens(corrupted, positions, tokens, selected.astype(jnp.float32))


def masked_count(
    length: Int[Array, ""] | int, row_length: int, mask_rate: float, num_predictions: int
) -> Int[Array, ""]:
    """min(K, max(1, round(length * rate))), from a table made in Python: float32 would round 0.15 * 10 by chance."""
    table = [min(num_predictions, prediction_count(i, mask_rate)) for i in range(row_length + 1)]
    return jnp.asarray(table, jnp.int32)[length]


def selection_scores(key: Key[Array, ""], valid: Bool[Array, " N"]) -> UInt32[Array, " N"]:
    """Random 31-bit scores that order the valid entries uniformly at random; all others come after them."""
    bits = jax.random.bits(key, valid.shape, jnp.uint32)
    return jnp.where(valid, bits >> 1, jnp.uint32(0xFFFFFFFF))


def select_exactly(key: Key[Array, ""], candidates: Bool[Array, " L"], count: Int[Array, ""]) -> Bool[Array, " L"]:
    """Marks `count` candidates, or all if there are fewer, uniformly without replacement."""
    order = jnp.argsort(selection_scores(key, candidates))
    first = jnp.arange(candidates.shape[0]) < count
    return jnp.zeros_like(candidates).at[order].set(first, unique_indices=True) & candidates


def replace_selected(
    key: Key[Array, ""],
    tokens: Int[Array, " L"],
    selected: Bool[Array, " L"],
    mask_id: int,
    vocab_size: int,
    mask_share: float,
    random_share: float,
    excluded_ids: tuple[int, ...] = (),
    *,
    heads: Int[Array, " L"] | None = None,
) -> Int[Array, " L"]:
    """The row with each selected token masked, replaced at random (never by `excluded_ids`) or kept.

    With `heads`, the tokens that have one head are masked, replaced or kept together; random tokens still differ.
    """
    kind_key, token_key = jax.random.split(key)
    kind = jax.random.uniform(kind_key, tokens.shape, jnp.float32)
    if heads is not None:
        kind = kind[heads]
    excluded = sorted({i for i in excluded_ids if 0 <= i < vocab_size})
    random = jax.random.randint(token_key, tokens.shape, 0, vocab_size - len(excluded), jnp.int32)
    for excluded_id in excluded:  # steps over each excluded id, in ascending order
        random += random >= excluded_id
    other = jnp.where(kind < mask_share + random_share, random.astype(tokens.dtype), tokens)
    replaced = jnp.where(kind < mask_share, jnp.asarray(mask_id, tokens.dtype), other)
    return jnp.where(selected, replaced, tokens)


def gather_selected(
    tokens: Int[Array, " L"], corrupted: Int[Array, " L"], selected: Bool[Array, " L"], num_predictions: int
) -> MaskedTokens:
    """Collects the selected tokens, of which there are at most K, in order of position."""
    # Unselected tokens go to slot K, out of bounds, and are dropped.
    slot = jnp.where(selected, jnp.cumsum(selected, dtype=jnp.int32) - 1, num_predictions)

    def collect(values: Array) -> Array:
        return jnp.zeros((num_predictions,), values.dtype).at[slot].set(values, mode="drop")

    positions = collect(jnp.arange(tokens.shape[0], dtype=jnp.int32))
    return MaskedTokens(corrupted, positions, collect(tokens), collect(selected.astype(jnp.float32)))


def check_masking(
    mask_rate: float | None, mask_share: float, random_share: float, num_predictions: int | None = None
) -> None:
    """Raises UserError for settings that no masking can satisfy."""
    if mask_rate is not None and not 0.0 < mask_rate <= 1.0:
        raise UserError(f"mask_rate is {mask_rate}; it is the share of tokens to predict, above 0 and at most 1.")
    # A sum of shares such as 0.9 + 0.1 may exceed 1 by rounding.
    if mask_share < 0 or random_share < 0 or mask_share + random_share > 1 + np.finfo(np.float32).eps:
        raise UserError(
            f"mask_share is {mask_share} and random_share is {random_share}; they are probabilities of exclusive "
            "outcomes, so each must be at least 0 and their sum at most 1."
        )
    if num_predictions is not None and num_predictions < 1:
        raise UserError(f"num_predictions is {num_predictions}; a row needs at least 1 slot for a prediction.")
