"""Fill in the middle: documents whose middle is moved to their end, so that a causal model learns to write it.

A document is cut at two places, uniform over 0 .. n for n tokens and sorted, into prefix, middle and suffix, any of
which may be empty. It is then written in one of two orders, with three markers:

    PSM     PRE prefix SUF suffix MID middle
    SPM     PRE SUF suffix MID prefix middle

It grows by 3 tokens. In both, what follows MID goes between what is before SUF and what is after.

Source: Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the Middle"; SPM is its variant 2, as in
`permute` of SantaCoder's Megatron-LM. Deviation: the cuts are between tokens, whereas that code cuts between characters
and tokenises the parts, which only text allows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key
from numpy.typing import ArrayLike

from lmobj.errors import UserError
from lmobj.noise._counts import check_rates

__all__ = ["FilledInMiddle", "fill_in_middle", "join_middle"]


class FilledInMiddle(NamedTuple):
    """A row of documents of which some have their middle at their end; 0, False and -1 in padding."""

    tokens: Int[Array, " R"]
    segment_ids: Int[Array, " R"]
    """Those of the row, each also at its document's markers."""
    positions: Int[Array, " R"]
    """From 0 in each document; int32."""
    is_moved: Bool[Array, " R"]
    """True for all of a document whose middle is at its end, markers included."""
    is_middle: Bool[Array, " R"]
    """True for the tokens of a middle, which follow MID (in SPM, after the prefix)."""
    source: Int[Array, " R"]
    """Where each token was in the row; -1 for markers and padding. int32."""


def fill_in_middle(
    key: Key[Array, ""],
    tokens: Int[Array, " L"],
    segment_ids: Int[Array, " L"],
    *,
    max_documents: int,
    prefix_id: int,
    suffix_id: int,
    middle_id: int,
    fim_rate: Float[Array, ""] | float = 0.5,
    spm_rate: Float[Array, ""] | float = 0.5,
    bos: int | None = None,
    eos: int | None = None,
) -> FilledInMiddle:
    """Each document of a row, by its own draws: with probability `fim_rate` its middle moves to its end.

    Nothing is ever cut off: R = L + 3 * max_documents. What is drawn beyond so many documents stays as it is, the last
    ones first. Of rows that hold what fits of their documents this is the paper's context-level FIM.

    For the whole row at once, as if it were one document, give every real token the segment 1.

    Args:
      key: the row's threefry key. The k-th document's draws are the k-th, whatever the documents are.
      tokens: the row.
      segment_ids: the document of each token, adjacent and above 0; 0 for padding, which comes last.
      max_documents: the most that are transformed, at least 0 (static).
      prefix_id, suffix_id, middle_id: PRE, SUF and MID, which occur nowhere else.
      fim_rate: probability that a document is transformed.
      spm_rate: probability that one that is has the order SPM, not PSM.
      bos, eos: where a document begins with `bos` or ends with `eos`, the token stays there and is in no part; None if
        none does. A document of nothing else stays as it is.

    Raises:
      UserError: a Python number that is no probability, a negative number of documents, or markers that are not
        distinct.
    """
    _check(max_documents, (prefix_id, suffix_id, middle_id), fim_rate, spm_rate)
    L = tokens.shape[0]
    room = L + 3 * max_documents
    at = jnp.arange(L, dtype=jnp.int32)
    real = segment_ids > 0
    first = real & (segment_ids != jnp.pad(segment_ids[:-1], (1, 0)))
    last = real & (segment_ids != jnp.pad(segment_ids[1:], (0, 1)))
    doc = jnp.where(real, jnp.cumsum(first, dtype=jnp.int32) - 1, L)
    opens = first & (tokens == bos) if bos is not None else jnp.zeros_like(first)
    closes = last & ~opens & (tokens == eos) if eos is not None else jnp.zeros_like(last)

    def by_document(values: Array) -> Int[Array, " L"]:
        return jnp.zeros((L,), jnp.int32).at[doc].add(values.astype(jnp.int32), mode="drop")

    size = by_document(real & ~opens & ~closes)
    moved, spm, low, high = _draw(key, size, fim_rate, spm_rate)
    moved &= jnp.cumsum(moved, dtype=jnp.int32) <= max_documents

    begin = by_document(jnp.where(first, at + opens, 0))  # of the parts, after `bos`
    grown = 3 * (jnp.cumsum(moved, dtype=jnp.int32) - moved)  # by the documents before
    tail = size - high  # tokens of the suffix
    to_prefix, to_suffix, to_middle = jnp.where(spm, tail + 3, 1), jnp.where(spm, 2, low + 2) - high, tail + 3

    here = jnp.minimum(doc, L - 1)
    offset = at - begin[here]
    in_prefix, in_suffix = offset < low[here], offset >= high[here]
    shift = jnp.where(in_prefix, to_prefix[here], jnp.where(in_suffix, to_suffix[here], to_middle[here]))
    shift = jnp.where(opens, 0, jnp.where(closes, 3, shift))
    place = jnp.where(real, at + grown[here] + jnp.where(moved[here], shift, 0), room)
    is_middle = moved[here] & ~in_prefix & ~in_suffix  # `bos` is before the prefix, `eos` after the suffix

    def put(values: Array, fill: Any = 0) -> Array:
        return jnp.full((room,), fill, values.dtype).at[place].set(values, mode="drop")

    row, segments, is_moved = put(tokens), put(segment_ids), put(moved[here] & real)
    segment = by_document(jnp.where(first, segment_ids, 0)).astype(segment_ids.dtype)
    before_middle = tail + 2 + jnp.where(spm, 0, low)
    for marker, mark in ((prefix_id, 0), (suffix_id, jnp.where(spm, 1, low + 1)), (middle_id, before_middle)):
        where = jnp.where(moved, begin + grown + mark, room)
        row = row.at[where].set(jnp.asarray(marker, tokens.dtype), mode="drop")
        segments = segments.at[where].set(segment, mode="drop")
        is_moved = is_moved.at[where].set(True, mode="drop")
    out = jnp.arange(room, dtype=jnp.int32)
    heads = jax.lax.cummax(jnp.where(segments != jnp.pad(segments[:-1], (1, 0)), out, 0))
    positions = jnp.where(segments > 0, out - heads, 0)
    return FilledInMiddle(row, segments, positions, is_moved, put(is_middle), put(at, -1))


def join_middle(
    tokens: ArrayLike, *, prefix_id: int, suffix_id: int, middle_id: int, eos: int | None = None
) -> np.ndarray:
    """The document that `fill_in_middle` made `tokens` of, in either order or left as it was.

    Args:
      tokens: one document, without padding.
      prefix_id, suffix_id, middle_id, eos: as there.

    Raises:
      UserError: markers that are not one PRE, SUF and MID in this order.
    """
    ids = np.asarray(tokens)
    places = np.flatnonzero(np.isin(ids, (prefix_id, suffix_id, middle_id)))
    if not places.size:
        return ids
    if ids[places].tolist() != [prefix_id, suffix_id, middle_id]:
        raise UserError(
            f"The markers of the document are {ids[places].tolist()}; accepted: none, or prefix_id {prefix_id}, "
            f"suffix_id {suffix_id} and middle_id {middle_id}, in this order."
        )
    before, prefix, suffix, middle = (part[1:] if i else part for i, part in enumerate(np.split(ids, places)))
    end = ids[-1:] if eos is not None and middle[-1:].tolist() == [eos] else ids[:0]
    return np.concatenate([before, prefix, middle[: middle.size - end.size], suffix, end])


def _draw(
    key: Key[Array, ""], size: Int[Array, " L"], fim_rate: Float[Array, ""] | float, spm_rate: Float[Array, ""] | float
) -> tuple[Bool[Array, " L"], Bool[Array, " L"], Int[Array, " L"], Int[Array, " L"]]:
    """By document: whether it is transformed, whether in the order SPM, and its cuts."""
    move_key, order_key, *cut_keys = jax.random.split(key, 4)
    moved = (jax.random.uniform(move_key, size.shape, jnp.float32) < fim_rate) & (size > 0)
    spm = jax.random.uniform(order_key, size.shape, jnp.float32) < spm_rate
    one, other = (jax.random.randint(cut_key, size.shape, 0, size + 1, jnp.int32) for cut_key in cut_keys)
    return moved, spm, jnp.minimum(one, other), jnp.maximum(one, other)


def _check(max_documents: int, markers: tuple[int, int, int], fim_rate: Any, spm_rate: Any) -> None:
    check_rates(fim_rate=fim_rate, spm_rate=spm_rate)
    if max_documents < 0:
        raise UserError(f"max_documents is {max_documents}; accepted: 0 or more.")
    if len(set(markers)) < 3:
        raise UserError(f"prefix_id, suffix_id and middle_id are {markers}; they must be three different tokens.")
