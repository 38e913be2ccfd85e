"""What is done to one part of a corpus, in this process or another: sampled for the tokenizer, or written as shards.

Documents are cleaned, dropped and put in a split in the same way for each purpose. Everything here can be pickled, and
none of it imports jax.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmobj.data._augment import Augmenter
from lmobj.data._cleaning import Cleaner, Counts, add_counts, dropped
from lmobj.data._cleaning_config import CleaningConfig, SegmentationConfig
from lmobj.data._config import Shares
from lmobj.data._corpus import Document
from lmobj.data._duplicates import Duplicates, Signature, signature
from lmobj.data._fill_in_middle import Rearrangement
from lmobj.data._parts import Part, digest_file, temporary_name, utf8_size, write_json
from lmobj.data._segmentation import Segmenter
from lmobj.data._shard_writer import ShardWriter, token_dtype
from lmobj.data._tokenizer import Tokenizer, training_lines

__all__ = ["Sample", "SampleLines", "Selection", "SignDocuments", "WriteShards", "decide_duplicates", "record_file"]

_ENCODE_BYTES = 1024 * 1024
"""Text handed to the tokenizer at once."""


@dataclass(frozen=True)
class Selection:
    """Which documents of a part are kept, what they are once cleaned, and in which split."""

    shares: Shares
    clean: CleaningConfig
    duplicates: Path | None = None
    """Holds what `decide_duplicates` decided, where duplicates are dropped."""

    def documents(self, part: Part, counts: Counts | None = None) -> Iterator[tuple[str, Document]]:
        """(split, document) of each document kept. Adds to `counts` what cleaning did."""
        duplicate = None
        if self.duplicates is not None:
            with np.load(self.duplicates, allow_pickle=False) as decisions:
                duplicate = iter(decisions[part_name(part)].tolist())
        for document in self.cleaned(part, counts):
            if duplicate is not None and (step := next(duplicate)):
                if counts is not None:
                    add_counts(counts, {step: dropped(document.text, document.pair)})
                continue
            yield self.shares.split(document.text), document

    def cleaned(self, part: Part, counts: Counts | None = None) -> Iterator[Document]:
        """The documents that are left when each was cleaned on its own."""
        if not self.clean.steps:
            yield from part.documents
            return
        cleaner = Cleaner(self.clean)
        for document in part.documents:
            text, pair, changes = cleaner(document.text, document.pair)
            if counts is not None:
                add_counts(counts, changes)
            if text is not None:
                yield Document(text, pair, document.label)


@dataclass(frozen=True)
class SignDocuments:
    """Makes the signatures by which duplicates are found."""

    selection: Selection

    def __call__(self, part: Part) -> tuple[str, list[Signature]]:
        """The part's name, and a signature for each document that cleaning leaves."""
        documents = self.selection.cleaned(part)
        return part_name(part), [signature(self.selection.clean, d.text, d.pair) for d in documents]

    def finished(self, group: int, index: int) -> None:
        return None


def decide_duplicates(clean: CleaningConfig, parts: Iterable[tuple[str, list[Signature]]], path: Path) -> None:
    """Writes, per part, the step that drops each document; empty for those that stay."""
    decide = Duplicates(clean)
    decisions = {name: np.array([decide(document) or "" for document in signed], "U16") for name, signed in parts}
    temporary = temporary_name(path)
    with temporary.open("wb") as file:
        np.savez_compressed(file, **decisions)  # type: ignore[arg-type]
    temporary.replace(path)


def part_name(part: Part) -> str:
    """The name of a part among those of its corpus."""
    return f"{part.group:05d}-{part.index:03d}"


class Sample(NamedTuple):
    """Lines of training text, drawn evenly."""

    documents: int
    """Documents in the part, of any split."""
    training: int
    """Those of them in the training split."""
    lines: str
    """The lines drawn, joined by newlines."""
    sizes: NDArray[np.int64]
    """Bytes of each."""
    draws: NDArray[np.uint64]
    """A random number per line, uniform over [0, 2**64 * share): those below a bound are an even sample."""


@dataclass(frozen=True)
class SampleLines:
    """Draws a share of the lines of training text, by random numbers that depend on the place of the part alone."""

    selection: Selection
    share: float

    def __call__(self, part: Part) -> Sample:
        texts, documents = [], 0
        for split, document in self.selection.documents(part):
            documents += 1
            if split == "train":
                texts.append(document)
        lines = list(training_lines(text for document in texts for text in (document.text, document.pair or "")))
        draws = np.random.Philox(key=part.group << 32 | part.index).random_raw(len(lines))
        kept = np.flatnonzero(draws / 2.0**64 < self.share)
        chosen = [lines[i] for i in kept.tolist()]
        sizes = np.array([utf8_size(line) for line in chosen], np.int64)
        return Sample(documents, len(texts), "\n".join(chosen), sizes, draws[kept])

    def finished(self, group: int, index: int) -> None:
        return None


@dataclass(frozen=True)
class WriteShards:
    """Tokenises a part into one shard per split that has documents in it; its record, written last, says so.

    The record of a part, in JSON: `last` (of its group), `skipped` (rows and files), `cleaning` (counts per step, and
    under `tokenizer` those of documents that tokenise to nothing), `augmented` (copies added, by what made them),
    `classes` (names that label ids of this part mean), and per split its shard (`file`, `size`, `digest`, `records`),
    its index file with its size, and the counts.
    """

    selection: Selection
    segment: SegmentationConfig
    folder: Path
    """Holds tokenizer.model, and gets the shards."""
    augmenter: Augmenter | None = None
    """Makes the copies that follow each training document."""
    rearrangement: Rearrangement | None = None
    """The order in which the parts of training documents are written."""

    def __call__(self, part: Part) -> dict[str, Any]:
        tokenizer = _tokenizer(self.folder / "tokenizer.model")
        shards = _Shards(self.folder, part, tokenizer, self.segment)
        counts: Counts = {}
        augmented = Counter({} if self.augmenter is None else self.augmenter.kinds)
        for batch in _batched(self._documents(part, counts, augmented)):
            written = [(split, *self._written(split, document)) for split, document in batch]
            pieces = [piece for _, _, texts in written for text in texts for piece in text]
            encoded = iter(tokenizer.encode_batch([piece for piece in pieces if isinstance(piece, str)]))
            for split, document, texts in written:
                tokens = [_tokens(text, encoded) for text in texts]
                if all(map(len, tokens)):
                    shards.add(split, document, tokens)
                else:  # a loaded model may normalise a text to nothing
                    add_counts(counts, {"tokenizer": dropped(document.text, document.pair)})
        record = {
            "last": part.last,
            "skipped": part.skipped,
            "cleaning": counts,
            "augmented": augmented,
            **shards.close(),
        }
        write_json(self.folder / record_file(part.group, part.index), record)
        return record

    def _documents(self, part: Part, counts: Counts, augmented: Counter[str]) -> Iterator[tuple[str, Document]]:
        """(split, document) of each document that is kept, and of its copies."""
        for split, document in self.selection.documents(part, counts):
            yield split, document
            if split == "train" and self.augmenter is not None:
                for copy in self.augmenter(document, augmented):
                    if self.selection.shares.split(copy.text) == "train":  # what is held out must not come in by a copy
                        yield split, copy

    def _written(self, split: str, document: Document) -> tuple[Document, list[tuple[str | int, ...]]]:
        """The document as it is written, and of each of its texts the parts to tokenise and the ids between them."""
        if split != "train" or self.rearrangement is None:
            return document, [(text,) for text in document[:2] if text is not None]
        pieces = self.rearrangement(document.text)
        return document._replace(text="".join(piece for piece in pieces if isinstance(piece, str))), [pieces]

    def finished(self, group: int, index: int) -> dict[str, Any] | None:
        try:
            record = json.loads((self.folder / record_file(group, index)).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # ValueError: a power cut may leave a file without its content
            return None
        files = {
            split[name]: split[size]
            for split in record["splits"].values()
            for name, size in (("file", "size"), ("index", "index_size"))
        }
        sizes = [path.stat().st_size if (path := self.folder / name).exists() else -1 for name in files]
        return record if sizes == list(files.values()) else None


def _tokens(text: Sequence[str | int], encoded: Iterator[NDArray[np.int32]]) -> NDArray[np.int32]:
    """The tokens of a text in parts, of which `encoded` gives those to tokenise, in their order."""
    parts = [next(encoded) if isinstance(piece, str) else np.array([piece], np.int32) for piece in text]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class _Shards:
    """The shards of one part, one per split."""

    def __init__(self, folder: Path, part: Part, tokenizer: Tokenizer, segment: SegmentationConfig):
        self._folder, self._part = folder, part
        self._segmenter = Segmenter(segment, tokenizer)
        self._marks_words = segment.words != "basic"  # the rule of `basic` needs the tokens alone, so is not stored
        self._dtype = token_dtype(tokenizer.size)
        self._writers: dict[str, ShardWriter] = {}
        self._classes: dict[str, int] = {}

    def add(self, split: str, document: Document, encoded: list[NDArray[np.int32]]) -> None:
        """Adds a document of one or two texts, tokenised."""
        if split not in self._writers:
            self._writers[split] = ShardWriter(temporary_name(self._path(split, ".arrayrecord")), self._dtype)
        texts = [text for text in (document.text, document.pair) if text is not None]
        ends = [self._segmenter.sentence_ends(text, tokens) for text, tokens in zip(texts, encoded, strict=True)]
        words = None
        if self._marks_words:
            starts = (self._segmenter.word_starts(text, tokens) for text, tokens in zip(texts, encoded, strict=True))
            words = np.concatenate(list(starts))
        label = document.label
        self._writers[split].add(
            encoded[0] if len(encoded) == 1 else np.concatenate(encoded),
            ends[0] if len(ends) == 1 else np.concatenate([ends[0], ends[1] + len(encoded[0])]),
            sum(utf8_size(text) for text in texts),
            word_starts=words,
            pair_start=None if document.pair is None else len(encoded[0]),
            label=self._classes.setdefault(label, len(self._classes)) if isinstance(label, str) else label,
        )

    def close(self) -> dict[str, Any]:
        """Completes the files; returns what the record tells of them."""
        splits = {split: self._close(split, writer) for split, writer in sorted(self._writers.items())}
        return {"splits": splits, "classes": list(self._classes)}

    def _path(self, split: str, suffix: str) -> Path:
        return self._folder / f"{split}-{part_name(self._part)}{suffix}"

    def _close(self, split: str, writer: ShardWriter) -> dict[str, Any]:
        index = writer.close()
        shard, arrays = self._path(split, ".arrayrecord"), self._path(split, ".npz")
        with temporary_name(arrays).open("wb") as file:
            np.savez(file, **index)  # type: ignore[arg-type]
        for path in (shard, arrays):
            temporary_name(path).replace(path)
        return {
            "file": shard.name,
            "size": shard.stat().st_size,
            "digest": digest_file(shard),
            "index": arrays.name,
            "index_size": arrays.stat().st_size,
            "records": writer.records,
            "documents": len(index["lengths"]),
            "tokens": int(index["lengths"].sum(dtype=np.int64)),
            "bytes": int(index["bytes"].sum()),
        }


def record_file(group: int, index: int) -> str:
    """The name of a part's record."""
    return f"part-{group:05d}-{index:03d}.json"


def _batched(documents: Iterable[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    """Lists of documents that hold _ENCODE_BYTES characters or just over, in order."""
    batch: list[tuple[str, Document]] = []
    held = 0
    for entry in documents:
        batch.append(entry)
        held += len(entry[1].text) + len(entry[1].pair or "")
        if held >= _ENCODE_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.load(path)
