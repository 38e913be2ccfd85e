"""Batches of one split under one RowSpec: the plan of the epoch, the tokens it points to, and threads that read ahead.

Batch s is made of global rows s * B ... s * B + B - 1; row g belongs to epoch g // rows_per_epoch. Nothing else decides
its content, so any step can be read first, and hosts that read slices of a batch read the same batch.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator

import grain
import numpy as np
from numpy.typing import NDArray

from lmobj.batch import RowSpec
from lmobj.data._plan import (
    Fragments,
    Ints,
    PackedPlan,
    PairsPlan,
    Plan,
    Sentences,
    SinglePlan,
    StreamPlan,
    epoch_key,
    ragged,
    shuffle_rows,
)
from lmobj.data._shards import TokenStore
from lmobj.data._tokenizer import Tokenizer
from lmobj.errors import UserError

__all__ = ["HostBatch", "Rows"]

HostBatch = dict[str, NDArray]
"""A batch in NumPy arrays on the host, with the names of `lmobj.batch`."""

_SOURCE_ID = 0
_FIELDS = ("word_starts", "token_bytes")
_READ_AHEAD = 8
_READ_THREADS = 2


class Rows:
    """The rows of one split under one RowSpec, addressed by global row or by step. See `Dataset.rows`."""

    def __init__(
        self,
        store: TokenStore,
        tokenizer: Tokenizer,
        spec: RowSpec,
        *,
        fingerprint: str,
        seed: int,
        batch_size: int,
        once: bool,
    ):
        unknown = [name for name in spec.fields if name not in _FIELDS]
        if unknown:
            raise UserError(f"RowSpec.fields has {unknown[0]!r}; accepted: {', '.join(_FIELDS)}.")
        self.spec = spec
        self.batch_size = batch_size
        self.once = once
        self._store = store
        self._tokenizer = tokenizer
        self._fingerprint = fingerprint
        self._seed = 0 if once else seed  # what is evaluated does not depend on the run's seed
        self._plans: OrderedDict[int, Plan] = OrderedDict()
        self._lock = threading.Lock()
        self._fixed = self._fixed_plan()
        self.per_epoch = self._plan(0).rows
        """Rows in an epoch."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every row once; the last may be part empty."""
        return -(-self.per_epoch // self.batch_size)

    def row(self, index: int) -> HostBatch:
        """Global row `index` alone: arrays as in a batch of one row."""
        return self._assemble(np.array([index], np.int64))

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> HostBatch:
        """The batch of a step, or the contiguous slice of it that belongs to one of several processes."""
        local = self.batch_size // process_count
        start = step * self.batch_size + process_index * local
        return self._assemble(np.arange(start, start + local))

    def batches(
        self, start: int = 0, steps: int | None = None, process_index: int = 0, process_count: int = 1
    ) -> Iterator[HostBatch]:
        """Batches of steps start, start + 1, ..., read ahead by threads; `steps` of them, or without end.

        A split that is read once ends with its last row in any case. Raises UserError if the processes do not divide
        the batch.
        """
        if self.batch_size % process_count:
            raise UserError(
                f"the batch size {self.batch_size} is not divisible by the {process_count} processes that read it; "
                f"accepted: a multiple of {process_count}."
            )
        stop = sys.maxsize if steps is None else start + steps
        if self.once:
            stop = min(stop, self.steps_per_epoch)
        return self._read_ahead(min(start, stop), stop, process_index, process_count)

    def _read_ahead(self, start: int, stop: int, process_index: int, process_count: int) -> Iterator[HostBatch]:
        source = grain.MapDataset.source(_Steps(self, process_index, process_count))
        options = grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=_READ_AHEAD)
        batches = iter(source[start:stop].to_iter_dataset(options))
        try:
            yield from batches
        finally:
            batches.close()

    def _fixed_plan(self) -> Plan | None:
        """The part of the plan that is the same in every epoch, if any."""
        if self.spec.layout == "single":
            return SinglePlan(self._store.lengths, self.spec)
        if self.spec.layout == "pairs":
            return PairsPlan(Sentences(self._store.sentence_ends, self._store.sentence_counts), self.spec)
        return None

    def _plan(self, epoch: int) -> Plan:
        """The plan of an epoch; the two last used are kept, since a batch can touch two epochs."""
        with self._lock:
            if epoch not in self._plans:
                self._plans[epoch] = self._make_plan(epoch)
                while len(self._plans) > 2:
                    self._plans.popitem(last=False)
            self._plans.move_to_end(epoch)
            return self._plans[epoch]

    def _make_plan(self, epoch: int) -> Plan:
        if isinstance(self._fixed, PairsPlan):
            return self._fixed.at(self._key(epoch, "pairs"))
        if self._fixed is not None:
            return self._fixed
        key = None if self.once else self._key(epoch, "documents")
        packed = PackedPlan(self._store.lengths, self.spec, key)
        return StreamPlan(packed, self.batch_size) if self.spec.layout == "stream" else packed

    def _key(self, epoch: int, purpose: str) -> int:
        return epoch_key(self._fingerprint, self._seed, epoch, purpose)

    def _lookup(self, rows: Ints) -> list[Fragments]:
        """Fragments of global rows, epoch by epoch."""
        if self.once:
            return [self._plan(0).lookup(rows)]
        found = []
        epochs = rows // self.per_epoch
        for epoch in np.unique(epochs).tolist():
            here = np.flatnonzero(epochs == epoch)
            local = rows[here] - epoch * self.per_epoch
            if self.spec.layout != "stream":
                local = shuffle_rows(local, self.per_epoch, self._key(epoch, "rows"))
            fragments = self._plan(epoch).lookup(local)
            found.append(fragments._replace(row=here[fragments.row]))
        return found

    def _assemble(self, rows: Ints) -> HostBatch:
        found = self._lookup(rows)
        at = found[0] if len(found) == 1 else Fragments(*(np.concatenate(part) for part in zip(*found, strict=True)))
        spec, shape = self.spec, (len(rows), self.spec.length)
        tokens = np.full(shape, self._tokenizer.vocabulary.pad, np.int32)
        segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        begin = at.row * spec.length + at.column
        text = begin + at.head_count
        tokens.reshape(-1)[_spread(text, at.length)] = self._store.gather(at.document, at.offset, at.length)
        _put_specials(tokens, spec.prefix, begin, at.head_from, at.head_count)
        _put_specials(tokens, spec.suffix, text + at.length, at.tail_from, at.tail_count)
        fragment, nth = ragged(at.head_count + at.length + at.tail_count)
        where = begin[fragment] + nth
        segments.reshape(-1)[where] = at.segment[fragment]
        positions.reshape(-1)[where] = at.position[fragment] + nth
        # 31 bits of the global row address its randomness; the step is folded in beside them.
        row_ids = np.stack([np.full(len(rows), _SOURCE_ID), rows & 0x7FFFFFFF], axis=1).astype(np.int32)
        batch: HostBatch = {"tokens": tokens, "segment_ids": segments, "positions": positions, "row_ids": row_ids}
        if spec.layout == "pairs":
            token_types = np.zeros(shape, np.int32)
            token_types.reshape(-1)[where] = at.token_type[fragment]
            batch |= {"token_types": token_types, "pair_labels": np.zeros(len(rows), np.int32)}
        if "word_starts" in spec.fields:
            batch["word_starts"] = self._tokenizer.word_starts(tokens, segments)
        if "token_bytes" in spec.fields:
            batch["token_bytes"] = np.where(segments > 0, self._tokenizer.piece_bytes[tokens], 0).astype(np.int32)
        return batch


class _Steps:
    """Batches by step, for Grain."""

    def __init__(self, rows: Rows, process_index: int, process_count: int):
        self._rows = rows
        self._process = (process_index, process_count)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> HostBatch:
        return self._rows.batch(step, *self._process)


def _spread(begin: Ints, count: Ints) -> Ints:
    """The indices begin, begin + 1, ... of every run, end to end."""
    run, nth = ragged(count)
    return begin[run] + nth


def _put_specials(tokens: NDArray[np.int32], special: tuple[int, ...], begin: Ints, start: Ints, count: Ints) -> None:
    """Writes special[start : start + count] at each `begin` of the flat tokens."""
    if special:
        run, nth = ragged(count)
        tokens.reshape(-1)[begin[run] + nth] = np.array(special, np.int32)[start[run] + nth]
