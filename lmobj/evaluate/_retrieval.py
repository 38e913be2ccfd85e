"""Scores of rankings, as of a bi-encoder that gives each query and each document a vector.

Source: of each score in `score_retrieval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmobj.errors import UserError

__all__ = ["RetrievalScores", "cosine_scores", "relevant_ranks", "score_retrieval"]


class RetrievalScores(NamedTuple):
    """Means over the queries with a relevant document, in [0, 1]."""

    recall: dict[int, float]
    """k -> share of a query's relevant documents among the first k."""
    hits: dict[int, float]
    """k -> share of queries with a relevant document among the first k; equal to recall with one for each query."""
    ndcg: dict[int, float]
    """k -> normalised discounted cumulative gain of the first k."""
    mrr: float
    """Mean of 1 / rank of a query's first relevant document."""
    queries: int
    """Queries with a relevant document; the others are left out."""


def cosine_scores(queries: ArrayLike, documents: ArrayLike) -> NDArray[np.float64]:
    """[Q, D]: q . d / (|q| |d|) of vectors [Q, H] and [D, H]; 0 for a vector of zeros.

    Raises:
      UserError: shapes that do not fit.
    """
    q, d = np.asarray(queries, np.float64), np.asarray(documents, np.float64)
    if q.ndim != 2 or d.ndim != 2 or q.shape[1] != d.shape[1]:
        raise UserError(f"vectors have the shapes {q.shape} and {d.shape}; accepted: [Q, H] and [D, H].")
    return unit_vectors(q) @ unit_vectors(d).T


def unit_vectors(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N, H] vectors of length 1; of zeros, zeros."""
    length = np.linalg.norm(x, axis=1, keepdims=True)
    unit: NDArray[np.float64] = x / np.where(length == 0, 1, length)
    return unit


def score_retrieval(scores: ArrayLike, relevance: ArrayLike, ks: Sequence[int] = (1, 5, 10)) -> RetrievalScores:
    """Scores the ranking of documents for each query, highest score first.

        recall@k = relevant ones in the first k / relevant ones        MRR = mean 1 / rank of the first relevant one
        DCG@k = sum_{i=1..k} rel_i / log2(1 + i)                       nDCG@k = DCG@k / that of the best ranking

    Documents with equal scores rank the less relevant one first, so that a model which scores all alike gains nothing
    from the order of the documents.

    Args:
      scores: [Q, D], -inf allowed: of a document that is not a candidate.
      relevance: [Q, D], 0 and more, or [Q] whole numbers: the one relevant document of each query, as arange(Q) for
        pairs.
      ks: depths.

    Raises:
      UserError: shapes that do not fit, NaN, negative relevance, a depth below 1, or no query with a relevant document.

    Source: MRR, Voorhees 1999, "The TREC-8 Question Answering Track Report", section 3; DCG, Järvelin and Kekäläinen
    2002, "Cumulated gain-based evaluation of IR techniques", with the discount log2(1 + i) from the first rank on and
    the relevance itself as gain, as trec_eval has it (Burges et al. 2005 take 2^rel - 1: give that as relevance).
    """
    s, gains = _checked(scores, relevance, ks)
    gains, s = gains[gains.any(1)], s[gains.any(1)]
    if not len(gains):
        raise UserError("no query has a relevant document; accepted: at least one that has.")
    order = np.lexsort((gains, -s), axis=1)
    ranked = np.take_along_axis(gains, order, axis=1)
    relevant = ranked > 0
    discounts = 1 / np.log2(np.arange(2, ranked.shape[1] + 2))
    best = np.cumsum(-np.sort(-gains, axis=1) * discounts, axis=1)
    gained, found = np.cumsum(ranked * discounts, axis=1), np.cumsum(relevant, axis=1)
    last = {k: min(k, ranked.shape[1]) - 1 for k in ks}
    return RetrievalScores(
        recall={k: float(np.mean(found[:, i] / found[:, -1])) for k, i in last.items()},
        hits={k: float(np.mean(found[:, i] > 0)) for k, i in last.items()},
        ndcg={k: float(np.mean(gained[:, i] / best[:, i])) for k, i in last.items()},
        mrr=float(np.mean(1 / (1 + np.argmax(relevant, axis=1)))),
        queries=len(gains),
    )


def relevant_ranks(scores: ArrayLike, relevant: Sequence[Sequence[int]]) -> list[list[int]]:
    """The ranks of each query's relevant documents, from 1, ascending; ties are broken as in `score_retrieval`.

    Args:
      scores: [Q, D].
      relevant: of each query, which documents are.

    Raises:
      UserError: shapes that do not fit, or NaN.
    """
    s = np.asarray(scores, np.float64)
    if s.ndim != 2 or len(s) != len(relevant) or np.isnan(s).any():
        raise UserError(f"scores have the shape {s.shape}, or are NaN; accepted: numbers [{len(relevant)}, D].")
    found = []
    for row, own in zip(s, relevant, strict=True):
        scored = -np.sort(-row[list(own)])
        ahead = np.array([np.count_nonzero(row >= score) - np.count_nonzero(scored >= score) for score in scored])
        found.append((ahead + np.arange(1, len(own) + 1)).tolist())
    return found


def _checked(
    scores: ArrayLike, relevance: ArrayLike, ks: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores and relevance, [Q, D] each."""
    s, given = np.asarray(scores, np.float64), np.asarray(relevance)
    if s.ndim != 2 or np.isnan(s).any():
        raise UserError(f"scores have the shape {s.shape}, or are NaN; accepted: numbers [Q, D].")
    if not ks or min(ks) < 1:
        raise UserError(f"ks is {tuple(ks)}; accepted: depths of at least 1.")
    if given.shape == s.shape[:1] and np.issubdtype(given.dtype, np.integer):
        if len(given) and not (given.min() >= 0 and given.max() < s.shape[1]):
            raise UserError(f"relevance reaches from {given.min()} to {given.max()}; accepted: 0 to {s.shape[1] - 1}.")
        given = np.arange(s.shape[1]) == given[:, None]
    gains = given.astype(np.float64)
    if gains.shape != s.shape or not (gains >= 0).all():
        raise UserError(
            f"relevance has the shape {given.shape}, or is negative; accepted: {s.shape}, or {s.shape[:1]} integers."
        )
    return s, gains
