"""The figures of tasks from what objectives put out."""

from __future__ import annotations

import numpy as np
import pytest

from lmobj.evaluate import TASK_METRICS, TASKS, task_metrics, task_report


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


def test_the_table_of_classes_by_hand() -> None:
    # As above, and a class d that is nowhere: no part of the macro average.
    logits = np.eye(4)[[0, 1, 1, 1]]
    found = task_report("classification", {"logits": logits, "targets": np.array([[0], [0], [1], [2]])}, "abcd")
    precision, recall, f1 = (1, 1 / 3, 0), (1 / 2, 1, 0), (2 / 3, 1 / 2, 0)
    assert [tuple(row) for row in found.rows] == [
        ("a", 1, 1 / 2, pytest.approx(2 / 3), 2),
        ("b", pytest.approx(1 / 3), 1, 1 / 2, 1),
        ("c", 0, 0, 0, 1),
        ("d", 0, 0, 0, 0),
        ("macro average", *(pytest.approx(sum(x) / 3) for x in (precision, recall, f1)), 4),
        ("weighted average", *(pytest.approx((2 * x[0] + x[1]) / 4) for x in (precision, recall, f1)), 4),
    ]
    records = list(found.records())
    assert [(one["index"], one["target"], one["prediction"]) for one in records] == [
        (0, "a", "a"), (1, "a", "b"), (2, "b", "b"), (3, "c", "b"),
    ]  # fmt: skip
    # softmax(1, 0, 0, 0) = e / (e + 3), 1 / (e + 3), ...
    p = np.array([np.e, 1, 1, 1]) / (np.e + 3)
    assert records[0]["probabilities"] == {name: pytest.approx(x, abs=1e-6) for name, x in zip("abcd", p, strict=True)}


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_examples_scores_make_the_figures(task: str) -> None:
    """Over all examples and over resamples of them, where the report of the resample has the figure."""
    rng = np.random.default_rng(0)
    if task == "classification":
        outputs = {"logits": rng.normal(size=(40, 3)), "targets": rng.integers(0, 3, (40, 1))}
    else:
        outputs = {"scores": 1e4 + rng.normal(size=40), "targets": 3 + rng.normal(size=(40, 1))}
    records = list(TASKS[task].report(outputs, "abc", None).records())
    for drawn in (np.arange(40), rng.integers(0, 40, 40), np.full(40, 7)):
        again = {name: x[drawn] for name, x in outputs.items()}
        figures = task_metrics(task, again, "abc")
        if task == "classification":
            logits, targets = again["logits"], again["targets"][:, 0]
            chosen = np.log(np.exp(logits).sum(1)) - logits[np.arange(40), targets]
            figures |= {"accuracy": np.mean(logits.argmax(1) == targets), "nll": chosen.mean()}
        else:
            figures |= {"mse": np.mean((again["scores"] - again["targets"][:, 0]) ** 2)}
        for name, scores in TASKS[task].scores.items():
            values, statistic = scores(records)
            means = values[drawn].mean(0, keepdims=True)
            found = means if statistic is None else statistic(means)
            assert found == pytest.approx(figures[name], abs=1e-6 if name == "pearson" else 1e-12), (name, drawn)
