"""Scores of vectors of sentences, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lmobj.errors import UserError
from lmobj.evaluate import _similarity, score_similarity, uniformity, word_overlap

FIRST = [[1.0, 0.0], [3.0, 0.0], [1.0, 0.0]]
SECOND = [[2.0, 0.0], [1.0, 1.0], [0.0, 3.0]]
"""Cosines 1, 1 / sqrt 2 and 0."""


def test_correlations() -> None:
    found = score_similarity(FIRST, SECOND, [5.0, 1.0, 0.0])
    assert found.spearman == pytest.approx(1)
    # Deviations of the cosines from their mean m = (1 + r) / 3 and of the scores from 2.
    r = math.sqrt(0.5)
    x, y = np.array([1, r, 0]) - (1 + r) / 3, np.array([3, -1, -2])
    assert found.pearson == pytest.approx(x @ y / math.sqrt((x @ x) * (y @ y)))
    assert score_similarity(FIRST, SECOND, [1.0, 5.0, 0.0]).spearman == pytest.approx(0.5)  # 1 - 6 (1 + 1) / (3 * 8)
    assert score_similarity(FIRST, SECOND, [0.0, 1.0, 5.0]).spearman == pytest.approx(-1)


def test_alignment_of_related_pairs() -> None:
    # Above 4 of 0 to 5 is the first alone, whose unit vectors are equal; then the second too, at 2 - 2 / sqrt 2.
    assert score_similarity(FIRST, SECOND, [5.0, 4.0, 0.0]).alignment == pytest.approx(0)
    assert score_similarity(FIRST, SECOND, [5.0, 4.1, 0.0]).alignment == pytest.approx(1 - math.sqrt(0.5))
    # Of -1 to 1, above 0.6.
    assert score_similarity(FIRST, SECOND, [-1.0, 0.7, 1.0]).alignment == pytest.approx(((2 - math.sqrt(2)) + 2) / 2)
    assert math.isnan(score_similarity(FIRST, SECOND, [2.0, 2.0, 2.0]).alignment)


@pytest.mark.parametrize("chunk", [1, 2, 1024])
def test_uniformity(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(_similarity, "_CHUNK", chunk)
    # Squared distances 2, 2 and 4 of unit vectors.
    expected = math.log((2 * math.exp(-4) + math.exp(-8)) / 3)
    assert uniformity([[1.0, 0.0], [0.0, 2.0], [-5.0, 0.0]]) == pytest.approx(expected)
    assert uniformity([[1.0, 2.0]] * 3) == pytest.approx(0, abs=1e-12)
    assert uniformity([[1.0, 2.0]]) == 0


def test_uniformity_is_that_of_vectors_that_differ() -> None:
    """Of the six vectors three are at (1, 0), which count once beside (1, 1) and (0, 1)."""
    squares = [2 - math.sqrt(2), 2 - math.sqrt(2), 2]
    expected = math.log(sum(math.exp(-2 * square) for square in squares) / 3)
    assert score_similarity(FIRST, SECOND, [5.0, 1.0, 0.0]).uniformity == pytest.approx(expected)


def test_shared_words() -> None:
    found = word_overlap(["A cat sat.", "dogs run", ""], ["a cat ran", "it rains", ""])
    np.testing.assert_allclose(found, [2 / 4, 0, 0])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"shapes \(3, 2\) and \(3, 2\) and scores \(2,\)"):
        score_similarity(FIRST, SECOND, [1.0, 2.0])
    with pytest.raises(UserError, match="there are 1 numbers"):
        score_similarity(FIRST[:1], SECOND[:1], [1.0])
