"""Writes token shards: one ArrayRecord record per document (long ones in several), and index arrays beside them.

A record holds token ids as little-endian unsigned integers: 2 bytes each while the vocabulary fits, else 4. A document
of more than 65,536 tokens continues in the next records, so that a short stretch of a long text is cheap to read.
Index arrays (.npy, one entry per document unless said otherwise):

    lengths         int32   tokens
    bytes           int64   UTF-8 bytes of its text
    sentences       int32   number of sentences
    sentence_ends   int32   offset after each sentence, document after document

and where the settings ask for them

    word_starts     uint8   bits (the first in the lowest), one per token of the split: it begins a word
    pair_starts     int32   tokens of the first of two texts; the second follows it
    labels          int32   id of a class (the manifest names them), or float32: a number

Sentence offsets stand in the index, not in the records, because plans over pairs need all of them and no tokens.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from array_record.python import array_record_module
from numpy.typing import NDArray

__all__ = ["INDEX", "OPTIONAL", "RECORD_TOKENS", "ShardWriter", "pack_bits", "token_dtype"]

RECORD_TOKENS = 1 << 16
"""Tokens in a record."""
# One record per group and no compression: a record is then read alone, in microseconds.
_WRITER_OPTIONS = "group_size:1,uncompressed"

INDEX = {"lengths": np.int32, "bytes": np.int64, "sentences": np.int32, "sentence_ends": np.int32}
"""Index arrays and their types."""
OPTIONAL = ("word_starts", "pair_starts", "labels")
"""Index arrays that only some data have."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that tokens are stored in."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Writes the documents of one shard, and collects their index."""

    def __init__(self, path: Path, dtype: np.dtype):
        self._writer = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)
        self._dtype = dtype
        self.records = 0
        self._index: dict[str, list] = {name: [] for name in (*INDEX, *OPTIONAL)}

    def add(
        self,
        tokens: NDArray[np.int32],
        sentence_ends: NDArray[np.int32],
        size: int,
        *,
        word_starts: NDArray[np.bool_] | None = None,
        pair_start: int | None = None,
        label: int | float | None = None,
    ) -> None:
        """Adds a document of at least one token, whose text has `size` bytes. Of what is optional, all documents of a
        shard have the same."""
        stored = tokens.astype(self._dtype)
        for start in range(0, len(stored), RECORD_TOKENS):
            self._writer.write(stored[start : start + RECORD_TOKENS].tobytes())
            self.records += 1
        entries = {
            "lengths": len(tokens),
            "bytes": size,
            "sentences": len(sentence_ends),
            "sentence_ends": sentence_ends,
            "word_starts": word_starts,
            "pair_starts": pair_start,
            "labels": label,
        }
        for name, entry in entries.items():
            if entry is not None:
                self._index[name].append(entry)

    def close(self) -> dict[str, NDArray]:
        """Completes the file; returns the index arrays, of the optional ones those that documents had. Labels that are
        whole numbers are ids of classes."""
        self._writer.close()
        index: dict[str, NDArray] = {
            name: np.array(self._index[name], INDEX[name]) for name in ("lengths", "bytes", "sentences")
        }
        index["sentence_ends"] = np.concatenate([np.zeros(0, np.int32), *self._index["sentence_ends"]])
        if self._index["word_starts"]:
            index["word_starts"] = pack_bits(np.concatenate(self._index["word_starts"]))
        if self._index["pair_starts"]:
            index["pair_starts"] = np.array(self._index["pair_starts"], np.int32)
        if labels := self._index["labels"]:
            index["labels"] = np.array(labels, np.float32 if isinstance(labels[0], float) else np.int32)
        return index


def pack_bits(bits: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Eight to a byte, the first in the lowest bit."""
    return np.packbits(bits, bitorder="little")
