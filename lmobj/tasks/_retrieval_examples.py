"""Queries and texts as rows: [CLS] query [SEP], [CLS] text [SEP], ..., each a segment of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmobj.batch import RowSpec
from lmobj.data import RetrievalFiles, Tokenizer
from lmobj.errors import UserError
from lmobj.tasks._example_dataset import ExampleRows, Kind
from lmobj.tasks._files import field, lines

__all__ = ["MatchedTexts", "RetrievalExamples", "RetrievalReference"]


class MatchedTexts(NamedTuple):
    """A query, a text that belongs to it, and texts that do not."""

    query: str
    positive: str
    negatives: tuple[str, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """All of them, the query first."""
        return (self.query, self.positive, *self.negatives)


@dataclass(frozen=True)
class RetrievalReference:
    """What the vectors of rows are vectors of."""

    texts: tuple[str, ...]
    """Every text of the split once, queries included."""
    ids: NDArray[np.int32]
    """[N, T] which of them each segment of each row is, the query first and what belongs to it second; -1: none."""


@dataclass(frozen=True)
class RetrievalExamples(Kind[MatchedTexts]):
    """Of `RetrievalFiles`."""

    source: RetrievalFiles
    fields: ClassVar[tuple[str, ...]] = ("text_ids",)

    def read(self, file: str) -> Iterator[MatchedTexts | None]:
        """The rows; those without a query or a text are refused or left out. Blank negatives are none."""
        for where, line, names in self._lines(file):
            try:
                yield self._example(where, _parsed(where, line) if names is None else self._cells(where, line, names))
            except UserError as error:
                if self.source.errors == "strict":
                    raise UserError(f"data.source: {error} To leave out such rows: data.source.errors=skip.") from None
                yield None

    def _lines(self, file: str) -> Iterator[tuple[str, str, tuple[str, ...] | None]]:
        """Place, text and columns of each line that is not blank; JSON has no columns."""
        source = self.source
        names = source.columns
        for number, line in lines(file):
            if not line.strip():
                continue
            if source.lines == "jsonl" or names is not None:
                yield f"{file}:{number}", line, names
                continue
            names = tuple(cell.strip() for cell in line.split(source.separator))
            for key in ("query", "positive"):
                if getattr(source, key) not in names:
                    raise UserError(
                        f"data.source.{key} is {getattr(source, key)!r}, but {file} has no such column; accepted: "
                        f"{', '.join(names)}, or data.source.columns for files without names in their first line."
                    )

    def _cells(self, where: str, line: str, names: tuple[str, ...]) -> Mapping[str, Any]:
        cells = [cell.strip() for cell in line.split(self.source.separator)]
        if len(cells) != len(names):
            raise UserError(f"{where} has {len(cells)} cells; accepted: {len(names)}.")
        return dict(zip(names, cells, strict=True))

    def _example(self, where: str, row: Mapping[str, Any]) -> MatchedTexts:
        source = self.source
        query, positive = (field(where, row, key, str, "text") for key in (source.query, source.positive))
        for key, text in ((source.query, query), (source.positive, positive)):
            if not text.strip():
                raise UserError(f"{where} has a blank text under {key!r}; accepted: text.")
        given: Any = []
        if row.get(source.negatives) is not None:
            given = field(where, row, source.negatives, str | list, "a text or a list of texts")
        negatives = [given] if isinstance(given, str) else given
        if not all(isinstance(text, str) for text in negatives):
            raise UserError(f"{where} has more than texts under {source.negatives!r}; accepted: a list of texts.")
        return MatchedTexts(query, positive, tuple(text for text in negatives if text.strip()))

    def texts(self, examples: Sequence[MatchedTexts]) -> Iterable[str]:
        """Every text once."""
        return dict.fromkeys(text for example in examples for text in example.texts)

    def group(self, example: MatchedTexts) -> str:
        """The text that belongs to the query."""
        return example.positive

    def rows(
        self, examples: Sequence[MatchedTexts], classes: Sequence[str], tokenizer: Tokenizer, spec: RowSpec, key: str
    ) -> ExampleRows:
        """A row for each example. How a text is cut depends on nothing but its being a query or not."""
        source, specials = self.source, len(spec.prefix) + len(spec.suffix)
        room = (spec.length - source.max_query - specials) // (spec.texts - 1) - specials
        if room < 1:
            least = source.max_query + specials + (spec.texts - 1) * (specials + 1)
            raise UserError(
                f"data.length is {spec.length}, which leaves no room for {spec.texts - 1} texts beside a query of "
                f"up to {source.max_query} tokens (data.source.max_query); accepted: {least} or more, or a smaller "
                "data.source.max_query."
            )
        needed = spec.texts > 2 and key == "data.source"  # held-out files may do without
        if needed and not any(example.negatives for example in examples):
            raise UserError(
                f"objective.negatives is {spec.texts - 2}, and no row of {key} has any under "
                f"data.source.negatives={source.negatives!r}; accepted: a column that has some, or an objective that "
                "asks for none."
            )
        every = tuple(dict.fromkeys(text for example in examples for text in example.texts[: spec.texts]))
        number = {text: index for index, text in enumerate(every)}
        encoded = tokenizer.encode_batch(list(every))
        shape = (len(examples), spec.length)
        tokens = np.full(shape, tokenizer.vocabulary.pad, np.int32)
        segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        ids = np.full((len(examples), spec.texts), -1, np.int32)
        for row, example in enumerate(examples):
            begin = 0
            for place, text in enumerate(example.texts[: spec.texts]):
                ids[row, place] = number[text]
                pieces = encoded[number[text]][: room if place else source.max_query]
                end = begin + len(pieces) + specials
                tokens[row, begin:end] = [*spec.prefix, *pieces, *spec.suffix]
                segments[row, begin:end], positions[row, begin:end] = place + 1, np.arange(end - begin)
                begin = end
        arrays = {"tokens": tokens, "segment_ids": segments, "positions": positions, "text_ids": ids}
        return ExampleRows(arrays, RetrievalReference(every, ids))


def _parsed(where: str, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON ({error}); accepted: one object a line.") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is a {type(row).__name__}; accepted: one object a line.")
    return row
