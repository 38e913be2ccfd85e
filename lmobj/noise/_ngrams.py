"""N-gram masking: as whole-word masking, but runs of one to a few words are selected together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lmobj.errors import UserError
from lmobj.noise._masking import (
    MaskedTokens,
    check_masking,
    gather_selected,
    masked_count,
    replace_selected,
    selection_scores,
)
from lmobj.noise._whole_words import word_ids

__all__ = ["mask_ngrams"]


def mask_ngrams(
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
    max_ngram: int = 3,
) -> MaskedTokens:
    """ALBERT's masking: runs of n whole words, n in 1 .. max_ngram with probability in proportion to 1 / n.

    The count is that of `mask_tokens`. Words are gone through in random order. Each draws an n and begins a run of
    that many words, or of those that are left in the row. If the run would bring the number of selected tokens above
    the count, the longest shorter one that does not is tried instead, and if there is none, or a token of the run is
    selected already, the word is passed over. So fewer tokens than the count may be selected. The replacement is drawn
    for each token on its own.

    The share of n among the runs taken is exactly (1 / n) / (1 + .. + 1 / max_ngram), 6/11, 3/11 and 2/11 for 3, as
    long as nothing is cut or passed over: for the first run of a row whose longest runs fit into the count, if it does
    not begin within the last max_ngram - 1 words. Later ones are shorter on average.

    Args:
      key, tokens, candidates, length, num_predictions, mask_id, vocab_size, mask_rate, mask_share, random_share: as
        for `mask_tokens`.
      word_starts: as for `mask_whole_words`; runs, too, go on across special tokens.
      max_ngram: the most words in a run, at least 1. 1 selects single words; not those that `mask_whole_words` does
        from the same key.

    Raises:
      UserError: a rate or share out of range, or `num_predictions` or `max_ngram` below 1.

    Source: Lan et al. 2020, section 4.1, eq. 1; `create_masked_lm_predictions` of the authors' code.
    """
    check_masking(mask_rate, mask_share, random_share, num_predictions)
    if max_ngram < 1:
        raise UserError(f"max_ngram is {max_ngram}; a run has at least 1 word.")
    order_key, size_key, replace_key = jax.random.split(key, 3)
    L = tokens.shape[0]
    words = word_ids(candidates, word_starts)
    sizes = jnp.zeros((L,), jnp.int32).at[words].add(candidates.astype(jnp.int32))
    order = jnp.argsort(selection_scores(order_key, sizes > 0)).astype(jnp.int32)
    drawn = _draw_sizes(jax.random.uniform(size_key, (L,), jnp.float32), max_ngram)
    taken = _take_runs(sizes, order, drawn, masked_count(length, L, mask_rate, num_predictions), max_ngram)
    selected = candidates & taken[words]
    corrupted = replace_selected(replace_key, tokens, selected, mask_id, vocab_size, mask_share, random_share)
    return gather_selected(tokens, corrupted, selected, num_predictions)


def _draw_sizes(uniform: Float[Array, " L"], max_ngram: int) -> Int[Array, " L"]:
    """n with probability in proportion to 1 / n, from draws in [0, 1)."""
    share = np.cumsum(1 / np.arange(1, max_ngram + 1))
    border = jnp.asarray(share[:-1] / share[-1], jnp.float32)
    return 1 + jnp.sum(uniform[:, None] >= border, axis=1, dtype=jnp.int32)


def _take_runs(
    sizes: Int[Array, " L"], order: Int[Array, " L"], drawn: Int[Array, " L"], budget: Int[Array, ""], max_ngram: int
) -> Bool[Array, " L"]:
    """The words taken, going through them in order, one after another until the budget is spent.

    Args:
      sizes: tokens of each word; 0 after the last one.
      order: the words in random order, those of size 0 last.
      drawn: the n of each word.
      budget: the most tokens to take.
      max_ngram: the most words in a run.
    """
    L = sizes.shape[0]
    offsets = jnp.arange(max_ngram, dtype=jnp.int32)
    count = jnp.sum(sizes > 0, dtype=jnp.int32)
    # tokens[w, k]: of the k + 1 words from w on
    padded = jnp.pad(sizes, (0, max_ngram - 1))
    tokens = jnp.cumsum(jnp.stack([padded[k : L + k] for k in range(max_ngram)], axis=1), axis=1, dtype=jnp.int32)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        """The next word's run."""
        i, rest, taken = state
        word = order[i]
        fits = (tokens[word] <= rest) & (offsets < drawn[word])
        run = jnp.where(offsets < jnp.sum(fits), word + offsets, L)  # the sums ascend, so those that fit come first
        free = ~jnp.any(taken.at[run].get(mode="fill", fill_value=False))
        taken = taken.at[jnp.where(free, run, L)].set(True, mode="drop")
        used = jnp.where(free, jnp.sum(jnp.where(run < L, padded[jnp.minimum(run, L - 1)], 0), dtype=jnp.int32), 0)
        return i + 1, rest - used, taken

    zero = budget - budget  # varies over the same mesh axes as the row under shard_map
    start = (zero, budget, sizes < 0)
    return jax.lax.while_loop(lambda state: (state[0] < count) & (state[1] > 0), step, start)[2]
