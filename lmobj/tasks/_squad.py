"""Files in SQuAD's format: questions about paragraphs, with answers cut out of them.

Source: Rajpurkar et al. 2016 (1.1) and 2018 (2.0); XQuAD (Artetxe et al. 2020), MLQA and CMRC 2018 use the same format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lmobj.errors import UserError
from lmobj.tasks._files import field, read_json

__all__ = ["GoldAnswer", "Question", "read_squad"]


class GoldAnswer(NamedTuple):
    """A true answer: context[start:end] == text."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Question:
    """A question about a context.

    answers: the true ones, equal ones as often as they are given; none in test files without answers.
    impossible: the context has no answer (2.0). Not so where answers were there but all dropped.
    dropped: answers that did not match the context where they were said to be, and are left out.
    """

    id: str
    question: str
    context: str
    answers: tuple[GoldAnswer, ...]
    impossible: bool
    dropped: int
    title: str


def read_squad(path: str | Path, *, strict: bool = False) -> Iterator[Question]:
    """The questions of a file in SQuAD's format, 1.1 or 2.0, in order.

    Args:
      path: a JSON file.
      strict: whether an answer that does not stand at its offset is refused; else it is dropped, and counted in its
        question's `dropped`.

    Raises:
      UserError: a file that cannot be read, is no JSON (with the line), or lacks something (with the place in the
        JSON, as such a file may have a single line).
    """
    articles = field(str(path), read_json(path), "data", list, "a list of articles")
    for i, article in enumerate(articles):
        place = f"{path}: data[{i}]"
        paragraphs = field(place, article, "paragraphs", list, "a list")
        title = article.get("title") or ""
        for j, paragraph in enumerate(paragraphs):
            where = f"{place}.paragraphs[{j}]"
            context = field(where, paragraph, "context", str, "the text")
            for k, row in enumerate(field(where, paragraph, "qas", list, "a list of questions")):
                yield _question(f"{where}.qas[{k}]", row, context, str(title), strict)


def _question(where: str, row: Any, context: str, title: str, strict: bool) -> Question:
    number = field(where, row, "id", str | int, "text")
    text = field(where, row, "question", str, "text")
    given = field(where, row, "answers", list, "a list") if "answers" in row else []
    impossible = field(where, row, "is_impossible", bool, "true or false") if "is_impossible" in row else False
    if impossible and given:
        raise UserError(f"{where} (id {number}) is impossible and has answers; accepted: one of them.")
    answers = [_answer(f"{where}.answers[{index}]", answer, context) for index, answer in enumerate(given)]
    if strict and None in answers:
        index = answers.index(None)
        raise UserError(
            f"{where}.answers[{index}] (id {number}) says {given[index]['text']!r:.60} stands at "
            f"{given[index]['answer_start']}, where the context has another text; accepted: answers at their place, or "
            "strict=False (data.source.errors=skip) to drop and count them."
        )
    kept = tuple(answer for answer in answers if answer is not None)
    return Question(str(number), text, context, kept, impossible, len(answers) - len(kept), title)


def _answer(where: str, row: Mapping[str, Any], context: str) -> GoldAnswer | None:
    """The answer; None if it is empty or does not stand where it is said to."""
    text = field(where, row, "text", str, "text")
    start = field(where, row, "answer_start", int, "a whole number")
    fits = bool(text) and start >= 0 and context.startswith(text, start)
    return GoldAnswer(text, start, start + len(text)) if fits else None
