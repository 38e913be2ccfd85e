"""Duplicate documents: told apart by digests, and near ones by MinHash signatures.

Workers make a `Signature` of each clean document; one `Duplicates` sees them in the order of the documents and decides.
A document is a duplicate of an earlier one that was kept, so of each set of duplicates the first stays.

    exact    the same text (128-bit digest)
    near     estimated Jaccard similarity of the sets of word runs at or above the threshold

The estimate is the share of MinHash values that agree (Broder, "On the resemblance and containment of documents",
1997). Values come from datasketch's seeded permutations, so they are the same on every machine. Which earlier documents
are compared is decided by bands of values (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4):
those that agree in a whole band. Bands are as wide as can be while a pair at the threshold is still compared with
probability 0.95; the estimate itself decides, so false candidates drop nothing.

Memory per document kept: about 0.1 KiB with `exact_duplicates`; with near ones 4 bytes per permutation and about
0.1 KiB per band (2.5 KiB for 128 permutations at threshold 0.8, 18 bands). A document's length does not matter.
"""

from __future__ import annotations

import hashlib
import zlib
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmobj.data._cleaning_config import CleaningConfig, NearDuplicates
from lmobj.data._extras import clean_extra
from lmobj.data._words import find_words

__all__ = ["Duplicates", "Signature", "signature"]

_RECALL = 0.95
_SEED = 1
_BATCH = 4096
"""Word runs permuted at once: bounds the memory of a long document."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 4096
"""Signatures stored together."""


class Signature(NamedTuple):
    """What is kept of a document to compare it with others."""

    digest: bytes
    """16 bytes."""
    minhash: NDArray[np.uint32] | None
    """[P]; None where near duplicates are not asked for."""


def signature(config: CleaningConfig, text: str, pair: str | None = None) -> Signature:
    """The signature of a clean document."""
    whole = text if pair is None else f"{text}\0{pair}"
    digest = hashlib.blake2b(whole.encode(), digest_size=16).digest()
    near = config.near_duplicates
    return Signature(digest, None if near is None else _minhash(whole, digest, near))


class Duplicates:
    """Decides which documents are duplicates, in the order in which it is asked."""

    def __init__(self, config: CleaningConfig):
        self._exact = config.exact_duplicates
        self._seen: set[bytes] = set()
        self._near = None if config.near_duplicates is None else _NearIndex(config.near_duplicates)

    def __call__(self, document: Signature) -> Literal["exact_duplicates", "near_duplicates"] | None:
        """The step that drops this document; None if it is kept, and later ones are compared with it."""
        if self._exact and document.digest in self._seen:
            return "exact_duplicates"
        if self._near is not None:
            assert document.minhash is not None
            if not self._near.add(document.minhash):
                return "near_duplicates"
        if self._exact:
            self._seen.add(document.digest)
        return None


class _NearIndex:
    """Signatures of the documents kept, found by their bands."""

    def __init__(self, config: NearDuplicates):
        self._least = config.threshold * config.permutations - 1e-9
        self._rows = _band_rows(config)
        self._bands = config.permutations // self._rows
        self._blocks: list[NDArray[np.uint32]] = []
        self._count = 0
        self._first: dict[int, int] = {}
        """By the hash of a band: the first document with it."""
        self._others: dict[int, list[int]] = {}
        """By the hash of a band: the other documents with it, few as they are not alike."""

    def add(self, minhash: NDArray[np.uint32]) -> bool:
        """Adds a document unless it is like one that is there; tells whether it was added."""
        bands = self._hashes(minhash)
        candidates = {self._first[band] for band in bands if band in self._first}
        candidates.update(*(self._others.get(band, ()) for band in bands))
        if any(np.count_nonzero(self._stored(index) == minhash) >= self._least for index in candidates):
            return False
        for band in bands:
            if self._first.setdefault(band, self._count) != self._count:
                self._others.setdefault(band, []).append(self._count)
        if self._count % _BLOCK == 0:
            self._blocks.append(np.empty((_BLOCK, len(minhash)), np.uint32))
        self._blocks[-1][self._count % _BLOCK] = minhash
        self._count += 1
        return True

    def _stored(self, index: int) -> NDArray[np.uint32]:
        return self._blocks[index // _BLOCK][index % _BLOCK]

    def _hashes(self, minhash: NDArray[np.uint32]) -> list[int]:
        """A 64-bit hash of each band, its place among the bands included."""
        values = minhash[: self._bands * self._rows].reshape(self._bands, self._rows)
        hashes = np.arange(self._bands, dtype=np.uint64)
        for column in values.T:
            hashes = _mixed(hashes, column)
        return hashes.tolist()


def _band_rows(config: NearDuplicates) -> int:
    """The most values in a band for which a pair at the threshold agrees in some band with probability _RECALL.

    A pair of similarity s agrees in one of b bands of r values with probability 1 - (1 - s^r)^b.
    """
    rows = 1
    for r in range(2, config.permutations + 1):
        if 1 - (1 - config.threshold**r) ** (config.permutations // r) >= _RECALL:
            rows = r
    return rows


def _minhash(text: str, digest: bytes, config: NearDuplicates) -> NDArray[np.uint32]:
    """[P] uint32: the least value of each permutation over the hashes of all runs of words."""
    permutations = _permutations(config.permutations)
    hashes = _run_hashes(text.casefold(), config.shingle)
    if len(hashes) == 0:  # no words at all: like nothing but itself
        hashes = np.frombuffer(digest[:4], np.uint32)
    minhash = clean_extra("datasketch", "data.clean.near_duplicates is set").MinHash(
        config.permutations, seed=_SEED, scheme="affine32", permutations=permutations, hashfunc=_itself
    )
    for start in range(0, len(hashes), _BATCH):
        minhash.update_batch(hashes[start : start + _BATCH].tolist())
    values: NDArray[np.uint32] = minhash.hashvalues
    return values


def _run_hashes(text: str, size: int) -> NDArray[np.uint32]:
    """Hashes of the distinct runs of `size` consecutive words; of all words where they are fewer."""
    words = np.fromiter((zlib.crc32(word.encode()) for word in find_words(text)), np.uint32)
    if len(words) == 0:
        return words
    runs = np.lib.stride_tricks.sliding_window_view(words, min(size, len(words)))
    hashes = np.zeros(len(runs), np.uint64)
    for column in runs.T:
        hashes = _mixed(hashes, column)
    return np.unique((hashes >> np.uint64(32)).astype(np.uint32))


def _mixed(hashes: NDArray[np.uint64], values: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """64-bit hashes with one more value each."""
    mixed = (hashes ^ values) * _MULTIPLIER
    return mixed ^ (mixed >> np.uint64(29))


@cache
def _permutations(count: int) -> Any:
    """datasketch's permutations for its seed, made once per process."""
    return (
        clean_extra("datasketch", "data.clean.near_duplicates is set")
        .MinHash(count, seed=_SEED, scheme="affine32")
        .permutations
    )


def _itself(value: int) -> int:
    return value
