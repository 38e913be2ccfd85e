"""Text statistics: by hand, and the longest repeat against every pair of places."""

from __future__ import annotations

import numpy as np
import pytest

from lmobj.evaluate import text_statistics


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
