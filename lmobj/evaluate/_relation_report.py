"""Report of relation classification: that of classification, and F1 without the class that is no relation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lmobj.evaluate._class_scores import confusion_matrix, score_classes
from lmobj.evaluate._row_reports import classification_report, label_nll, right_answers
from lmobj.evaluate._task_report import Record, TaskKind, TaskReport, f1_of_counts
from lmobj.tasks import RelationReference

__all__ = ["RELATION"]


def _report(outputs: Mapping[str, NDArray], classes: Sequence[str], reference: RelationReference) -> TaskReport:
    """Of `logits` [N, C] and `targets` [N, 1]: as of classification, with micro and macro F1 of relations alone.

        P = right / found    R = right / true        of the relations that were found, are true, and are both

    which is how TACRED is scored (Zhang et al. 2017). Macro F1 is the mean over the relations that occur among targets
    or predictions, without that class too, as in SemEval-2010 Task 8 (Hendrickx et al. 2010).
    """
    report = classification_report(outputs, classes, reference)
    targets, given = outputs["targets"][:, 0], np.argmax(outputs["logits"], axis=-1)
    none = reference.no_relation
    precision, recall, micro = _micro(confusion_matrix(targets, given, len(classes)), none)
    title = "micro average" if none is None else f"micro average without {classes[none]}"
    counted = np.arange(len(classes)) != none
    support = int(counted[targets].sum())

    def records() -> Iterator[Record]:
        for record, target, guess in zip(report.records(), targets.tolist(), given.tolist(), strict=True):
            true, found = target != none, guess != none
            yield record | {"relations": [int(true), int(found), int(true and found and target == guess)]}

    return dataclasses.replace(
        report,
        figures={"macro_f1": _macro(targets, given, classes, none), "micro_f1": micro},
        rows=[*report.rows, (title, precision, recall, micro, support)],
        records=records,
    )


def _micro(confusion: NDArray[np.int64], none: int | None) -> tuple[float, float, float]:
    """Precision, recall and F1 of the relations together; 0 where there is nothing to divide by."""
    counted = np.arange(len(confusion)) != none
    right, true, found = np.diag(confusion)[counted].sum(), confusion[counted].sum(), confusion[:, counted].sum()
    return float(right / max(found, 1)), float(right / max(true, 1)), float(2 * right / max(true + found, 1))


def _macro(targets: NDArray, given: NDArray, classes: Sequence[str], none: int | None) -> float:
    """Mean F1 of the relations that occur among targets or predictions; 0 where none does."""
    occurs = sorted({*targets.tolist(), *given.tolist()} - {none})
    by_class = score_classes(targets, given, classes).classes
    return float(np.mean([by_class[index].f1 for index in occurs])) if occurs else 0.0


def _most_frequent_relation(trained: RelationReference, held_out: RelationReference) -> dict[str, dict[str, float]]:
    """Every text has the class that training has most often."""
    most = int(np.argmax(np.bincount(trained.labels)))
    names = [str(index) for index in range(int(max(trained.labels.max(), held_out.labels.max(), 1)) + 1)]
    targets, given = held_out.labels, np.full_like(held_out.labels, most)
    none = held_out.no_relation
    figures = {
        "accuracy": float(np.mean(targets == most)),
        "macro_f1": _macro(targets, given, names, none),
        "micro_f1": _micro(confusion_matrix(targets, given, len(names)), none)[2],
    }
    return {"most frequent class": figures}


RELATION = TaskKind(
    figures=("macro_f1", "micro_f1"),
    report=_report,
    baselines=_most_frequent_relation,
    scores={"accuracy": right_answers, "micro_f1": f1_of_counts("relations"), "nll": label_nll},
)
