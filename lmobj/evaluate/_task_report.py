"""What is told of a task's model on a split: figures, a table, a picture, and a record of every example."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmobj.evaluate._pictures import Picture

__all__ = ["PROBABILITY_DIGITS", "ExampleScores", "TaskKind", "TaskReport", "f1_of_counts"]

Record = dict[str, Any]

PROBABILITY_DIGITS = 6
"""After the point, in records and predictions."""


@dataclass(frozen=True)
class TaskReport:
    """What a model says on a split, beside what it should.

    figures: scores that are no means over rows.
    header, rows: a table of scores, a row for each class, type or kind of answer; numbers are shown with four digits.
    picture: of all examples; None where none says anything.
    records: gives every example's record in JSON, in the order of the split: `index`, `target`, `prediction`, and
      what the model said in numbers.
    """

    figures: dict[str, float]
    header: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]
    picture: Picture | None
    records: Callable[[], Iterable[Record]]


class ExampleScores(NamedTuple):
    """What a figure is made of, example by example, as `paired_bootstrap` takes it.

    values: [N], whose mean is the figure; or [N, K] with a statistic.
    statistic: means over examples [B, K] -> the figure [B].
    """

    values: NDArray[np.float64]
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None


class TaskKind(NamedTuple):
    """A task as evaluation sees it.

    figures: names of `TaskReport.figures`.
    report: of outputs (arrays with rows first: what the objective says of its rows, and `targets`), of the names of the
      classes, where the task has some, and of what the data set has as reference for the split.
    baselines: of the training split's reference and the held-out one's: figures of answers that do not look at the
      text, by their names.
    scores: figures that systems can be compared by, example by example; of the examples' records. They may be figures
      of the objective too, such as its accuracy.
    """

    figures: tuple[str, ...]
    report: Callable[[Mapping[str, NDArray], Sequence[str], Any], TaskReport]
    baselines: Callable[[Any, Any], dict[str, dict[str, float]]]
    scores: Mapping[str, Callable[[Sequence[Record]], ExampleScores]]


def f1_of_counts(name: str) -> Callable[[Sequence[Record]], ExampleScores]:
    """2 right / (true + found), of the counts [true, found, right] that each record has under a name."""

    def statistic(means: NDArray[np.float64]) -> NDArray[np.float64]:
        true, found, right = means.T
        return np.where(right > 0, 2 * right / np.where(right > 0, true + found, 1), 0.0)

    return lambda records: ExampleScores(np.array([one[name] for one in records], np.float64), statistic)
