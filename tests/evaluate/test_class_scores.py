"""Scores of classes, labels and numbers: by hand, against plain loops, and where nothing can be told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics

from lmobj.errors import UserError
from lmobj.evaluate import confusion_matrix, draw_confusion, score_classes, score_labels, score_numbers

TRUE = [0, 0, 0, 1, 1, 2]
GIVEN = [0, 0, 1, 1, 0, 0]


def test_classes_by_hand() -> None:
    report = score_classes(TRUE, GIVEN, ["a", "b", "c", "d"])
    np.testing.assert_array_equal(report.confusion, [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    # a: 2 of 4 given, 2 of 3 true, F1 4/7. b: 1 of 2 and 1 of 2. c: never given. d: nowhere, and not in the mean.
    assert report.classes == (
        ("a", 2 / 4, pytest.approx(2 / 3), pytest.approx(4 / 7), 3),
        ("b", 1 / 2, 1 / 2, 1 / 2, 2),
        ("c", 0, 0, 0, 1),
        ("d", 0, 0, 0, 0),
    )
    assert report.accuracy == report.micro_f1 == 1 / 2
    assert report.macro_f1 == pytest.approx((4 / 7 + 1 / 2 + 0) / 3, rel=1e-14)
    # s = 6, right 3, t = (3, 2, 1), p = (4, 2, 0): (18 - 16) / sqrt((36 - 20) (36 - 14)).
    assert report.matthews == pytest.approx(2 / np.sqrt(16 * 22), rel=1e-14)


def test_two_classes_have_matthews_own_formula() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        true, given = rng.integers(0, 2, (2, 40))
        tp, tn = np.sum(true & given), np.sum((1 - true) & (1 - given))
        fp, fn = np.sum((1 - true) & given), np.sum(true & (1 - given))
        expected = (tp * tn - fp * fn) / np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
        assert score_classes(true, given, ["no", "yes"]).matthews == pytest.approx(expected, abs=1e-14)


def test_matthews_of_many_classes_is_scikit_learns() -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        true, given = rng.integers(0, 6, (2, 25))
        given = np.where(rng.random(25) < 0.5, true, given)
        expected = metrics.matthews_corrcoef(true, given)
        assert score_classes(true, given, list("abcdef")).matthews == pytest.approx(expected, abs=1e-14)


def test_classes_against_loops() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        true, given = rng.integers(0, 5, (2, 30)).tolist()
        report = score_classes(true, given, list("abcde"))
        for c, row in enumerate(report.classes):
            right = sum(t == g == c for t, g in zip(true, given, strict=True))
            precision = right / given.count(c) if given.count(c) else 0.0
            recall = right / true.count(c) if true.count(c) else 0.0
            f1 = 2 * precision * recall / (precision + recall) if right else 0.0
            assert row[1:] == pytest.approx((precision, recall, f1, true.count(c)), rel=1e-14)
            for d in range(5):
                assert report.confusion[c, d] == sum((t, g) == (c, d) for t, g in zip(true, given, strict=True))
        seen = [report.classes[c].f1 for c in range(5) if c in true or c in given]
        assert report.macro_f1 == pytest.approx(np.mean(seen), rel=1e-14)


def test_one_answer_for_all_has_no_correlation() -> None:
    assert score_classes([0, 1, 1], [1, 1, 1], ["a", "b"]).matthews == 0
    assert score_classes([1, 1], [1, 1], ["a", "b"])[:4] == (1, 1, 1, 0)


def test_labels_by_hand() -> None:
    targets = [[1, 0, 1], [0, 0, 1], [1, 0, 0]]
    probabilities = [[0.9, 0.1, 0.5], [0.6, 0.2, 0.4], [0.7, 0.3, 0.1]]
    # At 0.5, itself included: 1 0 1, 1 0 0, 1 0 0. Label 0: 2 right, 2 true, 3 given, F1 4/5; 1: nothing; 2: 1 right, 2
    # true, 1 given, F1 2/3. Together 3 right, 4 true, 4 given. The first and the last example are wholly right.
    scores = score_labels(targets, probabilities)
    assert scores.by_label == pytest.approx((4 / 5, 0, 2 / 3), rel=1e-14)
    assert scores[:3] == pytest.approx((3 / 4, (4 / 5 + 2 / 3) / 3, 2 / 3), rel=1e-14)
    assert score_labels(targets, probabilities, threshold=0.95)[:3] == (0, 0, 0)
    assert score_labels([[0, 0]], [[0.1, 0.2]])[:3] == (0, 0, 1)


def test_labels_against_loops() -> None:
    rng = np.random.default_rng(2)
    targets, probabilities = rng.integers(0, 2, (50, 4)), rng.random((50, 4))
    counts = np.zeros((4, 3))
    for row, values in zip(targets, probabilities, strict=True):
        for label in range(4):
            counts[label] += [row[label] and values[label] >= 0.3, row[label], values[label] >= 0.3]
    f1 = [2 * right / (true + given) for right, true, given in counts]
    scores = score_labels(targets, probabilities, threshold=0.3)
    assert scores.by_label == pytest.approx(f1, rel=1e-14)
    assert scores.micro_f1 == pytest.approx(2 * counts[:, 0].sum() / counts[:, 1:].sum(), rel=1e-14)


def test_numbers_by_hand() -> None:
    # Deviations of 1 2 3 4: -1.5 -0.5 0.5 1.5; of 1 3 2 6 (mean 3): -2 0 -1 3. Products 3 + 0 - 0.5 + 4.5 = 7, squares
    # 5 and 14. Ranks 1 3 2 4: 1 - 6 (0 + 1 + 1 + 0) / (4 * 15) = 0.8. Errors 0 1 1 4: mean 6/4.
    scores = score_numbers([1, 2, 3, 4], [1, 3, 2, 6])
    assert scores == pytest.approx((7 / np.sqrt(5 * 14), 0.8, 6 / 4), rel=1e-14)


def test_equal_numbers_share_a_rank() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        true, given = rng.integers(0, 6, (2, 15)).astype(float)
        ranks = [[np.mean([sum(v < x for v in each) + 1, sum(v <= x for v in each)]) for x in each]
                 for each in (true, given)]  # fmt: skip
        centred = [np.array(rank) - np.mean(rank) for rank in ranks]
        expected = centred[0] @ centred[1] / np.sqrt(centred[0] @ centred[0] * (centred[1] @ centred[1]))
        assert score_numbers(true, given).spearman == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_constant_numbers_have_no_correlation() -> None:
    assert score_numbers([1, 2, 3], [2, 2, 2]) == (0, 0, pytest.approx(2 / 3))
    assert score_numbers([5, 5], [1, 2])[:2] == (0, 0)


def test_what_cannot_be_scored_is_refused() -> None:
    for true, given in (([0, 1], [0]), ([], []), ([[0]], [[0]])):
        with pytest.raises(UserError, match="targets have the shape"):
            confusion_matrix(true, given, 2)
    for given in ([0, 2], [-1, 0], [0.5, 1.0]):
        with pytest.raises(UserError, match=r"predictions reach from .* accepted: whole numbers from 0 to 1"):
            score_classes([0, 1], given, ["a", "b"])
    with pytest.raises(UserError, match="1 classes; accepted: at least 2"):
        score_classes([0], [0], ["a"])
    with pytest.raises(UserError, match="other than 0 and 1"):
        score_labels([[2]], [[0.5]])
    with pytest.raises(UserError, match="NaN"):
        score_labels([[1]], [[np.nan]])
    for true, given in (([1.0], [1.0]), ([1.0, np.nan], [1.0, 2.0])):
        with pytest.raises(UserError, match="at least 2, all finite"):
            score_numbers(true, given)


def test_a_picture_is_drawn_and_drawn_alike(tmp_path: Path) -> None:
    names = ["sport", "$x_1$", "a & b"]  # no formulas, and no markup
    paths = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for path in paths:
        draw_confusion(np.array([[3, 1, 0], [0, 0, 0], [1, 0, 1200]]), names, [path])
    one, two = (path.read_text(encoding="utf-8") for path in paths)
    assert one == two
    assert "1,200" in one  # glyphs are paths, each with its text as a comment
    assert "<!-- $x_1$ -->" in one
    with pytest.raises(UserError, match=r"accepted: \(2, 2\)"):
        draw_confusion(np.zeros((3, 3)), ["a", "b"], paths)
