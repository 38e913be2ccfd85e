"""Sentences and words of a document, found in its text and told in tokens.

A boundary in the text is a byte offset. Models trained here spell a text byte for byte, so the bytes that each token
stands for, added up, say which token a boundary falls on.

    sentence    ends at the token that holds the boundary's last byte; if a token spans several boundaries, one remains
    word        begins at a token that starts where a word does, or that a Chinese word begins inside of

Sentences come from sentencex (a port of Wikimedia's segmenter), words from jieba in its Rust port rjieba. Without
either, both are the tokenizer's own, by rule.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmobj.data._cleaning_config import SegmentationConfig
from lmobj.data._extras import clean_extra
from lmobj.data._parts import utf8_size
from lmobj.data._tokenizer import Tokenizer
from lmobj.errors import UserError

__all__ = ["IDEOGRAPHS", "Segmenter", "chinese_words"]

IDEOGRAPHS = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ceaf\U0002f800-\U0002fa1f"
"""The blocks of CJK ideographs that BERT's basic tokenizer splits on, as ranges for a class of a regular expression."""
_STRETCH = re.compile(f"[{IDEOGRAPHS}]+")
_RARE_SPACE = re.compile(r"[^\S\n ]")
_WINDOW = 8192
"""Characters that sentencex sees at once: its time grows with the square of the quotation marks in them."""


class Segmenter:
    """Finds the sentences and words of documents as configured. Can be pickled.

    Raises UserError if a package is missing, or text boundaries are asked of a tokenizer that is not lossless.
    """

    def __init__(self, config: SegmentationConfig, tokenizer: Tokenizer):
        self._config = config
        self._tokenizer = tokenizer
        if config.sentences == "sentencex":
            clean_extra("sentencex", "data.segment.sentences is sentencex")
            self._require_lossless("data.segment.sentences", "sentencex", "rule")
        if config.words == "jieba":
            clean_extra("rjieba", "data.segment.words is jieba")
            self._require_lossless("data.segment.words", "jieba", "basic")

    def sentence_ends(self, text: str, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """[S] int32: the offset after each sentence of the document `text`, whose tokens are [N]; the last one is N.

        With sentencex, a sentence ends before the spaces that follow it (they are spelled with the next word), but
        after the newlines. Blank lines belong to the sentence before them.
        """
        if self._config.sentences == "rule":
            return self._tokenizer.sentence_ends(tokens)
        boundaries = _sentence_boundaries(text, self._config.language)
        inside = np.searchsorted(self._offsets(text, tokens)[1:], boundaries) + 1
        return np.unique(np.append(inside, len(tokens))).astype(np.int32)

    def word_starts(self, text: str, tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
        """[N] bool: the token begins a word. The first one always does.

        The rule is `Tokenizer.word_starts`. With jieba, a stretch of ideographs is not words of one character each but
        the words that jieba finds; a token inside such a word begins none, a token in which one begins does.
        """
        segments = np.ones((1, len(tokens)), np.int32)
        starts = self._tokenizer.word_starts(tokens[None], segments)[0] if len(tokens) else np.zeros(0, np.bool_)
        if self._config.words == "basic" or len(tokens) == 0:
            return starts
        begins, ends = _chinese_word_bounds(text)
        offsets = self._offsets(text, tokens)
        first, after = offsets[:-1], offsets[1:]
        word = np.searchsorted(begins, first, side="right") - 1  # the last Chinese word that begins at or before it
        within = (word >= 0) & (first > begins[word]) & (first < ends[word]) if len(begins) else np.zeros_like(starts)
        bounds = np.union1d(begins, ends)
        holds = np.searchsorted(bounds, after) > np.searchsorted(bounds, first)
        return (starts & ~within) | holds

    def _offsets(self, text: str, tokens: NDArray[np.int32]) -> NDArray[np.int64]:
        """[N + 1] int64: the byte at which each token begins, and the length of the text."""
        offsets = np.zeros(len(tokens) + 1, np.int64)
        np.cumsum(self._tokenizer.piece_bytes[tokens], out=offsets[1:])
        assert offsets[-1] == utf8_size(text), "a lossless tokenizer spells every byte"
        return offsets

    def _require_lossless(self, key: str, value: str, rule: str) -> None:
        if not self._tokenizer.lossless:
            raise UserError(
                f"{key} is {value}, but the model of data.tokenizer.path normalises text, so places in the text are "
                f"not places in its tokens; accepted: {rule}, or a model without normalisation (as trained here)."
            )


def chinese_words(stretch: str) -> list[str]:
    """The words of a text of ideographs; together they are the text."""
    words: list[str] = clean_extra("rjieba", "Chinese words are asked for").cut(stretch)
    return words


def _sentence_boundaries(text: str, language: str) -> NDArray[np.int64]:
    """Byte offsets at which sentences end, in order; the end of the text is none."""
    boundaries: list[int] = []
    size = 0
    for part in _sentences(text, language):
        blanks = len(part) - len(part.lstrip())
        newlines = part[: part.rfind("\n", 0, blanks) + 1]
        if newlines and boundaries:
            boundaries[-1] = size + utf8_size(newlines)
        if blanks < len(part):
            boundaries.append(size + utf8_size(part[: max(part.rfind("\n") + 1, len(part.rstrip()))]))
        size += utf8_size(part)
    return np.array(boundaries[:-1], np.int64)


def _sentences(text: str, language: str) -> Iterator[str]:
    """The sentences of sentencex; together they are the text. One longer than the window is cut.

    Sentencex counts every white space as one byte in some places and stops at wider ones, so it is shown plain spaces
    in their stead.
    """
    segment: Any = clean_extra("sentencex", "data.segment.sentences is sentencex").segment
    shown = _RARE_SPACE.sub(" ", text)
    start = 0
    while start < len(text):
        parts = segment(language, shown[start : start + _WINDOW])
        if start + _WINDOW < len(text):  # towards the window's end, a quotation or an abbreviation may be cut
            ends = list(itertools.accumulate(map(len, parts)))
            parts = parts[: max(1, bisect.bisect_right(ends, _WINDOW - _WINDOW // 4))]
        for part in parts:
            yield text[start : start + len(part)]
            start += len(part)


def _chinese_word_bounds(text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Byte offsets [W] at which the words in stretches of ideographs begin, and [W] at which they end."""
    begins: list[int] = []
    ends: list[int] = []
    size = place = 0
    for stretch in _STRETCH.finditer(text):
        size += utf8_size(text[place : stretch.start()])
        for word in chinese_words(stretch[0]):
            begins.append(size)
            size += utf8_size(word)
            ends.append(size)
        place = stretch.end()
    return np.array(begins, np.int64), np.array(ends, np.int64)
