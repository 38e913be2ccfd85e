"""Rankings: by hand, against plain loops and scikit-learn's nDCG, and where scores are equal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from lmobj.errors import UserError
from lmobj.evaluate import cosine_scores, score_retrieval


def test_by_hand() -> None:
    scores = [[0.1, 0.9, 0.5, 0.3], [4, 3, 2, 1], [1, 2, 3, 4]]
    relevance = [[2, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    # First query: documents 1, 2, 3, 0, relevance 0, 1, 0, 2. Second: nothing relevant. Third: found at once.
    result = score_retrieval(scores, relevance, ks=(1, 2, 9))
    assert result.queries == 2
    assert result.mrr == (1 / 2 + 1) / 2
    assert result.recall == {1: (0 + 1) / 2, 2: (1 / 2 + 1) / 2, 9: 1}
    assert result.hits == {1: 1 / 2, 2: 1, 9: 1}
    whole = (1 / math.log2(3) + 2 / math.log2(5)) / (2 + 1 / math.log2(3))
    two = (1 / math.log2(3)) / (2 + 1 / math.log2(3))
    assert result.ndcg == pytest.approx({1: 1 / 2, 2: (two + 1) / 2, 9: (whole + 1) / 2}, rel=1e-14)


def test_pairs_by_hand() -> None:
    # Each query's own document: the first of its row, the second, and the last.
    scores = np.array([[0.9, 0.1, 0.0], [0.8, 0.5, 0.2], [0.9, 0.8, 0.7]])
    result = score_retrieval(scores, np.arange(3), ks=(1, 2))
    assert result.recall == result.hits == {1: 1 / 3, 2: 2 / 3}
    assert result.mrr == pytest.approx((1 + 1 / 2 + 1 / 3) / 3, rel=1e-15)
    assert result == score_retrieval(scores, np.eye(3), ks=(1, 2))


def test_a_model_that_scores_all_alike_gains_nothing() -> None:
    result = score_retrieval(np.zeros((5, 5)), np.arange(5), ks=(1, 4, 5))
    assert result.mrr == pytest.approx(1 / 5, rel=1e-15)
    assert result.recall == {1: 0, 4: 0, 5: 1}
    apart = score_retrieval(np.where(np.eye(5), 0.0, -np.inf), np.arange(5), ks=(1,))
    assert apart.recall == {1: 1}


def test_against_loops() -> None:
    rng = np.random.default_rng(0)
    scores, relevance = rng.integers(0, 6, (40, 8)).astype(float), rng.integers(0, 3, (40, 8))
    relevance[:, 2:] = 0  # so that some queries have none
    wanted: dict[str, list[float]] = {"mrr": [], "recall": [], "hits": [], "ndcg": []}
    for row, gains in zip(scores.tolist(), relevance.tolist(), strict=True):
        if not any(gains):
            continue
        ranked = [gain for _, gain in sorted(zip(row, gains, strict=True), key=lambda pair: (-pair[0], pair[1]))]
        wanted["mrr"].append(1 / (1 + next(i for i, gain in enumerate(ranked) if gain)))
        wanted["recall"].append(sum(gain > 0 for gain in ranked[:3]) / sum(gain > 0 for gain in gains))
        wanted["hits"].append(float(any(ranked[:3])))
        dcg = [sum(g / math.log2(i + 2) for i, g in enumerate(order[:3])) for order in (ranked, sorted(gains)[::-1])]
        wanted["ndcg"].append(dcg[0] / dcg[1])
    result = score_retrieval(scores, relevance, ks=(3,))
    assert result.queries == len(wanted["mrr"]) < 40
    assert result.mrr == pytest.approx(np.mean(wanted["mrr"]), rel=1e-14)
    for name in ("recall", "hits", "ndcg"):
        assert getattr(result, name)[3] == pytest.approx(np.mean(wanted[name]), rel=1e-14)


def test_ndcg_is_scikit_learns_without_equal_scores() -> None:
    rng = np.random.default_rng(1)
    scores, relevance = rng.random((30, 12)), rng.integers(0, 4, (30, 12))
    for k, value in score_retrieval(scores, relevance, ks=(1, 3, 12)).ndcg.items():
        assert value == pytest.approx(ndcg_score(relevance, scores, k=k), rel=1e-12)


def test_cosines_by_hand() -> None:
    # (3, 4) has length 5 and (0, 2) length 2: 8 / 10.
    np.testing.assert_allclose(cosine_scores([[3, 4], [0, 0]], [[0, 2], [-3, -4]]), [[0.8, -1], [0, 0]], atol=1e-15)
    with pytest.raises(UserError, match="vectors have the shapes"):
        cosine_scores([[1, 2]], [[1, 2, 3]])


@pytest.mark.parametrize(
    ("scores", "relevance", "ks", "message"),
    [
        ([1.0], [1], (1,), "scores have the shape"),
        ([[np.nan]], [[1]], (1,), "or are NaN"),
        ([[1.0]], [[1]], (0,), "ks is"),
        ([[1.0]], [[1]], (), "ks is"),
        ([[1.0, 2.0]], [2], (1,), "reaches from 2 to 2; accepted: 0 to 1"),
        ([[1.0, 2.0]], [[1]], (1,), r"accepted: \(1, 2\), or \(1,\) integers"),
        ([[1.0, 2.0]], [[1, -1]], (1,), "or is negative"),
        ([[1.0, 2.0]], [[0, 0]], (1,), "no query has a relevant document"),
    ],
)
def test_what_cannot_be_scored_is_refused(scores: Any, relevance: Any, ks: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score_retrieval(scores, relevance, ks)
