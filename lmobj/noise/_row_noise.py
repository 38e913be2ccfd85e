"""Noise for whole texts: sentences in another order, spans replaced by one mask, tokens inserted, a text rotated.

A text begins with BOS and ends with EOS, which stay where they are, and is corrupted in steps, each of which takes a
`NoisedRow` and returns one:

    row = noise.whole_row(tokens, length, room=1100)
    row = noise.permute_sentences(keys[0], row, sentence_ends)
    row = noise.infill_spans(keys[1], row, word_starts, mask_rate=0.3, mask_id=4, vocab_size=50265)
    row = noise.rotate_row(keys[2], row, rate=0.5)

`source` tells where each token was in the text, so what is known of the text's tokens (where words start) is known of
the row's. A text without anything between BOS and EOS stays as it is. Draws are one-dimensional over positions: padding
a row further, or more room, changes nothing, unless insertions were left out for lack of it.

Source: Lewis et al. 2020, "BART: Denoising Sequence-to-Sequence Pre-training for Natural Language Generation,
Translation, and Comprehension", section 2.2; where the paper is silent, fairseq's `denoising_dataset.py`.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lmobj.errors import UserError
from lmobj.noise._counts import ceil_share, check_rates
from lmobj.noise._masking import selection_scores

__all__ = ["LONGEST_MEAN", "NoisedRow", "infill_spans", "insert_tokens", "permute_sentences", "rotate_row", "whole_row"]

LONGEST_MEAN = 16.0
"""Of the Poisson lengths: the chance of 0 is then still above the 1e-7 at which they end."""


class NoisedRow(NamedTuple):
    """A text after none or some steps of noise; 0 and -1 after its end."""

    tokens: Int[Array, " R"]
    length: Int[Array, ""]
    """Tokens of the row, BOS and EOS included; int32."""
    source: Int[Array, " R"]
    """Where each token was in the text; -1 for masks and random tokens. int32."""


def whole_row(tokens: Int[Array, " L"], length: Int[Array, ""] | int, *, room: int) -> NoisedRow:
    """The text as it is, of which the first `length` tokens are real, in a row of `room` tokens (static, at least L).

    Only insertions lengthen a row. In `infill_spans` with mean span m there are q / (1 - q) of them per span on
    average, q = e^-m, and a span hides m / (1 - q) words for 1 mask: apart from overlaps, rows get shorter on average
    if m > 1. Insertions beyond the room are left out.

    Raises:
      UserError: less room than the row has tokens.
    """
    L = tokens.shape[0]
    if room < L:
        raise UserError(f"room is {room}, and rows have {L} tokens; accepted: at least {L}.")
    at = jnp.arange(room, dtype=jnp.int32)
    length = jnp.asarray(length, jnp.int32)
    real = at < length
    return NoisedRow(jnp.where(real, jnp.pad(tokens, (0, room - L)), 0), length, jnp.where(real, at, -1))


def permute_sentences(
    key: Key[Array, ""], row: NoisedRow, sentence_ends: Bool[Array, " L"], *, rate: Float[Array, ""] | float = 1.0
) -> NoisedRow:
    """ceil(rate * s) of the s sentences, drawn uniformly, change places among themselves, all orders equally likely.

    A sentence ends with the first of adjacent tokens that `sentence_ends` marks (in the text: full stops), or with the
    last token before EOS. As in fairseq, if that token follows a marked one it belongs to no sentence, and stays.

    Raises:
      UserError: a rate that is a Python number and not from 0 to 1.
    """
    check_rates(rate=rate)
    at = jnp.arange(row.tokens.shape[0], dtype=jnp.int32)
    content = _content(row)
    stops = content & (_of_source(sentence_ends, row) | (at == row.length - 2))
    ends = stops & ~jnp.pad(stops[:-1], (1, 0))
    number = jnp.cumsum(ends, dtype=jnp.int32) - ends  # of the sentence that each token is in
    count = jnp.sum(ends, dtype=jnp.int32)
    order = jnp.argsort(selection_scores(key, at < count)).astype(jnp.int32)
    chosen = jnp.zeros_like(ends).at[order].set(at < ceil_share(count, rate), unique_indices=True)
    # The chosen places, in ascending order, get the chosen sentences in the order drawn.
    sentence = jnp.where(chosen, order[jnp.cumsum(chosen, dtype=jnp.int32) - 1], at)
    place = jnp.zeros_like(at).at[sentence].set(at, unique_indices=True)
    inside = content & (number < count)
    size = jnp.zeros_like(at).at[jnp.where(inside, number, at.size)].add(1, mode="drop")
    begin = jnp.cumsum(size, dtype=jnp.int32) - size
    new_size = size[sentence]
    new_begin = jnp.cumsum(new_size, dtype=jnp.int32) - new_size
    target = at - begin[number] + new_begin[place[number]]
    return _reorder(row, at.at[jnp.where(inside, target, at.size)].set(at, mode="drop"))


def infill_spans(
    key: Key[Array, ""],
    row: NoisedRow,
    word_starts: Bool[Array, " L"],
    *,
    mask_id: int,
    vocab_size: int,
    mask_rate: Float[Array, ""] | float = 0.3,
    mean_span: float | None = 3.0,
    random_share: Float[Array, ""] | float = 0.0,
    replace: Literal["span", "token", "delete"] = "span",
) -> NoisedRow:
    """Text infilling: spans of words, of Poisson lengths, each replaced by one mask; a span of no word inserts one.

    Lengths are drawn until they add up to the budget ceil(mask_rate * w) of w words, and the last is cut to meet it.
    Spans begin at different words, drawn uniformly; they may touch, overlap, or run over the end, so fewer words than
    the budget may be hidden. A mask inside another span goes with it. Masks of spans of no word are then inserted
    anywhere (`insert_tokens`).

    Args:
      key: a threefry key.
      row: the text so far.
      word_starts: True for tokens of the text that begin a word. Those before the first are never hidden.
      mask_id: id of the mask token.
      vocab_size: random tokens are uniform over 1 .. vocab_size - 1, as in fairseq, where id 0 is BOS.
      mask_rate: share of the words to hide.
      mean_span: of the Poisson lengths, above 0 and at most 16 (static). They end where their chance falls below 1e-7.
        None: each span is one word, and none is inserted, which is token masking with "token" and token deletion with
        "delete" if every token begins a word.
      random_share: probability that a span has random tokens in the place of masks.
      replace: what is left of a span: "span" one mask, "token" a mask for each of its tokens, "delete" nothing.

    Raises:
      UserError: a setting out of range.

    Deviation: fairseq's budget is the float32 product rounded up, which makes 4 of 3.0000001; here it is exact.
    """
    _check_infilling(mask_rate, mean_span, random_share, vocab_size, replace)
    start_key, size_key, zero_key, kind_key, token_key, insert_key = jax.random.split(key, 6)
    R = row.tokens.shape[0]
    at = jnp.arange(R, dtype=jnp.int32)
    starts = _content(row) & _of_source(word_starts, row)
    budget = ceil_share(jnp.sum(starts, dtype=jnp.int32), mask_rate)
    if mean_span is None:
        sizes, count, inserts = jnp.ones((R,), jnp.int32), budget, budget - budget
    else:
        sizes, count, inserts = _poisson_sizes(size_key, zero_key, budget, mean_span, R)

    # Span j begins where the j-th start drawn is, and ends where a word does.
    begin = jnp.argsort(selection_scores(start_key, starts)).astype(jnp.int32)
    stop = row.length - 1
    word = jnp.cumsum(starts, dtype=jnp.int32) - 1
    word_begin = jnp.full((R,), stop).at[jnp.where(starts, word, R)].set(at, mode="drop")
    after = word[begin] + sizes
    end = jnp.where(after < R, word_begin[jnp.minimum(after, R - 1)], stop)
    used = at < count
    reach = jax.lax.cummax(jnp.zeros((R,), jnp.int32).at[begin].set(jnp.where(used, end, 0), unique_indices=True))
    # The first span that covers a token begins where `reach` first exceeds it: at as many places as it does not before.
    head = jnp.cumsum(jnp.zeros((R,), jnp.int32).at[reach].add(1), dtype=jnp.int32)
    covered = head <= at

    masked = covered if replace == "token" else covered & (head == at) & (replace == "span")
    is_random = jax.random.uniform(kind_key, (R,), jnp.float32) < random_share
    is_random = jnp.zeros((R,), bool).at[begin].set(is_random, unique_indices=True)[jnp.minimum(head, R - 1)]
    filler = _fillers(token_key, is_random, mask_id, vocab_size).astype(row.tokens.dtype)
    kept = (at < row.length) & (masked | ~covered)
    rank = jnp.cumsum(kept, dtype=jnp.int32)
    place = jnp.where(kept, rank - 1, R)
    shorter = NoisedRow(
        jnp.zeros_like(row.tokens).at[place].set(jnp.where(masked, filler, row.tokens), mode="drop"),
        rank[-1],
        jnp.full_like(row.source, -1).at[place].set(jnp.where(masked, -1, row.source), mode="drop"),
    )
    return insert_tokens(
        insert_key, shorter, inserts, mask_id=mask_id, vocab_size=vocab_size, random_share=random_share
    )


def insert_tokens(
    key: Key[Array, ""],
    row: NoisedRow,
    count: Int[Array, ""] | int,
    *,
    mask_id: int,
    vocab_size: int,
    random_share: Float[Array, ""] | float = 0.0,
) -> NoisedRow:
    """`count` masks, or as many as there is room for, between BOS and EOS, all choices of their places equally likely.

    Of n insertions, ceil(random_share * n) are random tokens, uniform over 1 .. vocab_size - 1. Only rows with BOS and
    EOS are changed.
    """
    check_rates(random_share=random_share)
    place_key, token_key = jax.random.split(key)
    R = row.tokens.shape[0]
    at = jnp.arange(R, dtype=jnp.int32)
    count = jnp.where(row.length >= 2, jnp.clip(jnp.asarray(count, jnp.int32), 0, R - row.length), 0)
    length = row.length + count
    order = jnp.argsort(selection_scores(place_key, (at >= 1) & (at < length - 1)))
    rank = jnp.full((R,), R, jnp.int32).at[order].set(at, unique_indices=True)  # in the order drawn
    inserted = rank < count
    old = jnp.maximum(at - jnp.cumsum(inserted, dtype=jnp.int32), 0)
    filler = _fillers(token_key, rank < ceil_share(count, random_share), mask_id, vocab_size)
    tokens = jnp.where(inserted, filler.astype(row.tokens.dtype), row.tokens[old])
    real = at < length
    return NoisedRow(jnp.where(real, tokens, 0), length, jnp.where(real & ~inserted, row.source[old], -1))


def rotate_row(key: Key[Array, ""], row: NoisedRow, *, rate: Float[Array, ""] | float = 1.0) -> NoisedRow:
    """With probability `rate`, the text begins at another token: BOS t[k] .. t[n - 2] t[1] .. t[k - 1] EOS.

    k is uniform over 1 .. n - 1 for n tokens, of which both the first and the last leave the row as it is (so they do
    in fairseq).

    Raises:
      UserError: a rate that is a Python number and not from 0 to 1.
    """
    check_rates(rate=rate)
    turn_key, offset_key = jax.random.split(key)
    at = jnp.arange(row.tokens.shape[0], dtype=jnp.int32)
    inner = jnp.maximum(row.length - 2, 1)
    offset = jax.random.randint(offset_key, (), 0, inner + 1, jnp.int32)  # k - 1
    offset = jnp.where(jax.random.uniform(turn_key, dtype=jnp.float32) < rate, offset, 0)
    return _reorder(row, jnp.where(_content(row), 1 + (at - 1 + offset) % inner, at))


def _content(row: NoisedRow) -> Bool[Array, " R"]:
    """True between BOS and EOS."""
    at = jnp.arange(row.tokens.shape[0])
    return (at >= 1) & (at < row.length - 1)


def _of_source(values: Bool[Array, " L"], row: NoisedRow) -> Bool[Array, " R"]:
    """What is true of the tokens of the text, for those of the row; False for masks."""
    return (row.source >= 0) & values[jnp.maximum(row.source, 0)]


def _reorder(row: NoisedRow, old: Int[Array, " R"]) -> NoisedRow:
    return NoisedRow(row.tokens[old], row.length, row.source[old])


def _fillers(key: Key[Array, ""], is_random: Bool[Array, " R"], mask_id: int, vocab_size: int) -> Int[Array, " R"]:
    """Random tokens where asked for, masks elsewhere."""
    return jnp.where(is_random, jax.random.randint(key, is_random.shape, 1, vocab_size, jnp.int32), mask_id)


def _poisson_sizes(
    size_key: Key[Array, ""], zero_key: Key[Array, ""], budget: Int[Array, ""], mean: float, room: int
) -> tuple[Int[Array, " R"], Int[Array, ""], Int[Array, ""]]:
    """Poisson lengths drawn until they add up to the budget: those above 0, how many these are, and how many are 0.

    Before each length above 0 comes a number of zeros, which is geometric; so as many draws as the budget are enough,
    where drawing one after the other has no such bound.
    """
    chances = _poisson_chances(mean)
    share = np.cumsum(chances[1:]) / chances[1:].sum()
    drawn = jax.random.uniform(size_key, (room,), jnp.float32)
    sizes = 1 + jnp.sum(drawn[:, None] >= jnp.asarray(share[:-1], jnp.float32), axis=1, dtype=jnp.int32)
    before = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
    used = before < budget
    sizes = jnp.minimum(sizes, budget - before)  # meets the budget with the last one used
    level = 1 - jax.random.uniform(zero_key, (room,), jnp.float32)  # in (0, 1]: P(zeros >= m) = P(level <= p0^m)
    zeros = jnp.floor(jnp.log(level) / np.float32(math.log(chances[0] / chances.sum()))).astype(jnp.int32)
    return sizes, jnp.sum(used, dtype=jnp.int32), jnp.sum(jnp.where(used, zeros, 0), dtype=jnp.int32)


def _poisson_chances(mean: float) -> np.ndarray:
    """e^-mean mean^k / k! for k = 0, 1, .. until one is below 1e-7, which is the last."""
    chances = [math.exp(-mean)]
    while chances[-1] >= 1e-7:
        chances.append(chances[-1] * mean / len(chances))
    return np.asarray(chances)


def _check_infilling(mask_rate: Any, mean_span: float | None, random_share: Any, vocab_size: int, replace: str) -> None:
    check_rates(mask_rate=mask_rate, random_share=random_share)
    if mean_span is not None and not 0.0 < mean_span <= LONGEST_MEAN:
        raise UserError(
            f"mean_span is {mean_span}; it is the mean of Poisson lengths, above 0 and at most {LONGEST_MEAN:g}, or "
            "None for spans of one word."
        )
    if vocab_size < 2:
        raise UserError(f"vocab_size is {vocab_size}; random tokens are 1 .. vocab_size - 1, so it must be at least 2.")
    if replace not in ("span", "token", "delete"):
        raise UserError(f'replace is {replace!r}; accepted: "span", "token" and "delete".')
