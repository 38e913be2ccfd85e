"""Report of retrieval: every query of a split against every text of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmobj.evaluate._retrieval import relevant_ranks
from lmobj.evaluate._task_report import ExampleScores, Record, TaskKind, TaskReport
from lmobj.tasks import RetrievalReference

__all__ = ["RETRIEVAL"]

_DEPTHS = (1, 5, 10)
_CHUNK = 512
"""Queries whose similarities to all texts are in memory at once."""
_K1, _B = 1.2, 0.75
"""Of BM25: how soon further occurrences of a word count less, and how much a text's length counts."""
_TIES = 1e-9
"""Texts that hold the same words of a query are in random order: last, as an own text is put, would be below chance."""
_WORDS = r"(?u)[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+"
"""Words, and single characters of Chinese and Japanese, which put no spaces between words."""


class _Search(NamedTuple):
    """The queries and texts of rows, each once, by their places in the reference."""

    queries: NDArray[np.int32]
    texts: NDArray[np.int32]
    relevant: list[list[int]]
    """Of each query, places in `texts`."""
    query_rows: NDArray[np.intp]
    """A row of each query."""
    text_cells: NDArray[np.intp]
    """Of each text, a place among the texts of all rows, row after row."""

    def without_themselves(self, part: slice, scores: NDArray) -> NDArray:
        """The scores of some queries, -inf where a text is the query itself and does not belong to it."""
        itself = self.texts[None, :] == self.queries[part][:, None]
        for row, own in zip(itself, self.relevant[part], strict=True):
            row[own] = False
        return np.where(itself, -np.inf, scores)

    @staticmethod
    def among(ids: NDArray[np.int32]) -> _Search:
        """Of rows [n, T] of ids, the query first."""
        queries, rows, which = np.unique(ids[:, 0], return_index=True, return_inverse=True)
        cells = ids[:, 1:].reshape(-1)
        there = np.flatnonzero(cells >= 0)
        texts, places = np.unique(cells[there], return_index=True)
        positives = np.searchsorted(texts, ids[:, 1])
        relevant: list[set[int]] = [set() for _ in queries]
        for query, text in zip(which.tolist(), positives.tolist(), strict=True):
            relevant[query].add(text)
        order = np.argsort(rows)
        belong = [sorted(relevant[query]) for query in order]
        return _Search(queries[order], texts, belong, rows[order], there[places])


def _report(outputs: Mapping[str, NDArray], classes: Sequence[str], reference: RetrievalReference) -> TaskReport:
    """Of `embeddings` [n, T, D] of the first n rows, whose products rank texts: figures of the search for each of their
    queries among all of their texts."""
    embeddings = outputs["embeddings"].astype(np.float64)
    search = _Search.among(reference.ids[: len(embeddings)])
    queries = embeddings[search.query_rows, 0]
    texts = embeddings[:, 1:].reshape(-1, embeddings.shape[-1])[search.text_cells]
    ranks, first = _ranked(search, lambda part: queries[part] @ texts.T)

    def records() -> Iterator[Record]:
        for index, (query, own, best) in enumerate(zip(search.queries, search.relevant, first, strict=True)):
            yield {
                "index": index,
                "query": reference.texts[query],
                "target": [reference.texts[search.texts[place]] for place in own],
                "prediction": reference.texts[search.texts[best]],
                "ranks": ranks[index],
                "similarity": float(queries[index] @ texts[best]),
            }

    return TaskReport(
        figures=_figures(ranks),
        header=("among the first", "recall", "nDCG", "MRR", "queries", "texts"),
        rows=[
            (f"{k}", _recall(ranks, k), _ndcg(ranks, k), _mrr(ranks, k), len(ranks), len(search.texts)) for k in _DEPTHS
        ],
        picture=None,
        records=records,
    )


def _ranked(search: _Search, scores: Callable[[slice], NDArray]) -> tuple[list[list[int]], list[int]]:
    """The ranks of each query's own texts, and the first of all texts, from the scores of some queries at a time."""
    ranks, first = [], []
    for start in range(0, len(search.queries), _CHUNK):
        part = slice(start, start + _CHUNK)
        found = search.without_themselves(part, scores(part))
        ranks += relevant_ranks(found, search.relevant[part])
        first += np.argmax(found, axis=1).tolist()
    return ranks, first


def _figures(ranks: Sequence[Sequence[int]]) -> dict[str, float]:
    recalls = {f"recall_at_{k}": _recall(ranks, k) for k in _DEPTHS}
    return {**recalls, "mrr_at_10": _mrr(ranks, 10), "ndcg_at_10": _ndcg(ranks, 10)}


def _recall(ranks: Sequence[Sequence[int]], k: int) -> float:
    return float(np.mean([np.mean(np.asarray(own) <= k) for own in ranks]))


def _mrr(ranks: Sequence[Sequence[int]], k: int) -> float:
    return float(np.mean([_reciprocal(own, k) for own in ranks]))


def _reciprocal(own: Sequence[int], k: int) -> float:
    return 1 / own[0] if own[0] <= k else 0.0


def _ndcg(ranks: Sequence[Sequence[int]], k: int) -> float:
    return float(np.mean([_gain(own, k) / _gain(range(1, len(own) + 1), k) for own in ranks]))


def _gain(ranks: Sequence[int], k: int) -> float:
    return sum(1 / float(np.log2(1 + rank)) for rank in ranks if rank <= k)


def _baselines(trained: RetrievalReference, held_out: RetrievalReference) -> dict[str, dict[str, float]]:
    """A search by words, and one that knows nothing; neither has learnt from the training split."""
    search = _Search.among(held_out.ids)
    bm25, draw = _bm25(search, held_out.texts), np.random.default_rng(0)

    def scores(part: slice) -> NDArray:
        found = bm25(part)
        return found + _TIES * draw.random(found.shape)

    ranks, _ = _ranked(search, scores)
    counts = [len(own) for own in search.relevant]
    return {"BM25": _figures(ranks), "chance": _chance(counts, len(search.texts))}


def _bm25(search: _Search, texts: Sequence[str]) -> Callable[[slice], NDArray]:
    """sum over the query's words of idf * f (k1 + 1) / (f + k1 (1 - b + b |d| / mean |d|)), f of them in the text d,
    with idf = log(1 + (N - n + 1/2) / (n + 1/2)) of a word in n of the N texts that are searched.

    Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond", eq. 3.15; the 1 in the
    logarithm, which keeps it above 0, is Lucene's.
    """
    import scipy.sparse
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(token_pattern=_WORDS)
    searched = [texts[place] for place in search.texts]
    try:
        counts = vectorizer.fit_transform(searched).astype(np.float64).tocsr()
    except ValueError:  # no words at all
        return lambda part: np.zeros((len(search.queries[part]), len(searched)))
    lengths = np.asarray(counts.sum(1)).ravel()
    norm = _K1 * (1 - _B + _B * lengths / lengths.mean())
    frequency = counts.data
    counts.data = frequency * (_K1 + 1) / (frequency + np.repeat(norm, np.diff(counts.indptr)))
    containing = np.bincount(counts.indices, minlength=counts.shape[1])
    idf = np.log1p((len(searched) - containing + 0.5) / (containing + 0.5))
    weighted = (counts @ scipy.sparse.diags(idf)).T.tocsr()

    def scores(part: slice) -> NDArray:
        asked = vectorizer.transform([texts[place] for place in search.queries[part]]).astype(np.float64)
        found: NDArray = (asked @ weighted).toarray()
        return found

    return scores


def _chance(relevant: Sequence[int], texts: int) -> dict[str, float]:
    """What is expected of texts in random order, from the number of each query's own among all."""
    depth = min(10, texts)
    mrr, ndcg = [], []
    for count in relevant:
        # The first of `count` comes at rank i if none is among the i - 1 before.
        none, expected = 1.0, 0.0
        for i in range(1, depth + 1):
            here = min(1.0, count / (texts - i + 1))
            expected += none * here / i
            none *= 1 - here
        mrr.append(expected)
        ndcg.append(count / texts * _gain(range(1, depth + 1), 10) / _gain(range(1, count + 1), 10))
    recalls = {f"recall_at_{k}": min(k, texts) / texts for k in _DEPTHS}
    return {**recalls, "mrr_at_10": float(np.mean(mrr)), "ndcg_at_10": float(np.mean(ndcg))}


def _of_ranks(figure: Callable[[Sequence[Sequence[int]]], float]) -> Callable[[Sequence[Record]], ExampleScores]:
    return lambda records: ExampleScores(np.array([figure([one["ranks"]]) for one in records], np.float64))


RETRIEVAL = TaskKind(
    figures=("recall_at_1", "recall_at_5", "recall_at_10", "mrr_at_10", "ndcg_at_10"),
    report=_report,
    baselines=_baselines,
    scores={
        "mrr_at_10": _of_ranks(lambda ranks: _mrr(ranks, 10)),
        "ndcg_at_10": _of_ranks(lambda ranks: _ndcg(ranks, 10)),
        "recall_at_1": _of_ranks(lambda ranks: _recall(ranks, 1)),
        "recall_at_10": _of_ranks(lambda ranks: _recall(ranks, 10)),
    },
)
