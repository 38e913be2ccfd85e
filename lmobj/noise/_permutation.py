"""Permutation language modelling: which tokens of a row to predict, and in what order its tokens see one another.

A row is one half, or two: `reuse` tokens that go on from the row before, then the rest. Each half has its targets and
its order for itself. No token is replaced: a token that is not a target is seen by all; the others (targets, and
separators) are seen by those that come later in a random order of the half (`masks.permutation`).

Source: Yang et al. 2019, "XLNet: Generalized Autoregressive Pretraining for Language Understanding", sections 2.2, 2.3
and 3.1; where the paper is silent, the authors' `data_utils.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lmobj.errors import UserError
from lmobj.noise._masking import MaskedTokens, gather_selected, selection_scores

__all__ = ["PermutationRanks", "PermutedTokens", "check_permutation", "permutation_ranks", "permute_tokens",
           "span_targets"]  # fmt: skip


class PermutationRanks(NamedTuple):
    """Who sees whom: the token at i sees the one at j where query_rank[i] > key_rank[j] (`masks.permutation`)."""

    query_rank: Int[Array, " L"]
    """As a query; int32, at least 0."""
    key_rank: Int[Array, " L"]
    """As a key; int32, at least -1."""
    is_target: Bool[Array, " L"]
    """The tokens to predict: masked, and no separator."""


class PermutedTokens(NamedTuple):
    """The order of a row and the at most K tokens to predict, in order of position; unused slots come last."""

    query_rank: Int[Array, " L"]
    key_rank: Int[Array, " L"]
    """As in `PermutationRanks`."""
    positions: Int[Array, " K"]
    """Where the predicted tokens are; int32, 0 in unused slots."""
    targets: Int[Array, " K"]
    """The tokens at `positions`."""
    weights: Float[Array, " K"]
    """1 for a prediction, 0 for an unused slot; float32."""
    prediction_rank: Int[Array, " K"]
    """`query_rank` at `positions`, for the mask of K gathered queries."""


def permute_tokens(
    key: Key[Array, ""],
    tokens: Int[Array, " L"],
    functional: Bool[Array, " L"],
    word_starts: Bool[Array, " L"],
    *,
    length: Int[Array, ""] | int,
    num_predictions: int,
    reuse: int,
    perm_size: int,
    max_span: int = 5,
    mask_alpha: int = 6,
    mask_beta: int = 1,
    whole_words: bool = False,
    backward: Bool[Array, ""] | bool = False,
) -> PermutedTokens:
    """Draws targets and an order for each half of a row, and gathers the targets.

    `num_predictions` is shared out between the halves in proportion to their lengths, what is odd going to the first
    (85 over 256 and 256: 43 and 42); a half that is not full gets less in proportion, rounded down. Separators can be
    drawn as well and are then not predicted, so there may be fewer predictions than slots.

    Args:
      key: the row's threefry key.
      tokens: the row.
      functional: True for SEP and CLS: never predicted, and never seen by the tokens that are not targets.
      word_starts: True for tokens that begin a word, in reading order.
      length: tokens of the row that are not padding, which is at its end.
      num_predictions: K, the number of slots.
      reuse: tokens in the first half; 0 for a row that is one half.
      perm_size: tokens in a block of the order (`permutation_ranks`).
      max_span, mask_alpha, mask_beta, whole_words: as for `span_targets`.
      backward: the row reads its text from the end. Each half is turned for its spans to be placed in reading order.

    Raises:
      UserError: as `check_permutation`.
    """
    L = tokens.shape[0]
    check_permutation(L, num_predictions, reuse, perm_size, max_span, mask_alpha, mask_beta)
    target_key, order_key = jax.random.split(key)
    halves = _halves(L, reuse, num_predictions)
    longest = max(half.size for half in halves)
    starts = word_starts | functional

    def draw(number: Int[Array, ""], starts: Bool[Array, " N"], filled: Array, count: Array) -> Bool[Array, " N"]:
        index = jnp.arange(longest, dtype=jnp.int32)
        turned = jnp.where(jnp.asarray(backward) & (index < filled), filled - 1 - index, index)  # its own inverse
        targets = span_targets(
            jax.random.fold_in(target_key, number),
            starts[turned],
            length=filled,
            num_predictions=count,
            max_span=max_span,
            mask_alpha=mask_alpha,
            mask_beta=mask_beta,
            whole_words=whole_words,
        )
        return targets[turned]

    number, begin, end, count = (jnp.asarray(column, jnp.int32) for column in zip(*halves, strict=True))
    filled = jnp.clip(jnp.asarray(length, jnp.int32) - begin, 0, end - begin)
    padded = jnp.stack([jnp.pad(starts[half.begin : half.end], (0, longest - half.size)) for half in halves])
    # Both halves at once, because the spans of one are placed one after the other.
    drawn = jax.vmap(draw)(number, padded, filled, count * filled // (end - begin))
    is_masked = jnp.concatenate([row[: half.size] for row, half in zip(drawn, halves, strict=True)])
    ranks = permutation_ranks(order_key, is_masked, functional, reuse=reuse, perm_size=perm_size)
    gathered: MaskedTokens = gather_selected(tokens, tokens, ranks.is_target, num_predictions)
    return PermutedTokens(
        ranks.query_rank,
        ranks.key_rank,
        gathered.positions,
        gathered.targets,
        gathered.weights,
        ranks.query_rank[gathered.positions],
    )


def span_targets(
    key: Key[Array, ""],
    word_starts: Bool[Array, " N"],
    *,
    length: Int[Array, ""] | int,
    num_predictions: Int[Array, ""] | int,
    max_span: int = 5,
    mask_alpha: int = 6,
    mask_beta: int = 1,
    whole_words: bool = False,
) -> Bool[Array, " N"]:
    """Marks `num_predictions` tokens of a row or half: spans spread over it, then single tokens.

    Spans are placed from left to right. Each has n tokens, n in 1 .. max_span with probability in proportion to 1 / n,
    or what is left to select if that is less. Of its context of c = n * mask_alpha // mask_beta tokens, l (uniform in
    0 .. c - 1) are passed over before it and c - l after it; between, it begins at the next word start. The first span
    that would reach the end is dropped, and no other follows. What is then missing is drawn uniformly from the tokens
    that are not selected.

    So one token in 1 + mask_alpha / mask_beta is in a span, as in the authors' code; the paper says one in K, with its
    K = mask_alpha / mask_beta.

    Args:
      key: a threefry key.
      word_starts: True for tokens that begin a word; mark separators too.
      length: tokens that are not padding, which is at the end.
      num_predictions: tokens to select; all of them where `length` is smaller.
      max_span, mask_alpha, mask_beta: see above.
      whole_words: False: n counts tokens, as in the paper (section 3.1, "a consecutive span of L tokens") and in
        effect in the authors' code, whose search for the n-th word end looks at the first token over and over. True: n
        counts words, and a span of more tokens than are left to select is passed over.
    """
    N = word_starts.shape[0]
    length = jnp.asarray(length, jnp.int32)
    goal = jnp.minimum(jnp.asarray(num_predictions, jnp.int32), length)
    size_key, left_key, fill_key = jax.random.split(key, 3)
    steps = -(-N // (1 + mask_alpha // mask_beta))  # no more spans fit, each taking 1 token and its context
    share = np.cumsum(1 / np.arange(1, max_span + 1))
    border = jnp.asarray(share[:-1] / share[-1], jnp.float32)
    drawn = jax.random.uniform(size_key, (steps,), jnp.float32)
    sizes = 1 + jnp.sum(drawn[:, None] >= border, axis=1, dtype=jnp.int32)
    shifts = jax.random.uniform(left_key, (steps,), jnp.float32)

    index = jnp.arange(N, dtype=jnp.int32)
    starts = word_starts & (index < length)
    next_start = jnp.append(jax.lax.cummin(jnp.where(starts, index, N), reverse=True), jnp.int32(N))
    if whole_words:
        word = jnp.append(jnp.cumsum(starts, dtype=jnp.int32) - 1, jnp.int32(N))
        begins = jnp.nonzero(starts, size=N + 1, fill_value=N)[0].astype(jnp.int32)

    def place(
        state: tuple[Int[Array, ""], Int[Array, ""], Bool[Array, ""]], draw: tuple[Array, Array]
    ) -> tuple[tuple[Int[Array, ""], Int[Array, ""], Bool[Array, ""]], tuple[Array, Array]]:
        """One span, from where the last one's context ends; (N, N) where there is none."""
        current, selected, going = state
        size, shift = draw
        left_over = goal - selected
        size = jnp.minimum(size, left_over)
        context = size * mask_alpha // mask_beta
        before = jnp.floor(shift * context).astype(jnp.int32)
        begin = next_start[jnp.minimum(current + before, N)]
        end = begins[jnp.minimum(word[begin] + size, N)] if whole_words else begin + size
        going = going & (size > 0) & (end < length)
        taken = going & (end - begin <= left_over)
        span = jnp.where(taken, begin, N), jnp.where(taken, end, N)
        current = jnp.where(going, end + context - before, current)
        return (current, selected + span[1] - span[0], going), span

    zero = goal - goal  # varies over the same mesh axes as the row under shard_map
    (_, selected, _), (begin, end) = jax.lax.scan(place, (zero, zero, zero == 0), (sizes, shifts))
    edges = jnp.zeros((N + 1,), jnp.int32).at[begin].add(1).at[end].add(-1)
    in_span = jnp.cumsum(edges[:N]) > 0
    order = jnp.argsort(selection_scores(fill_key, ~in_span & (index < length)))
    return in_span | jnp.zeros_like(in_span).at[order].set(index < goal - selected, unique_indices=True)


def permutation_ranks(
    key: Key[Array, ""],
    is_masked: Bool[Array, " L"],
    functional: Bool[Array, " L"],
    *,
    reuse: int,
    perm_size: int,
) -> PermutationRanks:
    """A random order of each half, as ranks.

    A half is cut into blocks of `perm_size` tokens. One permutation pi of 0 .. perm_size - 1 is drawn for all blocks:
    offset k of block b comes at b * perm_size + pi(k), so blocks come one after the other. Tokens neither masked nor
    functional come at -1: every token of the half sees them, and they see only one another. A target sees what comes
    before it; every other token also sees itself. Ranks of the second half lie above those of the first: no token of
    the first sees the second, and every token of the second sees all of the first.

    Args:
      key: a threefry key.
      is_masked: the tokens selected for prediction.
      functional: True for SEP and CLS, which have a place in the order and are not predicted.
      reuse: tokens in the first half, may be 0.
      perm_size: tokens in a block; divides both halves.
    """
    orders = []
    for half in _halves(is_masked.shape[0], reuse, 0):
        draws = jax.random.bits(jax.random.fold_in(key, half.number), (perm_size,), jnp.uint32)
        pi = jnp.argsort(draws).astype(jnp.int32)
        blocks = jnp.arange(0, half.size, perm_size, dtype=jnp.int32)
        orders.append((blocks[:, None] + pi).reshape(-1))
    order = jnp.concatenate(orders)
    # A separator that comes last in the first half has query rank `reuse`: the second half's keys begin there.
    shift = jnp.where(jnp.arange(order.shape[0]) < reuse, 0, reuse + 1).astype(jnp.int32)
    is_target = is_masked & ~functional
    key_rank = jnp.where(is_masked | functional, order, -1) + shift
    return PermutationRanks(key_rank + jnp.where(is_target, 0, 1), key_rank, is_target)


def check_permutation(
    length: int,
    num_predictions: int,
    reuse: int,
    perm_size: int,
    max_span: int = 5,
    mask_alpha: int = 6,
    mask_beta: int = 1,
) -> None:
    """Raises UserError for settings that rows of `length` tokens cannot have."""
    if not 0 <= reuse < length:
        raise UserError(
            f"reuse is {reuse}, and rows have {length} tokens; accepted: 0 (one half) to {length - 1}, the XLNet "
            f"paper's being half of the row."
        )
    for half in _halves(length, reuse, num_predictions):
        size, name = half.size, ("first", "second")[half.number]
        which = f"{size} tokens of the {name} half" if reuse else f"row of {size} tokens"
        if perm_size < 1 or size % perm_size:
            raise UserError(
                f"perm_size is {perm_size}, which does not divide the {which} (rows of {length}, reuse {reuse}); "
                f"accepted: a divisor of {np.gcd(reuse, length - reuse)}."
            )
        if half.predictions >= size:
            raise UserError(
                f"num_predictions is {num_predictions}, of which {half.predictions} would fall on the {which} "
                f"(rows of {length}, reuse {reuse}), with none left to see; accepted: at most {_most(length, reuse)}."
            )
    if num_predictions < 1:
        raise UserError(f"num_predictions is {num_predictions}; a row needs at least 1 slot for a prediction.")
    if max_span < 1:
        raise UserError(f"max_span is {max_span}; a span has at least 1 token.")
    if not 1 <= mask_beta <= mask_alpha:
        raise UserError(
            f"mask_alpha is {mask_alpha} and mask_beta is {mask_beta}; a span of n tokens has a context of n * "
            "mask_alpha // mask_beta, so mask_beta must be at least 1 and mask_alpha no smaller."
        )


class _Half(NamedTuple):
    """Tokens [begin, end) of a row, and how many of them to predict."""

    number: int
    begin: int
    end: int
    predictions: int

    @property
    def size(self) -> int:
        return self.end - self.begin


def _halves(length: int, reuse: int, num_predictions: int) -> list[_Half]:
    """The halves of a row, of which the first may be missing."""
    second = num_predictions * (length - reuse) // length
    halves = [_Half(0, 0, reuse, num_predictions - second), _Half(1, reuse, length, second)]
    return [half for half in halves if half.size > 0]


def _most(length: int, reuse: int) -> int:
    """The most predictions that leave a token of each half unselected."""
    return max(k for k in range(length) if all(half.predictions < half.size for half in _halves(length, reuse, k)))
