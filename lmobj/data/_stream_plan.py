"""Streams: rows at one place of successive batches read one text on and on, so that a carried memory stays with it.

The documents of an epoch, end to end, are divided into one part per stream. With `bidirectional`, there are half as
many parts, and each is read by two streams: forwards by one of the first half, from its end backwards by one of the
second (Yang et al. 2019, section 3.1). What is read backwards is mirrored token by token, prefixes and suffixes of
documents included.

Layouts: `stream` cuts a part into rows. A row of `stream_pairs` is [R | A SEP B SEP CLS]: R the next `reuse` tokens of
the part, A what comes after them, and B what comes after A or, with probability 1/2, text from anywhere. The next row
begins after R, so A and B are read ahead (past the part's end too, up to the end of the whole text).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from lmobj.batch import RowSpec
from lmobj.data._plan import Fragments, Ints, PackedPlan, hashed, offsets_of
from lmobj.data._sentences import Sentences
from lmobj.errors import UserError

__all__ = ["STREAM_LAYOUTS", "StreamPairsPlan", "StreamPlan", "reads_backward"]

STREAM_LAYOUTS = ("stream", "stream_pairs")
"""Layouts whose rows must keep their order."""

Bools = NDArray[np.bool_]

_CUT, _LABEL, _PLACE = range(3)
"""Purposes of draws."""


def reads_backward(rows: Ints, spec: RowSpec, streams: int) -> Bools:
    """Whether these rows of a source, of which `streams` are in a batch, read their text backwards."""
    return rows % streams >= streams // 2 if spec.bidirectional else np.zeros(len(rows), np.bool_)


class _Parts:
    """A text dealt to streams: `stride` tokens of its part per row. Row r is row r // streams of stream r % streams."""

    def __init__(self, text: PackedPlan, spec: RowSpec, streams: int, stride: int):
        if spec.bidirectional and streams % 2:
            raise UserError(
                f"train.batch_size gives {streams} stream{'s' * (streams > 1)} of text, of which half are read "
                "backwards; accepted: an even number of rows of each source, 2 or more."
            )
        self._text = text
        self._spec = spec
        self._streams = streams
        self._stride = stride
        self._parts = streams // 2 if spec.bidirectional else streams
        self._steps = -(-text.tokens // (stride * self._parts))
        self.rows = self._steps * streams

    def locate(self, rows: Ints) -> tuple[Bools, Ints, Ints]:
        """Of these rows: whether they read backwards, from which place of the text on, and how many tokens of their
        part, at most `stride`."""
        step, stream = np.divmod(rows, self._streams)
        part = stream % self._parts
        begin = np.minimum(part * self._steps * self._stride, self._text.tokens)
        end = np.minimum(begin + self._steps * self._stride, self._text.tokens)
        backward = reads_backward(rows, self._spec, self._streams)
        read = np.minimum(step * self._stride, end - begin)
        return backward, np.where(backward, end - read, begin + read), np.minimum(end - begin - read, self._stride)


class StreamPlan:
    """Each part cut into rows; the last row of a stream may be part empty, and the ones after it are empty."""

    def __init__(self, text: PackedPlan, spec: RowSpec, streams: int):
        self._text = text
        self._parts = _Parts(text, spec, streams, spec.length)
        self.rows = self._parts.rows

    def lookup(self, rows: Ints) -> Fragments:
        return _sorted(_read(self._text, *self._parts.locate(rows)))


class StreamPairsPlan:
    """Rows [R | A SEP B SEP CLS] of one segment, with token types 0 (R, A and its SEP), 1 (B and its SEP) and 2.

    A ends with a sentence, drawn evenly from those that end inside the room of A and B, or at an even place if none
    does; B fills the room. With probability 1/2 (label 0) B is what follows A, else (label 1) text of the same epoch
    from the begin of a sentence at an even place. Where fewer tokens than the room are left of the text, A and B share
    those; where fewer than 2, or R is cut short by the end of its part, the row is R alone.

    Deviations from `_split_a_and_b` of the authors' code, which reads on to the end of B's sentence and then cuts the
    longer of A and B until they fit: here A is never cut, so B follows it without a gap. There, the label of B being
    random is forced where no sentence ends inside; and its labels are the other way round.
    """

    def __init__(
        self,
        lengths: NDArray[np.integer],
        sentences: Sentences,
        spec: RowSpec,
        streams: int,
        order: int | None,
        key: int,
    ):
        """lengths: tokens per document, [N]; order: key of the documents' permutation, None for the stored order; key:
        of the draws."""
        check_stream_pairs(spec)
        self._text = PackedPlan(lengths, dataclasses.replace(spec, suffix=()), order)
        self._parts = _Parts(self._text, spec, streams, spec.reuse)
        self._cuts = _SentenceCuts(self._text, sentences, len(spec.prefix))
        self._spec = spec
        self._room = spec.length - spec.reuse - 3
        self._key = key
        self.rows = self._parts.rows

    def lookup(self, rows: Ints) -> Fragments:
        backward, place, reuse = self._parts.locate(rows)
        way = np.where(backward, -1, 1).astype(np.int64)
        begin = place + way * reuse
        left = np.where(backward, begin, self._text.tokens - begin)
        room = np.where((reuse == self._spec.reuse) & (left >= 2), np.minimum(left, self._room), 0)
        paired = room > 0
        length_a = np.where(paired, self._length_of_a(rows, backward, begin, room), 0)
        length_b = room - length_a
        label = paired & (self._draws(rows, _LABEL) >> np.uint64(63) == 1)
        elsewhere = self._elsewhere(rows, backward, length_b)
        start_b = np.where(label, elsewhere, begin + way * length_a)

        first = _read(self._text, backward, place, reuse + length_a)
        second = _read(self._text, backward, start_b, length_b)
        column_b = reuse + length_a + 1
        second = second._replace(column=second.column + column_b[second.row], token_type=second.token_type + 1)
        row, last = np.flatnonzero(paired), (column_b + length_b)[paired]
        closing = [
            _special(row, column, which, token_type)
            for column, which, token_type in ((column_b[paired] - 1, 0, 0), (last, 0, 1), (last + 1, 1, 2))
        ]
        found = Fragments.joined([first, second, *closing])
        one = np.ones_like(found.row)
        labels = label.astype(np.int64)[found.row]
        return _sorted(found._replace(segment=one, position=found.column, pair_label=labels))

    def _length_of_a(self, rows: Ints, backward: Bools, begin: Ints, room: Ints) -> Ints:
        """Tokens from `begin` to a sentence's end that leaves at least one of the room; some number without a room."""
        low = np.where(backward, begin - room, begin)
        first, last = self._cuts.until(low), self._cuts.until(np.maximum(low + room - 1, low))
        draw = self._draws(rows, _CUT)
        cut = np.where(last > first, self._cuts.place(first + _below(draw, last - first)), 0)
        cut = np.where(last > first, cut, low + 1 + _below(draw, room - 1))
        return np.abs(cut - begin)

    def _elsewhere(self, rows: Ints, backward: Bools, length: Ints) -> Ints:
        """Where text of `length` tokens can be read from the begin of a sentence on, in the row's direction."""
        total = self._text.tokens
        drawn = _below(self._draws(rows, _PLACE), total - length + 1)
        until = self._cuts.until(drawn)
        before = np.where(until > 0, self._cuts.place(np.maximum(until - 1, 0)), 0)
        after = self._cuts.place(self._cuts.until(drawn + np.maximum(length, 1) - 1))
        return np.where(backward, after, before)

    def _draws(self, rows: Ints, purpose: int) -> NDArray[np.uint64]:
        """64 random bits per row."""
        return hashed((rows * 4 + purpose).astype(np.uint64) ^ np.uint64(self._key))


class _SentenceCuts:
    """The places of a text at which a sentence ends, numbered from 0 in its order; the last is the text's end.

    Holds 8 bytes per document.
    """

    def __init__(self, text: PackedPlan, sentences: Sentences, prefix: int):
        """prefix: tokens that the text has before each document."""
        self._text = text
        self._sentences = sentences
        self._prefix = prefix
        counts = np.diff(sentences.first)
        self._first = offsets_of(counts if text.order is None else counts[text.order])

    def until(self, places: Ints) -> Ints:
        """How many cuts are at or before each place."""
        slot, document, offset = self._text.locate(places)
        first, ends = self._sentences.first, self._sentences.ends
        inside = [
            np.searchsorted(ends[first[d] : first[d + 1]], at, side="right")
            for d, at in zip(document.tolist(), (offset - self._prefix).tolist(), strict=True)
        ]
        return self._first[slot] + np.array(inside, np.int64)

    def place(self, cuts: Ints) -> Ints:
        """Where these cuts are; of numbers that there are not, where the last one is."""
        cuts = np.minimum(cuts, self._first[-1] - 1)
        slot = np.searchsorted(self._first, cuts, side="right") - 1
        document = slot if self._text.order is None else self._text.order[slot]
        end = self._sentences.ends[self._sentences.first[document] + cuts - self._first[slot]]
        return self._text.starts[slot] + self._prefix + end


def check_stream_pairs(spec: RowSpec) -> None:
    """Raises for rows [R | A SEP B SEP CLS] that cannot be."""
    if len(spec.suffix) != 2:
        raise ValueError(f"RowSpec.suffix is {spec.suffix}; the layout 'stream_pairs' takes the ids (SEP, CLS).")
    if not 1 <= spec.reuse <= spec.length - 5:
        raise UserError(
            f"reuse is {spec.reuse}, and data.length gives rows of {spec.length} tokens, which also hold two texts and "
            f"3 special tokens; accepted: at least 1 and at most data.length - 5 = {spec.length - 5}."
        )


def _read(text: PackedPlan, backward: Bools, place: Ints, length: Ints) -> Fragments:
    """`length` tokens of the text per row, read from `place` on in the row's direction.

    Fragments of a row that reads backwards are mirrored: the last of the text comes first. (Their tokens still have
    to be.)
    """
    begin = np.where(backward, place - length, place)
    at = text.stretches(begin, begin + length)
    mirrored = backward[at.row]
    count = at.head_count + at.length + at.tail_count
    segments = np.bincount(at.row, minlength=len(place))
    return at._replace(
        column=np.where(mirrored, length[at.row] - at.column - count, at.column),
        segment=np.where(mirrored, segments[at.row] + 1 - at.segment, at.segment),
    )


def _special(row: Ints, column: Ints, which: int, token_type: int) -> Fragments:
    """Fragments without text: the special token `which` of the suffix."""
    zero = np.zeros_like(row)
    nothing = Fragments(*[zero] * len(Fragments._fields))
    return nothing._replace(
        row=row, column=column, tail_from=zero + which, tail_count=zero + 1, token_type=zero + token_type
    )


def _sorted(at: Fragments) -> Fragments:
    """Ordered by row and column."""
    order = np.lexsort((at.column, at.row))
    return Fragments(*(values[order] for values in at))


def _below(draw: NDArray[np.uint64], bound: Ints) -> Ints:
    """Evenly one of 0 ... bound - 1; 0 for a bound below 1."""
    return (draw % np.maximum(bound, 1).astype(np.uint64)).astype(np.int64)
