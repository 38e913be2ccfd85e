"""Questions with long contexts: windows that a model can read, and where the answer lies in each.

    [CLS] question [SEP] context tokens s_w .. s_w + n_w - 1 [SEP]        s_w = w min(stride, room)

Source: Devlin et al. 2019, section 4.2, and what its published code does with contexts that are too long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmobj.data import Tokenizer
from lmobj.errors import UserError

__all__ = ["QAWindows", "check_offsets", "qa_windows", "token_offsets", "window_labels"]


class QAWindows(NamedTuple):
    """The windows of one question, a row each. W windows of L positions."""

    tokens: NDArray[np.int32]
    """[W, L]"""
    segment_ids: NDArray[np.int32]
    """[W, L]: 1, and 0 at padding."""
    token_types: NDArray[np.int32]
    """[W, L]: 1 for the context and the specials after it, else 0."""
    context_index: NDArray[np.int32]
    """[W, L]: which token of the context stands there; -1 where none does."""
    max_context: NDArray[np.bool_]
    """[W, L]: of all windows with this token of the context, this one shows most on the poorer of its two sides."""


def qa_windows(
    question: ArrayLike,
    context: ArrayLike,
    *,
    max_length: int,
    stride: int = 128,
    max_question: int = 64,
    prefix: Sequence[int],
    separator: Sequence[int],
    suffix: Sequence[int],
    pad: int = 0,
) -> QAWindows:
    """Windows over a context, each with the question before it.

    With room = max_length - specials - question, window w begins at token w min(stride, room), until one reaches the
    end. A token t that is in several windows has its context in the one with the largest

        min(t - s_w, s_w + n_w - 1 - t) + 0.01 n_w

    and in the first of them where two are equal.

    Args:
      question: [Q] token ids, cut after `max_question`.
      context: [N] token ids, at least one.
      max_length: L, positions of a window.
      stride: context tokens from one window to the next. (Transformers' tokenizers call by this name what two
        windows share, room - stride here.)
      max_question: most tokens of the question.
      prefix, separator, suffix: specials before the question, between, and after the context: BERT [CLS], [SEP],
        [SEP]; RoBERTa has two between.
      pad: fills what is left.

    Raises:
      UserError: no context, no room for any of it, or a stride or limit below 1.

    Source: Devlin et al. 2019, section 4.2; window, stride and "max context" as in its published code.
    """
    asked, read = np.asarray(question, np.int32), np.asarray(context, np.int32)
    if stride < 1 or max_question < 1:
        raise UserError(f"stride is {stride} and max_question {max_question}; both must be at least 1.")
    asked = asked[:max_question]
    before = np.concatenate([np.array(prefix, np.int32), asked, np.array(separator, np.int32)])
    room = max_length - len(before) - len(suffix)
    if room < 1:
        raise UserError(
            f"max_length is {max_length}, and question and special tokens take {max_length - room}; accepted: at least "
            f"{max_length - room + 1}, or a smaller max_question."
        )
    if not len(read):
        raise UserError("the context has no tokens; accepted: questions about a text.")
    starts = _window_starts(len(read), room, stride)
    sizes = np.minimum(room, len(read) - starts)
    tokens = np.full((len(starts), max_length), pad, np.int32)
    context_index = np.full_like(tokens, -1)
    segment_ids, token_types = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        filled = np.concatenate([before, read[start : start + size], np.array(suffix, np.int32)])
        tokens[row, : len(filled)] = filled
        segment_ids[row, : len(filled)] = 1
        token_types[row, len(before) : len(filled)] = 1
        context_index[row, len(before) : len(before) + size] = np.arange(start, start + size)
    shown = _max_context_window(len(read), starts, sizes)
    max_context = (context_index >= 0) & (shown[context_index] == np.arange(len(starts))[:, None])
    return QAWindows(tokens, segment_ids, token_types, context_index, max_context)


def window_labels(
    windows: QAWindows, offsets: ArrayLike, answer: tuple[int, int] | None
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Positions of the answer's first and last token in each window: ([W], [W]).

    The answer's tokens are those that share a character with it. A window that does not hold them all points to
    position 0, [CLS], with both; so do all if there is no answer.

    Args:
      windows: of `qa_windows`.
      offsets: [N, 2] first character and the one after the last of each token of the context.
      answer: the same of the answer; None: the context has none.

    Raises:
      UserError: offsets that go back, or an answer that ends before it begins.

    Source: Devlin et al. 2019, section 4.3 (no answer is a span at [CLS]).
    """
    spans = check_offsets(offsets, windows)
    count = len(windows.tokens)
    if answer is None:
        return np.zeros(count, np.int32), np.zeros(count, np.int32)
    begin, end = answer
    if not 0 <= begin < end:
        raise UserError(f"the answer is ({begin}, {end}); accepted: 0 <= first character < the one after the last.")
    first = int(np.searchsorted(spans[:, 1], begin, side="right"))
    last = int(np.searchsorted(spans[:, 0], end, side="left")) - 1
    starts, has_start = _places(windows, first)
    ends, has_end = _places(windows, last)
    held = has_start & has_end & (first <= last)  # first > last: the answer lies between two tokens
    return np.where(held, starts, 0).astype(np.int32), np.where(held, ends, 0).astype(np.int32)


def token_offsets(tokenizer: Tokenizer, text: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Token ids [N] of a text, and [N, 2] the first character of each and the one after its last.

    A token that is some bytes of a character covers that character. Spaces belong to the token that holds them.

    Raises:
      UserError: a tokenizer that is not lossless, whose tokens cannot be laid over the text.
    """
    if not tokenizer.lossless:
        raise UserError(
            "this tokenizer normalises text or drops spaces, so its tokens have no places in the text; accepted: one "
            "that is lossless, as those trained here are."
        )
    ids = tokenizer.encode(text)
    sizes = [len(character.encode()) for character in text]
    character_of = np.repeat(np.arange(len(text)), sizes)  # of each byte
    ends = np.cumsum(tokenizer.piece_bytes[ids])
    starts = ends - tokenizer.piece_bytes[ids]
    return ids, np.stack([character_of[starts], character_of[ends - 1] + 1], axis=1).astype(np.int32)


def check_offsets(offsets: ArrayLike, windows: QAWindows) -> NDArray[np.int64]:
    """The offsets as an array. UserError if they go back or are too few for the windows."""
    spans = np.asarray(offsets, np.int64)
    needed = int(windows.context_index.max()) + 1
    if spans.ndim != 2 or spans.shape[1] != 2 or len(spans) < needed:
        raise UserError(f"offsets has the shape {spans.shape}; accepted: ({needed}, 2), a row for each context token.")
    if (spans[:, 0] > spans[:, 1]).any() or (np.diff(spans, axis=0) < 0).any():
        raise UserError("offsets go back; accepted: tokens in the order of the text.")
    return spans


def _window_starts(count: int, room: int, stride: int) -> NDArray[np.int64]:
    """The first token of each window; the last window is the first that reaches the end."""
    step = min(stride, room)
    return step * np.arange(1 + max(0, -(-(count - room) // step)))


def _max_context_window(count: int, starts: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """[N]: the window in which each token has most context."""
    left = np.arange(count) - starts[:, None]
    right = sizes[:, None] - 1 - left
    score = np.minimum(left, right) + 0.01 * sizes[:, None]
    return np.argmax(np.where((left >= 0) & (right >= 0), score, -np.inf), axis=0)


def _places(windows: QAWindows, token: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """[W] the position of a context token in each window, and [W] whether it is there."""
    found = (windows.context_index == token) & (token >= 0)
    return np.argmax(found, axis=1), found.any(axis=1)
