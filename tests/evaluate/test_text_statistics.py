"""Text statistics: by hand, and the longest repeat against every pair of places."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lmobj.errors import UserError
from lmobj.evaluate import distinct_share, repeated_share, self_bleu, text_statistics


def test_by_hand() -> None:
    # 1 2 1 2 1 2: tokens 1 2; pairs 12 21; triples 121 212; of three 4-grams 1212 2121 1212 two are distinct.
    # 1 3: tokens 1 3, pair 13. Together 3 of 8 tokens, 3 of 6 pairs, 2 of 4 triples. 1 2 1 2 occurs twice, overlapping.
    statistics = text_statistics([[1, 2, 1, 2, 1, 2], [1, 3]])
    assert statistics.distinct_1 == 3 / 8
    assert statistics.distinct_2 == 3 / 6
    assert statistics.distinct_3 == 2 / 4
    assert statistics.repeated_4 == pytest.approx(1 / 3, rel=1e-15)  # the second text has no 4-gram and does not count
    assert statistics.longest_repeat == 4


def test_texts_are_not_read_across() -> None:
    apart = text_statistics([[1, 2, 3], [1, 2, 3]])
    assert apart.longest_repeat == 0
    assert apart.distinct_2 == 2 / 4
    # Every 4-gram of the first text repeats but one: 3 grams, 1 distinct; the second has none that repeats.
    assert text_statistics([[5] * 6, [1, 2, 3, 4, 5]]).repeated_4 == pytest.approx((2 / 3 + 0) / 2, rel=1e-15)


def test_extremes() -> None:
    assert text_statistics([]) == (0.0, 0.0, 0.0, 0.0, 0)
    assert text_statistics([[]]) == (0.0, 0.0, 0.0, 0.0, 0)
    assert text_statistics([[7]]) == (1.0, 0.0, 0.0, 0.0, 0)
    assert text_statistics([[7] * 100]) == (0.01, 1 / 99, 1 / 98, 96 / 97, 99)


@pytest.mark.parametrize("vocab_size", [2, 4, 30])
def test_longest_repeat_equals_the_search_over_all_pairs(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    for length in (2, 3, 10, 60):
        text = rng.integers(0, vocab_size, length).tolist()
        longest = 0
        for i in range(length):
            for j in range(i + 1, length):
                run = 0
                while j + run < length and text[i + run] == text[j + run]:
                    run += 1
                longest = max(longest, run)
        assert text_statistics([text]).longest_repeat == longest


def test_shares_of_any_length_by_hand() -> None:
    # 5-grams of 1 2 1 2 1 2 1: 12121 21212 12121, of which two are distinct.
    texts = [[1, 2, 1, 2, 1, 2, 1], [3]]
    assert distinct_share(texts, 5) == 2 / 3
    assert repeated_share(texts, 5) == pytest.approx(1 / 3, rel=1e-15)
    assert repeated_share(texts, 8) == distinct_share(texts, 8) == 0
    assert repeated_share(texts, 4) == text_statistics(texts).repeated_4
    for share in (distinct_share, repeated_share, self_bleu):
        with pytest.raises(UserError, match="n is 0"):
            share(texts, 0)


def test_self_bleu_by_hand() -> None:
    assert self_bleu([[1, 2, 3, 4]] * 3) == pytest.approx(1, rel=1e-15)
    assert self_bleu([[1, 2], [3, 4]]) == 0
    # 1 1 2 with 1 2 3: tokens 1 (once, as often as there) and 2 of 3, pairs 12 of 11 12. The other: 1 2 of 3, 12 of 2.
    # Both have the length of their reference, so each is sqrt(2/3 * 1/2).
    assert self_bleu([[1, 1, 2], [1, 2, 3]], 2) == pytest.approx(math.sqrt(1 / 3), rel=1e-14)
    # 1 2 with 1 3 1: token 1 of 2; no pair of 1, so 0.1; shorter, so exp(1 - 3/2). The other: token 1 once of 3, 0.1 of
    # 2 pairs, longer.
    expected = [math.sqrt(1 / 2 * 0.1) * math.exp(-1 / 2), math.sqrt(1 / 3 * 0.05)]
    assert self_bleu([[1, 2], [1, 3, 1]], 2) == pytest.approx(np.mean(expected), rel=1e-14)
    with pytest.raises(UserError, match="1 texts; accepted: at least 2"):
        self_bleu([[1]])
    assert self_bleu([[], [1], [1]]) == pytest.approx(2 * (0.1**3) ** 0.25 / 3, rel=1e-14)


def plain_bleu(text: list[int], others: list[list[int]], n: int) -> float:
    """Papineni's formulas, n-gram by n-gram."""
    product = 1.0
    for m in range(1, n + 1):
        grams = [tuple(text[i : i + m]) for i in range(len(text) - m + 1)]
        common = 0
        for gram in set(grams):
            most = max(sum(tuple(o[i : i + m]) == gram for i in range(len(o) - m + 1)) for o in others)
            common += min(grams.count(gram), most)
        if m == 1 and not common:
            return 0.0
        product *= (common or 0.1) / max(len(grams), 1)
    reference = min((abs(len(o) - len(text)), len(o)) for o in others)[1]
    return min(1.0, math.exp(1 - reference / len(text))) * product ** (1 / n)


def test_self_bleu_against_loops() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        texts = [rng.integers(0, 4, rng.integers(1, 12)).tolist() for _ in range(rng.integers(2, 7))]
        n = int(rng.integers(1, 5))
        each = [plain_bleu(text, texts[:i] + texts[i + 1 :], n) for i, text in enumerate(texts)]
        assert self_bleu(texts, n) == pytest.approx(np.mean(each), rel=1e-12)
