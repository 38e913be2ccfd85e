"""The figures of tasks from what objectives put out."""

from __future__ import annotations

import numpy as np
import pytest

from lmobj.evaluate import TASK_METRICS, task_metrics


def test_classification_by_hand() -> None:
    # Targets 0 0 1 2, guesses 0 1 1 1. F1: class 0 has P = 1, R = 1/2, so 2/3; class 1 P = 1/3, R = 1, so 1/2; class 2
    # none. Matthews: s = 4, right = 2, t = (2, 1, 1), p = (1, 3, 0): (4 * 2 - (2 + 3)) / sqrt((16 - 10) (16 - 6)).
    logits = np.eye(3)[[0, 1, 1, 1]]
    found = task_metrics("classification", {"logits": logits, "targets": np.array([[0], [0], [1], [2]])}, "abc")
    assert found == {
        "macro_f1": pytest.approx((2 / 3 + 1 / 2) / 3),
        "matthews": pytest.approx(3 / 60**0.5),
    }
    assert tuple(found) == TASK_METRICS["classification"]


def test_regression_by_hand() -> None:
    # x = 1 2 3, y = 1 2 9: covariance 8, variances 2 and 38: r = 8 / sqrt(76); ranks agree.
    outputs = {"scores": np.array([1.0, 2.0, 9.0]), "targets": np.array([[1.0], [2.0], [3.0]])}
    found = task_metrics("regression", outputs, ())
    assert found == {"pearson": pytest.approx(8 / 76**0.5), "spearman": pytest.approx(1.0)}
    assert tuple(found) == TASK_METRICS["regression"]
    assert task_metrics("regression", {name: x[:1] for name, x in outputs.items()}, ()) == {}
