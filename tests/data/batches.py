"""What several tests ask of batches."""

from __future__ import annotations

import numpy as np

from lmobj.batch import RowSpec
from lmobj.data import Dataset

SHARES = (
    ((0, 1, 2, 3), (4, 5, 6, 7)),
    ((0, 4), (1, 5), (2, 6), (3, 7)),
    ((2,), (0, 1, 5, 7), (3, 4, 6)),
)
"""Divisions of a batch of 8 rows among processes: contiguous, strided, and uneven."""


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def check_shares(dataset: Dataset, spec: RowSpec, shares: tuple[tuple[int, ...], ...], split: str = "train") -> None:
    """What processes read each for itself is, put together, the batch."""
    start = 5 if split == "train" else 0
    options = {"split": split, "seed": 0, "batch_size": 8, "start": start, "steps": 3}
    whole = list(dataset.batches(spec, **options))
    parts = [list(dataset.batches(spec, **options, local=np.array(local))) for local in shares]
    assert {len(part) for part in parts} == {len(whole)}
    for step, batch in enumerate(whole):
        joined = {name: np.empty_like(array) for name, array in batch.items()}
        for local, part in zip(shares, parts, strict=True):
            assert part[step].keys() == batch.keys()
            for name, array in part[step].items():
                joined[name][list(local)] = array
        assert same(joined, batch)
