"""Rows of random tokens in the shape that an objective reads, with the special tokens that rows of text would have.

A row is full and holds one document or one pair of texts, so that what peers without packed rows compute is the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmobj.batch import LABEL_FIELDS, RowSpec, Vocabulary

__all__ = ["synthetic_batch"]


def synthetic_batch(spec: RowSpec, rows: int, vocab: Vocabulary, index: int) -> dict[str, NDArray[Any]]:
    """A batch with the arrays of `lmobj.batch`.

    Args:
      spec: the rows.
      rows: how many.
      vocab: special ids stand where the spec puts them and nowhere else.
      index: batches with different numbers have different tokens.
    """
    rng = np.random.default_rng(index)
    ordinary = np.setdiff1d(np.arange(vocab.size), vocab.special_ids)
    shape = (rows, spec.length)
    special, types = _template(spec)
    drawn = rng.choice(ordinary, shape)
    batch: dict[str, NDArray[Any]] = {
        "tokens": np.where(special < 0, drawn, special).astype(np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.tile(np.arange(spec.length, dtype=np.int32), (rows, 1)),
        "row_ids": np.stack([np.full(rows, index), np.arange(rows)], axis=1).astype(np.int32),
    }
    if spec.layout in ("pairs", "examples", "stream_pairs"):
        batch["token_types"] = np.tile(types, (rows, 1))
    if spec.layout in ("pairs", "stream_pairs"):
        batch["pair_labels"] = (np.arange(rows) % 2).astype(np.int32)
    if spec.bidirectional:
        batch["backward"] = np.arange(rows) >= rows // 2
    if spec.layout == "texts":
        segments, positions = _texts(spec)
        batch |= {"segment_ids": np.tile(segments, (rows, 1)), "positions": np.tile(positions, (rows, 1))}
    for name in spec.fields:
        if name in LABEL_FIELDS:  # two classes, which every objective with classes has
            batch[name] = (np.arange(rows) % 2).astype(LABEL_FIELDS[name])
        elif name == "text_ids":  # no two texts are equal
            batch[name] = np.arange(rows * spec.texts, dtype=np.int32).reshape(rows, spec.texts)
        elif name == "word_starts":
            batch[name] = (special >= 0) | (rng.random(shape) < 0.7)
        else:
            assert name == "token_bytes", name
            batch[name] = np.where(special < 0, rng.integers(1, 7, shape), 0).astype(np.int32)
    return batch


def _template(spec: RowSpec) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Of one row: the special id of each place, or -1 for text; and token types."""
    prefix, suffix, length = list(spec.prefix), list(spec.suffix), spec.length
    types = np.zeros(length, np.int32)
    if spec.layout in ("packed", "single", "stream"):
        inside = [-1] * (length - len(prefix) - len(suffix))
        return np.array(prefix + inside + suffix, np.int32), types
    if spec.layout == "texts":
        _, positions = _texts(spec)
        sizes = np.diff(np.flatnonzero([*(positions == 0), True]))
        texts = (prefix + [-1] * (size - len(prefix) - len(suffix)) + suffix for size in sizes)
        return np.array([token for text in texts for token in text], np.int32), types
    if spec.layout == "stream_pairs":
        before, after_first = [-1] * spec.reuse, suffix[:1]
    else:
        before, after_first = prefix, suffix
    text = length - len(before) - len(after_first) - len(suffix)
    first = before + [-1] * (text // 2) + after_first
    types[len(first) :] = 1
    if spec.layout == "stream_pairs":
        types[-1] = 2
    return np.array(first + [-1] * (text - text // 2) + suffix, np.int32), types


def _texts(spec: RowSpec) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Of a row of texts as long as one another: the segment and the position of each place."""
    starts = spec.length * np.arange(spec.texts) // spec.texts
    segments = np.searchsorted(starts, np.arange(spec.length), side="right").astype(np.int32)
    return segments, (np.arange(spec.length) - starts[segments - 1]).astype(np.int32)
