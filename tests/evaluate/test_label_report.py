"""Figures, baselines and records of multi-label classification."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lmobj.evaluate import TASK_METRICS, TASKS, average_precisions, task_report

TARGETS = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]], np.float32)
LOGITS = np.array([[2, -1, -3], [1, -2, -1], [-1, 3, -1], [0, -3, -2]], np.float32)
NAMES = ("a", "b", "c")


def report():
    return task_report("multi_label", {"logits": LOGITS, "targets": TARGETS}, NAMES)


def test_figures_by_hand() -> None:
    # Told: a in rows 0, 1, 3 (a logit of 0 tells); b in row 2. a: 2 right of 3 told and 2 true, F1 = 4/5; b: 1 of 1 and
    # 2, F1 = 2/3; c: none, 0. All: 3 right, 4 told, 4 true. Average precision: a is ranked 0, 1, 3, 2 and its own are
    # first: 1. b is ranked 2, 0, 1, 3: (1 + 2/3) / 2. No text is of c.
    found = report().figures
    assert found == {
        "micro_f1": pytest.approx(6 / 8),
        "macro_f1": pytest.approx((4 / 5 + 2 / 3) / 3),
        "mean_average_precision": pytest.approx((1 + 5 / 6) / 2),
    }
    assert tuple(found) == TASK_METRICS["multi_label"]
    assert report().rows[0] == ("a", pytest.approx(2 / 3), 1.0, pytest.approx(4 / 5), 1.0, 2)
    assert report().rows[2] == ("c", 0.0, 0.0, 0.0, "-", 0)


def test_average_precision_of_equal_scores() -> None:
    # Both examples have the same score: precision 1/2 at recall 1.
    np.testing.assert_allclose(average_precisions([[1], [0]], [[2.0], [2.0]]), [0.5])
    assert np.isnan(average_precisions([[0], [0]], [[2.0], [1.0]])).all()


def test_the_most_frequent_set_by_hand() -> None:
    # {a} is most frequent in training. Of the four texts one is {a}; a is right twice, 4 told, 4 true labels.
    trained = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    assert TASKS["multi_label"].baselines(trained, TARGETS) == {
        "most frequent set of labels": {
            "micro_f1": pytest.approx(2 * 2 / 8),
            "macro_f1": pytest.approx((2 * 2 / 6) / 3),
            "exact_match": 0.25,
        }
    }


def test_records_are_json_and_make_up_the_figures() -> None:
    records = json.loads(json.dumps(list(report().records())))
    assert [one["target"] for one in records] == [["a"], ["a", "b"], ["b"], []]
    assert [one["prediction"] for one in records] == [["a"], ["a"], ["b"], ["a"]]
    assert records[0]["probabilities"]["a"] == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-6)
    expected = report().figures | {"exact_match": 0.5}
    signs = np.where(TARGETS > 0, 1, -1)
    expected["bce"] = float(np.log1p(np.exp(-signs * LOGITS)).mean())
    for name, scores in TASKS["multi_label"].scores.items():
        values, statistic = scores(records)
        value = values.mean(0) if statistic is None else statistic(values.mean(0, keepdims=True))[0]
        assert value == pytest.approx(expected[name]), name


def test_a_model_that_has_diverged_tells_nothing() -> None:
    found = task_report("multi_label", {"logits": LOGITS * np.nan, "targets": TARGETS}, NAMES).figures
    assert (found["micro_f1"], found["macro_f1"]) == (0.0, 0.0)
