"""What a task is judged by, found by its name.

A further task is one more `TaskKind` here: what it reports on a split, and what its reports are compared by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from numpy.typing import NDArray

from lmobj.evaluate._row_reports import CLASSIFICATION, REGRESSION
from lmobj.evaluate._task_report import TaskKind, TaskReport
from lmobj.objectives import Task

__all__ = ["TASKS", "TASK_METRICS", "task_metrics", "task_report"]

TASKS: dict[Task, TaskKind] = {"classification": CLASSIFICATION, "regression": REGRESSION}

TASK_METRICS: dict[Task, tuple[str, ...]] = {task: kind.figures for task, kind in TASKS.items()}
"""The names of what `task_metrics` gives."""


def task_report(task: Task, outputs: Mapping[str, NDArray], classes: Sequence[str]) -> TaskReport:
    """Figures, a table, a picture and the records of a split's rows.

    Args:
      task: which.
      outputs: what the objective says of its rows, rows first, and `targets` [N, 1].
      classes: names of the classes, where the task has some.
    """
    return TASKS[task].report(outputs, classes)


def task_metrics(task: Task, outputs: Mapping[str, NDArray], classes: Sequence[str]) -> dict[str, float]:
    """The figures of `TASK_METRICS` alone."""
    return task_report(task, outputs, classes).figures
