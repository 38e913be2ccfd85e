"""Rows of random tokens in the shape that an objective reads, with the special tokens that rows of text would have.

A row is full and holds one document or one pair of texts, so that what peers without packed rows compute is the same;
or a pair of texts for each of several choices.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmobj.batch import LABEL_FIELDS, NO_TAG, RowSpec, Vocabulary, row_arrays

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
    special, types, segments = _template(spec)
    begins = np.flatnonzero(np.diff(segments, prepend=0))
    drawn = rng.choice(ordinary, shape)
    text = np.broadcast_to(special < 0, shape)
    last_text = np.flatnonzero((special < 0) & (types == types[special < 0].max()))
    values: dict[str, Any] = {
        "tokens": np.where(text, drawn, special),
        "segment_ids": np.tile(segments, (rows, 1)),
        "positions": np.tile(np.arange(spec.length) - begins[segments - 1], (rows, 1)),
        "row_ids": np.stack([np.full(rows, index), np.arange(rows)], axis=1),
        "token_types": np.tile(types, (rows, 1)),
        "backward": np.arange(rows) >= rows // 2,
        "word_starts": ~text | (rng.random(shape) < 0.7),
        "sentence_ends": text & (rng.random(shape) < 0.05),
        "token_bytes": np.where(text, rng.integers(1, 7, shape), 0),
        "tags": np.where(text, drawn % 2, NO_TAG),
        "text_ids": np.arange(rows * spec.texts).reshape(rows, spec.texts),  # no two texts are equal
        "spans": np.sort(rng.choice(last_text, (rows, 2)), axis=1),
    }
    arrays = row_arrays(spec)
    for name in ("pair_labels", *LABEL_FIELDS):  # two classes, which every objective with classes has
        if name in arrays:
            whole = (rows, *arrays[name].shape)
            values[name] = np.arange(math.prod(whole)).reshape(whole) % 2
    return {name: values[name].astype(array.dtype) for name, array in arrays.items()}


def _template(spec: RowSpec) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Of one row: the special id of each place, or -1 for text; token types; and segments."""
    if spec.layout == "choices":
        count, part = spec.classes, dataclasses.replace(spec, layout="pairs")
    elif spec.layout == "texts":
        count, part = spec.texts, dataclasses.replace(spec, layout="single")
    else:
        return *_one_segment(spec), np.ones(spec.length, np.int32)
    share, more = divmod(spec.length, count)
    lengths = [share] * (count - 1) + [share + more]
    parts = [_one_segment(dataclasses.replace(part, length=length)) for length in lengths]
    special, types = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return special, types, np.repeat(np.arange(1, count + 1, dtype=np.int32), lengths)


def _one_segment(spec: RowSpec) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    prefix, suffix, length = list(spec.prefix), list(spec.suffix), spec.length
    types = np.zeros(length, np.int32)
    if spec.layout in ("packed", "single", "stream", "tagged", "relations"):
        inside = [-1] * (length - len(prefix) - len(suffix))
        return np.array(prefix + inside + suffix, np.int32), types
    if spec.layout == "stream_pairs":
        before, after_first = [-1] * spec.reuse, suffix[:1]
    else:
        before, after_first = prefix, suffix
    text = length - len(before) - len(after_first) - len(suffix)
    second = spec.second_length - len(suffix) if spec.second_length else -(-text // 2)
    first = before + [-1] * (text - second) + after_first
    types[len(first) :] = 1
    if spec.layout == "stream_pairs":
        types[-1] = 2
    return np.array(first + [-1] * second + suffix, np.int32), types
