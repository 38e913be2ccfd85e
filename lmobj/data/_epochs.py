"""The rows of one source under one RowSpec, epoch after epoch: row r belongs to epoch r // per_epoch."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np

from lmobj.batch import RowSpec
from lmobj.data._plan import (
    ExamplesPlan,
    Fragments,
    Ints,
    PackedPlan,
    PairsPlan,
    Plan,
    Sentences,
    SinglePlan,
    StreamPlan,
    epoch_key,
    shuffle_rows,
)
from lmobj.data._shards import TokenStore

__all__ = ["Epochs"]


class Epochs:
    """Looks up rows of one split of one source. The training split repeats, in each epoch in an order of its own."""

    def __init__(self, store: TokenStore, spec: RowSpec, *, fingerprint: str, seed: int, streams: int, once: bool):
        """streams: rows of this source in a batch, where the layout is `stream`. once: there is one epoch, in the
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
        """Rows in an epoch."""

    def lookup(self, rows: Ints) -> Fragments:
        """The fragments of these rows, whose `row` counts within `rows`."""
        if self._once:
            return self._plan(0).lookup(rows)
        found = []
        epochs = rows // self.per_epoch
        for epoch in np.unique(epochs).tolist():
            here = np.flatnonzero(epochs == epoch)
            local = rows[here] - epoch * self.per_epoch
            if self._spec.layout != "stream":
                local = shuffle_rows(local, self.per_epoch, self._key(epoch, "rows"))
            fragments = self._plan(epoch).lookup(local)
            found.append(fragments._replace(row=here[fragments.row]))
        return Fragments.joined(found)

    def _fixed_plan(self) -> Plan | None:
        """The part of the plan that is the same in every epoch, if any."""
        store, spec = self.store, self._spec
        if spec.layout == "single":
            return SinglePlan(store.lengths, spec)
        if spec.layout == "examples":
            return ExamplesPlan(store.lengths, store.pair_starts, spec)
        if spec.layout == "pairs":
            return PairsPlan(Sentences(store.sentence_ends, store.sentence_counts), spec)
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
        key = None if self._once else self._key(epoch, "documents")
        packed = PackedPlan(self.store.lengths, self._spec, key)
        return StreamPlan(packed, self._streams) if self._spec.layout == "stream" else packed

    def _key(self, epoch: int, purpose: str) -> int:
        return epoch_key(self._fingerprint, self._seed, epoch, purpose)
