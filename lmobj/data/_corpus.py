"""A corpus: inputs with known content, cut into groups that can be read one by one, in any process.

The order of documents depends on what the inputs hold, never on where they lie or when they were written, so the
fingerprint (made of content and settings) decides every batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from lmobj.data._inputs import InputFile, Tally

__all__ = ["GROUP_BYTES", "Corpus", "Document", "Group", "grouped", "unix_lines"]

GROUP_BYTES = 32 * 1024 * 1024
"""Input files that are consecutive and hold up to this together form a group."""


class Document(NamedTuple):
    """A text, and where the source has them a second text and a label."""

    text: str
    pair: str | None = None
    label: str | float | None = None


class Group(Protocol):
    """Some of a corpus's inputs. Can be pickled, and read in another process."""

    @property
    def size(self) -> int:
        """Bytes of the inputs as they lie."""
        ...

    def documents(self, tally: Tally) -> Iterator[Document]:
        """The documents, in an order fixed by their content, blank ones left out. Adds to `tally` while reading."""
        ...


@dataclass(frozen=True)
class Corpus:
    """The groups of one source."""

    identity: dict[str, object]
    """What the documents are made of, in JSON: settings and digests of the inputs."""
    groups: tuple[Group, ...]
    key: str
    """The setting that holds the source, for messages."""

    @property
    def size(self) -> int:
        """Bytes of all inputs as they lie: what compressed ones hold is not known before they are read."""
        return sum(group.size for group in self.groups)

    def documents(self, tally: Tally | None = None) -> Iterator[Document]:
        """The documents of all groups in order."""
        for group in self.groups:
            yield from group.documents(Tally() if tally is None else tally)


def grouped(inputs: Iterable[InputFile]) -> list[tuple[InputFile, ...]]:
    """Consecutive files that hold up to GROUP_BYTES together; a file larger than that is a group of its own."""
    groups: list[list[InputFile]] = []
    held = GROUP_BYTES
    for entry in inputs:
        if not groups or held + entry.size > GROUP_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(entry)
        held += entry.size
    return [tuple(group) for group in groups]


def unix_lines(text: str) -> str:
    """The text with line ends as `open` reads them."""
    return text.replace("\r\n", "\n").replace("\r", "\n")
