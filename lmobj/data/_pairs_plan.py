"""Pairs of texts made of sentences: [prefix] A [suffix] B [suffix], for sentence-level objectives.

A document is read chunk by chunk: sentences are taken until they fill a target length or the document ends. A is the
first of them, of which there are evenly 1 to one less than all; what B is, `RowSpec.pairing` says:

    next_sentence   label 0: the rest of the chunk. Label 1, for a chunk of one sentence and for half of the others:
                    text of another document, and the chunk's rest goes back to be read by the next chunk
                    (Devlin et al., 2019, section 3.1, task 2, and the released create_pretraining_data.py)
    sentence_order  label 0: the rest of the chunk. Label 1, for half of the chunks: A and B change places. A chunk of
                    one sentence takes text of another document, label 1 as well (Lan et al., 2020, section 3.1, and
                    the released code)

So more than half of the labels are 1. The target is the room in a row, or with probability `short_rate` a length drawn
evenly from 2 to it. A pair that does not fit loses tokens of the longer text (of B when they are equal), each from its
front or its back with probability 1/2.

Every draw is a hash of (the epoch's key, the purpose, the chunk's first sentence), so a row is looked up with nothing
before it read; a plan holds only where chunks begin. Deviations from the released code: the short length is drawn for
each chunk, not for each document; another document is one of the same source and split; and chunks are drawn anew in
each epoch instead of ten times beforehand.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmobj.batch import RowSpec
from lmobj.data._plan import Fragments, Ints, Stretches, hashed, ragged, room, trim, two_parts
from lmobj.data._sentences import Sentences
from lmobj.errors import UserError

__all__ = ["PairsPlan"]

_BLOCK = 1 << 20
"""Documents that are divided at once, so that temporaries stay small."""
_TRIES = 10
"""Draws of another document before the chunk's own is taken for it, as in BERT's code."""
_SHORT, _LENGTH, _DIVISION, _LABEL, _CUT_A, _CUT_B, _SENTENCE, _DOCUMENT = range(8)
"""Purposes of draws; further tries of another document count on from the last."""


class PairsPlan:
    """One epoch of pairs. See the module docstring.

    Holds 4 bytes per row, or 8 for 2^31 sentences and more.
    """

    def __init__(self, sentences: Sentences, spec: RowSpec, key: int):
        self._sentences = sentences
        self._spec = spec
        self._room = room(spec, 2)
        self._draws = _Draws(key)
        self._check()
        self._begins = self._divide()
        self.rows = len(self._begins)

    def lookup(self, rows: Ints) -> Fragments:
        row = np.flatnonzero(rows < self.rows)
        begin = self._begins[rows[row]].astype(np.int64)
        chunk = self._chunks(begin, self._sentences.document(begin))
        a, b = self._texts(chunk)
        length_a, length_b = trim(a.length, b.length, self._room)
        a = Stretches(a.document, a.offset + self._draws.heads(begin, _CUT_A, a.length - length_a), length_a)
        b = Stretches(b.document, b.offset + self._draws.heads(begin, _CUT_B, b.length - length_b), length_b)
        return two_parts(self._spec, row, a, b, chunk.label)

    def _check(self) -> None:
        sentences, count = self._sentences, len(self._sentences.documents)
        if not (np.diff(sentences.first) > 1).any():
            raise UserError(
                f"the objective reads pairs of sentences, but of {count:,} documents none has two; accepted: documents "
                "of two or more sentences or lines (data.source.documents: file joins the lines of a file)."
            )
        if self._spec.pairing == "next_sentence" and count < 2:
            raise UserError(
                f"the objective pairs sentences of different documents, but there is {count} document, of "
                f"{len(sentences.ends):,} sentences; accepted: two or more documents in each split."
            )

    def _divide(self) -> NDArray[np.integer]:
        """The sentence at which each chunk begins, in order."""
        sentences = self._sentences
        number = np.int32 if len(sentences.ends) < 2**31 else np.int64
        found = []
        for block in range(0, len(sentences.documents), _BLOCK):
            document = sentences.documents[block : block + _BLOCK].astype(np.int64)
            begin, rounds = sentences.first[document], []
            while len(begin):  # one round per chunk of the longest document
                rounds.append(begin)
                chunk = self._chunks(begin, document)
                returns = chunk.label.astype(np.bool_) & (self._spec.pairing == "next_sentence")
                begin = np.where(returns, chunk.middle, chunk.end)
                unread = begin < sentences.first[document + 1]
                begin, document = begin[unread], document[unread]
            found.append(np.sort(np.concatenate(rounds)).astype(number))
        return np.concatenate(found)

    def _chunks(self, begin: Ints, document: Ints) -> _Chunks:
        """The chunks that begin with these sentences."""
        draws = self._draws
        short = draws.chance(begin, _SHORT, self._spec.short_rate)
        target = np.where(short, 2 + draws.below(begin, _LENGTH, self._room - 1), self._room)
        end = self._sentences.fill(begin, document, target)
        middle = begin + 1 + draws.below(begin, _DIVISION, np.maximum(end - begin - 1, 1))
        label = (end - begin == 1) | draws.chance(begin, _LABEL, 0.5)
        return _Chunks(document, begin, middle, end, target, label.astype(np.int64))

    def _texts(self, chunk: _Chunks) -> tuple[Stretches, Stretches]:
        """A and B of each chunk, before they are cut to fit."""
        sentences, (document, begin, middle, end, target, label) = self._sentences, chunk
        start, border = sentences.start(begin, document), sentences.ends[middle - 1].astype(np.int64)
        opening = Stretches(document, start, border - start)
        rest = Stretches(document, border, sentences.ends[end - 1] - border)
        elsewhere = self._elsewhere(begin, document, target - opening.length)
        if self._spec.pairing == "next_sentence":
            return opening, _chosen(label == 1, elsewhere, rest)
        alone = end - begin == 1
        swapped = (label == 1) & ~alone
        return _chosen(swapped, rest, opening), _chosen(alone, elsewhere, _chosen(swapped, opening, rest))

    def _elsewhere(self, begin: Ints, document: Ints, tokens: Ints) -> Stretches:
        """Text of `tokens` tokens and the rest of their last sentence, from any sentence of another document on."""
        sentences, other = self._sentences, document
        for attempt in range(_TRIES):
            drawn = sentences.documents[self._draws.below(begin, _DOCUMENT + attempt, len(sentences.documents))]
            other = np.where(other == document, drawn, other)
        first, last = sentences.first[other], sentences.first[other + 1]
        sentence = first + self._draws.below(begin, _SENTENCE, last - first)
        offset = sentences.start(sentence, other)
        return Stretches(other, offset, sentences.ends[sentences.fill(sentence, other, tokens) - 1] - offset)


class _Chunks(NamedTuple):
    """Sentences [begin, end) of a document, divided at `middle`; a chunk of one sentence has middle == end."""

    document: Ints
    begin: Ints
    middle: Ints
    end: Ints
    target: Ints
    """Tokens that the pair is to have, about."""
    label: Ints


def _chosen(where: NDArray[np.bool_], these: Stretches, those: Stretches) -> Stretches:
    return Stretches(*(np.where(where, one, other) for one, other in zip(these, those, strict=True)))


class _Draws:
    """Random numbers addressed by (key, purpose, index): any of them without those before it."""

    def __init__(self, key: int):
        purposes = np.arange(_DOCUMENT + _TRIES, dtype=np.uint64)
        self._keys = hashed(purposes ^ np.uint64(key))

    def bits(self, index: Ints, purpose: int) -> NDArray[np.uint64]:
        """64 bits for each index."""
        return hashed(index.astype(np.uint64) ^ self._keys[purpose])

    def below(self, index: Ints, purpose: int, bound: Ints | int) -> Ints:
        """Evenly one of 0 ... bound - 1."""
        return (self.bits(index, purpose) % np.asarray(bound, np.uint64)).astype(np.int64)

    def chance(self, index: Ints, purpose: int, probability: float) -> NDArray[np.bool_]:
        """True with this probability."""
        return (self.bits(index, purpose) >> np.uint64(11)) * 2.0**-53 < probability

    def heads(self, index: Ints, purpose: int, coins: Ints) -> Ints:
        """How many of so many fair coins fall heads: Binomial(coins, 1/2), by counting bits."""
        run, nth = ragged(-(-coins // 64))
        bits = hashed(self.bits(index, purpose)[run] ^ nth.astype(np.uint64))
        unused = 64 - np.minimum(coins[run] - 64 * nth, 64)
        ones = np.bitwise_count(bits >> unused.astype(np.uint64))
        return np.bincount(run, weights=ones, minlength=len(coins)).astype(np.int64)
