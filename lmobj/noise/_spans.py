"""Span masking: runs of whole words, of random lengths, each masked, replaced or kept as one."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lmobj.errors import UserError
from lmobj.noise._masking import (
    MaskedTokens,
    check_masking,
    gather_selected,
    replace_selected,
    selection_scores,
)

__all__ = ["MaskedSpans", "mask_spans", "span_budget"]


class MaskedSpans(NamedTuple):
    """A corrupted row and the at most K tokens to predict, in order of position, each with the span that it is in.

    Unused slots come last and are 0 in every field. A span is a run of selected tokens of one segment, with no selected
    one beside it.
    """

    tokens: Int[Array, " L"]
    """The row with the selected tokens corrupted."""
    positions: Int[Array, " K"]
    """Where the predicted tokens are; int32."""
    targets: Int[Array, " K"]
    """The original tokens at `positions`, also where the corruption left them as they were."""
    weights: Float[Array, " K"]
    """1 for a prediction, 0 for an unused slot; float32."""
    left: Int[Array, " K"]
    """Where the token before the span is."""
    right: Int[Array, " K"]
    """Where the token after the span is."""
    offset: Int[Array, " K"]
    """The token's place in its span, from 0."""
    boundary_weights: Float[Array, " K"]
    """1 for a prediction from the span's boundary; of the other slots, `left`, `right` and `offset` are 0."""


def span_budget(length: int, mask_rate: float = 0.15) -> int:
    """SpanBERT's number of predictions for `length` ordinary tokens: ceil(length * mask_rate)."""
    return math.ceil(length * mask_rate)


def mask_spans(
    key: Key[Array, ""],
    tokens: Int[Array, " L"],
    candidates: Bool[Array, " L"],
    word_starts: Bool[Array, " L"],
    segment_ids: Int[Array, " L"],
    *,
    num_predictions: int,
    mask_id: int,
    vocab_size: int,
    mask_rate: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    span_probability: float = 0.2,
    max_span: int = 10,
    max_targets: int = 15,
) -> MaskedSpans:
    """SpanBERT's masking: spans of words until exactly n = min(num_predictions, ceil(mask_rate * c)) of c candidates.

    Spans are drawn one after another. Each has an anchor, uniform over the candidates that are not selected yet, and a
    length of l words, with probability in proportion to p (1 - p)^(l - 1) for l = 1 .. max_span, p = span_probability.
    It begins with the anchor's word and may run over words that are selected already, but not past a token that is no
    candidate, or the end of a segment. The last span ends where n is reached, inside a word if need be.

    Spans that overlap or touch are then one. All tokens of a span become `mask_id` (with probability `mask_share`), or
    random ones, each on its own (`random_share`), or stay.

    A token is predicted from its span's boundary too (`boundary_weights`) if it is among the first `max_targets` of the
    span, and the tokens next to the span on both sides are candidates of the same segment: not where a text begins or
    ends.

    Args:
      key, tokens, candidates, mask_id, vocab_size, mask_share, random_share: as for `mask_tokens`.
      word_starts: True for tokens that begin a word; so does any candidate after a token that is none.
      segment_ids: numbers of the texts in the row.
      num_predictions: K, the number of slots (static). `span_budget(c, mask_rate)` slots cut nothing.
      mask_rate: share of the candidates to select, in (0, 1] (static).
      span_probability: p, in (0, 1).
      max_span: the most words in a span as it is drawn, at least 1.
      max_targets: the most tokens of a span that are predicted from its boundary, at least 1.

    Raises:
      UserError: a rate, share or probability out of range, or a number below 1.

    Source: Joshi et al. 2020, "SpanBERT: Improving Pre-training by Representing and Predicting Spans", sections 3.1 and
    3.2, and the authors' code. Deviation: random tokens are uniform over the vocabulary, as BERT's; the code draws them
    by their frequency.
    """
    check_masking(mask_rate, mask_share, random_share, num_predictions)
    _check_spans(span_probability, max_span, max_targets)
    select_key, size_key, replace_key = jax.random.split(key, 3)
    L = tokens.shape[0]
    table = [min(num_predictions, span_budget(i, mask_rate)) for i in range(L + 1)]
    budget = jnp.asarray(table, jnp.int32)[jnp.sum(candidates)]
    sizes = _draw_sizes(jax.random.uniform(size_key, (L,), jnp.float32), span_probability, max_span)
    opens = candidates & ~_continued(candidates, segment_ids)  # the first token of each stretch of candidates
    begins, ends = _spans_of_anchors(candidates, opens, word_starts, sizes)
    selected = _take_spans(selection_scores(select_key, candidates), begins, ends, budget)

    at = jnp.arange(L, dtype=jnp.int32)
    first = selected & (opens | ~jnp.pad(selected[:-1], (1, 0)))
    heads = jnp.maximum(jax.lax.cummax(jnp.where(first, at, -1)), 0)
    corrupted = replace_selected(
        replace_key, tokens, selected, mask_id, vocab_size, mask_share, random_share, heads=heads
    )
    gathered: MaskedTokens = gather_selected(tokens, corrupted, selected, num_predictions)

    head = heads[gathered.positions]
    after = jax.lax.cummin(jnp.where(first | ~selected, at, L), reverse=True)  # where the span of the token before ends
    right = jnp.pad(after, (0, 1), constant_values=L)[gathered.positions + 1]
    bounded = ~opens[head] & (candidates & ~opens).at[right].get(mode="fill", fill_value=False)
    offset = gathered.positions - head
    counts = (gathered.weights > 0) & bounded & (offset < max_targets)
    left, right, offset = (jnp.where(counts, x, 0) for x in (head - 1, right, offset))
    return MaskedSpans(*gathered, left, right, offset, counts.astype(jnp.float32))


def _continued(candidates: Bool[Array, " L"], segment_ids: Int[Array, " L"]) -> Bool[Array, " L"]:
    """True where the token before is a candidate of the same segment."""
    return jnp.pad(candidates[:-1] & (segment_ids[1:] == segment_ids[:-1]), (1, 0))


def _draw_sizes(uniform: Float[Array, " L"], probability: float, max_span: int) -> Int[Array, " L"]:
    """l in 1 .. max_span with probability in proportion to p (1 - p)^(l - 1), from draws in [0, 1)."""
    share = np.cumsum((1 - probability) ** np.arange(max_span))
    border = jnp.asarray(share[:-1] / share[-1], jnp.float32)
    return 1 + jnp.sum(uniform[:, None] >= border, axis=1, dtype=jnp.int32)


def _spans_of_anchors(
    candidates: Bool[Array, " L"], opens: Bool[Array, " L"], word_starts: Bool[Array, " L"], sizes: Int[Array, " L"]
) -> tuple[Int[Array, " L"], Int[Array, " L"]]:
    """[begin, end) of the span of `sizes` words that each candidate would be the anchor of."""
    L = candidates.shape[0]
    at = jnp.arange(L, dtype=jnp.int32)
    starts = opens | (candidates & word_starts)
    begins = jnp.maximum(jax.lax.cummax(jnp.where(starts, at, -1)), 0)
    stops = jax.lax.cummin(jnp.where(opens | ~candidates, at, L), reverse=True)
    stops = jnp.append(stops[1:], jnp.int32(L))  # where the stretch of candidates ends
    word = jnp.cumsum(starts, dtype=jnp.int32) - 1
    word_begins = jnp.full((L,), L, jnp.int32).at[jnp.where(starts, word, L)].set(at, mode="drop")
    ends = word_begins.at[word + sizes].get(mode="fill", fill_value=L)
    return begins, jnp.minimum(ends, stops)


def _take_spans(
    scores: Array, begins: Int[Array, " L"], ends: Int[Array, " L"], budget: Int[Array, ""]
) -> Bool[Array, " L"]:
    """The tokens selected: of the anchors in order of score, each that is not selected yet adds its span.

    A random order with the selected ones left out is a sequence of draws each uniform over what is not selected, since
    every anchor that was drawn is selected at once. Each round adds a token at least; a typical row of 128 tokens takes
    six.
    """
    at = jnp.arange(begins.shape[0], dtype=jnp.int32)

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        """The next span."""
        selected, rest = state
        anchor = jnp.argmin(jnp.where(selected, jnp.uint32(0xFFFFFFFF), scores))
        new = ~selected & (begins[anchor] <= at) & (at < ends[anchor])
        new &= jnp.cumsum(new, dtype=jnp.int32) <= rest
        return selected | new, rest - jnp.sum(new, dtype=jnp.int32)

    start = (at < budget - budget, budget)  # nothing, and varying over the same mesh axes as the row under shard_map
    return jax.lax.while_loop(lambda state: state[1] > 0, step, start)[0]


def _check_spans(span_probability: float, max_span: int, max_targets: int) -> None:
    if not 0 < span_probability < 1:
        raise UserError(f"span_probability is {span_probability}; it must be above 0 and below 1.")
    for name, value in (("max_span", max_span), ("max_targets", max_targets)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")
