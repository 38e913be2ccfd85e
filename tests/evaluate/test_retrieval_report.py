"""Retrieval: the search among a split's texts, by hand; beside `score_retrieval`; its baselines."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lmobj.evaluate import TASKS, relevant_ranks, score_retrieval, task_metrics, task_report
from lmobj.tasks import RetrievalReference

TEXTS = ("which cat", "cat cat", "dog", "which dog", "hen", "the dog")
IDS = np.array([[0, 1, 2], [3, 2, -1], [3, 5, 4]], np.int32)
"""Query 0 has text 1; query 3, in two rows, the texts 2 and 5. Searched are 1, 2, 4 and 5."""
REFERENCE = RetrievalReference(TEXTS, IDS)


def outputs() -> dict[str, np.ndarray]:
    # Similarities of query 0: 1 to text 1, 3 to 2, 2 to 5, 0 to 4: its own is third. Of query 3: 1 to text 2, 0 to 5,
    # 5 to 1, -1 to 4: its own are second and third.
    unit = np.eye(4)
    texts = {1: unit[0], 2: unit[1], 5: unit[2], 4: unit[3], -1: 9 * np.ones(4)}
    queries = {0: np.array([1.0, 3.0, 2.0, 0.0]), 3: np.array([5.0, 1.0, 0.0, -1.0])}
    rows = [[queries[row[0]], *(texts[i] for i in row[1:])] for row in IDS.tolist()]
    return {"embeddings": np.array(rows), "targets": IDS[:, 1:2]}


def test_figures_by_hand() -> None:
    found = task_metrics("retrieval", outputs(), (), REFERENCE)
    gain = [1 / math.log2(1 + i) for i in range(1, 4)]
    ndcg = (gain[2] + (gain[1] + gain[2]) / (gain[0] + gain[1])) / 2
    assert found == {
        "recall_at_1": 0,
        "recall_at_5": 1,
        "recall_at_10": 1,
        "mrr_at_10": pytest.approx((1 / 3 + 1 / 2) / 2),
        "ndcg_at_10": pytest.approx(ndcg),
    }


def test_records_and_what_is_compared() -> None:
    report = task_report("retrieval", outputs(), (), REFERENCE)
    records = list(report.records())
    assert records == [
        {"index": 0, "query": "which cat", "target": ["cat cat"], "prediction": "dog", "ranks": [3], "similarity": 3.0},
        {
            "index": 1,
            "query": "which dog",
            "target": ["dog", "the dog"],
            "prediction": "cat cat",
            "ranks": [2, 3],
            "similarity": 5.0,
        },
    ]
    assert [row[4:] for row in report.rows] == [(2, 4)] * 3
    for name, scores in TASKS["retrieval"].scores.items():
        assert np.mean(scores(records).values) == pytest.approx(report.figures[name])


def test_a_part_of_the_split_is_searched_alone() -> None:
    """Of the first row: query 0, and the texts 1 and 2."""
    part = {name: x[:1] for name, x in outputs().items()}
    assert task_metrics("retrieval", part, (), REFERENCE)["mrr_at_10"] == 0.5


def test_ranks_are_those_of_score_retrieval() -> None:
    draw = np.random.default_rng(0)
    scores = draw.integers(0, 5, (20, 30)).astype(float)  # with many ties
    relevance = draw.random((20, 30)) < 0.1
    relevance[:, 0] = True
    ranks = relevant_ranks(scores, [np.flatnonzero(row).tolist() for row in relevance])
    wanted = score_retrieval(scores, relevance, ks=(3,))
    assert np.mean([1 / own[0] for own in ranks]) == pytest.approx(wanted.mrr)
    assert np.mean([np.mean(np.array(own) <= 3) for own in ranks]) == pytest.approx(wanted.recall[3])


def test_baselines() -> None:
    found = TASKS["retrieval"].baselines(REFERENCE, REFERENCE)
    # BM25: query 0 shares cat with text 1 alone. Query 3 shares dog with 2 and 5, both of which are its own.
    assert found["BM25"]["mrr_at_10"] == 1
    assert found["BM25"]["recall_at_1"] == pytest.approx((1 + 1 / 2) / 2)
    # At random among 4: 1 / rank is (1 + 1/2 + 1/3 + 1/4) / 4 for one text; of two, the first comes at rank 1 with
    # probability 1/2, 2 with 1/2 2/3, 3 with 1/2 1/3.
    assert found["chance"]["recall_at_1"] == 1 / 4
    assert found["chance"]["mrr_at_10"] == pytest.approx(((25 / 12) / 4 + (1 / 2 + 1 / 6 + 1 / 18)) / 2)
    draw = np.random.default_rng(0)
    gains = 1 / np.log2(np.arange(2, 6))
    drawn = [gains[draw.permutation(4)[:2]].sum() / gains[:2].sum() for _ in range(4000)]
    expected = (gains.mean() + np.mean(drawn)) / 2
    assert found["chance"]["ndcg_at_10"] == pytest.approx(expected, abs=0.01)


def test_bm25_by_hand() -> None:
    """Words in Chinese are characters; a rarer word and a shorter text count more."""
    texts = ("猫 cat", "猫 dog", "cat cat bird bird bird", "狗 cat")
    from lmobj.evaluate import _retrieval_report

    search = _retrieval_report._Search.among(np.array([[0, 1], [0, 2], [0, 3]], np.int32))
    (scores,) = _retrieval_report._bm25(search, texts)(slice(None))

    def score(n: int, f: int, length: int) -> float:
        idf = math.log(1 + (3 - n + 0.5) / (n + 0.5))
        return idf * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * length / 3))  # texts of 2, 5 and 2 words

    np.testing.assert_allclose(scores, [score(1, 1, 2), score(2, 2, 5), score(2, 1, 2)])
