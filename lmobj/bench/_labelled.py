"""Labelled texts for a probe: read from files, or made from a run's own held-out text."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmobj.bench._probe_config import JsonLinesProbe, Probe, SwappedWordsProbe, TsvProbe, WhichDocumentProbe
from lmobj.errors import UserError
from lmobj.tasks import AnyDataset

__all__ = ["Labelled", "ProbeData", "labelled_texts", "read_labelled", "swap_words", "swapped_words", "which_document"]


class Labelled(NamedTuple):
    """A text, perhaps a second one, and the name of its class."""

    text: str
    pair: str | None
    label: str


@dataclass(frozen=True)
class ProbeData:
    """What the classifier is fitted on and what it is scored on."""

    train: list[Labelled]
    test: list[Labelled]

    @property
    def digest(self) -> str:
        """Equal where texts, labels and their order are."""
        content = json.dumps([self.train, self.test]).encode()
        return hashlib.blake2b(content, digest_size=16).hexdigest()


def labelled_texts(probe: Probe, dataset: AnyDataset) -> ProbeData:
    """The texts of a probe. Those that are made come from `dataset`; those in files do not depend on it.

    Raises:
      UserError: a file that cannot be read, or texts of fewer than two classes.
    """
    if isinstance(probe, SwappedWordsProbe):
        data = swapped_words(probe, dataset)
    elif isinstance(probe, WhichDocumentProbe):
        data = which_document(probe, dataset)
    elif probe.test:
        data = ProbeData(list(read_labelled(probe, "train")), list(read_labelled(probe, "test")))
    else:
        rows = list(read_labelled(probe, "train"))
        order = np.random.default_rng(probe.seed).permutation(len(rows))
        apart = max(1, round(probe.test_share * len(rows)))
        data = ProbeData([rows[i] for i in sorted(order[apart:])], [rows[i] for i in sorted(order[:apart])])
    for part, rows in (("train", data.train), ("test", data.test)):
        classes = {row.label for row in rows}
        if not rows or (part == "train" and len(classes) < 2):
            shown = ", ".join(sorted(classes)) or "no texts at all"
            raise UserError(
                f"probe.{part} has {len(rows)} texts ({shown}); accepted: texts of two classes or more to fit the "
                "classifier on, and some to score it on."
            )
    return data


def read_labelled(probe: TsvProbe | JsonLinesProbe, part: str) -> Iterator[Labelled]:
    """The rows of `probe.train` or `probe.test` in order. Blank lines are passed over, ends of texts are trimmed.

    Raises:
      UserError: a file that cannot be read, or a row without one of the columns; it names the line.
    """
    for name in getattr(probe, part):
        lines = _lines(f"probe.{part}", name)
        yield from _tsv(probe, name, lines) if isinstance(probe, TsvProbe) else _jsonl(probe, name, lines)


def _lines(key: str, name: str) -> list[tuple[int, str]]:
    """Number and text of each line that is not blank; a byte order mark and carriage returns are dropped."""
    try:
        text = Path(name).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{key} has {name}, which is not UTF-8 at byte {error.start}; accepted: UTF-8 text.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{key} has {name!r}, which cannot be read ({error}); accepted: the path of a file.") from None
    # Not `splitlines`, which also ends lines at form feeds and other marks inside a text.
    return [(i, line.removesuffix("\r")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _tsv(probe: TsvProbe, name: str, lines: list[tuple[int, str]]) -> Iterator[Labelled]:
    header = lines[0][1].split("\t") if probe.header and lines else []
    columns: dict[str, int] = {}
    for key in ("text", "pair", "label"):
        column = getattr(probe, key)
        if isinstance(column, str):
            if column not in header:
                raise UserError(f'probe.{key} is "{column}"; accepted: the columns of {name}: {", ".join(header)}.')
            column = header.index(column)
        if column is not None:
            columns[key] = column
    for number, line in lines[1:] if probe.header else lines:
        cells = line.split("\t")
        for key, column in columns.items():
            if column >= len(cells):
                raise UserError(
                    f"{name}:{number} has {len(cells)} columns, and probe.{key} is column {column}, counted from 0; "
                    "accepted: lines with that column."
                )
        found = {key: cells[column].strip() for key, column in columns.items()}
        yield Labelled(found["text"], found.get("pair"), found["label"])


def _jsonl(probe: JsonLinesProbe, name: str, lines: list[tuple[int, str]]) -> Iterator[Labelled]:
    for number, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{name}:{number} is not JSON ({error.msg}); accepted: one object a line.") from None

        def cell(key: str, kinds: tuple[type, ...], row: Any = row, number: int = number) -> Any:
            column = getattr(probe, key)
            value = row.get(column) if isinstance(row, dict) else None
            if not isinstance(value, kinds):
                raise UserError(
                    f"{name}:{number} has {value!r:.60} under {column!r}, which probe.{key} names; accepted: "
                    f"{'text' if kinds == (str,) else 'text, a whole number, true or false'}."
                )
            return value

        pair = None if probe.pair is None else cell("pair", (str,)).strip()
        yield Labelled(cell("text", (str,)).strip(), pair, str(cell("label", (str, int, bool))).strip())


def swapped_words(probe: SwappedWordsProbe, dataset: AnyDataset) -> ProbeData:
    """Sentences of the validation split to fit on, of the test split to score on; every other one with words swapped.

    Raises:
      UserError: a split without sentences of the lengths asked for.
    """
    parts = {}
    for part, split in (("train", "validation"), ("test", "test")):
        draw = random.Random(f"{probe.seed} {split}")
        found = sorted({sentence for each in _sentences(dataset, split, probe.words) for sentence in each})
        draw.shuffle(found)
        rows: list[Labelled] = []
        for sentence in found:
            swapped = swap_words(sentence, probe.swaps, draw)
            if swapped is not None:
                rows.append(Labelled(swapped, None, "swapped") if len(rows) % 2 else Labelled(sentence, None, "whole"))
        if not rows:
            raise UserError(
                f"probe.name is swapped_words, and the {split} split has no sentences of {probe.words[0]} to "
                f"{probe.words[1]} words; accepted: a larger data.{split}, or other probe.words."
            )
        parts[part] = rows
    return ProbeData(**parts)


def which_document(probe: WhichDocumentProbe, dataset: AnyDataset) -> ProbeData:
    """Half of the sentences of each document to fit on, the other half to score on. A sentence is taken once.

    Raises:
      UserError: fewer documents with two sentences than are asked for.
    """
    held_out = [
        sorted(set(document))
        for split in ("validation", "test")
        for document in _sentences(dataset, split, probe.words)
    ]
    everywhere = Counter(sentence for document in held_out for sentence in document)
    own = [[sentence for sentence in document if everywhere[sentence] == 1] for document in held_out]
    longest = sorted((document for document in own if len(document) > 1), key=lambda d: (-len(d), d))
    if len(longest) < probe.documents:
        raise UserError(
            f"probe.documents is {probe.documents}, and {len(longest)} documents of the validation and test splits "
            "have two sentences or more of their own; accepted: fewer documents, or larger data.validation and "
            "data.test."
        )
    train, test = [], []
    for index, document in enumerate(longest[: probe.documents]):
        random.Random(f"{probe.seed} {index}").shuffle(document)
        rows = [Labelled(sentence, None, f"{index:03}") for sentence in document[: probe.sentences]]
        train += rows[: (len(rows) + 1) // 2]
        test += rows[(len(rows) + 1) // 2 :]
    return ProbeData(train, test)


def _sentences(dataset: AnyDataset, split: str, words: tuple[int, int]) -> Iterator[list[str]]:
    """The prose sentences of each document: a capital letter, words, commas, a full stop. Code and tables are none."""
    tokenizer = dataset.tokenizer
    for document in dataset.documents(split):
        text = re.sub(r"\n(?!\n)\s*", " ", tokenizer.decode(document))  # a line's end inside a paragraph is a space
        found = (sentence.split() for sentence in _SENTENCE.findall(text))
        yield [" ".join(each) for each in found if words[0] <= len(each) <= words[1]]


_SENTENCE = re.compile(r"(?<![^\s])[A-Z][a-z]*(?:,? [\w'()\-]+)+\.(?=\s|$)")


def swap_words(sentence: str, swaps: int, draw: random.Random) -> str | None:
    """The sentence with `swaps` disjoint pairs of neighbouring plain words exchanged; None if it has not so many.

    First and last words stay, so that neither capital letter nor full stop gives the swap away.
    """
    words = sentence.split(" ")
    places = [
        i for i in range(1, len(words) - 2)
        if words[i].isalpha() and words[i + 1].isalpha() and words[i].lower() != words[i + 1].lower()
    ]  # fmt: skip
    draw.shuffle(places)
    chosen: list[int] = []
    for place in places:
        if len(chosen) < swaps and all(abs(place - other) > 1 for other in chosen):
            chosen.append(place)
    if len(chosen) < swaps:
        return None
    for place in chosen:
        words[place], words[place + 1] = words[place + 1], words[place]
    return " ".join(words)
