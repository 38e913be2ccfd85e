"""A corpus cut into parts: up to 32 MB of documents, never of two groups. A part is the unit of work, of restart, and
of shard files.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from lmobj.data._corpus import Corpus, Document, Group
from lmobj.data._inputs import Tally

__all__ = [
    "Done",
    "Part",
    "Work",
    "cut",
    "digest_file",
    "digest_json",
    "pending",
    "pending_in",
    "temporary_name",
    "utf8_size",
    "write_json",
]

PART_BYTES = 32 * 1024 * 1024
"""Text of a part, or just over: what is redone after an interruption, and what a process holds."""
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


@dataclass(frozen=True)
class Part:
    """Some consecutive documents of a group."""

    group: int
    index: int
    documents: list[Document]
    last: bool
    """Whether it is the last part of its group."""
    size: int
    """Bytes of text."""
    read: int
    """Bytes of input read for it."""
    skipped: int
    """Rows and files skipped while reading it."""


@dataclass(frozen=True)
class Done(Generic[R]):
    """What became of a part."""

    result: R
    read: int


class Work(Protocol[R_co]):
    """What is done to a part. Can be pickled."""

    def __call__(self, part: Part) -> R_co:
        """The result of a part."""
        ...

    def finished(self, group: int, index: int) -> Any:
        """The result of a part that an interrupted preparation has finished already; None if it has not. Its `last`
        tells whether the part is the last of its group."""
        ...


def cut(group: Group, number: int) -> Iterator[Part]:
    """The parts of a group, at least one. Reads on when asked for the next."""
    tally = Tally()
    held: list[Document] = []
    index = size = read = skipped = 0

    def part(last: bool) -> Part:
        return Part(number, index, held, last, size, tally.read - read, tally.skipped - skipped)

    for document in group.documents(tally):
        if size >= PART_BYTES:
            yield part(last=False)
            held, index, size, read, skipped = [], index + 1, 0, tally.read, tally.skipped
        held.append(document)
        size += utf8_size(document.text) + utf8_size(document.pair or "")
    yield part(last=True)


def pending(corpus: Corpus, work: Work[R]) -> Iterator[Part | Done[R]]:
    """Per part, in order: the part, or its result where that is known."""
    for number, group in enumerate(corpus.groups):
        yield from pending_in(group, number, work)


def pending_in(group: Group, number: int, work: Work[R]) -> Iterator[Part | Done[R]]:
    """The same for one group. It is not read if all its results are known."""
    known = list(_finished(work, number))
    if known and known[-1]["last"]:
        yield from (Done(record, group.size // len(known)) for record in known)
        return
    for part in cut(group, number):
        record = work.finished(number, part.index)
        yield part if record is None else Done(record, part.read)


def _finished(work: Work[R], group: int) -> Iterator[Any]:
    """The results of a group's parts from its first on, as far as they are known."""
    index = 0
    while (record := work.finished(group, index)) is not None:
        yield record
        if record["last"]:
            return
        index += 1


def utf8_size(text: str) -> int:
    """Bytes of the text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes under another name and renames, so that the file is whole or absent."""
    temporary = temporary_name(path)
    temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
    temporary.replace(path)


def temporary_name(path: Path) -> Path:
    """A name to write under before renaming. Processes that write the same file do not meet there, nor machines."""
    return path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.tmp")


def digest_json(value: Any) -> str:
    """blake2b of a value as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def digest_file(path: Path) -> str:
    """blake2b of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
