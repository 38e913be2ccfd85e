"""Report of multi-label classification: labels told by themselves, and sets of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmobj.evaluate._class_scores import average_precisions, score_labels
from lmobj.evaluate._row_reports import right_answers
from lmobj.evaluate._task_report import PROBABILITY_DIGITS, ExampleScores, Record, TaskKind, TaskReport

__all__ = ["MULTI_LABEL"]

_NONE = -1e9
"""The logit of a label of which a model that has diverged says nothing."""


def _report(outputs: Mapping[str, NDArray], classes: Sequence[str], reference: Any) -> TaskReport:
    """Of `logits` [N, C] and `targets` [N, C]: precision, recall, F1 and average precision of every label.

    Mean average precision is that of the labels that some example has.
    """
    from scipy.special import expit
    from sklearn import metrics

    targets = outputs["targets"] > 0
    logits = np.nan_to_num(outputs["logits"].astype(np.float64), nan=_NONE)
    given = logits >= 0
    scores = score_labels(targets, logits, threshold=0.0)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        targets, given, average=None, zero_division=0
    )
    ranked = average_precisions(targets, logits)

    def named(chosen: NDArray[np.bool_]) -> list[str]:
        return [name for name, one in zip(classes, chosen, strict=True) if one]

    def records() -> Iterator[Record]:
        for index, (target, guess, row) in enumerate(zip(targets, given, logits, strict=True)):
            yield {
                "index": index,
                "target": named(target),
                "prediction": named(guess),
                "logits": row.tolist(),
                "probabilities": dict(zip(classes, expit(row).round(PROBABILITY_DIGITS).tolist(), strict=True)),
            }

    return TaskReport(
        figures={
            "micro_f1": scores.micro_f1,
            "macro_f1": scores.macro_f1,
            "mean_average_precision": float(np.nanmean(ranked)) if targets.any() else 0.0,
        },
        header=("label", "precision", "recall", "F1", "average precision", "support"),
        rows=[
            (name, float(p), float(r), float(f), "-" if np.isnan(a) else float(a), int(n))
            for name, p, r, f, a, n in zip(classes, precision, recall, f1, ranked, support, strict=True)
        ],
        picture=None,
        records=records,
    )


def _most_frequent_set(trained: NDArray, held_out: NDArray) -> dict[str, dict[str, float]]:
    """Every text has the set of labels that training has most often."""
    sets, counts = np.unique(trained > 0, axis=0, return_counts=True)
    given = np.broadcast_to(sets[np.argmax(counts)], held_out.shape)
    scores = score_labels(held_out > 0, given.astype(np.float64))
    figures = {"micro_f1": scores.micro_f1, "macro_f1": scores.macro_f1, "exact_match": scores.exact}
    return {"most frequent set of labels": figures}


def _truth(records: Sequence[Record], key: str) -> NDArray[np.bool_]:
    """[N, C]: whether each label is among those of the key."""
    names = list(records[0]["probabilities"])
    return np.array([[name in one[key] for name in names] for one in records])


def _bce(records: Sequence[Record]) -> ExampleScores:
    logits = np.array([one["logits"] for one in records], np.float64)
    signs = np.where(_truth(records, "target"), 1, -1)
    return ExampleScores(np.logaddexp(0, -signs * logits).mean(1))


def _f1(right: NDArray, true_and_given: NDArray) -> NDArray[np.float64]:
    """2 right / (true + given), and 0 where there is neither."""
    return np.where(true_and_given > 0, 2 * right / np.where(true_and_given > 0, true_and_given, 1), 0.0)


def _micro_f1(records: Sequence[Record]) -> ExampleScores:
    true, given = _truth(records, "target"), _truth(records, "prediction")
    counts = np.stack([(true & given).sum(1), true.sum(1) + given.sum(1)], axis=1).astype(np.float64)
    return ExampleScores(counts, lambda means: _f1(means[:, 0], means[:, 1]))


def _macro_f1(records: Sequence[Record]) -> ExampleScores:
    true, given = _truth(records, "target"), _truth(records, "prediction")
    counts = np.concatenate([true & given, true.astype(int) + given], axis=1).astype(np.float64)
    return ExampleScores(counts, lambda means: _f1(*np.split(means, 2, axis=1)).mean(1))


MULTI_LABEL = TaskKind(
    figures=("micro_f1", "macro_f1", "mean_average_precision"),
    report=_report,
    baselines=_most_frequent_set,
    scores={"bce": _bce, "exact_match": right_answers, "macro_f1": _macro_f1, "micro_f1": _micro_f1},
)
