"""What a task is judged by that is no mean over its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lmobj.evaluate._class_scores import score_classes, score_numbers
from lmobj.objectives import Task

__all__ = ["TASK_METRICS", "task_metrics"]

TASK_METRICS: dict[Task, tuple[str, ...]] = {
    "classification": ("macro_f1", "matthews"),
    "regression": ("pearson", "spearman"),
}
"""The names of what `task_metrics` gives."""


def task_metrics(task: Task, outputs: Mapping[str, NDArray], classes: Sequence[str]) -> dict[str, float]:
    """The figures of `TASK_METRICS` over the rows of a split.

    Args:
      task: which.
      outputs: what the objective says of its rows, rows first, and `targets` [N, 1].
      classes: names of the classes, where the task has some.
    """
    targets = outputs["targets"][:, 0]
    if task == "classification":
        report = score_classes(targets, np.argmax(outputs["logits"], axis=-1), classes)
        return {"macro_f1": report.macro_f1, "matthews": report.matthews}
    if len(targets) < 2:
        return {}
    scores = score_numbers(targets, outputs["scores"])
    return {"pearson": scores.pearson, "spearman": scores.spearman}
