"""N-gram language models with interpolated Kneser-Ney smoothing: the baselines beside a trained model.

    p_n(w | h) = (a(hw) - D(a(hw))) / sum_v a(hv)  +  gamma(h) p_{n-1}(w | h'),   h' = h without its first token
    gamma(h)   = sum_v D(a(hv)) / sum_v a(hv)
    p_0(w)     = 1 / V

a(hw) is the count of hw at the highest order, and at lower orders the number of distinct tokens that precede hw; an
n-gram that begins a document has nothing before it and keeps its count. A context that was never seen passes to the
next shorter one. Chen & Goodman 1998, "An Empirical Study of Smoothing Techniques for Language Modeling", section 4.1.6
and eq. 26; the unigrams are interpolated with the uniform distribution, as in Heafield et al. 2013, "Scalable Modified
Kneser-Ney Language Model Estimation", so that every token of the vocabulary has probability above 0. With order 1 that
is the only smoothing: a unigram model with discounted counts.

A document is preceded by one begin symbol, which is never predicted; contexts reach no further back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmobj.errors import UserError

__all__ = ["NGram", "bits_per_byte", "unigram_top_k"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_FALLBACK = (0.5, 1.0, 1.5)
"""Discounts where the counts of counts do not determine them, as KenLM's `--discount_fallback`."""


class _Order(NamedTuple):
    """The n-grams of one order, as (context, token) pairs; a context is the number of an (n-1)-gram."""

    keys: Ints
    """[G], ascending: context * (V + 1) + token. An n-gram's number is its index here."""
    mass: Floats
    """[G]: the discounted probability of the token in its context."""
    backoff: Floats
    """[C]: gamma of each context, 1 for one that nothing was seen to follow."""


class _Text(NamedTuple):
    """Documents end to end, each preceded by the begin symbol."""

    symbols: Ints
    depth: Ints
    """Distance to the begin symbol of the document; 0 for the symbol itself."""


class NGram:
    """An n-gram model over token ids. Build one with `NGram.fit`."""

    def __init__(self, orders: list[_Order], vocab_size: int, discounts: list[tuple[float, float, float]]):
        self._orders = orders
        self.order = len(orders)
        """n."""
        self.vocab_size = vocab_size
        """V."""
        self.discounts = discounts
        """(D1, D2, D3+) of each order from 1 to n; three equal values with `absolute`."""

    @classmethod
    def fit(
        cls,
        documents: Iterable[ArrayLike],
        order: int,
        vocab_size: int,
        discount: Literal["modified", "absolute"] = "modified",
    ) -> NGram:
        """Estimates a model from documents of token ids.

        Args:
          documents: 1-D integer arrays, with the special tokens that the scored rows will have (end of sequence).
          order: n, at least 1. Time and memory grow in proportion to it.
          vocab_size: V; ids are 0 .. V - 1.
          discount: `modified`: D1, D2 and D3+ for counts of 1, 2 and more, estimated from counts of counts
            (Chen & Goodman 1998, eq. 17); `absolute`: one D = t1 / (t1 + 2 t2) (Ney et al. 1994). An order whose
            counts of counts give no discount in (0, count] uses 0.5, 1 and 1.5 (`absolute`: 0.5); see `discounts`.

        Raises:
          UserError: no tokens, ids outside the vocabulary, or an order below 1.
        """
        if order < 1:
            raise UserError(f"order is {order}; an n-gram model has order 1 (unigram) or more.")
        if discount not in ("modified", "absolute"):
            raise UserError(f"discount is {discount!r}; accepted are 'modified' and 'absolute'.")
        tokens, starts = _concatenate(documents, vocab_size)
        text = _with_begin(tokens, starts, vocab_size)
        tables, discounts = [], []
        for keys, counts, contexts in _count(text, order, vocab_size):
            chosen = _discounts(counts, discount)
            tables.append(_smooth(keys, counts, contexts, chosen, vocab_size))
            discounts.append(chosen)
        return cls(tables, vocab_size, discounts)

    def log_probs(self, tokens: ArrayLike, segment_ids: ArrayLike | None = None) -> Floats:
        """ln p(token | tokens before it in its segment of its row), in nats; 0 for padding.

        Args:
          tokens: integers [..., L]: rows, or one document.
          segment_ids: integers [..., L], 0 for padding; by default each row is one segment. The first token of a
            segment has the begin of a document as its context, also where the segment continues a document.

        Raises:
          UserError: ids outside the vocabulary.
        """
        rows = np.asarray(tokens)
        segments = np.ones(rows.shape, np.int64) if segment_ids is None else np.asarray(segment_ids)
        if segments.shape != rows.shape:
            raise ValueError(f"segment_ids have shape {segments.shape}; the tokens have {rows.shape}.")
        starts = segments > 0
        starts[..., 1:] &= segments[..., 1:] != segments[..., :-1]
        kept = segments > 0
        flat = rows[kept].astype(np.int64)
        _check_ids(flat, self.vocab_size)
        text = _with_begin(flat, starts[kept], self.vocab_size)
        scores = np.zeros(rows.shape, np.float64)
        scores[kept] = np.log(self._probabilities(text)[text.depth > 0])
        return scores

    def bits_per_byte(self, tokens: ArrayLike, segment_ids: ArrayLike, token_bytes: ArrayLike) -> float:
        """Bits per byte over the tokens of packed rows that a causal model predicts.

        Those are the tokens [..., L] whose predecessor in the row is of the same segment: the first token of a
        segment is only read. `token_bytes` [..., L] are the UTF-8 bytes that each token stands for.

        Raises:
          UserError: no predicted token has bytes, or ids outside the vocabulary.
        """
        segments = np.asarray(segment_ids)
        predicted = (segments[..., 1:] > 0) & (segments[..., 1:] == segments[..., :-1])
        nats = -self.log_probs(tokens, segments)[..., 1:][predicted].sum()
        return bits_per_byte(float(nats), int(np.asarray(token_bytes)[..., 1:][predicted].sum()))

    def _probabilities(self, text: _Text) -> Floats:
        """p of every symbol given those before it, from order 1 upwards; of no meaning at begin symbols."""
        p = np.full(text.symbols.shape, 1 / self.vocab_size)
        # The (n-1)-gram before each symbol, -1 where it was not seen; the empty one is number 0.
        context = np.zeros_like(text.symbols)
        for table in self._orders:
            known = context >= 0
            key = np.where(known, context * (self.vocab_size + 1) + text.symbols, -1)
            index = np.minimum(np.searchsorted(table.keys, key), len(table.keys) - 1)
            seen = table.keys[index] == key
            p = np.where(known, table.backoff[context], 1.0) * p + np.where(seen, table.mass[index], 0.0)
            # No n-gram holds a begin symbol but as its first, so no context reaches into the document before.
            context = np.concatenate([[-1], np.where(seen, index, -1)[:-1]])
        return p


def bits_per_byte(nll_sum: float, num_bytes: int) -> float:
    """nll_sum / (num_bytes ln 2): nats over a text, as bits per byte of it.

    Raises:
      UserError: the text has no bytes.
    """
    if num_bytes <= 0:
        raise UserError(f"num_bytes is {num_bytes}; bits per byte need a text of at least 1 byte.")
    return nll_sum / (num_bytes * math.log(2))


def unigram_top_k(documents: Iterable[ArrayLike], vocab_size: int, k: int, exclude: tuple[int, ...] = ()) -> Ints:
    """The k most frequent token ids, the most frequent first, equal counts by lower id; never one of `exclude`.

    A baseline for masked models: the share of masked tokens that are among these ids is the top-k accuracy of a
    model that does not read the context.

    Raises:
      UserError: no tokens, ids outside the vocabulary, or a k that the vocabulary cannot fill.
    """
    if not 1 <= k <= vocab_size - len(set(exclude)):
        raise UserError(
            f"k is {k}; it must be at least 1 and at most {vocab_size - len(set(exclude))}, the vocabulary."
        )
    tokens, _ = _concatenate(documents, vocab_size)
    counts = np.bincount(tokens, minlength=vocab_size)
    counts[list(exclude)] = -1
    return np.argsort(-counts, kind="stable")[:k]


def _concatenate(documents: Iterable[ArrayLike], vocab_size: int) -> tuple[Ints, NDArray[np.bool_]]:
    """All tokens in one array, and which of them begin a document. Empty documents leave no trace."""
    arrays = [array for array in map(np.asarray, documents) if array.size]
    if not arrays:
        raise UserError("documents hold no tokens; an n-gram model needs at least one.")
    tokens = np.concatenate(arrays).astype(np.int64)
    _check_ids(tokens, vocab_size)
    starts = np.zeros(tokens.shape, bool)
    starts[np.cumsum([0] + [array.size for array in arrays[:-1]])] = True
    return tokens, starts


def _check_ids(tokens: Ints, vocab_size: int) -> None:
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
        raise UserError(
            f"token ids lie in {tokens.min()} .. {tokens.max()}; vocab_size {vocab_size} accepts 0 .. {vocab_size - 1}."
        )


def _with_begin(tokens: Ints, starts: NDArray[np.bool_], begin: int) -> _Text:
    """Puts the symbol `begin` before each token that starts a document."""
    index = np.arange(len(tokens)) + np.cumsum(starts)
    symbols = np.full(len(tokens) + int(starts.sum()), begin, np.int64)
    symbols[index] = tokens
    where = np.arange(len(symbols))
    return _Text(symbols, where - np.maximum.accumulate(np.where(symbols == begin, where, 0)))


def _count(text: _Text, order: int, vocab_size: int) -> list[tuple[Ints, Ints, int]]:
    """Keys, adjusted counts and number of contexts of each order.

    The n-gram that ends at a position is named by its number among all n-grams, so that a pair (number of the
    (n-1)-gram before, token) fits 64 bits at any order. The unigrams are simply the V + 1 symbols.
    """
    predicted = text.depth > 0
    keys = np.arange(vocab_size + 1)
    grams = text.symbols
    counts = np.bincount(text.symbols[predicted], minlength=vocab_size + 1)
    contexts = 1
    result = []
    for n in range(2, order + 1):
        ends = np.flatnonzero(text.depth >= n - 1)
        longer, first, inverse, longer_counts = np.unique(
            grams[ends - 1] * (vocab_size + 1) + text.symbols[ends],
            return_index=True,
            return_inverse=True,
            return_counts=True,
        )
        # Each distinct longer n-gram is one distinct token before its suffix. What begins a document has no longer one.
        preceded = np.bincount(grams[ends[first]], minlength=len(keys))
        begins = np.zeros(len(keys), bool)
        begins[grams[text.depth == n - 2]] = True
        result.append((keys, np.where(begins, counts, preceded), contexts))
        contexts, keys, counts = len(keys), longer, longer_counts
        grams = np.full(len(text.symbols), -1)
        grams[ends] = inverse
    return [*result, (keys, counts, contexts)]


def _discounts(counts: Ints, discount: str) -> tuple[float, float, float]:
    """(D1, D2, D3+) from the numbers t_k of n-grams with count k."""
    t1, t2, t3, t4 = (int((counts == k).sum()) for k in (1, 2, 3, 4))
    if discount == "absolute":
        single = t1 / (t1 + 2 * t2) if t1 else _FALLBACK[0]
        return (single, single, single)
    if not (t1 and t2 and t3):
        return _FALLBACK
    y = t1 / (t1 + 2 * t2)
    estimate = (1 - 2 * y * t2 / t1, 2 - 3 * y * t3 / t2, 3 - 4 * y * t4 / t3)
    return estimate if min(estimate) > 0 else _FALLBACK


def _smooth(keys: Ints, counts: Ints, contexts: int, discounts: tuple[float, float, float], vocab_size: int) -> _Order:
    """Discounted probabilities, and what each context leaves to the shorter one."""
    context = keys // (vocab_size + 1)
    discount = np.array([0.0, *discounts])[np.minimum(counts, 3)]
    totals = np.bincount(context, counts, contexts)
    backoff = np.divide(np.bincount(context, discount, contexts), totals, out=np.ones(contexts), where=totals > 0)
    mass = (counts - discount) / np.maximum(totals, 1)[context]
    return _Order(keys, mass, backoff)
