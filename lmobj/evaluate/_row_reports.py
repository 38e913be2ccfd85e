"""Reports of the tasks whose answer is about a whole row: classification and regression."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmobj.evaluate._class_scores import ClassReport, score_classes, score_numbers
from lmobj.evaluate._pictures import ConfusionPicture, ScatterPicture
from lmobj.evaluate._task_report import PROBABILITY_DIGITS, ExampleScores, Record, TaskKind, TaskReport

__all__ = ["CLASSIFICATION", "REGRESSION", "classification_report", "label_nll", "right_answers"]


def classification_report(outputs: Mapping[str, NDArray], classes: Sequence[str], reference: Any) -> TaskReport:
    """Of `logits` [N, C] and `targets` [N, 1]: precision, recall and F1 of every class, and the confusion matrix."""
    targets, logits = outputs["targets"][:, 0], outputs["logits"].astype(np.float64)
    given = np.argmax(logits, axis=-1)
    report = score_classes(targets, given, classes)

    def records() -> Iterator[Record]:
        from scipy.special import softmax

        for index, (target, guess, row) in enumerate(zip(targets, given, logits, strict=True)):
            probabilities = dict(zip(classes, softmax(row).round(PROBABILITY_DIGITS).tolist(), strict=True))
            yield {
                "index": index,
                "target": classes[target],
                "prediction": classes[guess],
                "logits": row.tolist(),
                "probabilities": probabilities,
            }

    return TaskReport(
        figures={"macro_f1": report.macro_f1, "matthews": report.matthews},
        header=("class", "precision", "recall", "F1", "support"),
        rows=[*report.classes, *_averages(report)],
        picture=ConfusionPicture(tuple(classes), report.confusion.tolist()),
        records=records,
    )


def _averages(report: ClassReport) -> Iterator[tuple[str, float, float, float, int]]:
    """Means over the classes that occur among targets or predictions, each alike, and each by its support."""
    scores = np.array([one[1:4] for one in report.classes])
    support = report.confusion.sum(1)
    occurs = (report.confusion.sum(0) + support > 0).astype(np.float64)
    for name, weights in (("macro average", occurs), ("weighted average", support)):
        precision, recall, f1 = (float(x) for x in np.average(scores, axis=0, weights=weights))
        yield name, precision, recall, f1, int(support.sum())


def _regression(outputs: Mapping[str, NDArray], classes: Sequence[str], reference: Any) -> TaskReport:
    """Of `scores` [N] and `targets` [N, 1]: correlations and errors, and a scatter. A single row has no correlation."""
    targets, scores = outputs["targets"][:, 0].astype(np.float64), outputs["scores"].astype(np.float64)

    def records() -> Iterator[Record]:
        for index, (target, score) in enumerate(zip(targets.tolist(), scores.tolist(), strict=True)):
            yield {"index": index, "target": target, "prediction": score}

    figures = {}
    if len(targets) > 1:
        found = score_numbers(targets, scores)
        figures = {"pearson": found.pearson, "spearman": found.spearman}
    errors = np.abs(scores - targets)
    return TaskReport(
        figures=figures,
        header=("", "mean", "standard deviation", "smallest", "largest"),
        rows=[
            (name, float(x.mean()), float(x.std()), float(x.min()), float(x.max()))
            for name, x in (("true", targets), ("predicted", scores), ("absolute error", errors))
        ],
        picture=ScatterPicture.of(targets, scores),
        records=records,
    )


def _most_frequent_class(trained: NDArray, held_out: NDArray) -> dict[str, dict[str, float]]:
    most = np.argmax(np.bincount(trained))
    return {"most frequent class": {"accuracy": float(np.mean(held_out == most))}}


def _mean(trained: NDArray, held_out: NDArray) -> dict[str, dict[str, float]]:
    mean = np.mean(trained, dtype=np.float64)
    return {"mean of the training": {"mse": float(np.mean(np.square(held_out - mean)))}}


def right_answers(records: Sequence[Record]) -> ExampleScores:
    """1 where the prediction is the target, else 0."""
    return ExampleScores(np.array([one["target"] == one["prediction"] for one in records], np.float64))


def label_nll(records: Sequence[Record]) -> ExampleScores:
    """-log p of the target's class."""
    from scipy.special import log_softmax

    places = [list(one["probabilities"]).index(one["target"]) for one in records]
    logits = np.array([one["logits"] for one in records], np.float64)
    return ExampleScores(-log_softmax(logits, axis=1)[np.arange(len(places)), places])


def _counts(records: Sequence[Record]) -> NDArray[np.float64]:
    """[N, 3 C]: of each class, whether an example is of it, was given it, and both."""
    names = list(records[0]["probabilities"])
    true, given = (np.array([[one[key] == name for name in names] for one in records]) for key in _SIDES)
    return np.concatenate([true, given, true & given], axis=1).astype(np.float64)


_SIDES = ("target", "prediction")


def _macro_f1(records: Sequence[Record]) -> ExampleScores:
    def statistic(means: NDArray[np.float64]) -> NDArray[np.float64]:
        true, given, right = np.split(means, 3, axis=1)
        occurs = true + given > 0
        f1 = 2 * right / np.where(occurs, true + given, 1)
        return f1.sum(1) / occurs.sum(1)

    return ExampleScores(_counts(records), statistic)


def _matthews(records: Sequence[Record]) -> ExampleScores:
    def statistic(means: NDArray[np.float64]) -> NDArray[np.float64]:
        true, given, right = np.split(means, 3, axis=1)
        squared = (1 - (given**2).sum(1)) * (1 - (true**2).sum(1))
        # Shares of one class alone leave a rounding error in place of 0.
        there = squared > 1e-12
        return np.where(there, (right.sum(1) - (true * given).sum(1)) / np.sqrt(np.where(there, squared, 1)), 0.0)

    return ExampleScores(_counts(records), statistic)


def _squared_error(records: Sequence[Record]) -> ExampleScores:
    true, given = (np.array([one[key] for one in records], np.float64) for key in _SIDES)
    return ExampleScores((given - true) ** 2)


def _pearson(records: Sequence[Record]) -> ExampleScores:
    def statistic(means: NDArray[np.float64]) -> NDArray[np.float64]:
        x, y, xx, yy, xy = means.T
        squared = (xx - x * x) * (yy - y * y)
        there = squared > 1e-24
        return np.where(there, (xy - x * y) / np.sqrt(np.where(there, squared, 1)), 0.0)

    # Correlations do not depend on unit and origin, the rounding of moments does.
    x, y = (np.array([one[key] for one in records], np.float64) for key in _SIDES)
    x, y = ((each - each.mean()) / (each.std() or 1.0) for each in (x, y))
    return ExampleScores(np.stack([x, y, x * x, y * y, x * y], axis=1), statistic)


CLASSIFICATION = TaskKind(
    figures=("macro_f1", "matthews"),
    report=classification_report,
    baselines=_most_frequent_class,
    scores={"accuracy": right_answers, "macro_f1": _macro_f1, "matthews": _matthews, "nll": label_nll},
)
REGRESSION = TaskKind(
    figures=("pearson", "spearman"),
    report=_regression,
    baselines=_mean,
    scores={"mse": _squared_error, "pearson": _pearson},
)
