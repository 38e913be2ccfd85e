"""Row plans: which stretch of which document stands where in which row. Looked up, never iterated.

A plan is a table over one epoch. `lookup(rows)` turns row numbers into fragments:

    row, column      where the fragment begins in the batch that is asked for
    document         the document it is taken from
    offset, length   the tokens taken: document[offset : offset + length]
    head, tail       (from, count) of the special tokens of `prefix` before and of `suffix` after those tokens
    segment          1, 2, ... in its row
    position         position of its first token in the segment (0 unless it continues a pair)
    token_type       0, or 1 for the second part of a pair, 2 for a CLS at the end
    pair_label       of the pair that it is a part of (`lmobj.batch`), else 0

Layouts: packed lays the documents of the epoch (in its permutation) end to end, each with its prefix and suffix, and
cuts the result into rows; single cuts each document into pieces of its own; examples takes each document whole, or what
fits of it. Pairs of runs of sentences are planned in `_pairs_plan`, streams in `_stream_plan`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
    "Plan",
    "SinglePlan",
    "Stretches",
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
    pair_label: Ints

    @classmethod
    def joined(cls, parts: Sequence[Fragments]) -> Fragments:
        """The fragments of all parts, one part after the other."""
        return parts[0] if len(parts) == 1 else cls(*(np.concatenate(part) for part in zip(*parts, strict=True)))


class Stretches(NamedTuple):
    """The tokens document[offset : offset + length], one stretch per row."""

    document: Ints
    offset: Ints
    length: Ints


class Plan(Protocol):
    """One epoch of rows."""

    rows: int
    """Rows in the epoch."""

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
        hashed(block)
        block <<= bits
        block |= index
    entries.sort()
    entries &= (np.uint64(1) << bits) - np.uint64(1)
    return entries.astype(np.int32)


def hashed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 on the golden-ratio sequence (Steele et al., 2014); works in place."""
    values += np.uint64(0x9E3779B97F4A7C15)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def offsets_of(counts: NDArray[np.integer]) -> Ints:
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
        self.order = permutation(len(lengths), key) if key is not None else None
        """[N] the documents in the order of the text; None for the stored order."""
        ordered = lengths if self.order is None else lengths[self.order]
        self.starts = offsets_of(ordered + self._specials)
        """[N + 1] where each of them begins in the text, with its prefix, and where the text ends."""
        self.rows = int(-(-self.starts[-1] // spec.length))

    @property
    def tokens(self) -> int:
        """Tokens of the text."""
        return int(self.starts[-1])

    def lookup(self, rows: Ints) -> Fragments:
        begin = rows * self._spec.length
        return self.stretches(begin, begin + self._spec.length)

    def locate(self, places: Ints) -> tuple[Ints, Ints, Ints]:
        """(place in the order, document, tokens into it and its prefix) of places in the text; the last has its end."""
        slot = np.minimum(np.searchsorted(self.starts, places, side="right") - 1, len(self.starts) - 2)
        return slot, slot if self.order is None else self.order[slot].astype(np.int64), places - self.starts[slot]

    def stretches(self, begin: Ints, end: Ints) -> Fragments:
        """The tokens [begin, end) of the text, one stretch per row, cut at the text's end."""
        starts = self.starts
        begin, end = np.minimum(begin, starts[-1]), np.minimum(end, starts[-1])
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
            document=slot if self.order is None else self.order[slot].astype(np.int64),
            offset=offset,
            length=np.clip(high - head, 0, raw) - offset,
            head_from=np.minimum(low, head),
            head_count=np.minimum(high, head) - np.minimum(low, head),
            tail_from=tail_from,
            tail_count=np.maximum(high - head - raw, 0) - tail_from,
            segment=nth + 1,
            position=zero,
            token_type=zero,
            pair_label=zero,
        )


class SinglePlan:
    """Each document cut into pieces of length - len(prefix) - len(suffix) tokens, one per row with both around it."""

    def __init__(self, lengths: NDArray[np.integer], spec: RowSpec):
        self._spec = spec
        self._lengths = lengths
        self._room = room(spec, 1)
        self._starts = offsets_of(-(-lengths // self._room))
        self.rows = int(self._starts[-1])

    def lookup(self, rows: Ints) -> Fragments:
        row = np.flatnonzero(rows < self.rows)
        asked = rows[row]
        document = np.searchsorted(self._starts, asked, side="right") - 1
        offset = (asked - self._starts[document]) * self._room
        return _one_part(self._spec, row, document, offset, np.minimum(self._lengths[document] - offset, self._room))


class ExamplesPlan:
    """One document per row: [prefix] A [suffix], or [prefix] A [suffix] B [suffix] where documents are two texts.

    What does not fit is cut from the end of A and of B, token by token from the longer one (from B when they are
    equal), as Hugging Face's `longest_first` does; or where B has a length of its own, from each by itself.
    """

    def __init__(self, lengths: NDArray[np.integer], pair_starts: NDArray[np.integer] | None, spec: RowSpec):
        """lengths: tokens per document, [N]; pair_starts: those of them that are the first text, [N]."""
        self._spec = spec
        self._lengths = lengths
        self._pair_starts = pair_starts
        self._room = room(spec, 1 if pair_starts is None else 2)
        self._most_b = spec.second_length - len(spec.suffix)
        """Tokens of B, where it has a length of its own."""
        if spec.second_length and not 0 < self._most_b < self._room:
            raise UserError(
                f"RowSpec.second_length is {spec.second_length} in rows of {spec.length} tokens; accepted: room for "
                "text and its special tokens, in both texts."
            )
        self.rows = len(lengths)

    def lookup(self, rows: Ints) -> Fragments:
        row = np.flatnonzero(rows < self.rows)
        document = rows[row]
        length, zero = self._lengths[document].astype(np.int64), np.zeros_like(document)
        if self._pair_starts is None:
            return _one_part(self._spec, row, document, zero, np.minimum(length, self._room))
        border = self._pair_starts[document].astype(np.int64)
        length_a, length_b = self._cut(border, length - border)
        a, b = Stretches(document, zero, length_a), Stretches(document, border, length_b)
        return two_parts(self._spec, row, a, b, pair_label=zero)

    def cut(self) -> tuple[int, int]:
        """How many documents of two texts lose tokens of A, and how many of B."""
        assert self._pair_starts is not None
        lengths = self._pair_starts, self._lengths - self._pair_starts
        kept = self._cut(*(length.astype(np.int64) for length in lengths))
        first, second = (int(np.sum(one < whole)) for one, whole in zip(kept, lengths, strict=True))
        return first, second

    def _cut(self, length_a: Ints, length_b: Ints) -> tuple[Ints, Ints]:
        """What fits of both texts."""
        if self._spec.second_length:
            return np.minimum(length_a, self._room - self._most_b), np.minimum(length_b, self._most_b)
        return trim(length_a, length_b, self._room)


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
        pair_label=zero,
    )


def two_parts(spec: RowSpec, row: Ints, a: Stretches, b: Stretches, pair_label: Ints) -> Fragments:
    """Rows of two stretches each: [prefix] A [suffix] B [suffix], together one segment."""
    prefix, suffix = len(spec.prefix), len(spec.suffix)
    zero, one = np.zeros_like(a.offset), np.ones_like(a.offset)
    column_b = prefix + a.length + suffix
    return Fragments(
        row=_interleave(row, row),
        column=_interleave(zero, column_b),
        document=_interleave(a.document, b.document),
        offset=_interleave(a.offset, b.offset),
        length=_interleave(a.length, b.length),
        head_from=_interleave(zero, zero),
        head_count=_interleave(one * prefix, zero),
        tail_from=_interleave(zero, zero),
        tail_count=_interleave(one * suffix, one * suffix),
        segment=_interleave(one, one),
        position=_interleave(zero, column_b),
        token_type=_interleave(zero, one),
        pair_label=_interleave(pair_label, pair_label),
    )


def trim(length_a: Ints, length_b: Ints, budget: int) -> tuple[Ints, Ints]:
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
