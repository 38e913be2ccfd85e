"""Exact match and F1 of answers, as SQuAD 1.1 and 2.0 are scored, and the same for Chinese.

Source: Rajpurkar et al. 2016, "SQuAD: 100,000+ Questions for Machine Comprehension of Text", section 6.1; Rajpurkar et
al. 2018, "Know What You Don't Know: Unanswerable Questions for SQuAD"; Lewis et al. 2020, "MLQA", section 5.1.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmobj.errors import UserError

__all__ = [
    "AnswerScores",
    "AnswerSummary",
    "Normalise",
    "answer_f1",
    "apply_null_threshold",
    "best_null_threshold",
    "exact_match",
    "normalise_answer",
    "normalise_chinese_answer",
    "score_answers",
    "summarise_answers",
]

Normalise = Callable[[str], str]

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class AnswerScores(NamedTuple):
    """Scores of N questions, each in [0, 1]."""

    ids: tuple[str, ...]
    exact: NDArray[np.float64]
    """[N]: 1 where the answer equals one of the true ones."""
    f1: NDArray[np.float64]
    """[N]: the largest F1 with one of the true answers."""
    has_answer: NDArray[np.bool_]
    """[N]: the question has an answer."""
    answered: NDArray[np.bool_]
    """[N]: the system gave one."""


class AnswerSummary(NamedTuple):
    """Means over questions, in [0, 1]. A part without questions is None."""

    exact: float
    f1: float
    total: int
    has_answer: AnswerSummary | None = None
    no_answer: AnswerSummary | None = None


def normalise_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and the words a, an, the; white space becomes single spaces.

    Source: Rajpurkar et al. 2016, section 6.1 (punctuation and articles are ignored). Steps in this order: "a.n" is
    first "an" and then gone.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def normalise_chinese_answer(text: str) -> str:
    """Lower case, without punctuation of any script; each Chinese character is a token of its own, other text is split
    at white space; one space between tokens.

    Source: the Chinese rule of the evaluation of Lewis et al. 2020 (MLQA), for XQuAD's zh (Artetxe et al. 2020) too.
    CMRC 2018 (Cui et al. 2019) takes the same tokens, but for its F1 the longest common substring instead of the bag
    of tokens. Deviation: ideographs beyond U+4E00-9FA5, such as extension A, are tokens of their own as well.
    """
    kept = (c for c in text.lower() if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return " ".join("".join(f" {c} " if _is_ideograph(c) else c for c in kept).split())


def exact_match(answer: str, golds: Sequence[str], normalise: Normalise = normalise_answer) -> float:
    """max_g [normalise(answer) = normalise(g)], 0 or 1. Source: Rajpurkar et al. 2016, section 6.1."""
    return float(max(normalise(answer) == normalise(gold) for gold in golds))


def answer_f1(answer: str, golds: Sequence[str], normalise: Normalise = normalise_answer) -> float:
    """max_g 2 P R / (P + R), with the common tokens c = sum_t min(count_t, count_t^g), P = c / tokens of the answer
    and R = c / tokens of g, after normalisation. Where either has no token it is 1 if neither has, else 0.

    Source: Rajpurkar et al. 2016, section 6.1; without tokens, Rajpurkar et al. 2018.
    """
    tokens = normalise(answer).split()
    return max(_token_f1(tokens, normalise(gold).split()) for gold in golds)


def score_answers(
    answers: Mapping[str, str],
    golds: Mapping[str, Sequence[str]],
    *,
    normalise: Normalise = normalise_answer,
) -> AnswerScores:
    """Exact match and F1 of every question.

    Args:
      answers: question id -> the system's text; "" is no answer.
      golds: question id -> true answers; none if the question has no answer. True answers that normalise to nothing
        are left out if there are others.
      normalise: `normalise_answer`, or `normalise_chinese_answer`.

    Raises:
      UserError: a question without an entry in `answers`.

    Deviation: the official scripts score a question without an entry 0 (1.1) or leave it out (2.0).
    """
    missing = [question for question in golds if question not in answers]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(golds)} questions have no answer, {missing[0]!r} first; accepted: an entry for "
            'each, "" for those that the system leaves unanswered.'
        )
    true = {question: [gold for gold in texts if normalise(gold)] or [""] for question, texts in golds.items()}
    return AnswerScores(
        tuple(golds),
        np.array([exact_match(answers[q], texts, normalise) for q, texts in true.items()]),
        np.array([answer_f1(answers[q], texts, normalise) for q, texts in true.items()]),
        np.array([bool(texts) for texts in golds.values()]),
        np.array([bool(answers[q]) for q in golds]),
    )


def summarise_answers(scores: AnswerScores) -> AnswerSummary:
    """Means over all questions, over those with an answer and over those without (SQuAD 2.0's HasAns and NoAns).

    Raises:
      UserError: no questions at all.
    """
    if not scores.ids:
        raise UserError("there are no questions to score; accepted: at least one.")

    def mean(chosen: NDArray[np.bool_]) -> AnswerSummary | None:
        if not chosen.any():
            return None
        return AnswerSummary(float(scores.exact[chosen].mean()), float(scores.f1[chosen].mean()), int(chosen.sum()))

    return AnswerSummary(
        float(scores.exact.mean()),
        float(scores.f1.mean()),
        len(scores.ids),
        mean(scores.has_answer),
        mean(~scores.has_answer),
    )


def apply_null_threshold(scores: AnswerScores, null_odds: ArrayLike, threshold: float) -> AnswerScores:
    """The scores if every question with null_odds [N] > threshold is left unanswered: 1 where it has no answer, else 0.

    Source: Devlin et al. 2019, section 4.3; the na-prob threshold of Rajpurkar et al. 2018.
    """
    silent = _checked_odds(scores, null_odds) > threshold
    without = (~scores.has_answer).astype(np.float64)
    return scores._replace(
        exact=np.where(silent, without, scores.exact),
        f1=np.where(silent, without, scores.f1),
        answered=scores.answered & ~silent,
    )


def best_null_threshold(values: ArrayLike, scores: AnswerScores, null_odds: ArrayLike) -> tuple[float, float]:
    """The largest mean that a threshold gives, and the smallest threshold that gives it: (mean, threshold).

    Thresholds are -inf (no question is answered) and each of the odds.

    Args:
      values: [N] `scores.exact` or `scores.f1` of the answers as they are before any threshold.
      scores: of the same questions.
      null_odds: [N] of each question.

    Source: best_exact and best_f1 of Rajpurkar et al. 2018. Deviations: questions with equal odds are answered
    together, as any threshold has them; and no threshold fits better than answering nothing is -inf, not 0.
    """
    odds, each = _checked_odds(scores, null_odds), np.asarray(values, np.float64)
    order = np.argsort(odds, kind="stable")
    gain = np.where(scores.has_answer, each, np.where(scores.answered, -1.0, 0.0))[order]
    total = np.concatenate([[0.0], np.cumsum(gain)]) + np.sum(~scores.has_answer)
    ordered = np.concatenate([[-np.inf], odds[order]])
    last = np.append(ordered[1:] != ordered[:-1], True)  # of those with the same odds
    best = int(np.flatnonzero(last)[np.argmax(total[last])])
    return float(total[best] / len(odds)), float(ordered[best])


def _checked_odds(scores: AnswerScores, null_odds: ArrayLike) -> NDArray[np.float64]:
    odds = np.asarray(null_odds, np.float64)
    if odds.shape != (len(scores.ids),) or np.isnan(odds).any():
        raise UserError(f"null_odds has the shape {odds.shape}; accepted: ({len(scores.ids)},), and no NaN.")
    return odds


def _token_f1(answer: Sequence[str], gold: Sequence[str]) -> float:
    if not answer or not gold:
        return float(not answer and not gold)
    common = (Counter(answer) & Counter(gold)).total()
    return 2 * common / (len(answer) + len(gold))  # equal to 2 P R / (P + R), and 0 where that is 0 / 0


def _is_ideograph(character: str) -> bool:
    """The Unicode blocks of CJK ideographs."""
    code = ord(character)
    return (
        0x4E00 <= code <= 0x9FFF or 0x3400 <= code <= 0x4DBF or 0x20000 <= code <= 0x3FFFF or 0xF900 <= code <= 0xFAFF
    )
