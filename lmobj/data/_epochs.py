"""The rows of one source under one RowSpec, epoch after epoch: row r belongs to epoch r // per_epoch.

Pairs are drawn anew in each epoch, and their number differs a little. An epoch has as many rows as the first all the
same: of one with more rows some are passed over, evenly drawn, and of one with fewer some are read twice.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lmobj.batch import RowSpec
from lmobj.data._pairs_plan import PairsPlan
from lmobj.data._plan import (
    ExamplesPlan,
    Fragments,
    Ints,
    PackedPlan,
    Plan,
    SinglePlan,
    epoch_key,
    shuffle_rows,
)
from lmobj.data._sentences import Sentences
from lmobj.data._shards import TokenStore
from lmobj.data._stream_plan import STREAM_LAYOUTS, StreamPairsPlan, StreamPlan, reads_backward

__all__ = ["Epochs"]


class Epochs:
    """Looks up rows of one split of one source. The training split repeats, in each epoch in an order of its own."""

    def __init__(self, store: TokenStore, spec: RowSpec, *, fingerprint: str, seed: int, streams: int, once: bool):
        """streams: rows of this source in a batch, where the layout is of streams. once: there is one epoch, in the
        stored order."""
        self.store = store
        self._spec = spec
        self._fingerprint = fingerprint
        self._seed = 0 if once else seed  # what is evaluated does not depend on the run's seed
        self._streams = streams
        self._once = once
        self._plans: OrderedDict[int, Plan] = OrderedDict()
        self._lock = threading.Lock()
        self._fixed = self._fixed_plan()
        self.per_epoch = self._plan(0).rows
        """Rows in an epoch, the same in every epoch."""

    @cached_property
    def sentences(self) -> Sentences:
        """Those of all documents of the split."""
        return Sentences(self.store.sentence_ends, self.store.sentence_counts)

    def lookup(self, rows: Ints) -> Fragments:
        """The fragments of these rows, whose `row` counts within `rows`."""
        if self._once:
            return self._plan(0).lookup(rows)
        found = []
        epochs = rows // self.per_epoch
        for epoch in np.unique(epochs).tolist():
            here = np.flatnonzero(epochs == epoch)
            local, plan = rows[here] - epoch * self.per_epoch, self._plan(epoch)
            if self._spec.layout not in STREAM_LAYOUTS:
                local = shuffle_rows(local % plan.rows, plan.rows, self._key(epoch, "rows"))
            fragments = plan.lookup(local)
            found.append(fragments._replace(row=here[fragments.row]))
        return Fragments.joined(found)

    def backward(self, rows: Ints) -> NDArray[np.bool_]:
        """Whether each of these rows reads its text backwards."""
        return reads_backward(rows, self._spec, self._streams)

    def _fixed_plan(self) -> Plan | None:
        """The part of the plan that is the same in every epoch, if any."""
        store, spec = self.store, self._spec
        if spec.layout == "single":
            return SinglePlan(store.lengths, spec)
        if spec.layout == "examples":
            return ExamplesPlan(store.lengths, store.pair_starts, spec)
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
        spec, lengths = self._spec, self.store.lengths
        order = None if self._once else self._key(epoch, "documents")
        if spec.layout == "stream_pairs":
            return StreamPairsPlan(lengths, self.sentences, spec, self._streams, order, self._key(epoch, "pairs"))
        if spec.layout == "pairs":
            return PairsPlan(self.sentences, spec, self._key(epoch, "pairs"))
        if self._fixed is not None:
            return self._fixed
        packed = PackedPlan(lengths, spec, order)
        return StreamPlan(packed, spec, self._streams) if spec.layout == "stream" else packed

    def _key(self, epoch: int, purpose: str) -> int:
        return epoch_key(self._fingerprint, self._seed, epoch, purpose)
