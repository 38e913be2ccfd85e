"""Scores of classes, of several labels at once, and of numbers.

Source: of each score in its function. All are shares or correlations, never per cent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmobj.errors import UserError

__all__ = [
    "ClassReport",
    "ClassScore",
    "MultiLabelScores",
    "RegressionScores",
    "average_precisions",
    "confusion_matrix",
    "score_classes",
    "score_labels",
    "score_numbers",
]


class ClassScore(NamedTuple):
    """One class of a report."""

    name: str
    precision: float
    """Right ones among those given this class; 0 if none is."""
    recall: float
    """Right ones among those of this class; 0 if there is none."""
    f1: float
    """2 P R / (P + R); 0 if both are 0."""
    support: int
    """Examples of this class."""


class ClassReport(NamedTuple):
    """Scores of examples with one class each."""

    accuracy: float
    """Share of right examples."""
    macro_f1: float
    """Mean F1 of the classes that occur among targets or predictions."""
    micro_f1: float
    """F1 of the counts of all classes together; with one class for each example it equals the accuracy."""
    matthews: float
    """Matthews correlation, in [-1, 1]."""
    classes: tuple[ClassScore, ...]
    """Every class, in the order of its number."""
    confusion: NDArray[np.int64]
    """[C, C]: examples of the row's class that were given the column's."""


class MultiLabelScores(NamedTuple):
    """Scores of examples with any number of labels."""

    micro_f1: float
    """F1 of the counts of all labels together."""
    macro_f1: float
    """Mean F1 of all labels; 0 for one that is neither true nor predicted."""
    exact: float
    """Share of examples with all their labels right."""
    by_label: tuple[float, ...]
    """F1 of each label."""


class RegressionScores(NamedTuple):
    """Scores of numbers."""

    pearson: float
    """Linear correlation, in [-1, 1]; 0 if either side is constant."""
    spearman: float
    """Correlation of ranks, equal values having the mean of theirs; 0 if either side is constant."""
    mse: float
    """Mean squared error."""


def confusion_matrix(targets: ArrayLike, predictions: ArrayLike, classes: int) -> NDArray[np.int64]:
    """[C, C]: n_ij = examples of class i that were given class j.

    Args:
      targets, predictions: [N] classes 0 to C - 1.
      classes: C.

    Raises:
      UserError: shapes that differ, no examples, or a class out of range.
    """
    true, given = _same_shape(targets, predictions, 1)
    for name, values in (("targets", true), ("predictions", given)):
        if not np.issubdtype(values.dtype, np.integer) or values.min() < 0 or values.max() >= classes:
            raise UserError(
                f"{name} reach from {values.min()} to {values.max()}; accepted: whole numbers from 0 to {classes - 1}."
            )
    pairs = true.astype(np.int64) * classes + given.astype(np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def score_classes(targets: ArrayLike, predictions: ArrayLike, names: Sequence[str]) -> ClassReport:
    """Scores examples with one class each.

        P_c = n_cc / sum_i n_ic     R_c = n_cc / sum_j n_cj     F1_c = 2 P_c R_c / (P_c + R_c)
        MCC = (s sum_c n_cc - sum_c t_c p_c) / sqrt((s^2 - sum_c p_c^2) (s^2 - sum_c t_c^2))

    with n the confusion matrix, t_c = sum_j n_cj, p_c = sum_i n_ic, s = sum_c t_c; MCC is 0 where its denominator is.

    Args:
      targets, predictions: [N] classes 0 to C - 1.
      names: of the classes, at least two.

    Raises:
      UserError: as for `confusion_matrix`, or fewer than two names.

    Source: Matthews 1975, "Comparison of the predicted and observed secondary structure of T4 phage lysozyme"; for more
    than two classes Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation coefficient". F1:
    van Rijsbergen 1979, "Information Retrieval", chapter 7. The macro average is the mean of F1s, not the F1 of means.
    """
    if len(names) < 2:
        raise UserError(f"there are {len(names)} classes; accepted: at least 2.")
    from sklearn import metrics

    confusion = confusion_matrix(targets, predictions, len(names))
    true, given = np.asarray(targets), np.asarray(predictions)
    labels = list(range(len(names)))
    table = metrics.precision_recall_fscore_support(true, given, labels=labels, average=None, zero_division=0)
    f1, occurs = table[2], confusion.sum(0) + confusion.sum(1) > 0
    return ClassReport(
        accuracy=float(np.trace(confusion) / confusion.sum()),
        macro_f1=float(f1[occurs].mean()),
        micro_f1=float(metrics.f1_score(true, given, labels=labels, average="micro", zero_division=0)),
        matthews=_matthews(confusion),
        classes=tuple(
            ClassScore(name, float(p), float(r), float(f), int(n))
            for name, p, r, f, n in zip(names, *table, strict=True)
        ),
        confusion=confusion,
    )


def score_labels(targets: ArrayLike, probabilities: ArrayLike, *, threshold: float = 0.5) -> MultiLabelScores:
    """Scores examples with any number of labels; a label is predicted if its probability >= threshold.

    Args:
      targets: [N, C] 0 or 1.
      probabilities: [N, C], or logits with a threshold for them.
      threshold: from which a label is predicted.

    Raises:
      UserError: shapes that differ, no examples, a target other than 0 and 1, or NaN.

    Source: micro and macro averages, Lewis 1991, "Evaluating Text Categorization"; Yang 1999, "An Evaluation of
    Statistical Approaches to Text Categorization", section 3.
    """
    true, given = _same_shape(targets, probabilities, 2)
    if not np.isin(true, (0, 1)).all():
        raise UserError("targets have values other than 0 and 1; accepted: whether each label is true.")
    if np.isnan(given).any():
        raise UserError("probabilities are NaN; accepted: numbers.")
    truth, predicted = true.astype(bool), given >= threshold
    right = (truth & predicted).sum(0)
    each = _f1(right, truth.sum(0), predicted.sum(0))
    return MultiLabelScores(
        micro_f1=float(_f1(right.sum(), truth.sum(), predicted.sum())),
        macro_f1=float(each.mean()),
        exact=float((truth == predicted).all(1).mean()),
        by_label=tuple(each.tolist()),
    )


def average_precisions(targets: ArrayLike, scores: ArrayLike) -> NDArray[np.float64]:
    """[C] average precision of each label over the examples sorted by its score; NaN for a label that none has.

        AP = sum_k (R_k - R_(k-1)) P_k

    with P_k and R_k precision and recall where the k highest scores are taken, examples of equal score together.

    Args:
      targets: [N, C] 0 or 1.
      scores: [N, C], of whatever unit.

    Raises:
      UserError: shapes that differ, or no examples.

    Source: Buckley and Voorhees 2000, "Evaluating Evaluation Measure Stability"; without interpolation.
    """
    true, given = _same_shape(targets, scores, 2)
    from sklearn import metrics

    return np.array(
        [
            metrics.average_precision_score(label, score) if label.any() else np.nan
            for label, score in zip(true.T, given.T, strict=True)
        ]
    )


def score_numbers(targets: ArrayLike, predictions: ArrayLike) -> RegressionScores:
    """Scores numbers such as similarities.

        r = sum_i (x_i - mean x) (y_i - mean y) / sqrt(sum_i (x_i - mean x)^2 sum_i (y_i - mean y)^2)

    Spearman's is r of the ranks. Where all targets or all predictions are equal, r has no value; both are 0 then, as of
    a system that tells nothing, so that a mean over runs stays a number.

    Args:
      targets, predictions: [N], N at least 2.

    Raises:
      UserError: shapes that differ, fewer than two examples, or values that are not finite.

    Source: Pearson 1896; Spearman 1904, "The Proof and Measurement of Association between Two Things". Both are what
    GLUE reports of STS-B (Wang et al. 2019).
    """
    true, given = (np.asarray(each, np.float64) for each in _same_shape(targets, predictions, 1))
    if len(true) < 2 or not (np.isfinite(true).all() and np.isfinite(given).all()):
        raise UserError(f"there are {len(true)} numbers, or some are not finite; accepted: at least 2, all finite.")
    mse = float(np.mean((given - true) ** 2))
    if np.ptp(true) == 0 or np.ptp(given) == 0:
        return RegressionScores(0.0, 0.0, mse)
    from scipy import stats

    return RegressionScores(
        float(stats.pearsonr(given, true).statistic), float(stats.spearmanr(given, true).statistic), mse
    )


def _matthews(confusion: NDArray[np.int64]) -> float:
    """The correlation of a confusion matrix. (Scikit-learn's warns where all examples are of one class.)"""
    n = confusion.astype(np.float64)
    true, given, total = n.sum(1), n.sum(0), n.sum()
    scale = np.sqrt((total**2 - given @ given) * (total**2 - true @ true))
    return float((np.trace(n) * total - true @ given) / scale) if scale else 0.0


def _f1(right: NDArray[np.int64], true: NDArray[np.int64], predicted: NDArray[np.int64]) -> NDArray[np.float64]:
    """2 P R / (P + R) = 2 right / (true + predicted); 0 if there is neither."""
    return 2 * right / np.maximum(true + predicted, 1)


def _same_shape(targets: ArrayLike, predictions: ArrayLike, axes: int) -> tuple[NDArray, NDArray]:
    true, given = np.asarray(targets), np.asarray(predictions)
    if true.shape != given.shape or true.ndim != axes or not true.size:
        wanted = "[N]" if axes == 1 else "[N, C]"
        raise UserError(
            f"targets have the shape {true.shape} and predictions {given.shape}; accepted: {wanted} both, not empty."
        )
    return true, given
