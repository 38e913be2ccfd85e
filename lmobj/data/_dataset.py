"""A prepared data set: tokens of three splits, their tokenizer, and rows over them for any RowSpec."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmobj.batch import RowSpec, Vocabulary
from lmobj.data._rows import HostBatch, Rows
from lmobj.data._shards import TokenStore, damaged, token_dtype
from lmobj.data._tokenizer import Tokenizer
from lmobj.errors import UserError

__all__ = ["SPLITS", "Dataset"]

SPLITS = ("train", "validation", "test")

_ALWAYS_CHECKED_BYTES = 1 << 30
"""Shards are checked whole on opening up to this size together; beyond it ArrayRecord's own checks on reading serve."""


class Dataset:
    """Opens a folder that `prepare` wrote. Raises UserError naming what is damaged."""

    def __init__(self, folder: Path):
        self._folder = Path(folder)
        self._manifest = _read_manifest(self._folder)
        _verify(self._folder, self._manifest)
        self._stores: dict[str, TokenStore] = {}

    @property
    def fingerprint(self) -> str:
        """Digest of the inputs' content, the settings and the tokenizer: equal fingerprints, equal tokens."""
        return self._manifest["fingerprint"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of this data."""
        return Tokenizer.load(self._folder / "tokenizer.model")

    @property
    def vocab(self) -> Vocabulary:
        """Size of the vocabulary and its special ids."""
        return self.tokenizer.vocabulary

    def summary(self) -> dict[str, Any]:
        """In JSON: the fingerprint, the vocabulary's size, per split the documents, tokens and bytes of text, and the
        number of input files that were skipped because they did not parse."""
        counts = ("documents", "tokens", "bytes")
        return {
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab.size,
            "skipped_files": self._manifest["skipped_files"],
            "splits": {name: {count: self._manifest["splits"][name][count] for count in counts} for name in SPLITS},
        }

    def documents(self, split: str = "train") -> Iterator[NDArray[np.int32]]:
        """Token ids of every document of a split, in the stored order, without special tokens."""
        return self._store(split).documents()

    def rows(self, spec: RowSpec, *, split: str = "train", seed: int = 0, batch_size: int) -> Rows:
        """Rows of a split: random access to rows and batches, and their number.

        The training split repeats in epochs, each in its own order. Other splits are read once, in the stored order;
        their last batch is filled with empty rows (segment 0).

        Raises:
          UserError: an empty split, a batch size below 1, a length with no room for text, or (pairs) no document with
            two sentences.
        """
        if batch_size < 1:
            raise UserError(f"the batch size is {batch_size}; accepted: 1 or more rows.")
        store = self._store(split)
        if len(store.lengths) == 0:
            raise UserError(
                f"the {split} split holds no documents; accepted: a larger data.{split} share, or more documents."
            )
        return Rows(
            store,
            self.tokenizer,
            spec,
            fingerprint=self.fingerprint,
            seed=seed,
            batch_size=batch_size,
            once=split != "train",
        )

    def batches(
        self,
        spec: RowSpec,
        *,
        split: str = "train",
        seed: int = 0,
        batch_size: int,
        start: int = 0,
        steps: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[HostBatch]:
        """Batches of steps start, start + 1, ..., read ahead by threads.

        Args:
          spec: the rows an objective reads.
          split: train repeats forever; validation and test end after every row was read once.
          seed: of the order of documents and rows.
          batch_size: rows of the global batch, B.
          start: first step. Nothing before it is read.
          steps: number of batches; by default no end (train) or to the end of the split.
          process_index, process_count: this process reads its contiguous B / process_count rows of each batch.

        Raises:
          UserError: as `rows`, and a batch size that the processes do not divide.
        """
        rows = self.rows(spec, split=split, seed=seed, batch_size=batch_size)
        return rows.batches(start, steps, process_index, process_count)

    def _store(self, split: str) -> TokenStore:
        if split not in SPLITS:
            raise UserError(f"the split is {split!r}; accepted: {', '.join(SPLITS)}.")
        if split not in self._stores:
            shards = [(name, records) for name, records in self._manifest["splits"][split]["shards"]]
            self._stores[split] = TokenStore(self._folder, split, shards, token_dtype(self.vocab.size))
        return self._stores[split]


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(folder, f"manifest.json cannot be read: {error}") from error


def _verify(folder: Path, manifest: dict[str, Any]) -> None:
    """Compares sizes, and checksums where that is quick, with the manifest."""
    small = sum(entry["size"] for entry in manifest["files"].values()) <= _ALWAYS_CHECKED_BYTES
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise damaged(folder, f"{name} is missing")
        if path.stat().st_size != entry["size"]:
            raise damaged(folder, f"{name} has {path.stat().st_size} bytes instead of {entry['size']}")
        if small or not name.endswith(".arrayrecord"):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
            if digest != entry["digest"]:
                raise damaged(folder, f"{name} does not match its checksum")
