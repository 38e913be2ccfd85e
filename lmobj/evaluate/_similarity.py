"""What vectors of sentences are worth: whether near ones mean the same, and how they are spread.

Source: of each figure in its function.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmobj.errors import UserError
from lmobj.evaluate._class_scores import score_numbers
from lmobj.evaluate._retrieval import unit_vectors

__all__ = ["SimilarityScores", "score_similarity", "uniformity", "word_overlap"]

_RELATED = 0.8
"""From this share of the way from the lowest to the highest score on, pairs are related: above 4 of STS-B's 0 to 5."""
_CHUNK = 1024
"""Vectors whose distances to all others are in memory at once."""


class SimilarityScores(NamedTuple):
    """Scores of pairs of vectors."""

    spearman: float
    """Correlation of the ranks of cosines and of given scores."""
    pearson: float
    """Their linear correlation."""
    alignment: float
    """Mean squared distance of the unit vectors of related pairs, in [0, 4]; lower is better. NaN without any."""
    uniformity: float
    """Of all vectors, at most 0; lower is better."""


def score_similarity(first: ArrayLike, second: ArrayLike, scores: ArrayLike) -> SimilarityScores:
    """Scores the cosines of pairs by the scores that people gave the pairs.

        alignment = mean over related pairs |x - y|^2

    Related are the pairs whose score is above 4/5 of the way from the lowest to the highest: above 4 where they reach
    from 0 to 5. Uniformity is that of all vectors that differ.

    Args:
      first, second: [N, D] vectors of both texts of each pair, N at least 2.
      scores: [N].

    Raises:
      UserError: shapes that do not fit, fewer than two pairs, or numbers that are not finite.

    Source: Spearman of all pairs, Gao et al. 2021, "SimCSE", appendix B; alignment, Wang and Isola 2020, "Understanding
    Contrastive Representation Learning through Alignment and Uniformity on the Hypersphere", eq. 1 with alpha = 2, on
    the related pairs of STS-B as in SimCSE's figure 2.
    """
    x, y, given = (np.asarray(each, np.float64) for each in (first, second, scores))
    if x.ndim != 2 or x.shape != y.shape or given.shape != x.shape[:1]:
        raise UserError(
            f"vectors have the shapes {x.shape} and {y.shape} and scores {given.shape}; accepted: [N, D] both and [N]."
        )
    x, y = unit_vectors(x), unit_vectors(y)
    found = score_numbers(given, np.sum(x * y, axis=1))
    low, high = given.min(), given.max()
    related = given > low + _RELATED * (high - low)
    alignment = float(np.mean(np.sum((x - y)[related] ** 2, axis=1))) if related.any() else float("nan")
    return SimilarityScores(
        found.spearman, found.pearson, alignment, uniformity(np.unique(np.concatenate([x, y]), axis=0))
    )


def uniformity(vectors: ArrayLike) -> float:
    """How evenly vectors are spread: log of the mean over all pairs of

        exp(-2 |x - y|^2)

    of unit vectors; 0 of vectors that are all alike, and of fewer than two.

    Args:
      vectors: [N, D]; their lengths do not count.

    Source: Wang and Isola 2020, eq. 2 with t = 2, over the pairs of different vectors as in their code.
    """
    x = unit_vectors(np.asarray(vectors, np.float64))
    count, total = len(x), 0.0
    if count < 2:
        return 0.0
    for start in range(0, count, _CHUNK):
        squares = 2 - 2 * x[start : start + _CHUNK] @ x.T
        total += float(np.exp(-2 * np.maximum(squares, 0)).sum())
    return min(0.0, float(np.log((total - count) / (count * (count - 1)))))  # each vector is at 0 from itself


def word_overlap(first: Sequence[str], second: Sequence[str]) -> NDArray[np.float64]:
    """[N] shared words of pairs of texts over all their words, each once: what is known of them without a model."""
    words = [[set(re.findall(r"\w+", text.lower())) for text in texts] for texts in (first, second)]
    return np.array([len(a & b) / max(len(a | b), 1) for a, b in zip(*words, strict=True)])
