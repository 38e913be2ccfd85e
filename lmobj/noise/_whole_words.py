"""Whole-word masking: as `mask_tokens`, but a word's tokens are selected together or not at all."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from lmobj.noise._masking import (
    MaskedTokens,
    check_masking,
    gather_selected,
    masked_count,
    replace_selected,
    selection_scores,
)

__all__ = ["mask_whole_words", "word_ids"]


def mask_whole_words(
    key: Key[Array, ""],
    tokens: Int[Array, " L"],
    candidates: Bool[Array, " L"],
    word_starts: Bool[Array, " L"],
    *,
    length: Int[Array, ""] | int,
    num_predictions: int,
    mask_id: int,
    vocab_size: int,
    mask_rate: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
) -> MaskedTokens:
    """BERT's whole-word masking: words in random order, each taken if it still fits into the count.

    The count n is that of `mask_tokens`. A word that would bring the number of selected tokens above n is skipped,
    not cut, and later words may still fit; so fewer than n tokens may be selected, and none if every word is longer
    than n. The replacement is drawn for each token on its own, also inside a word.

    Args:
      key, tokens, candidates, length, num_predictions, mask_id, vocab_size, mask_rate, mask_share, random_share: as
        for `mask_tokens`.
      word_starts: True for tokens that begin a word. A candidate that begins none joins the word of the last
        candidate before it, across special tokens too (as in the reference); the first candidate always begins one.
        Mark the first token of each segment to keep words inside segments.

    Raises:
      UserError: a rate or share out of range, or `num_predictions` below 1.

    Source: `create_masked_lm_predictions` with `do_whole_word_mask` in the code of Devlin et al. 2019.
    """
    check_masking(mask_rate, mask_share, random_share, num_predictions)
    select_key, replace_key = jax.random.split(key)
    count = masked_count(length, tokens.shape[0], mask_rate, num_predictions)
    words = word_ids(candidates, word_starts)
    sizes = jnp.zeros(tokens.shape, jnp.int32).at[words].add(candidates.astype(jnp.int32))
    order = jnp.argsort(selection_scores(select_key, sizes > 0))
    taken = _take_in_order(sizes[order], count)
    taken = jnp.zeros_like(taken).at[order].set(taken, unique_indices=True)
    selected = candidates & taken[words]
    corrupted = replace_selected(replace_key, tokens, selected, mask_id, vocab_size, mask_share, random_share)
    return gather_selected(tokens, corrupted, selected, num_predictions)


def word_ids(candidates: Bool[Array, " L"], word_starts: Bool[Array, " L"]) -> Int[Array, " L"]:
    """The number of the word that each candidate belongs to, from 0; other tokens get some word's number."""
    is_first = candidates & (jnp.cumsum(candidates) == 1)
    starts = candidates & (word_starts | is_first)
    return jnp.maximum(jnp.cumsum(starts, dtype=jnp.int32) - 1, 0)


def _take_in_order(sizes: Int[Array, " W"], budget: Int[Array, ""]) -> Bool[Array, " W"]:
    """Goes through the sizes in order and takes each that still fits into the budget; size 0 is never taken.

    One step per word would be a long sequential loop. Instead, each round takes the longest run of words that fit
    one after another, passing over words larger than what is left (they stay too large, as the rest only shrinks).
    A round ends at a word larger than the new rest, so every round but the first removes at least one size from those
    that fit: there are at most (longest word + 1) rounds, typically two or three.
    """

    def fits(state: tuple[Bool[Array, " W"], Int[Array, ""]]) -> Bool[Array, " W"]:
        taken, rest = state
        return ~taken & (sizes > 0) & (sizes <= rest)

    def take_run(state: tuple[Bool[Array, " W"], Int[Array, ""]]) -> tuple[Bool[Array, " W"], Int[Array, ""]]:
        taken, rest = state
        fitting = fits(state)
        total = jnp.cumsum(jnp.where(fitting, sizes, 0), dtype=jnp.int32)
        run = fitting & (total <= rest)
        return taken | run, rest - jnp.sum(jnp.where(run, sizes, 0), dtype=jnp.int32)

    nothing = sizes < 0  # all False, and varying over the same mesh axes as the rows under shard_map
    start = (nothing, jnp.asarray(budget, jnp.int32))
    return jax.lax.while_loop(lambda state: jnp.any(fits(state)), take_run, start)[0]
