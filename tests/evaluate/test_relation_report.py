"""Figures, baselines and records of relation classification, with and without a class that is no relation."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from sklearn import metrics

from lmobj.evaluate import TASK_METRICS, TASKS, task_report
from lmobj.tasks import Relation, RelationReference

NAMES = ("met", "none", "saw", "won")
TARGETS, GIVEN = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 1, 2, 2, 0])
EXAMPLES = tuple(Relation("a b", (0, 1), (2, 3), NAMES[label]) for label in TARGETS)
REFERENCE = RelationReference(EXAMPLES, TARGETS.astype(np.int32), 1)
OUTPUTS = {"logits": np.eye(4)[GIVEN], "targets": TARGETS[:, None]}


def test_tacred_by_hand() -> None:
    # Relations are true in 4 texts and found in 4 (0, 3, 4, 5), of which 0 and 4 are right: F1 = 4/8. met: 1 of 2 and
    # 2; saw: 1 of 2 and 2; won is nowhere.
    report = task_report("relation", OUTPUTS, NAMES, REFERENCE)
    assert report.figures == {"macro_f1": pytest.approx(1 / 2), "micro_f1": pytest.approx(1 / 2)}
    assert tuple(report.figures) == TASK_METRICS["relation"]
    assert report.rows[-1] == ("micro average without none", 0.5, 0.5, 0.5, 4)
    assert report.picture is not None
    labels = [0, 2, 3]
    assert report.figures["micro_f1"] == metrics.f1_score(TARGETS, GIVEN, labels=labels, average="micro")


def test_without_such_a_class_micro_f1_is_the_accuracy() -> None:
    every = dataclasses.replace(REFERENCE, no_relation=None)
    report = task_report("relation", OUTPUTS, NAMES, every)
    # The F1s of met, none and saw are all 1/2, and 3 of 6 are right.
    assert report.figures == {"macro_f1": pytest.approx(1 / 2), "micro_f1": pytest.approx(3 / 6)}
    assert report.rows[-1][0] == "micro average"


def test_nothing_found_is_a_score_of_0() -> None:
    outputs = {"logits": np.eye(4)[[1] * 6], "targets": np.ones((6, 1), int)}
    assert task_report("relation", outputs, NAMES, REFERENCE).figures == {"macro_f1": 0.0, "micro_f1": 0.0}


def test_records_make_up_the_figures() -> None:
    report = task_report("relation", OUTPUTS, NAMES, REFERENCE)
    records = json.loads(json.dumps(list(report.records())))
    assert [one["relations"] for one in records] == [[1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 1, 0], [1, 1, 1], [1, 1, 0]]
    expected = {"micro_f1": report.figures["micro_f1"], "accuracy": 0.5}
    for name, value in expected.items():
        values, statistic = TASKS["relation"].scores[name](records)
        assert (values.mean(0) if statistic is None else statistic(values.mean(0, keepdims=True))[0]) == value


def test_the_most_frequent_class_by_hand() -> None:
    # met: right twice, found in all 6, true in 4: micro 2 * 2 / (4 + 6); macro of met alone and saw, 2 * 2 / 8 and 0.
    trained = RelationReference(EXAMPLES, np.array([0, 0, 2], np.int32), 1)
    assert TASKS["relation"].baselines(trained, REFERENCE) == {
        "most frequent class": {
            "accuracy": pytest.approx(1 / 3),
            "macro_f1": pytest.approx(1 / 4),
            "micro_f1": pytest.approx(4 / 10),
        }
    }
