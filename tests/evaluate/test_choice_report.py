"""Figures, baselines and records of multiple choice."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lmobj.evaluate import TASKS, task_report
from lmobj.tasks import ChoiceReference, MultipleChoice

EXAMPLES = (
    MultipleChoice("a", ("x", "y", "z"), 2),
    MultipleChoice("b", ("x", "y"), 0),
    MultipleChoice("c", ("x", "y"), 0),
)
REFERENCE = ChoiceReference(EXAMPLES, np.array([False, True, False]))
LOGITS = np.array([[0.0, 1.0, 2.0], [0.0, 1.0, -np.inf], [3.0, 1.0, -np.inf]])


def test_accuracy_of_those_that_fit_and_those_that_do_not() -> None:
    report = task_report("multiple_choice", {"logits": LOGITS}, ("0", "1", "2"), REFERENCE)
    assert report.rows == [("all", pytest.approx(2 / 3), 3), ("whole", 1.0, 2), ("cut to fit", 0.0, 1)]
    part = task_report("multiple_choice", {"logits": LOGITS[:1]}, ("0", "1", "2"), REFERENCE)
    assert part.rows == [("all", 1.0, 1), ("whole", 1.0, 1)]
    records = json.loads(json.dumps(list(report.records()), allow_nan=False))
    assert [(one["target"], one["prediction"], len(one["logits"])) for one in records] == [
        (2, 2, 3),
        (0, 1, 2),
        (0, 0, 2),
    ]
    scores = TASKS["multiple_choice"].scores
    assert scores["accuracy"](records).values.tolist() == [1, 0, 1]
    # log(1 + e^-1 + e^-2), log(1 + e) and log(1 + e^-2).
    expected = [np.log(1 + np.exp(-1) + np.exp(-2)), np.log(1 + np.e), np.log(1 + np.exp(-2))]
    np.testing.assert_allclose(scores["nll"](records).values, expected)


def test_baselines_by_hand() -> None:
    # Place 1 is right most often in training, and nowhere here; by lot 1/3, 1/2 and 1/2.
    trained = ChoiceReference((MultipleChoice("d", ("x", "y"), 1),), np.array([False]))
    assert TASKS["multiple_choice"].baselines(trained, REFERENCE) == {
        "most frequent place": {"accuracy": 0.0},
        "chance": {"accuracy": pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)},
    }
