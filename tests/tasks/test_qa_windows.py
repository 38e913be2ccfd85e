"""Windows over long contexts: by hand, against a window-by-window transcription, and labels that cut out the answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mutants import Mutant, assert_killed

from lmobj.data import SentencePieceConfig, Tokenizer
from lmobj.data._tokenizer import train_tokenizer
from lmobj.errors import UserError
from lmobj.tasks import QAWindows, _qa_windows, qa_windows, token_offsets, window_labels

CLS, SEP, PAD = 101, 102, 0
BERT = {"prefix": [CLS], "separator": [SEP], "suffix": [SEP], "pad": PAD}


def reference(count: int, room: int, stride: int) -> tuple[list[tuple[int, int]], list[int]]:
    """BERT's loop: (first token, tokens) of each window, and the window with the maximum context of each token."""
    spans = []
    start = 0
    while start < count:
        size = min(count - start, room)
        spans.append((start, size))
        if start + size == count:
            break
        start += min(size, stride)
    best = []
    for token in range(count):
        best_score, best_window = -1.0, -1
        for window, (first, size) in enumerate(spans):
            if first <= token < first + size:
                score = min(token - first, first + size - 1 - token) + 0.01 * size
                if score > best_score:
                    best_score, best_window = score, window
        best.append(best_window)
    return spans, best


def test_by_hand() -> None:
    # 9 positions - 3 specials - 2 of the question = 4 of the context. Seven tokens with stride 2: 0-3, 2-5, 4-6.
    windows = qa_windows([7, 8], range(20, 27), max_length=9, stride=2, **BERT)
    np.testing.assert_array_equal(
        windows.tokens,
        [
            [CLS, 7, 8, SEP, 20, 21, 22, 23, SEP],
            [CLS, 7, 8, SEP, 22, 23, 24, 25, SEP],
            [CLS, 7, 8, SEP, 24, 25, 26, SEP, PAD],
        ],
    )
    np.testing.assert_array_equal(windows.segment_ids, [[1] * 9, [1] * 9, [1] * 8 + [0]])
    np.testing.assert_array_equal(windows.token_types, [[0] * 4 + [1] * 5, [0] * 4 + [1] * 5, [0] * 4 + [1] * 4 + [0]])
    np.testing.assert_array_equal(windows.context_index[2], [-1, -1, -1, -1, 4, 5, 6, -1, -1])
    # Poorer side of token 2: 1 in the first window (one after it), 0 in the second. Token 3: 0 and 1. Token 4: 1 in
    # the second, 0 in the third. Token 5: 0 in the second, 1 in the third.
    np.testing.assert_array_equal(windows.max_context[:, 4:8], [[1, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]])


def test_specials_of_another_model_and_a_long_question() -> None:
    windows = qa_windows([7, 8, 9], [20, 21], max_length=9, max_question=2, prefix=[1], separator=[2, 2], suffix=[2])
    np.testing.assert_array_equal(windows.tokens, [[1, 7, 8, 2, 2, 20, 21, 2, 0]])


def test_equals_the_loop_window_by_window() -> None:
    rng = np.random.default_rng(0)
    cases = [
        (int(n), int(r), int(s)) for n, r, s in zip(*rng.integers(1, [[300], [120], [150]], (3, 150)), strict=True)
    ]
    for count, room, stride in [*cases, (1, 1, 1), (5, 5, 9), (6, 5, 5), (220, 120, 100), (221, 120, 101)]:
        windows = qa_windows([], np.arange(count), max_length=room + 3, stride=stride, **BERT)
        spans, best = reference(count, room, stride)
        assert len(windows.tokens) == len(spans)
        for window, (first, size) in enumerate(spans):
            np.testing.assert_array_equal(windows.context_index[window, 2 : 2 + size], np.arange(first, first + size))
            assert (windows.context_index[window] >= 0).sum() == size
            expected = [t for t in range(first, first + size) if best[t] == window]
            np.testing.assert_array_equal(windows.context_index[window][windows.max_context[window]], expected)


def words(text: str) -> np.ndarray:
    """Offsets of what stands between spaces."""
    ends = [i for i in range(1, len(text) + 1) if text[i - 1] != " " and text[i : i + 1] in (" ", "")]
    return np.array([(text.rfind(" ", 0, end) + 1, end) for end in ends])


def test_labels_by_hand() -> None:
    text = "aa bb cc dd ee ff gg"
    offsets = words(text)
    windows = qa_windows([7, 8], range(20, 27), max_length=9, stride=2, **BERT)
    # "cc dd" is tokens 2 and 3: positions 6, 7 of the first window, 4, 5 of the second, not in the third.
    for answer in ((6, 11), (7, 10), (5, 11), (6, 12)):  # to the letter, cut, and with the spaces around it
        starts, ends = window_labels(windows, offsets, answer)
        np.testing.assert_array_equal([starts, ends], [[6, 4, 0], [7, 5, 0]])
    # "dd ee" spans 3 and 4: the first window has the one and the third the other.
    np.testing.assert_array_equal(window_labels(windows, offsets, (9, 14)), [[0, 5, 0], [0, 6, 0]])
    np.testing.assert_array_equal(window_labels(windows, offsets, None), np.zeros((2, 3)))
    np.testing.assert_array_equal(window_labels(windows, offsets, (5, 6)), np.zeros((2, 3)))  # a space alone
    np.testing.assert_array_equal(window_labels(windows, offsets, (18, 20)), [[0, 0, 6], [0, 0, 6]])


def test_labels_are_the_tokens_that_share_a_character() -> None:
    """Over random texts, answers and windows: the labelled tokens, and only they, overlap the answer."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        text = "".join(rng.choice(list("ab "), 40))
        offsets = words(text)
        if not len(offsets):
            continue
        windows = qa_windows([5], np.arange(len(offsets)), max_length=int(rng.integers(5, 14)), stride=3, **BERT)
        begin, end = sorted(rng.choice(41, 2, replace=False).tolist())
        overlapping = [t for t, (a, b) in enumerate(offsets) if a < end and b > begin]
        starts, ends = window_labels(windows, offsets, (begin, end))
        for row, start, stop in zip(windows.context_index, starts, ends, strict=True):
            if overlapping and set(overlapping) <= set(row.tolist()):
                assert row[start : stop + 1].tolist() == overlapping
                held += 1
            else:
                assert (start, stop) == (0, 0)
    assert held > 100


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(UserError, match=r"max_length is 5, .* special tokens take 5; accepted: at least 6"):
        qa_windows([7, 8], [20], max_length=5, **BERT)
    with pytest.raises(UserError, match="no tokens"):
        qa_windows([7], [], max_length=9, **BERT)
    with pytest.raises(UserError, match="stride is 0"):
        qa_windows([7], [20], max_length=9, stride=0, **BERT)
    windows = qa_windows([7], [20, 21], max_length=9, **BERT)
    with pytest.raises(UserError, match=r"accepted: \(2, 2\)"):
        window_labels(windows, [(0, 1)], (0, 1))
    with pytest.raises(UserError, match="go back"):
        window_labels(windows, [(2, 3), (0, 1)], (0, 1))
    with pytest.raises(UserError, match=r"the answer is \(3, 3\)"):
        window_labels(windows, [(0, 1), (1, 2)], (3, 3))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(SentencePieceConfig(vocab_size=330), ["the quick brown fox sees the quiet river\n" * 4])


def test_offsets_lay_tokens_over_the_text(tokenizer: Tokenizer) -> None:
    text = "the fox\n  saw ▁ 北京, the naïve 🦊 river"
    ids, offsets = token_offsets(tokenizer, text)
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
    reached = 0
    for index, (start, end) in zip(ids, offsets, strict=True):
        piece = tokenizer.piece(index).replace("▁", " ")
        if not piece.startswith("<0x"):
            assert text[start:end] == piece
            assert start == reached
        else:  # bytes of one character
            assert end == start + 1
            assert start in (reached - 1, reached)
        reached = int(end)
    assert reached == len(text)
    ids, offsets = token_offsets(tokenizer, "")
    assert len(ids) == len(offsets) == 0
    assert offsets.shape == (0, 2)


def test_offsets_need_a_lossless_tokenizer(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tokenizer.__dict__, "lossless", False)
    with pytest.raises(UserError, match="lossless"):
        token_offsets(tokenizer, "the")


def _one_window_less(real: Any) -> Any:
    return lambda count, room, stride: real(count, room, stride)[: max(1, -(-(count - room) // min(stride, room)))]


def _shifted(real: Any) -> Any:
    def places(windows: QAWindows, token: int) -> Any:
        at, found = real(windows, token)
        return at + 1, found

    return places


@pytest.mark.parametrize(
    "mutant",
    [
        Mutant("the last window is lost", _qa_windows, "_window_starts", _one_window_less),
        Mutant("windows step by all their room", _qa_windows, "_window_starts", lambda f: lambda n, r, s: f(n, r, r)),
        Mutant("the first window has it", _qa_windows, "_max_context_window",
               lambda _: lambda n, s, z: np.argmax(np.arange(n) < (s + z)[:, None], axis=0)),
        Mutant("positions one to the right", _qa_windows, "_places", _shifted),
        Mutant("a window that has one end will do", _qa_windows, "_places",
               lambda f: lambda w, t: (f(w, t)[0], np.ones(len(w.tokens), bool))),
    ],
    ids=str,
)  # fmt: skip
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    assert_killed(monkeypatch, mutant, [test_by_hand, test_labels_by_hand, test_equals_the_loop_window_by_window])
