"""Copies of training documents in other words: synonyms drawn from a table, and paraphrases listed in one.

A copy is a function of (document, number of the copy, settings, table): of neither the corpus around it, nor the part
it is read in, nor the process that does it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmobj.data._augment_config import Augmentation, Synonyms
from lmobj.data._corpus import Document
from lmobj.data._inputs import InputFile, Tally, find_inputs
from lmobj.errors import UserError

__all__ = ["Augmenter", "open_augmenter"]

_VERSION = 1
"""Raised when the same settings and tables would make other copies."""
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")  # noqa: RUF001 (the apostrophe of printed text)

Table = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Augmenter:
    """Makes the copies of a training document. Can be pickled, tables included."""

    identity: dict[str, Any]
    """What the copies are made of, in JSON: settings and digests of the tables."""
    settings: Synonyms | None
    synonyms: Table
    """Of words in small letters."""
    paraphrases: Table
    """Of texts with single spaces."""

    @property
    def kinds(self) -> dict[str, int]:
        """No copies yet, by what makes them."""
        asked = {"synonyms": self.settings is not None, "paraphrases": bool(self.paraphrases)}
        return {name: 0 for name, there in asked.items() if there}

    def __call__(self, document: Document, counts: Counter[str]) -> Iterator[Document]:
        """The copies. Adds to `counts` those with another wording, by what made them."""
        if self.settings is not None:
            for number in range(self.settings.copies):
                copy = self._in_synonyms(document, number, self.settings)
                counts["synonyms"] += copy != document
                yield copy
        texts, pairs = (self.paraphrases.get(_plain(text or ""), ()) for text in document[:2])
        for number in range(max(len(texts), len(pairs))):
            text = texts[number] if number < len(texts) else document.text
            pair = pairs[number] if number < len(pairs) else document.pair
            counts["paraphrases"] += 1
            yield Document(text, pair, document.label)

    def _in_synonyms(self, document: Document, number: int, settings: Synonyms) -> Document:
        texts = [text for text in document[:2] if text is not None]
        address = json.dumps([settings.seed, number, *texts]).encode()
        key = int.from_bytes(hashlib.blake2b(address, digest_size=16).digest(), "little")
        words = sum(1 for text in texts for _ in _WORD.finditer(text))
        draws = iter(np.random.Philox(key=key).random_raw(2 * words).tolist())

        def replaced(match: re.Match[str]) -> str:
            whether, which = next(draws), next(draws)
            choices = self.synonyms.get(match[0].lower(), ())
            if not choices or whether >= settings.rate * 2**64:
                return match[0]
            return _capitalised(choices[which * len(choices) >> 64], match[0])

        new = [_WORD.sub(replaced, text) for text in texts]
        return Document(new[0], new[1] if len(new) > 1 else None, document.label)


def open_augmenter(config: Augmentation) -> Augmenter:
    """Reads the tables. UserError naming the file and line of what is no table."""
    identity: dict[str, Any] = {"version": _VERSION}
    synonyms: dict[str, tuple[str, ...]] = {}
    paraphrases: dict[str, tuple[str, ...]] = {}
    if config.synonyms is not None:
        key = "data.augment.synonyms.file"
        file = _find(key, config.synonyms.file)
        synonyms = _grouped((word.lower(), others) for word, others in _read(key, file, _check_word))
        identity["synonyms"] = {**dataclasses.asdict(config.synonyms), "file": file.digest}
    if config.paraphrases is not None:
        key = "data.augment.paraphrases"
        file = _find(key, config.paraphrases)
        paraphrases = _grouped((_plain(text), others) for text, others in _read(key, file, lambda where, text: None))
        identity["paraphrases"] = file.digest
    return Augmenter(identity, config.synonyms, synonyms, paraphrases)


def _find(key: str, name: str) -> InputFile:
    found = find_inputs(key, (name,), workers=1)
    if len(found) > 1:
        raise UserError(f"{key} is {name!r}, which {len(found)} files match; accepted: the path or URL of one.")
    return found[0]


def _read(key: str, file: InputFile, check: Any) -> Iterator[tuple[str, list[str]]]:
    """Each entry of a table with what it may be replaced by. `check` raises for entries that are none."""
    with file.open(Tally()) as stream:
        try:
            text = stream.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{key}: {file.name} is not UTF-8 at byte {error.start}; accepted: UTF-8 text.") from None
    found = 0
    for where, entry, others in _json(key, file.name, text) if file.name.endswith(".json") else _lines(file.name, text):
        others = [other for other in map(str.strip, others) if other]
        if not entry or not others:
            raise UserError(
                f"{key}: {where} is {entry!r:.60} with {len(others)} replacements; accepted: text and at least one."
            )
        check(f"{key}: {where}", entry)
        found += 1
        yield entry, others
    if not found:
        raise UserError(f"{key}: {file.name} has no entries; accepted: lines of a text, a tab and what replaces it.")


def _lines(name: str, text: str) -> Iterator[tuple[str, str, list[str]]]:
    """(place, first cell, other cells) of each line that is not blank."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            first, *others = line.split("\t")
            yield f"{name}:{number}", first.strip(), others


def _json(key: str, name: str, text: str) -> Iterator[tuple[str, str, list[str]]]:
    """(place, key, texts) of each pair of the object."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{key}: {name} is no JSON ({error}); accepted: one object of lists of text.") from None
    if not isinstance(values, dict):
        raise UserError(f"{key}: {name} holds a {type(values).__name__}; accepted: one object of lists of text.")
    for entry, others in values.items():
        if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
            raise UserError(f"{key}: {name} has {others!r:.60} under {entry!r:.60}; accepted: a list of text.")
        yield name, entry.strip(), others


def _check_word(where: str, word: str) -> None:
    if not _WORD.fullmatch(word):
        raise UserError(f"{where} is {word!r:.60}; accepted: single words, of letters and digits.")


def _grouped(entries: Iterable[tuple[str, list[str]]]) -> dict[str, tuple[str, ...]]:
    """The table; entries given twice have the replacements of both, each once."""
    table: dict[str, dict[str, None]] = {}
    for entry, others in entries:
        table.setdefault(entry, {}).update(dict.fromkeys(others))
    return {entry: tuple(others) for entry, others in table.items()}


def _plain(text: str) -> str:
    """The text with single spaces, so that tables need not have those of the corpus."""
    return " ".join(text.split())


def _capitalised(word: str, like: str) -> str:
    """A word with the capitals of the one that it replaces: all, the first, or its own."""
    if len(like) > 1 and like.isupper():
        return word.upper()
    return word[0].upper() + word[1:] if like[0].isupper() else word
