"""Report of multiple choice: how often the right choice is taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lmobj.evaluate._row_reports import right_answers
from lmobj.evaluate._task_report import PROBABILITY_DIGITS, ExampleScores, Record, TaskKind, TaskReport
from lmobj.tasks import ChoiceReference

__all__ = ["MULTIPLE_CHOICE"]


def _report(outputs: Mapping[str, NDArray], classes: Sequence[str], reference: ChoiceReference) -> TaskReport:
    """Of `logits` [n, K] of the first n examples: accuracy, that of examples which fit into their rows apart."""
    logits = outputs["logits"].astype(np.float64)
    given, count = np.argmax(logits, axis=1), len(logits)
    right, cut = given == reference.labels[:count], reference.cut[:count]

    def records() -> Iterator[Record]:
        from scipy.special import softmax

        for index, (example, guess, row) in enumerate(zip(reference.examples, given.tolist(), logits, strict=False)):
            said = row[: len(example.choices)]
            yield {
                "index": index,
                "context": example.context,
                "choices": example.choices,
                "target": example.label,
                "prediction": guess,
                "logits": said.tolist(),
                "probabilities": softmax(said).round(PROBABILITY_DIGITS).tolist(),
            }

    parts = {"all": np.ones(count, np.bool_), "whole": ~cut, "cut to fit": cut}
    return TaskReport(
        figures={},
        header=("examples", "accuracy", "number"),
        rows=[(name, float(right[part].mean()), int(part.sum())) for name, part in parts.items() if part.any()],
        picture=None,
        records=records,
    )


def _without_reading(trained: ChoiceReference, held_out: ChoiceReference) -> dict[str, dict[str, float]]:
    """The place that is right most often in training, and any place by lot."""
    most = np.argmax(np.bincount(trained.labels))
    chance = np.mean([1 / len(example.choices) for example in held_out.examples])
    return {
        "most frequent place": {"accuracy": float(np.mean(held_out.labels == most))},
        "chance": {"accuracy": float(chance)},
    }


def _nll(records: Sequence[Record]) -> ExampleScores:
    from scipy.special import log_softmax

    return ExampleScores(np.array([-log_softmax(one["logits"])[one["target"]] for one in records], np.float64))


MULTIPLE_CHOICE = TaskKind(
    figures=(), report=_report, baselines=_without_reading, scores={"accuracy": right_answers, "nll": _nll}
)
