"""Spans from logits: by hand, against a search over all spans, and logits that know the answer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from mutants import Mutant, assert_killed

from lmobj.errors import UserError
from lmobj.evaluate import _answer_spans, find_answers
from lmobj.tasks import QAWindows, qa_windows, window_labels

BERT = {"prefix": [1], "separator": [2], "suffix": [2]}


def laid_out(text: str, max_length: int, stride: int) -> tuple[QAWindows, np.ndarray]:
    """Windows over the words of a text, after a question of one token, and the words' characters."""
    ends = [i for i in range(1, len(text) + 1) if text[i - 1] != " " and text[i : i + 1] in (" ", "")]
    offsets = np.array([(text.rfind(" ", 0, end) + 1, end) for end in ends])
    return qa_windows([9], np.arange(len(ends)), max_length=max_length, stride=stride, **BERT), offsets


def test_by_hand() -> None:
    # Positions: [CLS] q [SEP] aa bb cc [SEP].
    windows, offsets = laid_out("aa bb cc", 7, 3)
    start = np.array([[1.0, 9.0, 9.0, 2.0, 0.0, 1.0, 9.0]])
    end = np.array([[0.5, 9.0, 9.0, 0.0, 1.0, 0.5, 9.0]])
    # aa 2, aa bb 3, aa bb cc 2.5 (three tokens: too long), bb 1, bb cc 0.5, cc 1.5; question and specials never.
    found = find_answers(start, end, windows, offsets, "aa bb cc", n_best=4, max_answer_tokens=2, no_answer=True)
    assert [(s.text, s.start, s.end, s.score) for s in found.spans] == [
        ("aa bb", 0, 5, 3.0),
        ("aa", 0, 2, 2.0),
        ("cc", 6, 8, 1.5),
        ("bb", 3, 5, 1.0),
    ]
    assert found.null_score == 1.5
    assert found.null_odds == -1.5
    whole = math.exp(3) + math.exp(2) + 2 * math.exp(1.5) + math.exp(1)
    assert found.null_probability == pytest.approx(math.exp(1.5) / whole, rel=1e-14)
    assert found.spans[0].probability == pytest.approx(math.exp(3) / whole, rel=1e-14)
    assert found.answer() == found.answer(-1.5) == "aa bb"  # unanswered only above the threshold
    assert found.answer(-1.6) == ""
    without = find_answers(start, end, windows, offsets, "aa bb cc", n_best=4, max_answer_tokens=2)
    assert without.null_probability == 0
    assert sum(span.probability for span in without.spans) == pytest.approx(1, rel=1e-14)


def test_the_window_with_most_context_speaks_for_a_start() -> None:
    # Room for 4 words, stride 2: windows a b c d, c d e f. "c" has its context in the first, "d" in the second.
    windows, offsets = laid_out("a b c d e f", 8, 2)
    start, end = np.zeros((2, 8)), np.zeros((2, 8))
    start[1, 3], end[1, 3] = 50.0, 50.0  # c, in the second window
    start[0, 6] = 40.0  # d, in the first
    start[1, 4] = 1.0  # d, in the second
    found = find_answers(start, end, windows, offsets, "a b c d e f", max_answer_tokens=1)
    assert (found.spans[0].text, found.spans[0].score) == ("d", 1.0)
    # No answer is the least of the windows' scores: a window without the answer says nothing against it.
    start[:, 0], end[:, 0] = [5.0, -3.0], [1.0, 2.0]
    assert find_answers(start, end, windows, offsets, "a b c d e f").null_score == -1.0


def test_equal_texts_stand_once_and_white_space_is_trimmed() -> None:
    text = "x y x"
    windows, _ = laid_out(text, 9, 3)
    offsets = [(0, 1), (1, 3), (3, 5)]  # tokens that hold the space before them
    start = np.where(windows.context_index >= 0, [[0, 0, 0, 1, 2, 3, 0, 0, 0]], 0.0)
    found = find_answers(start, start, windows, offsets, text, max_answer_tokens=1)
    assert [(s.text, s.start, s.score) for s in found.spans] == [("x", 4, 6.0), ("y", 2, 4.0)]


def test_nothing_valid_is_no_answer() -> None:
    windows, offsets = laid_out("aa bb", 7, 3)
    start = np.zeros((1, 7))
    found = find_answers(np.where(windows.context_index >= 0, -np.inf, start), start, windows, offsets, "aa bb")
    assert found.spans == ()
    assert found.answer() == found.answer(1e9) == ""
    assert found.null_odds == np.inf


def test_bad_logits_are_refused() -> None:
    windows, offsets = laid_out("aa bb", 7, 3)
    good = np.zeros((1, 7))
    with pytest.raises(UserError, match=r"accepted: \(1, 7\)"):
        find_answers(good[:, :6], good, windows, offsets, "aa bb")
    with pytest.raises(UserError, match="NaN"):
        find_answers(good, good * np.nan, windows, offsets, "aa bb")
    with pytest.raises(UserError, match="n_best is 0"):
        find_answers(good, good, windows, offsets, "aa bb", n_best=0)


def test_equals_the_search_over_all_spans() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        text = " ".join(rng.choice(["ab", "c", "de", "f"], rng.integers(1, 25)))
        windows, offsets = laid_out(text, int(rng.integers(5, 16)), int(rng.integers(1, 6)))
        shape, longest, n_best = windows.tokens.shape, int(rng.integers(1, 6)), int(rng.integers(1, 30))
        start, end = rng.normal(size=shape), rng.normal(size=shape)
        start[rng.random(shape) < 0.2] = -np.inf
        best: dict[str, float] = {}
        for w in range(shape[0]):
            for i in range(shape[1]):
                for j in range(i, min(i + longest, shape[1])):
                    if not windows.max_context[w, i] or windows.context_index[w, j] < 0:
                        continue
                    piece = text[offsets[windows.context_index[w, i]][0] : offsets[windows.context_index[w, j]][1]]
                    if np.isfinite(start[w, i]):
                        best[piece] = max(best.get(piece, -np.inf), start[w, i] + end[w, j])
        expected = sorted(best.items(), key=lambda item: -item[1])[:n_best]
        found = find_answers(start, end, windows, offsets, text, n_best=n_best, max_answer_tokens=longest)
        assert [(span.text, span.score) for span in found.spans] == expected


def test_logits_that_know_the_answer_give_it() -> None:
    """One-hot logits at the labels of each window: the text comes back, unless no window holds it."""
    rng = np.random.default_rng(1)
    lost = 0
    for _ in range(100):
        text = " ".join(rng.choice(["ab", "c", "de", "f"], 30))
        windows, offsets = laid_out(text, 12, 4)
        first, last = sorted(rng.integers(0, 30, 2).tolist())
        answer = (int(offsets[first, 0]), int(offsets[last, 1]))
        starts, ends = window_labels(windows, offsets, answer)
        at = np.arange(windows.tokens.shape[1])
        held = (starts > 0)[:, None]
        logits = [np.where((at == label[:, None]) & held, 10.0, 0.0) for label in (starts, ends)]
        if last - first >= 8:
            lost += 1
            assert not held.any()
        elif any(windows.max_context[w, starts[w]] for w in np.flatnonzero(held)):
            found = find_answers(*logits, windows, offsets, text)
            assert found.spans[0][:3] == (text[slice(*answer)], *answer)
    assert 10 < lost < 80


def _end_before_start(real: Any) -> Any:
    return lambda start, end, windows, longest: real(end, start, windows, longest)


def _any_window(real: Any) -> Any:
    return lambda start, end, windows, n: real(start, end, windows._replace(max_context=windows.context_index >= 0), n)


def _anywhere(real: Any) -> Any:
    def scores(start: Any, end: Any, windows: QAWindows, n: int) -> Any:
        everywhere = np.maximum(windows.context_index, 0)
        return real(start, end, windows._replace(context_index=everywhere), n)

    return scores


@pytest.mark.parametrize(
    "mutant",
    [
        Mutant("starts are ends", _answer_spans, "_span_scores", _end_before_start),
        Mutant("one token longer", _answer_spans, "_span_scores", lambda f: lambda s, e, w, n: f(s, e, w, n + 1)),
        Mutant("every window speaks", _answer_spans, "_span_scores", _any_window),
        Mutant("spans end in the specials", _answer_spans, "_span_scores", _anywhere),
        Mutant("one character less", _answer_spans, "_cut", lambda f: lambda c, s, e, x: f(c, s, e - 1, x)),
        Mutant("no softmax", _answer_spans, "_softmax", lambda _: lambda x: x),
    ],
    ids=str,
)
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    assert_killed(monkeypatch, mutant, [test_by_hand, test_the_window_with_most_context_speaks_for_a_start])
