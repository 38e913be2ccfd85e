"""Token shards: one ArrayRecord record per document (long ones in several), and index arrays beside them.

A record holds token ids as little-endian unsigned integers: 2 bytes each while the vocabulary fits, else 4. A document
of more than 65,536 tokens continues in the next records, so that a short stretch of a long text is cheap to read.
Index arrays (.npy, one entry per document unless said otherwise):

    lengths         int32   tokens
    bytes           int64   UTF-8 bytes of its text
    sentences       int32   number of sentences
    sentence_ends   int32   offset after each sentence, document after document

Sentence offsets stand in the index, not in the records, because plans over pairs need all of them and no tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from array_record.python import array_record_module
from numpy.typing import NDArray

from lmobj.data._plan import ragged
from lmobj.errors import UserError

__all__ = ["INDEX", "ShardWriter", "TokenStore", "token_dtype"]

_RECORD_TOKENS = 1 << 16
# One record per group and no compression: a record is then read alone, in microseconds.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"

INDEX = {"lengths": np.int32, "bytes": np.int64, "sentences": np.int32, "sentence_ends": np.int32}
"""Index arrays and their types."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that tokens are stored in."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class ShardWriter:
    """Writes the documents of one shard, and collects their index."""

    def __init__(self, path: Path, dtype: np.dtype):
        self._writer = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)
        self._dtype = dtype
        self.records = 0
        self._index: dict[str, list] = {name: [] for name in INDEX}

    def add(self, tokens: NDArray[np.int32], sentence_ends: NDArray[np.int32], size: int) -> None:
        """Adds a document of at least one token, whose text has `size` bytes."""
        stored = tokens.astype(self._dtype)
        for start in range(0, len(stored), _RECORD_TOKENS):
            self._writer.write(stored[start : start + _RECORD_TOKENS].tobytes())
            self.records += 1
        self._index["lengths"].append(len(tokens))
        self._index["bytes"].append(size)
        self._index["sentences"].append(len(sentence_ends))
        self._index["sentence_ends"].append(sentence_ends)

    def close(self) -> dict[str, NDArray[np.integer]]:
        """Completes the file; returns the index arrays."""
        self._writer.close()
        ends = self._index.pop("sentence_ends")
        index: dict[str, NDArray[np.integer]] = {
            name: np.array(values, INDEX[name]) for name, values in self._index.items()
        }
        index["sentence_ends"] = np.concatenate([np.zeros(0, np.int32), *ends])
        return index


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

    @property
    def sentence_counts(self) -> NDArray[np.integer]:
        """[N] sentences per document."""
        return self._load("sentences")

    @property
    def sentence_ends(self) -> NDArray[np.integer]:
        """[S] offset after each sentence, document after document."""
        return self._load("sentence_ends")

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
