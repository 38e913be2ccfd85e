"""How diverse and how repetitive generated texts are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["TextStatistics", "text_statistics"]


class TextStatistics(NamedTuple):
    """Diversity and repetition of a set of token lists. Shares are in [0, 1], and 0 where there is no n-gram."""

    distinct_1: float
    """Distinct tokens over all tokens, of all texts together (Li et al. 2016)."""
    distinct_2: float
    """The same for pairs of neighbours."""
    distinct_3: float
    """The same for triples."""
    repeated_4: float
    """1 - distinct 4-grams / 4-grams, of each text by itself, averaged over texts that have one (Welleck et al. 2020,
    seq-rep-4)."""
    longest_repeat: int
    """Length of the longest run of tokens that occurs twice in one text; occurrences may overlap."""


def text_statistics(texts: Sequence[ArrayLike]) -> TextStatistics:
    """Statistics of generated texts, given as one-dimensional arrays of token ids without padding.

    Source: distinct-n, Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models",
    section 5; seq-rep-n, Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training", section 6.
    """
    arrays = [np.asarray(text, np.int64) for text in texts]
    repeated = [1 - _distinct(grams) / len(grams) for grams in (_ngrams(array, 4) for array in arrays) if len(grams)]
    return TextStatistics(
        distinct_1=_distinct_share(arrays, 1),
        distinct_2=_distinct_share(arrays, 2),
        distinct_3=_distinct_share(arrays, 3),
        repeated_4=float(np.mean(repeated)) if repeated else 0.0,
        longest_repeat=max((_longest_repeat(array) for array in arrays), default=0),
    )


def _distinct_share(arrays: list[NDArray[np.int64]], n: int) -> float:
    """Distinct n-grams over all n-grams; none spans two texts."""
    grams = [gram for array in arrays for gram in _ngrams(array, n)]
    return _distinct(grams) / len(grams) if grams else 0.0


def _ngrams(tokens: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """[count, n]: all runs of n tokens."""
    if len(tokens) < n:
        return np.zeros((0, n), np.int64)
    return np.lib.stride_tricks.sliding_window_view(tokens, n)


def _distinct(grams: Iterable[NDArray[np.int64]]) -> int:
    return len({gram.tobytes() for gram in grams})


def _longest_repeat(tokens: NDArray[np.int64]) -> int:
    """By bisection: a run that occurs twice has a shorter one that does."""
    low, high = 0, max(len(tokens) - 1, 0)
    while low < high:
        middle = (low + high + 1) // 2
        grams = _ngrams(tokens, middle)
        if _distinct(grams) < len(grams):
            low = middle
        else:
            high = middle - 1
    return low
