"""Contexts with choices as rows: [CLS] context [SEP] choice [SEP] for each choice, end to end, each its own segment.

A row holds all choices of an example, so that a batch of rows is a batch of examples. Where they do not fit, the
context is cut at its end, by as much for each choice; a choice only where choices take more than half of the row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lmobj.batch import RowSpec
from lmobj.data import ChoiceFiles, Tokenizer
from lmobj.errors import UserError
from lmobj.tasks._choices import MultipleChoice, read_multiple_choice
from lmobj.tasks._example_dataset import ExampleRows, Kind

__all__ = ["ChoiceExamples", "ChoiceReference"]


@dataclass(frozen=True)
class ChoiceReference:
    """What logits of choices are compared with: an example for each row."""

    examples: tuple[MultipleChoice, ...]
    cut: NDArray[np.bool_]
    """[N] whether an example did not fit into its row."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """[N] the place of the right choice; 0 where it is not told."""
        return np.array([example.label or 0 for example in self.examples], np.int64)


@dataclass(frozen=True)
class ChoiceExamples(Kind[MultipleChoice]):
    """Of `ChoiceFiles`."""

    source: ChoiceFiles
    fields: ClassVar[tuple[str, ...]] = ("labels",)

    def read(self, file: str) -> Iterator[MultipleChoice | None]:
        """The examples; those without a label are refused."""
        source = self.source
        for example in read_multiple_choice(file, context=source.context, choices=source.choices, label=source.label):
            if example.label is None:
                raise UserError(
                    f"data.source.label is {source.label!r}, and {file}:{example.line} has no label there; accepted: "
                    f"0 to {len(example.choices) - 1}, the place of the right choice."
                )
            yield example

    def read_unlabelled(self, file: str) -> Iterator[MultipleChoice]:
        """The same to be predicted: labels need not be there and are not looked at."""
        return read_multiple_choice(file, context=self.source.context, choices=self.source.choices, label=None)

    def texts(self, examples: Sequence[MultipleChoice]) -> Iterable[str]:
        """The contexts, each once, and the choices."""
        contexts = dict.fromkeys(example.context for example in examples)
        return [*contexts, *(choice for example in examples for choice in example.choices)]

    def group(self, example: MultipleChoice) -> str:
        """The context: questions on one passage stay together."""
        return example.context

    def classes(self, examples: Sequence[MultipleChoice]) -> list[str]:
        """The places of choices, as many as the training example with most has."""
        return [str(place) for place in range(max(len(example.choices) for example in examples))]

    def rows(
        self, examples: Sequence[MultipleChoice], classes: Sequence[str], tokenizer: Tokenizer, spec: RowSpec, key: str
    ) -> ExampleRows:
        """A row for each example."""
        _check_room(spec)
        contexts = list(dict.fromkeys(example.context for example in examples))
        read = dict(zip(contexts, tokenizer.encode_batch(contexts), strict=True))
        encoded = iter(tokenizer.encode_batch([choice for example in examples for choice in example.choices]))
        shape = (len(examples), spec.length)
        tokens = np.full(shape, tokenizer.vocabulary.pad, np.int32)
        segments, positions, types = (np.zeros(shape, np.int32) for _ in range(3))
        cut = np.zeros(len(examples), np.bool_)
        for row, example in enumerate(examples):
            if len(example.choices) > spec.classes:
                raise UserError(
                    f"objective.choices is {spec.classes}, and the example at line {example.line} of {key} has "
                    f"{len(example.choices)} choices; accepted: {len(example.choices)} or more."
                )
            context, choices = read[example.context], [next(encoded) for _ in example.choices]
            room = spec.length - len(choices) * _specials(spec)
            kept, longest = _fitted(len(context), [len(choice) for choice in choices], room)
            cut[row] = kept < len(context) or any(len(choice) > longest for choice in choices)
            start = 0
            for segment, choice in enumerate(choices, 1):
                first = [*spec.prefix, *context[:kept], *spec.suffix]
                second = [*choice[:longest], *spec.suffix]
                end = start + len(first) + len(second)
                tokens[row, start:end] = [*first, *second]
                segments[row, start:end], positions[row, start:end] = segment, np.arange(end - start)
                types[row, start + len(first) : end] = 1
                start = end
        reference = ChoiceReference(tuple(examples), cut)
        arrays = {
            "tokens": tokens,
            "segment_ids": segments,
            "positions": positions,
            "token_types": types,
            "labels": reference.labels.astype(np.int32),
        }
        return ExampleRows(arrays, reference, tuple(_notes(cut, spec)))


def _specials(spec: RowSpec) -> int:
    """Special tokens of a segment."""
    return len(spec.prefix) + 2 * len(spec.suffix)


def _check_room(spec: RowSpec) -> None:
    least = spec.classes * (_specials(spec) + 2)
    if spec.length < least:
        raise UserError(
            f"data.length is {spec.length}, and {spec.classes} choices (objective.choices) with their contexts do not "
            f"fit into a row; accepted: {least} or more."
        )


def _fitted(context: int, choices: Sequence[int], room: int) -> tuple[int, int]:
    """Most tokens that are kept of the context and of each choice, so that all choices with the context before each
    have room. Of the context at least what its share of one half of the room holds."""
    count = len(choices)
    longest = _level(choices, room - count * min(context, room // (2 * count)))
    return min(context, (room - sum(min(size, longest) for size in choices)) // count), longest


def _level(sizes: Sequence[int], total: int) -> int:
    """The largest m with sum_i min(size_i, m) <= total, or the largest size if that is less."""
    for index, size in enumerate(sorted(sizes)):
        share = total // (len(sizes) - index)
        if size > share:
            return share
        total -= size
    return max(sizes)


def _notes(cut: NDArray[np.bool_], spec: RowSpec) -> Iterator[str]:
    if cut.any():
        yield f"{cut.sum():,} of {len(cut):,} examples are cut to fit into rows of {spec.length} tokens (data.length)."
