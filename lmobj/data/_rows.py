"""Batches of one split under one RowSpec, addressed by step, and threads that read ahead.

Batch s is made of global rows s * B ... s * B + B - 1. Nothing but its number decides what a row holds, so any step can
be read first, and processes that read shares of a batch read the same batch.
"""

from __future__ import annotations

import abc
import sys
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from numpy.typing import NDArray

from lmobj.batch import RowSpec
from lmobj.data._plan import Ints, epoch_key, shuffle_rows

__all__ = ["HostBatch", "Indices", "MemoryRows", "Rows", "row_number"]

HostBatch = dict[str, NDArray]
"""A batch in NumPy arrays on the host, with the names of `lmobj.batch`."""

Indices = Sequence[int] | NDArray[np.integer]

_READ_AHEAD = 8
_READ_THREADS = 2


class Rows(abc.ABC):
    """The rows of one split under one RowSpec, addressed by global row or by step."""

    def __init__(self, spec: RowSpec, per_epoch: int, *, batch_size: int, once: bool):
        self.spec = spec
        self.batch_size = batch_size
        self.once = once
        """Whether the split ends with its last row, instead of beginning again."""
        self.per_epoch = per_epoch
        """Rows in an epoch."""

    @abc.abstractmethod
    def _assemble(self, rows: Ints) -> HostBatch:
        """The batch of these global rows; those beyond the end of a split that is read once are empty."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every row once; the last may be part empty."""
        return -(-self.per_epoch // self.batch_size)

    def row(self, index: int) -> HostBatch:
        """Global row `index` alone: arrays as in a batch of one row."""
        return self._assemble(np.array([index], np.int64))

    def batch(self, step: int, local: Indices | None = None) -> HostBatch:
        """The batch of a step, or of its rows those at the places `local`, each in [0, B)."""
        places = np.arange(self.batch_size) if local is None else np.asarray(local, np.int64)
        return self._assemble(step * self.batch_size + places)

    def batches(self, start: int = 0, steps: int | None = None, local: Indices | None = None) -> Iterator[HostBatch]:
        """Batches of steps start, start + 1, ..., read ahead by threads; `steps` of them, or without end.

        A split that is read once ends with its last row in any case. Raises ValueError for places outside the batch.
        """
        if local is not None and not all(0 <= place < self.batch_size for place in local):
            raise ValueError(f"local has rows outside the batch of {self.batch_size}: {list(local)}")
        stop = sys.maxsize if steps is None else start + steps
        if self.once:
            stop = min(stop, self.steps_per_epoch)
        return self._read_ahead(min(start, stop), stop, local)

    def _read_ahead(self, start: int, stop: int, local: Indices | None) -> Iterator[HostBatch]:
        source = grain.MapDataset.source(_Steps(self, local))
        options = grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=_READ_AHEAD)
        batches = iter(source[start:stop].to_iter_dataset(options))
        try:
            yield from batches
        finally:
            batches.close()


class MemoryRows(Rows):
    """Rows that are all in memory, in each epoch in an order of its own, or once in the order that they have."""

    def __init__(
        self,
        arrays: HostBatch,
        spec: RowSpec,
        *,
        batch_size: int,
        once: bool,
        fingerprint: str,
        seed: int,
        empty: HostBatch,
    ):
        """
        Args:
          arrays: all rows, with the names of `lmobj.batch` but for `row_ids`.
          spec: what they are.
          batch_size: rows of the global batch.
          once: they are read once, in order; else without end.
          fingerprint, seed: decide the order.
          empty: of each array one row that stands for none.
        """
        super().__init__(spec, len(arrays["tokens"]), batch_size=batch_size, once=once)
        self._arrays = {name: np.concatenate([values, empty[name][None]]) for name, values in arrays.items()}
        self._fingerprint, self._seed = fingerprint, seed

    def _assemble(self, rows: Ints) -> HostBatch:
        if self.once:
            places = np.minimum(rows, self.per_epoch)
        else:
            epochs = rows // self.per_epoch
            places = rows - epochs * self.per_epoch
            for epoch in np.unique(epochs).tolist():
                here = epochs == epoch
                key = epoch_key(self._fingerprint, self._seed, epoch, "rows")
                places[here] = shuffle_rows(places[here], self.per_epoch, key)
        batch = {name: values[places] for name, values in self._arrays.items()}
        row_ids = np.stack([np.zeros_like(rows), row_number(rows)], axis=1).astype(np.int32)
        return batch | {"row_ids": row_ids}


def row_number(rows: Ints) -> Ints:
    """What of a row's number addresses its randomness, beside the step: 31 bits."""
    return rows & 0x7FFFFFFF


class _Steps:
    """Batches by step, for Grain."""

    def __init__(self, rows: Rows, local: Indices | None):
        self._rows, self._local = rows, local

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> HostBatch:
        return self._rows.batch(step, self._local)
