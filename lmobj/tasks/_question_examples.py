"""Questions with long contexts as rows: windows, and in each the first and last token of the answer."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmobj.batch import RowSpec
from lmobj.data import SquadFiles, Tokenizer
from lmobj.errors import UserError
from lmobj.tasks._example_dataset import ExampleRows, Kind
from lmobj.tasks._qa_windows import QAWindows, qa_windows, token_offsets, window_labels
from lmobj.tasks._squad import Question, read_squad

__all__ = ["AskedQuestion", "QuestionExamples", "QuestionReference"]


class AskedQuestion(NamedTuple):
    """A question, the windows that the model reads of its context, and where their tokens lie in it."""

    question: Question
    windows: QAWindows
    offsets: NDArray[np.int32]


@dataclass(frozen=True)
class QuestionReference:
    """What the logits of rows are turned into answers with: the windows of question after question are the rows."""

    asked: tuple[AskedQuestion, ...]
    source: SquadFiles


@dataclass(frozen=True)
class QuestionExamples(Kind[Question]):
    """Of `SquadFiles`."""

    source: SquadFiles
    fields: ClassVar[tuple[str, ...]] = ("spans",)

    def read(self, file: str) -> Iterator[Question | None]:
        """The questions; those without a context or all of whose answers were dropped are left out."""
        for question in read_squad(file, strict=self.source.errors == "strict"):
            lost = question.dropped and not question.answers
            yield None if lost or not question.context.strip() else question

    def read_unlabelled(self, file: str) -> Iterator[Question]:
        """The questions, answered or not."""
        return read_squad(file)

    def texts(self, examples: Sequence[Question]) -> Iterable[str]:
        """The contexts, each once, and the questions."""
        return [
            *dict.fromkeys(question.context for question in examples),
            *(question.question for question in examples),
        ]

    def group(self, example: Question) -> str:
        """The article, or the context where it has no title."""
        return example.title or example.context

    def rows(
        self, examples: Sequence[Question], classes: Sequence[str], tokenizer: Tokenizer, spec: RowSpec, key: str
    ) -> ExampleRows:
        """A row for each window. Where a question has several answers, the first is pointed to."""
        questions = tokenizer.encode_batch([question.question for question in examples])
        read = functools.cache(lambda text: token_offsets(tokenizer, text))
        asked, spans = [], []
        for question, tokens in zip(examples, questions, strict=True):
            context, offsets = read(question.context)
            try:
                windows = self._windows(tokens, context, tokenizer, spec)
            except UserError as error:
                raise UserError(
                    f"data.length is {spec.length} and data.source.max_question {self.source.max_question}, and for "
                    f"the question {question.id!r} of {key} that does not do: {error}"
                ) from None
            answer = (question.answers[0].start, question.answers[0].end) if question.answers else None
            asked.append(AskedQuestion(question, windows, offsets))
            spans.append(np.stack(window_labels(windows, offsets, answer), axis=1))
        segments = np.concatenate([one.windows.segment_ids for one in asked])
        arrays = {
            "tokens": np.concatenate([one.windows.tokens for one in asked]),
            "segment_ids": segments,
            "positions": (np.arange(spec.length) * segments).astype(np.int32),
            "token_types": np.concatenate([one.windows.token_types for one in asked]),
            "spans": np.concatenate(spans),
        }
        cut = sum(len(tokens) > self.source.max_question for tokens in questions)
        lost = sum(bool(question.answers) and not found.any() for question, found in zip(examples, spans, strict=True))
        notes = tuple(self._notes(cut, lost, len(examples), spec))
        return ExampleRows(arrays, QuestionReference(tuple(asked), self.source), notes)

    def _windows(
        self, question: NDArray[np.int32], context: NDArray[np.int32], tokenizer: Tokenizer, spec: RowSpec
    ) -> QAWindows:
        return qa_windows(
            question,
            context,
            max_length=spec.length,
            stride=self.source.stride,
            max_question=self.source.max_question,
            prefix=spec.prefix,
            separator=spec.suffix,
            suffix=spec.suffix,
            pad=tokenizer.vocabulary.pad,
        )

    def _notes(self, cut: int, lost: int, questions: int, spec: RowSpec) -> Iterator[str]:
        if cut:
            yield (
                f"questions that are cut after {self.source.max_question} tokens (data.source.max_question): "
                f"{cut:,} of {questions:,}."
            )
        if lost:
            yield (
                f"questions whose answer no window holds whole (data.length is {spec.length}), so that their rows say "
                f"that there is none: {lost:,} of {questions:,}."
            )
