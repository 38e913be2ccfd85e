"""Report of extractive question answering: exact match and F1 of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lmobj.evaluate._answer_scores import (
    AnswerScores,
    Normalise,
    best_null_threshold,
    normalise_answer,
    normalise_chinese_answer,
    score_answers,
    summarise_answers,
)
from lmobj.evaluate._answer_spans import FoundAnswers, find_answers
from lmobj.evaluate._task_report import ExampleScores, Record, TaskKind, TaskReport
from lmobj.tasks import AskedQuestion, QuestionReference

__all__ = ["EXTRACTIVE_QA", "answer_questions"]

_NORMALISE: dict[str, Normalise] = {"english": normalise_answer, "chinese": normalise_chinese_answer}
_HEADER = ("questions", "exact match", "F1", "number")
_N_BEST = 5
"""Answers in a record."""


def _report(outputs: Mapping[str, NDArray], classes: Sequence[str], reference: QuestionReference) -> TaskReport:
    """Of `start_logits` and `end_logits` [n, L] of the first n windows: exact match and F1 of the questions all of
    whose windows are there. Where some have no answer, the best of both over all thresholds too, and with which.

    Of fewer rows than the first question has windows there are no figures.
    """
    asked, found = answer_questions(outputs["start_logits"], outputs["end_logits"], reference)
    settings = reference.source
    normalise = _NORMALISE[settings.normalise]
    if not asked:
        return TaskReport({}, _HEADER, [], None, list)
    scores = _scores(asked, [each.answer(settings.null_threshold) for each in found], normalise)
    summary = summarise_answers(scores)
    figures = {"exact_match": summary.exact, "f1": summary.f1}
    if summary.no_answer is not None:
        odds = [each.null_odds for each in found]
        spoken = _scores(asked, [each.answer() for each in found], normalise)
        figures["best_exact_match"], _ = best_null_threshold(spoken.exact, spoken, odds)
        figures["best_f1"], figures["best_null_threshold"] = best_null_threshold(spoken.f1, spoken, odds)

    def records() -> Iterator[Record]:
        for index, (one, each) in enumerate(zip(asked, found, strict=True)):
            yield {
                "index": index,
                "id": one.question.id,
                "question": one.question.question,
                "target": [answer.text for answer in one.question.answers],
                "prediction": each.answer(settings.null_threshold),
                "exact_match": scores.exact[index],
                "f1": scores.f1[index],
                "null_odds": each.null_odds if np.isfinite(each.null_odds) else None,
                "best": [[span.text, span.score, span.probability] for span in each.spans[:_N_BEST]],
            }

    parts = {"all": summary, "with an answer": summary.has_answer, "without": summary.no_answer}
    return TaskReport(
        figures=figures,
        header=_HEADER,
        rows=[(name, part.exact, part.f1, part.total) for name, part in parts.items() if part is not None],
        picture=None,
        records=records,
    )


def answer_questions(
    start: NDArray, end: NDArray, reference: QuestionReference
) -> tuple[list[AskedQuestion], list[FoundAnswers]]:
    """The questions all of whose windows have logits [n, L], and what these say; settings are those of the source."""
    asked, found, row = [], [], 0
    for one in reference.asked:
        rows = slice(row, row + len(one.windows.tokens))
        if rows.stop > len(start):
            break
        row = rows.stop
        asked.append(one)
        found.append(
            find_answers(
                start[rows],
                end[rows],
                one.windows,
                one.offsets,
                one.question.context,
                max_answer_tokens=reference.source.max_answer,
                no_answer=reference.source.null_threshold is not None,
            )
        )
    return asked, found


def _scores(asked: Sequence[AskedQuestion], answers: Sequence[str], normalise: Normalise) -> AnswerScores:
    golds = {str(index): [gold.text for gold in one.question.answers] for index, one in enumerate(asked)}
    return score_answers({str(index): text for index, text in enumerate(answers)}, golds, normalise=normalise)


def _most_frequent_answer(trained: QuestionReference, held_out: QuestionReference) -> dict[str, dict[str, float]]:
    """Every question has the answer that training has most often, be it none."""
    normalise = _NORMALISE[held_out.source.normalise]
    every = Counter(one.question.answers[0].text if one.question.answers else "" for one in trained.asked)
    most = max(sorted(every), key=every.__getitem__)
    summary = summarise_answers(_scores(held_out.asked, [most] * len(held_out.asked), normalise))
    return {"most frequent answer": {"exact_match": summary.exact, "f1": summary.f1}}


def _mean_of(name: str) -> Callable[[Sequence[Record]], ExampleScores]:
    return lambda records: ExampleScores(np.array([one[name] for one in records], np.float64))


EXTRACTIVE_QA = TaskKind(
    figures=("exact_match", "f1"),
    report=_report,
    baselines=_most_frequent_answer,
    scores={"exact_match": _mean_of("exact_match"), "f1": _mean_of("f1")},
)
