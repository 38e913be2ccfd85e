"""Reads token shards, whose format `_shard_writer` tells."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from array_record.python import array_record_module
from numpy.typing import NDArray

from lmobj.data._plan import ragged
from lmobj.data._shard_writer import RECORD_TOKENS as _RECORD_TOKENS
from lmobj.data._shard_writer import token_dtype
from lmobj.errors import UserError

__all__ = ["TokenStore", "damaged", "token_dtype"]

_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class TokenStore:
    """The documents of one split, read at random from its shards. Safe to share between threads."""

    def __init__(self, folder: Path, split: str, shards: list[tuple[str, int]], dtype: np.dtype):
        """shards: (file name, number of records) in order."""
        self._folder = folder
        self._split = split
        self._dtype = dtype
        self._files = [name for name, _ in shards]
        self._first_record = np.concatenate([[0], np.cumsum([count for _, count in shards])]).astype(np.int64)
        self._readers: dict[int, array_record_module.ArrayRecordReader] = {}
        self._lock = threading.Lock()
        self.lengths = self._load("lengths")
        # Only where a document takes several records do documents and records differ.
        parts = -(-self.lengths // _RECORD_TOKENS)
        self._record_of = np.cumsum(parts, dtype=np.int64) - parts if parts.size and parts.max() > 1 else None
        if int(parts.sum()) != int(self._first_record[-1]):
            raise damaged(folder, f"{split}-lengths.npy tells of {parts.sum()} records, the shards hold others")

    def _load(self, name: str) -> NDArray[np.integer]:
        return np.load(self._folder / f"{self._split}-{name}.npy", mmap_mode="r", allow_pickle=False)

    def _load_optional(self, name: str) -> NDArray | None:
        return self._load(name) if (self._folder / f"{self._split}-{name}.npy").is_file() else None

    @property
    def sentence_counts(self) -> NDArray[np.integer]:
        """[N] sentences per document."""
        return self._load("sentences")

    @property
    def sentence_ends(self) -> NDArray[np.integer]:
        """[S] offset after each sentence, document after document."""
        return self._load("sentence_ends")

    @property
    def pair_starts(self) -> NDArray[np.integer] | None:
        """[N] tokens of the first of two texts per document; None where documents are one text each."""
        return self._load_optional("pair_starts")

    @property
    def labels(self) -> NDArray | None:
        """[N] int32 class or float32 number of each document; None where they have none."""
        return self._load_optional("labels")

    @property
    def has_word_starts(self) -> bool:
        """Whether the words of this text were found when it was prepared."""
        return self._word_bits is not None

    def word_starts(
        self, documents: NDArray[np.int64], offsets: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Whether each token of the stretches document[offset : offset + length], end to end, begins a word."""
        assert self._word_bits is not None
        stretch, nth = ragged(lengths)
        token = (self._first_token[documents] + offsets)[stretch] + nth
        return (self._word_bits[token >> 3] >> (token & 7).astype(np.uint8) & 1).astype(np.bool_)

    @cached_property
    def _word_bits(self) -> NDArray[np.integer] | None:
        return self._load_optional("word_starts")

    @cached_property
    def _first_token(self) -> NDArray[np.int64]:
        """[N] tokens of the split that stand before each document."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    def document(self, index: int) -> NDArray[np.int32]:
        """All tokens of one document."""
        zero = np.zeros(1, np.int64)
        return self.gather(zero + index, zero, zero + int(self.lengths[index])).astype(np.int32)

    def documents(self) -> Iterator[NDArray[np.int32]]:
        """Every document's tokens, in the stored order."""
        return (self.document(index) for index in range(len(self.lengths)))

    def gather(
        self, documents: NDArray[np.int64], offsets: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.unsignedinteger]:
        """The stretches document[offset : offset + length], end to end."""
        record = documents if self._record_of is None else self._record_of[documents]
        first = offsets // _RECORD_TOKENS
        counts = np.where(lengths > 0, (offsets + lengths - 1) // _RECORD_TOKENS - first + 1, 0)
        stretch, nth = ragged(counts)
        part = first[stretch] + nth
        low = np.maximum(offsets[stretch], part * _RECORD_TOKENS) - part * _RECORD_TOKENS
        high = np.minimum((offsets + lengths)[stretch] - part * _RECORD_TOKENS, _RECORD_TOKENS)
        pieces = [np.zeros(0, self._dtype)]
        read: dict[int, bytes] = {}
        for index, start, stop in zip((record[stretch] + part).tolist(), low.tolist(), high.tolist(), strict=True):
            data = read.get(index)
            if data is None:
                data = read[index] = self._read(index)
            pieces.append(np.frombuffer(data, self._dtype, stop - start, start * self._dtype.itemsize))
        return np.concatenate(pieces)

    def _read(self, record: int) -> bytes:
        shard = int(np.searchsorted(self._first_record, record, side="right")) - 1
        local = record - int(self._first_record[shard])
        try:
            return self._reader(shard).read([local])[0]
        except (RuntimeError, IndexError) as error:
            raise damaged(self._folder, f"{self._files[shard]}, record {local}: {error}") from error

    def _reader(self, shard: int) -> array_record_module.ArrayRecordReader:
        with self._lock:
            reader = self._readers.get(shard)
            if reader is None:
                path = self._folder / self._files[shard]
                reader = array_record_module.ArrayRecordReader(str(path), _READER_OPTIONS)
                expected = int(self._first_record[shard + 1] - self._first_record[shard])
                if reader.num_records() != expected:
                    raise damaged(
                        self._folder, f"{path.name} holds {reader.num_records()} records instead of {expected}"
                    )
                self._readers[shard] = reader
            return reader


def damaged(folder: Path, what: str) -> UserError:
    """The error for prepared data that is not what was written."""
    return UserError(
        f"data.cache: the prepared data in {folder} is damaged ({what}); delete that folder and run again to build it "
        "anew."
    )
