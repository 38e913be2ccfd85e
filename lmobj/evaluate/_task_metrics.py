"""What a task is judged by, found by its name.

A further task is one more `TaskKind` here: what it reports on a split, and what its reports are compared by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from lmobj.evaluate._answer_report import EXTRACTIVE_QA
from lmobj.evaluate._choice_report import MULTIPLE_CHOICE
from lmobj.evaluate._label_report import MULTI_LABEL
from lmobj.evaluate._relation_report import RELATION
from lmobj.evaluate._retrieval_report import RETRIEVAL
from lmobj.evaluate._row_reports import CLASSIFICATION, REGRESSION
from lmobj.evaluate._tag_report import TOKEN_CLASSIFICATION
from lmobj.evaluate._task_report import TaskKind, TaskReport
from lmobj.evaluate._written_scores import SEQUENCE_TO_SEQUENCE
from lmobj.objectives import Task

__all__ = ["TASKS", "TASK_METRICS", "task_metrics", "task_report"]

TASKS: dict[Task, TaskKind] = {
    "classification": CLASSIFICATION,
    "extractive_qa": EXTRACTIVE_QA,
    "multi_label": MULTI_LABEL,
    "multiple_choice": MULTIPLE_CHOICE,
    "regression": REGRESSION,
    "relation": RELATION,
    "retrieval": RETRIEVAL,
    "sequence_to_sequence": SEQUENCE_TO_SEQUENCE,
    "token_classification": TOKEN_CLASSIFICATION,
}

TASK_METRICS: dict[Task, tuple[str, ...]] = {task: kind.figures for task, kind in TASKS.items()}
"""The names of what `task_metrics` gives on any data."""


def task_report(
    task: Task, outputs: Mapping[str, NDArray], classes: Sequence[str], reference: Any = None
) -> TaskReport:
    """Figures, a table, a picture and the records of a split's rows.

    Args:
      task: which.
      outputs: what the objective says of its rows, rows first, and `targets`; or the texts that were `written`.
      classes: names of the classes, where the task has some.
      reference: `reference` of the data set for the split.
    """
    return TASKS[task].report(outputs, classes, reference)


def task_metrics(
    task: Task, outputs: Mapping[str, NDArray], classes: Sequence[str], reference: Any = None
) -> dict[str, float]:
    """The figures of `TASK_METRICS` alone."""
    return task_report(task, outputs, classes, reference).figures
