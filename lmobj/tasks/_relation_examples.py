"""Texts with two marked entities as rows: [CLS] text [SEP], and where the opening markers stand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmobj.batch import RowSpec
from lmobj.data import RelationFiles, Tokenizer
from lmobj.errors import UserError
from lmobj.tasks._example_dataset import ExampleRows, Kind
from lmobj.tasks._relations import MarkedText, Relation, mark_entities, read_relations

__all__ = ["RelationExamples", "RelationReference"]


@dataclass(frozen=True)
class RelationReference:
    """What logits of relations are compared with: an example for each row."""

    examples: tuple[Relation, ...]
    labels: NDArray[np.int32]
    """[N] ids of the relations; 0 where it is not told."""
    no_relation: int | None
    """The id of the class that is no relation."""


class _Marked(NamedTuple):
    """Tokens of a marked text."""

    tokens: NDArray[np.int32]
    head: int
    """The first token of the marker that opens the head."""
    tail: int
    end: int
    """The token after the later one of both entities, its marker included."""


@dataclass(frozen=True)
class RelationExamples(Kind[Relation]):
    """Of `RelationFiles`."""

    source: RelationFiles
    fields: ClassVar[tuple[str, ...]] = ("labels", "spans")

    def read(self, file: str) -> Iterator[Relation | None]:
        """The examples; those without a label are refused."""
        for example in read_relations(file):
            if example.label is None:
                raise UserError(
                    f"data.source: {file}:{example.line} has no 'label'; accepted: the name of a relation there."
                )
            yield example

    def read_unlabelled(self, file: str) -> Iterator[Relation]:
        """The same to be predicted: labels need not be there and are not looked at."""
        return read_relations(file, label=None)

    def texts(self, examples: Sequence[Relation]) -> Iterable[str]:
        """The marked texts."""
        return [self._marked(example).text for example in examples]

    def group(self, example: Relation) -> str:
        """The text: what it says of several pairs of entities stays together."""
        return example.text

    def classes(self, examples: Sequence[Relation]) -> list[str]:
        """The relations of the training examples by name. Refuses a `no_relation` that is none of them."""
        names = sorted({str(example.label) for example in examples})
        if self.source.no_relation not in (None, *names):
            raise UserError(
                f"data.source.no_relation is {self.source.no_relation!r}, which no training example has; accepted: "
                f"{', '.join(names)}, or null."
            )
        return names

    def rows(
        self, examples: Sequence[Relation], classes: Sequence[str], tokenizer: Tokenizer, spec: RowSpec, key: str
    ) -> ExampleRows:
        """A row for each example. Of a text that is too long a window is kept, with as much before its entities as
        after them; of entities that are too far apart, what goes on from the first, and what leads to the second."""
        room = spec.length - len(spec.prefix) - len(spec.suffix)
        if room < 2:
            raise UserError(
                f"data.length is {spec.length}, which leaves no room for two entities; accepted: "
                f"{spec.length - room + 2} or more."
            )
        ids = {name: index for index, name in enumerate(classes)}
        shape = (len(examples), spec.length)
        tokens = np.full(shape, tokenizer.vocabulary.pad, np.int32)
        segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        spans, labels = np.zeros((len(examples), 2), np.int32), np.zeros(len(examples), np.int32)
        cut, apart = 0, 0
        for row, example in enumerate(examples):
            if example.label not in (None, *ids):
                raise UserError(
                    f"{key}: the example at line {example.line} has the label {example.label!r}, which no training "
                    f"example has; accepted: {', '.join(classes)}."
                )
            marked = _encoded(self._pieces(example), tokenizer)
            kept = _window(len(marked.tokens), sorted((marked.head, marked.tail)), marked.end, room)
            cut, apart = cut + (len(kept) < len(marked.tokens)), apart + bool(np.any(np.diff(kept) > 1))
            size = spec.length - room + len(kept)
            tokens[row, :size] = [*spec.prefix, *marked.tokens[kept], *spec.suffix]
            segments[row, :size], positions[row, :size] = 1, np.arange(size)
            spans[row] = len(spec.prefix) + np.searchsorted(kept, (marked.head, marked.tail))
            labels[row] = 0 if example.label is None else ids[example.label]
        arrays = {"tokens": tokens, "segment_ids": segments, "positions": positions, "labels": labels, "spans": spans}
        none = self.source.no_relation
        reference = RelationReference(tuple(examples), labels, None if none is None else ids[none])
        return ExampleRows(arrays, reference, tuple(_notes(cut, apart, len(examples), spec)))

    def _marked(self, example: Relation) -> MarkedText:
        return mark_entities(example, self.source.head_markers, self.source.tail_markers)

    def _pieces(self, example: Relation) -> list[tuple[str, str]]:
        """The marked text in pieces, and what opens with each: `head`, `tail`, `end` or nothing. Markers are pieces of
        their own, so that their tokens are the same wherever they stand."""
        marked, source = self._marked(example), self.source
        pieces, reached = [], 0
        for name, (start, end), (before, after) in sorted(
            (("head", marked.head, source.head_markers), ("tail", marked.tail, source.tail_markers)),
            key=lambda entity: entity[1],
        ):
            inner = marked.text[start + len(before) : end - len(after)]
            pieces += [(marked.text[reached:start], ""), (before, name), (inner, ""), (after, "")]
            reached = end
        return [*pieces, (marked.text[reached:], "end")]


def _encoded(pieces: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> _Marked:
    encoded = tokenizer.encode_batch([text for text, _ in pieces])
    starts = np.cumsum([0, *(len(part) for part in encoded)])
    at = {name: int(start) for (_, name), start in zip(pieces, starts[:-1], strict=True)}
    return _Marked(np.concatenate(encoded), at["head"], at["tail"], at["end"])


def _window(count: int, openings: Sequence[int], end: int, room: int) -> NDArray[np.int64]:
    """Which of `count` tokens are kept, ascending, at most `room`: both openings are among them.

    Args:
      openings: the first tokens of the first and of the second entity.
      end: the token after the second entity.
    """
    first, second = openings
    if count <= room:
        return np.arange(count)
    if end - first <= room:
        start = min(max(first - (room - (end - first)) // 2, 0), count - room)
        return np.arange(start, start + room)
    left, right = room - room // 2, room // 2
    if second < first + left:
        return np.arange(first, first + room)
    start = min(end - right, second)
    return np.concatenate([np.arange(first, first + left), np.arange(start, start + right)])


def _notes(cut: int, apart: int, examples: int, spec: RowSpec) -> Iterator[str]:
    if cut:
        yield (
            f"{cut:,} of {examples:,} texts are cut to windows with both entities (data.length is {spec.length}); of "
            f"{apart:,} these are too far apart, so what is between them is cut too."
        )
