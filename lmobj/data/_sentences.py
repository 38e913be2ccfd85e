"""The sentences of a split, as they were found when its text was prepared: where they begin and end."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lmobj.data._plan import Ints, offsets_of, ragged

__all__ = ["Sentences"]


class Sentences:
    """Sentences of all documents, laid end to end and numbered through.

    ends: [S] offset in its document after each sentence; every sentence has tokens. first: [N + 1] number of the first
    sentence of each document, and S. documents: those that have sentences.
    """

    def __init__(self, ends: NDArray[np.integer], counts: NDArray[np.integer]):
        """counts: [N] sentences per document."""
        self.ends = np.asarray(ends)
        self.first = offsets_of(counts)
        self.documents = np.flatnonzero(counts).astype(np.int32)

    def document(self, sentence: Ints) -> Ints:
        """The document that each sentence is in."""
        return np.searchsorted(self.first, sentence, side="right") - 1

    def start(self, sentence: Ints, document: Ints) -> Ints:
        """Offset at which each sentence begins in its document."""
        return np.where(sentence == self.first[document], 0, self.ends[sentence - 1]).astype(np.int64)

    def fill(self, begin: Ints, document: Ints, tokens: Ints) -> Ints:
        """The sentence after the last of as few as have `tokens` tokens from `begin` on, at least one; or the end of
        the document, if all have fewer."""
        last = np.minimum(self.first[document + 1], begin + np.maximum(tokens, 1)) - 1
        return self._reaching(begin, last, self.start(begin, document) + tokens) + 1

    def inside(self, document: Ints, offset: Ints, length: Ints) -> tuple[Ints, Ints]:
        """Where sentences end in the stretches document[offset : offset + length]: of every sentence whose last token
        is in one, which stretch that is, and the token's place in it."""
        full = np.flatnonzero(length)
        document, offset, length = document[full], offset[full], length[full]
        last = self.first[document + 1] - 1
        low = self._reaching(self.first[document], last, offset + 1)
        high = self._reaching(low, last, offset + length)  # may end beyond the stretch
        stretch, nth = ragged(high - low + 1)
        place = self.ends[low[stretch] + nth] - 1 - offset[stretch]
        ends = place < length[stretch]
        return full[stretch[ends]], place[ends]

    def _reaching(self, low: Ints, high: Ints, offset: Ints) -> Ints:
        """The first of the sentences `low` .. `high` of a document that ends at `offset` or later; `high` if none."""
        while (wide := low < high).any():
            middle = (low + high) >> 1
            short = self.ends[middle] < offset
            low, high = np.where(wide & short, middle + 1, low), np.where(wide & ~short, middle, high)
        return low
