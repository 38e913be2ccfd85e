"""Row plans: which stretch of which document stands where in which row. Looked up, never iterated.

A plan is a table over one epoch. `lookup(rows)` turns row numbers into fragments:

    row, column      where the fragment begins in the batch that is asked for
    document         the document it is taken from
    offset, length   the tokens taken: document[offset : offset + length]
    head, tail       (from, count) of the special tokens of `prefix` before and of `suffix` after those tokens
    segment          1, 2, ... in its row
    position         position of its first token in the segment (0 unless it continues a pair)
    token_type       0, or 1 for the second part of a pair

Layouts: packed and stream lay the documents of the epoch (in its permutation) end to end, each with its prefix and
suffix, and cut the result into rows; single cuts each document into pieces of its own; pairs takes runs of sentences;
examples takes each document whole, or what fits of it.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from grain.experimental import index_shuffle
from numpy.typing import NDArray

from lmobj.batch import RowSpec
from lmobj.errors import UserError

__all__ = [
    "ExamplesPlan",
    "Fragments",
    "PackedPlan",
    "PairsPlan",
    "Plan",
    "Sentences",
    "SinglePlan",
    "StreamPlan",
    "epoch_key",
    "shuffle_rows",
]

Ints = NDArray[np.int64]

_SHUFFLE_ROUNDS = 4
_HASH_BLOCK = 1 << 16
"""Entries hashed at once, so that temporaries stay small."""


class Fragments(NamedTuple):
    """Fragments of the rows asked for, [F] each, ordered by row and column. See the module docstring."""

    row: Ints
    column: Ints
    document: Ints
    offset: Ints
    length: Ints
    head_from: Ints
    head_count: Ints
    tail_from: Ints
    tail_count: Ints
    segment: Ints
    position: Ints
    token_type: Ints

    @classmethod
    def joined(cls, parts: Sequence[Fragments]) -> Fragments:
        """The fragments of all parts, one part after the other."""
        return parts[0] if len(parts) == 1 else cls(*(np.concatenate(part) for part in zip(*parts, strict=True)))


class Plan(Protocol):
    """One epoch of rows."""

    rows: int
    """Rows in an epoch; the same in every epoch."""

    def lookup(self, rows: Ints) -> Fragments:
        """The fragments of these rows. A row beyond the last has none."""
        ...


def epoch_key(fingerprint: str, seed: int, epoch: int, purpose: str) -> int:
    """64 bits that address one use of randomness in one epoch."""
    text = f"{fingerprint}/{seed}/{epoch}/{purpose}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def shuffle_rows(rows: Ints, total: int, key: int) -> Ints:
    """The place of each row in a permutation of [0, total), computed row by row without memory (Grain)."""
    seed = key & 0xFFFFFFFF
    return np.array([index_shuffle(int(row), total - 1, seed=seed, rounds=_SHUFFLE_ROUNDS) for row in rows], np.int64)


def permutation(count: int, key: int) -> NDArray[np.int32]:
    """A permutation of [0, count) decided by `key`: the indices in the order of their hashes.

    The index sits in the low bits of what is sorted, so no two entries are equal and every sorting algorithm on
    every machine gives the same order. (`numpy.random` does not promise its streams across versions.)
    """
    bits = np.uint64(max(1, (count - 1).bit_length()))
    entries = np.arange(count, dtype=np.uint64)
    for start in range(0, count, _HASH_BLOCK):
        block = entries[start : start + _HASH_BLOCK]
        index = block.copy()
        block ^= np.uint64(key)
        _hash(block)
        block <<= bits
        block |= index
    entries.sort()
    entries &= (np.uint64(1) << bits) - np.uint64(1)
    return entries.astype(np.int32)


def _hash(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 on the golden-ratio sequence (Steele et al., 2014); works in place."""
    values += np.uint64(0x9E3779B97F4A7C15)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def _offsets(counts: NDArray[np.integer]) -> Ints:
    """[N + 1] offsets at which entries with these counts begin when laid end to end."""
    offsets = np.empty(len(counts) + 1, np.int64)
    offsets[0] = 0
    np.cumsum(counts, out=offsets[1:])
    return offsets


def ragged(counts: Ints) -> tuple[Ints, Ints]:
    """For runs of these counts laid end to end: the run each element is in, and its index in the run."""
    run = np.repeat(np.arange(len(counts)), counts)
    return run, np.arange(len(run)) - (np.cumsum(counts) - counts)[run]


class PackedPlan:
    """Documents end to end in the order of the epoch's permutation, cut at row ends. The last row may be part empty.

    Holds 12 bytes per document: the permutation (int32) and the offsets of the permuted documents (int64).
    """

    def __init__(self, lengths: NDArray[np.integer], spec: RowSpec, key: int | None):
        """lengths: tokens per document, [N]; key: of the epoch's permutation, or None for the stored order."""
        self._spec = spec
        self._specials = len(spec.prefix) + len(spec.suffix)
        self._order = permutation(len(lengths), key) if key is not None else None
        ordered = lengths if self._order is None else lengths[self._order]
        self._starts = _offsets(ordered + self._specials)
        self.rows = int(-(-self._starts[-1] // spec.length))

    def lookup(self, rows: Ints) -> Fragments:
        length, starts = self._spec.length, self._starts
        begin = np.minimum(rows * length, starts[-1])
        end = np.minimum(begin + length, starts[-1])
        first = np.searchsorted(starts, begin, side="right") - 1
        count = np.where(end > begin, np.searchsorted(starts, end, side="left") - first, 0)
        row, nth = ragged(count)
        slot = first[row] + nth
        start, stop = starts[slot], starts[slot + 1]
        # [low, high): the part of prefix + document + suffix that falls into the row
        low = np.maximum(begin[row], start) - start
        high = np.minimum(end[row], stop) - start
        head, raw = len(self._spec.prefix), stop - start - self._specials
        zero = np.zeros_like(low)
        offset = np.clip(low - head, 0, raw)
        tail_from = np.maximum(low - head - raw, 0)
        return Fragments(
            row=row,
            column=start + low - begin[row],
            document=slot if self._order is None else self._order[slot].astype(np.int64),
            offset=offset,
            length=np.clip(high - head, 0, raw) - offset,
            head_from=np.minimum(low, head),
            head_count=np.minimum(high, head) - np.minimum(low, head),
            tail_from=tail_from,
            tail_count=np.maximum(high - head - raw, 0) - tail_from,
            segment=nth + 1,
            position=zero,
            token_type=zero,
        )


class StreamPlan:
    """The packed rows dealt to `streams` contiguous streams: row b of step s + 1 continues row b of step s.

    Row s * streams + b of the epoch is packed row b * steps + s; streams that end early continue with empty rows.
    """

    def __init__(self, packed: PackedPlan, streams: int):
        self._packed = packed
        self._streams = streams
        self._steps = -(-packed.rows // streams)
        self.rows = self._steps * streams

    def lookup(self, rows: Ints) -> Fragments:
        return self._packed.lookup((rows % self._streams) * self._steps + rows // self._streams)


class SinglePlan:
    """Each document cut into pieces of length - len(prefix) - len(suffix) tokens, one per row with both around it."""

    def __init__(self, lengths: NDArray[np.integer], spec: RowSpec):
        self._spec = spec
        self._lengths = lengths
        self._room = room(spec, 1)
        self._starts = _offsets(-(-lengths // self._room))
        self.rows = int(self._starts[-1])

    def lookup(self, rows: Ints) -> Fragments:
        row = np.flatnonzero(rows < self.rows)
        asked = rows[row]
        document = np.searchsorted(self._starts, asked, side="right") - 1
        offset = (asked - self._starts[document]) * self._room
        return _one_part(self._spec, row, document, offset, np.minimum(self._lengths[document] - offset, self._room))


@dataclass(frozen=True)
class Sentences:
    """Sentences of every document, laid end to end.

    ends: [S] offset in its document after each sentence. counts: [N] sentences per document.
    """

    ends: NDArray[np.integer]
    counts: NDArray[np.integer]


class PairsPlan:
    """Two runs of consecutive sentences of one document per row: [prefix] A [suffix] B [suffix], B following A.

    A document is divided greedily into groups of sentences that fill a row, at least two in each; where one sentence
    would be left over at the end, the group before gives it company (or, having only two itself, lends its last). A
    and B divide a group at a sentence drawn by the epoch's key. Two sentences too long for the row are trimmed as BERT
    does, the longer first, at the sides that do not touch: A loses its beginning, B its end. Documents of one sentence
    have no pair. (Devlin et al., 2019, section 3.1 and appendix A.2. The random second segments of NSP are not drawn
    here.)
    """

    def __init__(self, sentences: Sentences, spec: RowSpec):
        self._spec = spec
        self._room = room(spec, 2)
        self._ends = sentences.ends
        self._first = _offsets(sentences.counts)
        self._begin, self._end = self._divide()
        self.rows = len(self._begin)
        self.key = 0
        if self.rows == 0:
            raise UserError(
                "the objective reads pairs of sentences, but no document of the corpus has two; accepted: documents of "
                "two or more sentences or lines (data.source.documents: file joins the lines of a file)."
            )

    def at(self, key: int) -> PairsPlan:
        """This plan with the dividing sentences drawn by `key`."""
        plan = copy.copy(self)
        plan.key = key
        return plan

    def lookup(self, rows: Ints) -> Fragments:
        row = np.flatnonzero(rows < self.rows)
        asked = rows[row]
        begin, end = self._begin[asked], self._end[asked]
        draw = _hash(asked.astype(np.uint64) ^ np.uint64(self.key))
        middle = begin + 1 + (draw % (end - begin - 1).astype(np.uint64)).astype(np.int64)
        document = np.searchsorted(self._first, begin, side="right") - 1
        opening = np.where(begin == self._first[document], 0, self._ends[begin - 1]).astype(np.int64)
        border, closing = self._ends[middle - 1].astype(np.int64), self._ends[end - 1].astype(np.int64)
        length_a, length_b = _trim(border - opening, closing - border, self._room)
        return _two_parts(self._spec, row, document, border - length_a, length_a, border, length_b)

    def _divide(self) -> tuple[Ints, Ints]:
        """(begin, end) sentence of each group, counted over the corpus, in order."""
        last = self._first[1:]
        tokens = np.where(last > self._first[:-1], self._ends[np.maximum(last - 1, 0)], 0)
        base = _offsets(tokens)[:-1]
        document = np.repeat(np.arange(len(last)), np.diff(self._first))
        ends = self._ends + base[document]
        starts = np.concatenate([ends[:1] * 0, ends[:-1]])
        sentence = np.arange(len(ends))
        following = np.searchsorted(ends, starts + self._room, side="right")
        following = np.minimum(np.maximum(following, sentence + 2), last[document])
        following -= (last[document] - following == 1) & (following - sentence > 2)
        begins: list[Ints] = []
        current = self._first[:-1][np.diff(self._first) >= 2]
        while len(current):  # one round per group of the longest document
            begins.append(current)
            current = following[current]
            current = current[current < len(ends)]
            current = current[self._first[document[current]] < current]
        begin = np.sort(np.concatenate(begins)) if begins else np.zeros(0, np.int64)
        end = following[begin]
        return begin - (end - begin == 1), end


class ExamplesPlan:
    """One document per row: [prefix] A [suffix], or [prefix] A [suffix] B [suffix] where documents are two texts.

    What does not fit is cut from the end of A and of B, token by token from the longer one (from B when they are
    equal), as Hugging Face's `longest_first` does.
    """

    def __init__(self, lengths: NDArray[np.integer], pair_starts: NDArray[np.integer] | None, spec: RowSpec):
        """lengths: tokens per document, [N]; pair_starts: those of them that are the first text, [N]."""
        self._spec = spec
        self._lengths = lengths
        self._pair_starts = pair_starts
        self._room = room(spec, 1 if pair_starts is None else 2)
        self.rows = len(lengths)

    def lookup(self, rows: Ints) -> Fragments:
        row = np.flatnonzero(rows < self.rows)
        document = rows[row]
        length, zero = self._lengths[document].astype(np.int64), np.zeros_like(document)
        if self._pair_starts is None:
            return _one_part(self._spec, row, document, zero, np.minimum(length, self._room))
        border = self._pair_starts[document].astype(np.int64)
        length_a, length_b = _trim(border, length - border, self._room)
        return _two_parts(self._spec, row, document, zero, length_a, border, length_b)


def _one_part(spec: RowSpec, row: Ints, document: Ints, offset: Ints, length: Ints) -> Fragments:
    """Rows of one stretch each: [prefix] document[offset : offset + length] [suffix]."""
    zero, one = np.zeros_like(offset), np.ones_like(offset)
    return Fragments(
        row=row,
        column=zero,
        document=document,
        offset=offset,
        length=length,
        head_from=zero,
        head_count=one * len(spec.prefix),
        tail_from=zero,
        tail_count=one * len(spec.suffix),
        segment=one,
        position=zero,
        token_type=zero,
    )


def _two_parts(
    spec: RowSpec, row: Ints, document: Ints, offset_a: Ints, length_a: Ints, offset_b: Ints, length_b: Ints
) -> Fragments:
    """Rows of two stretches of a document each: [prefix] A [suffix] B [suffix], together one segment."""
    prefix, suffix = len(spec.prefix), len(spec.suffix)
    zero, one = np.zeros_like(offset_a), np.ones_like(offset_a)
    column_b = prefix + length_a + suffix
    return Fragments(
        row=_interleave(row, row),
        column=_interleave(zero, column_b),
        document=_interleave(document, document),
        offset=_interleave(offset_a, offset_b),
        length=_interleave(length_a, length_b),
        head_from=_interleave(zero, zero),
        head_count=_interleave(one * prefix, zero),
        tail_from=_interleave(zero, zero),
        tail_count=_interleave(one * suffix, one * suffix),
        segment=_interleave(one, one),
        position=_interleave(zero, column_b),
        token_type=_interleave(zero, one),
    )


def _trim(length_a: Ints, length_b: Ints, budget: int) -> tuple[Ints, Ints]:
    """Lengths after tokens were taken from the longer of A and B (B when equal) until both fit the budget."""
    fits = length_a + length_b <= budget
    trimmed = np.minimum(length_a, np.maximum(budget - length_b, budget - budget // 2))
    return np.where(fits, length_a, trimmed), np.where(fits, length_b, budget - trimmed)


def _interleave(first: Ints, second: Ints) -> Ints:
    return np.stack([first, second], axis=1).reshape(-1)


def room(spec: RowSpec, parts: int) -> int:
    """Tokens of text in a row that holds the prefix once and the suffix after each of `parts` parts."""
    left = spec.length - len(spec.prefix) - parts * len(spec.suffix)
    if left < parts:
        raise UserError(
            f"data.length gives rows of {spec.length} tokens, of which special tokens take {spec.length - left}; "
            f"accepted: at least {spec.length - left + parts}."
        )
    return left
