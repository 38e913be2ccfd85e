"""Mixtures: which source each row of the training split is taken from.

The rows of a mixture repeat a table of `period` slots. Slot p belongs to source[p] and is its rank[p]-th slot in the
table, and source i has counts[i] slots. Global row g stands in slot g % period of round g // period, and is row
(g // period) * counts[i] + rank of source i. So every row has an address that is computed, not counted: any batch can
be read first, and every source is read row after row, however often the others begin again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lmobj._shares import share_out

__all__ = ["PERIOD", "InOrder", "Mixture"]

PERIOD = 4096
"""Slots of the table, but for streams, which have one slot each: their shares are multiples of 1 / PERIOD."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Mixture:
    """The table of a mixture: source [P], rank [P], counts [number of sources]."""

    source: Ints
    rank: Ints
    counts: Ints

    @classmethod
    def of(cls, weights: Sequence[float], period: int) -> Mixture:
        """The table for these weights, each above 0; there must be at least as many slots as sources."""
        return _table(tuple(weights), period)

    def locate(self, rows: Ints) -> tuple[Ints, Ints]:
        """(source, row of that source) of global rows."""
        turn, slot = np.divmod(rows, len(self.source))
        source = self.source[slot]
        return source, turn * self.counts[source] + self.rank[slot]


@lru_cache(maxsize=8)
def _table(weights: tuple[float, ...], period: int) -> Mixture:
    """Spreads each source's slots evenly: among the first n slots, source i has n * counts[i] / period to within
    1 - 1 / (2k - 2) for k sources, the least that is possible for all weights.

    Source: Tijdeman, "The chairman assignment problem", Discrete Mathematics 32, 1980, 323-330.
    """
    if not 1 <= len(weights) <= period:
        raise ValueError(f"a mixture of {len(weights)} sources does not fit into {period} slots")
    counts = np.array(share_out(weights, period), np.int64)
    if len(counts) == 1:
        return Mixture(np.zeros(period, np.int64), np.arange(period), counts)
    scale = 2 * len(counts) - 2
    due = np.zeros_like(counts)  # scale * period * (slots due until now - slots given)
    source = np.empty(period, np.int64)
    for slot in range(period):
        due += scale * counts
        deadline = np.where(due >= period, (period * (scale - 1) - due) / counts, np.inf)
        source[slot] = chosen = int(np.argmin(deadline))
        due[chosen] -= scale * period
    rank = np.empty(period, np.int64)
    for i in range(len(counts)):
        rank[source == i] = np.arange(counts[i])
    return Mixture(source, rank, counts)


class InOrder:
    """Held-out splits: the sources one after the other, each row once. Rows past the end are past that of the last."""

    def __init__(self, counts: Sequence[int]):
        """counts: rows of each source."""
        self._ends = np.cumsum(counts)

    def locate(self, rows: Ints) -> tuple[Ints, Ints]:
        """(source, row of that source) of global rows."""
        source = np.minimum(np.searchsorted(self._ends, rows, side="right"), len(self._ends) - 1)
        return source, rows - np.concatenate([[0], self._ends])[source]
