"""Files of tagged words: a word per line, as of CoNLL, or a sentence per line.

Source: Tjong Kim Sang and De Meulder 2003, section 2.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lmobj.errors import UserError
from lmobj.tasks._files import lines

__all__ = ["TaggedSentence", "read_conll", "read_tagged_lines"]

_GAPS = re.compile(r"[ \t]+")
"""What parts columns. Other white space, such as U+3000, may be a word."""


@dataclass(frozen=True)
class TaggedSentence:
    """Words, or characters, each with a tag; `line` is that of the first, counted from 1."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    line: int


def read_conll(
    path: str | Path,
    *,
    word_column: int = 0,
    tag_column: int | None = -1,
    separator: str | None = None,
    comment: str | None = None,
) -> Iterator[TaggedSentence]:
    """The sentences of a file with a word, or a character, and its tag on each line.

    A blank line ends a sentence, and so does a line that begins with -DOCSTART-, which is no word.

    Args:
      path: the file.
      word_column, tag_column: counted from 0, or from the end below 0. Without a tag column every tag is O.
      separator: between columns; None: any number of spaces and tabs. With "\\t" a word may be a space.
      comment: lines that begin so before the first word of a sentence are none; None: there are no comments, and "#" is
        a word.

    Raises:
      UserError: a file that cannot be read, or a line without one of the columns; it names the line.
    """
    words: list[str] = []
    tags: list[str] = []
    first = 0
    for number, line in lines(path):
        if not words and comment is not None and line.startswith(comment):
            continue
        columns = [] if not line.strip(" \t") else _columns(line, separator)
        if columns and columns[0] == "-DOCSTART-":
            columns = []
        if columns:
            word, tag = _pair(f"{path}:{number}", columns, word_column, tag_column)
            first = first or number
            words.append(word)
            tags.append(tag)
        elif words:
            yield TaggedSentence(tuple(words), tuple(tags), first)
            words, tags, first = [], [], 0
    if words:
        yield TaggedSentence(tuple(words), tuple(tags), first)


def read_tagged_lines(
    path: str | Path, *, separator: str = "\t", between: str = " ", tagged: bool = True
) -> Iterator[TaggedSentence]:
    """The sentences of a file with one on each line: words, a separator, tags. Blank lines are none.

    Args:
      path: the file.
      separator: between words and tags.
      between: between one word and the next, and between tags.
      tagged: whether there are tags; else every tag is O, and what follows a separator is not looked at.

    Raises:
      UserError: a file that cannot be read, or a line whose words and tags are not as many; it names the line.
    """
    for number, line in lines(path):
        if not line.strip():
            continue
        parts = line.split(separator)
        if not tagged:
            parts = [parts[0], between.join("O" for _ in parts[0].strip(" ").split(between))]
        if len(parts) != 2:
            raise UserError(f"{path}:{number} has {len(parts)} columns; accepted: words, {separator!r}, tags.")
        words, tags = (tuple(part.strip(" ").split(between)) for part in parts)
        if len(words) != len(tags) or "" in words + tags:
            raise UserError(
                f"{path}:{number} has {len(words)} words and {len(tags)} tags, or an empty one; accepted: as many, "
                f"with one {between!r} between."
            )
        yield TaggedSentence(words, tags, number)


def _columns(line: str, separator: str | None) -> list[str]:
    return _GAPS.split(line.strip(" \t")) if separator is None else line.split(separator)


def _pair(where: str, columns: list[str], word_column: int, tag_column: int | None) -> tuple[str, str]:
    """Word and tag of a line. UserError if a column is missing or empty, or both are the same one."""
    count = len(columns)
    if tag_column is None:
        if not -count <= word_column < count or not columns[word_column]:
            raise UserError(f"{where} has no word in column {word_column}, counted from 0; accepted: lines with one.")
        return columns[word_column], "O"
    word, tag = (column + count if column < 0 else column for column in (word_column, tag_column))
    if not (0 <= word < count and 0 <= tag < count) or word == tag:
        raise UserError(
            f"{where} has {count} {'column' if count == 1 else 'columns'}, and words are in column {word_column} and "
            f"tags in column {tag_column}, counted from 0; accepted: lines with both."
        )
    if not columns[word] or not columns[tag]:
        raise UserError(f"{where} has an empty column; accepted: a word and its tag.")
    return columns[word], columns[tag]
