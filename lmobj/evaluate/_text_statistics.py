"""How diverse and how repetitive generated texts are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmobj.errors import UserError

__all__ = ["TextStatistics", "distinct_share", "repeated_share", "self_bleu", "text_statistics"]

_NO_MATCH = 0.1
"""Counts for no n-gram in common, where the unigrams have some."""


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
    return TextStatistics(
        distinct_1=distinct_share(arrays, 1),
        distinct_2=distinct_share(arrays, 2),
        distinct_3=distinct_share(arrays, 3),
        repeated_4=repeated_share(arrays, 4),
        longest_repeat=max((_longest_repeat(array) for array in arrays), default=0),
    )


def distinct_share(texts: Sequence[ArrayLike], n: int) -> float:
    """distinct-n: distinct n-grams over all n-grams of all texts together; none spans two texts. 0 if there is none.

    Args:
      texts: as for `text_statistics`.
      n: at least 1.

    Source: Li et al. 2016, section 5.
    """
    grams = [gram for text in texts for gram in _ngrams(np.asarray(text, np.int64), _checked(n))]
    return _distinct(grams) / len(grams) if grams else 0.0


def repeated_share(texts: Sequence[ArrayLike], n: int) -> float:
    """seq-rep-n: mean over texts of 1 - distinct n-grams / n-grams; texts without one are left out. 0 if all are.

    Args:
      texts: as for `text_statistics`.
      n: at least 1.

    Source: Welleck et al. 2020, section 6.
    """
    found = [grams for text in texts if len(grams := _ngrams(np.asarray(text, np.int64), _checked(n)))]
    return float(np.mean([1 - _distinct(grams) / len(grams) for grams in found])) if found else 0.0


def self_bleu(texts: Sequence[ArrayLike], n: int = 4) -> float:
    """Mean BLEU of each text with all others as its references, in [0, 1]: high where texts are alike.

        BLEU = min(1, exp(1 - r / c)) (prod_{m=1..n} p_m)^(1/n)
        p_m = sum_g min(count_g, max_others count_g) / m-grams of the text

    with c the length of the text and r that of the reference nearest in length (of two, the shorter). Where nothing is
    in common the count is 0.1, and BLEU is 0 where no token is.

    Args:
      texts: as for `text_statistics`, at least two.
      n: longest n-grams.

    Raises:
      UserError: fewer than two texts, or n below 1.

    Source: Zhu et al. 2018, "Texygen: A Benchmarking Platform for Text Generation Models", section 3; BLEU, Papineni et
    al. 2002, section 2; the count 0.1, Chen and Cherry 2014, "A Systematic Comparison of Smoothing Techniques for
    Sentence-Level BLEU", smoothing 1.
    """
    if len(texts) < 2:
        raise UserError(f"there are {len(texts)} texts; accepted: at least 2, to be compared with one another.")
    arrays = [np.asarray(text, np.int64) for text in texts]
    lengths = np.array([len(array) for array in arrays])
    logs = np.zeros(len(arrays))
    for m in range(1, _checked(n) + 1):
        common = _in_common([Counter(gram.tobytes() for gram in _ngrams(array, m)) for array in arrays])
        if m == 1:
            is_zero = common == 0
        logs += np.log(np.where(common > 0, common, _NO_MATCH) / np.maximum(lengths - m + 1, 1)) / n
    penalty = np.minimum(0.0, 1 - _nearest(lengths) / np.maximum(lengths, 1))
    return float(np.mean(np.where(is_zero, 0.0, np.exp(logs + penalty))))


def _in_common(counts: list[Counter[bytes]]) -> NDArray[np.float64]:
    """Of each text, its n-grams that another text has too, each as often as the text with most of them has it."""
    most: dict[bytes, tuple[int, int, int]] = {}  # count, whose it is, and the largest count of another text
    for owner, each in enumerate(counts):
        for gram, count in each.items():
            first, whose, second = most.get(gram, (0, -1, 0))
            most[gram] = (count, owner, first) if count > first else (first, whose, max(second, count))
    shared = np.zeros(len(counts))
    for owner, each in enumerate(counts):
        for gram, count in each.items():
            first, whose, second = most[gram]
            shared[owner] += min(count, second if whose == owner else first)
    return shared


def _nearest(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of each length, the nearest among the others; of two, the shorter."""
    order = np.argsort(lengths, kind="stable")
    ordered = lengths[order]
    below, above = np.roll(ordered, 1), np.roll(ordered, -1)
    below[0], above[-1] = ordered[1], ordered[-2]  # the ends have one neighbour
    nearest = np.empty_like(lengths)
    nearest[order] = np.where(np.abs(ordered - below) <= np.abs(above - ordered), below, above)
    return nearest


def _checked(n: int) -> int:
    if n < 1:
        raise UserError(f"n is {n}; accepted: at least 1.")
    return n


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
