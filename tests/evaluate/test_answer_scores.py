"""Exact match and F1: by hand, against plain counts, and thresholds against trying each."""

from __future__ import annotations

import numpy as np
import pytest
from mutants import Mutant, assert_killed

from lmobj.errors import UserError
from lmobj.evaluate import (
    _answer_scores,
    answer_f1,
    apply_null_threshold,
    best_null_threshold,
    exact_match,
    normalise_answer,
    normalise_chinese_answer,
    score_answers,
    summarise_answers,
)


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The  Denver\tBroncos!", "denver broncos"),
        ("A man, a plan; an idea.", "man plan idea"),
        ("the-end and anthem", "theend and anthem"),  # marks go first and leave no space
        ("a.n apple", "apple"),
        ("U.S.\u00a0dollars", "us dollars"),  # a space that does not break is one
        ("“the” café", "“ ” café"),  # only ASCII marks, and an article beside another mark is one
        ("The", ""),
        ("  ", ""),
    ],
)
def test_normalisation_by_hand(text: str, normalised: str) -> None:
    assert normalise_answer(text) == normalised


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("308分，", "308 分"),  # noqa: RUF001
        ("《北京》 大学", "北 京 大 学"),
        ("卡万·肖特 (NFL)", "卡 万 肖 特 nfl"),
        ("24 次3.5%", "24 次 35"),
        ("the 㐀𠀀", "the 㐀 𠀀"),  # articles are English; extension A, extension B
        ("。", ""),
    ],
)
def test_chinese_normalisation_by_hand(text: str, normalised: str) -> None:
    assert normalise_chinese_answer(text) == normalised


def test_scores_by_hand() -> None:
    assert exact_match("the Broncos", ["Denver Broncos", "Broncos."]) == 1
    assert exact_match("Broncos", ["Denver Broncos"]) == 0
    # Answer x x y, gold x y z: common x and y, P = 2/3 = R.
    assert answer_f1("x x y", ["x y z"]) == pytest.approx(2 / 3, rel=1e-15)
    # One of 1 and one of 2: P = 1, R = 1/2, F1 = 2/3; the other gold has nothing in common.
    assert answer_f1("Broncos", ["Denver Broncos", "panthers"]) == pytest.approx(2 / 3, rel=1e-15)
    assert answer_f1("x", ["y"]) == 0
    assert answer_f1("", [""]) == answer_f1("the", [""]) == 1
    assert answer_f1("", ["x"]) == answer_f1("x", [""]) == 0
    # 北京 of 北京市: P = 1, R = 2/3, F1 = 4/5. By words they would have nothing in common.
    assert answer_f1("北京", ["北京市"], normalise_chinese_answer) == pytest.approx(4 / 5, rel=1e-15)
    assert answer_f1("北京", ["北京市"]) == 0


GOLDS = {"a": ["Broncos", "Denver Broncos"], "b": ["ten", "the"], "c": [], "d": [], "e": ["the"]}
ANSWERS = {"a": "Denver Broncos", "b": "ten men", "c": "", "d": "one", "e": ""}


def test_summary_by_hand() -> None:
    scores = score_answers(ANSWERS, GOLDS)
    # a is right, b has P = 1/2, R = 1 ("the" is nothing and left out), c is rightly silent, d wrongly answers; the
    # only gold of e is nothing, and so is its answer.
    np.testing.assert_array_equal(scores.exact, [1, 0, 1, 0, 1])
    np.testing.assert_allclose(scores.f1, [1, 2 / 3, 1, 0, 1], rtol=1e-15)
    np.testing.assert_array_equal(scores.has_answer, [True, True, False, False, True])
    np.testing.assert_array_equal(scores.answered, [True, True, False, True, False])
    summary = summarise_answers(scores)
    assert summary[:3] == (3 / 5, pytest.approx((3 + 2 / 3) / 5, rel=1e-15), 5)
    assert summary.has_answer == (2 / 3, pytest.approx((2 + 2 / 3) / 3, rel=1e-15), 3, None, None)
    assert summary.no_answer == (1 / 2, 1 / 2, 2, None, None)
    assert summarise_answers(score_answers({"a": ""}, {"a": ["x"]})).no_answer is None


def test_a_threshold_by_hand() -> None:
    scores = score_answers(ANSWERS, GOLDS)
    odds = [-3.0, -1.0, 2.0, 1.0, 0.0]
    cut = apply_null_threshold(scores, odds, 0.0)  # c and d fall silent, e at the threshold does not
    np.testing.assert_array_equal(cut.exact, [1, 0, 1, 1, 1])
    np.testing.assert_array_equal(cut.answered, [True, True, False, False, False])
    # Right answers by odds: nothing 2 of 5 (c, d); a 3; b 3; e 4; d 3; c 3.
    assert best_null_threshold(scores.exact, scores, odds) == (4 / 5, 0.0)
    # Where every answer is wrong, silence is best.
    wrong = score_answers({"a": "x", "c": "x"}, {"a": ["y"], "c": []})
    assert best_null_threshold(wrong.exact, wrong, [0.0, 1.0]) == (1 / 2, -np.inf)


def test_the_best_threshold_is_the_best_of_all() -> None:
    """Against trying every threshold; odds repeat, so that some questions can only be answered together."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(1, 12))
        golds = {str(i): ["x y"] if rng.random() < 0.6 else [] for i in range(count)}
        answers = {str(i): str(rng.choice(["x", "x y", "z", ""])) for i in range(count)}
        scores = score_answers(answers, golds)
        odds = rng.integers(-3, 4, count).astype(float)
        tried = {float(t): apply_null_threshold(scores, odds, float(t)).f1.mean() for t in [-np.inf, *np.unique(odds)]}
        best, threshold = best_null_threshold(scores.f1, scores, odds)
        assert best == pytest.approx(max(tried.values()), abs=1e-14)
        assert tried[threshold] == pytest.approx(best, abs=1e-14)
        assert threshold == min(t for t, value in tried.items() if value > best - 1e-12)


def test_f1_equals_plain_counts() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        answer, gold = (rng.choice(list("xyz"), rng.integers(1, 8)).tolist() for _ in range(2))
        rest, common = list(gold), 0
        for token in answer:
            if token in rest:
                rest.remove(token)
                common += 1
        precision, recall = common / len(answer), common / len(gold)
        expected = 2 * precision * recall / (precision + recall) if common else 0.0
        assert answer_f1(" ".join(answer), [" ".join(gold)]) == pytest.approx(expected, rel=1e-14)


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(UserError, match="1 of 2 questions have no answer, 'b' first"):
        score_answers({"a": ""}, {"a": [], "b": ["x"]})
    with pytest.raises(UserError, match="no questions"):
        summarise_answers(score_answers({}, {}))
    scores = score_answers({"a": ""}, {"a": []})
    for odds in ([1.0, 2.0], [np.nan]):
        with pytest.raises(UserError, match="null_odds"):
            apply_null_threshold(scores, odds, 0.0)


@pytest.mark.parametrize(
    "mutant",
    [
        Mutant("articles stay", _answer_scores, "_ARTICLES", lambda _: _answer_scores.re.compile(r"(?!)")),
        Mutant("tokens count once", _answer_scores, "_token_f1",
               lambda f: lambda a, g: f(sorted(set(a)), sorted(set(g)))),
        Mutant("recall alone", _answer_scores, "_token_f1",
               lambda f: lambda a, g: len(set(a) & set(g)) / len(g) if g else float(not a)),
    ],
    ids=str,
)  # fmt: skip
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    assert_killed(monkeypatch, mutant, [test_scores_by_hand, test_summary_by_hand])
