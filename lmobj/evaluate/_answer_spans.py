"""Extractive question answering: from the logits of windows to the text of an answer.

Source: Devlin et al. 2019, "BERT", sections 4.2 (score S T_i + E T_j of a span) and 4.3 (no answer, threshold tau).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmobj.errors import UserError
from lmobj.tasks import QAWindows

__all__ = ["AnswerSpan", "FoundAnswers", "find_answers"]


class AnswerSpan(NamedTuple):
    """A stretch of the context that may be the answer."""

    text: str
    start: int
    """First character of the text in the context."""
    end: int
    """The character after its last."""
    score: float
    """Start logit + end logit."""
    probability: float
    """Softmax of the score over the list."""


class FoundAnswers(NamedTuple):
    """What the logits say of one question, best first."""

    spans: tuple[AnswerSpan, ...]
    """With different texts; none if no span is valid."""
    null_score: float
    """Score of no answer: the smallest start[0] + end[0] of all windows."""
    null_probability: float
    """Share of no answer in the softmax; 0 where it does not take part."""

    @property
    def null_odds(self) -> float:
        """null_score - the best span's score: what a threshold is compared with. Infinite if there is no span."""
        return self.null_score - self.spans[0].score if self.spans else float("inf")

    def answer(self, threshold: float | None = None) -> str:
        """The best text, or "" if null_odds > threshold. None: always a text if there is one (SQuAD 1.1)."""
        if not self.spans or (threshold is not None and self.null_odds > threshold):
            return ""
        return self.spans[0].text


def find_answers(
    start_logits: ArrayLike,
    end_logits: ArrayLike,
    windows: QAWindows,
    offsets: ArrayLike,
    context: str,
    *,
    n_best: int = 20,
    max_answer_tokens: int = 30,
    no_answer: bool = False,
) -> FoundAnswers:
    """The best spans of all windows of a question.

        score(w, i, j) = start[w, i] + end[w, j],   i <= j < i + max_answer_tokens

    over positions i, j of context tokens, where window w has the maximum context of i. Texts are cut out of the
    context by the characters of their tokens, without white space at the ends; of equal texts the best stays.

    Args:
      start_logits, end_logits: [W, L]; -inf rules a position out.
      windows: what the model read.
      offsets: [N, 2] characters of the context's tokens, as for `window_labels`.
      context: the text.
      n_best: most spans in the list.
      max_answer_tokens: longest answer.
      no_answer: whether no answer takes part in the softmax, as in SQuAD 2.0.

    Raises:
      UserError: logits of another shape, or not a number.

    Deviation: BERT's code looks among the pairs of the `n_best` largest start and end logits of a window; this looks
    at all spans, so its list is never worse.
    """
    start, end = np.asarray(start_logits, np.float64), np.asarray(end_logits, np.float64)
    if start.shape != windows.tokens.shape or end.shape != windows.tokens.shape:
        raise UserError(f"logits have the shapes {start.shape} and {end.shape}; accepted: {windows.tokens.shape}.")
    if np.isnan(start).any() or np.isnan(end).any() or max(start.max(), end.max()) == np.inf:
        raise UserError("logits are NaN or inf; accepted: numbers, and -inf for what is ruled out.")
    if n_best < 1 or max_answer_tokens < 1:
        raise UserError(f"n_best is {n_best} and max_answer_tokens {max_answer_tokens}; both must be at least 1.")
    spans = np.asarray(offsets, np.int64)
    scores = _span_scores(start, end, windows, max_answer_tokens)
    found = _best_texts(scores, windows, spans, context, n_best)
    null_score = float((start[:, 0] + end[:, 0]).min())
    listed = np.array([span.score for span in found] + [null_score] * no_answer)
    probabilities = _softmax(listed)
    named = tuple(span._replace(probability=float(p)) for span, p in zip(found, probabilities, strict=False))
    return FoundAnswers(named, null_score, float(probabilities[-1]) if no_answer else 0.0)


def _span_scores(
    start: NDArray[np.float64], end: NDArray[np.float64], windows: QAWindows, max_answer_tokens: int
) -> NDArray[np.float64]:
    """[W, L, A]: the score of each span by window, first position and length - 1; -inf where it is not valid."""
    first = np.where(windows.max_context, start, -np.inf)
    last = np.where(windows.context_index >= 0, end, -np.inf)
    padded = np.pad(last, ((0, 0), (0, max_answer_tokens - 1)), constant_values=-np.inf)
    return first[:, :, None] + np.lib.stride_tricks.sliding_window_view(padded, max_answer_tokens, axis=1)


def _best_texts(
    scores: NDArray[np.float64], windows: QAWindows, offsets: NDArray[np.int64], context: str, n_best: int
) -> list[AnswerSpan]:
    """The n best spans with different texts; their probabilities are still to come."""
    flat = scores.reshape(-1)
    valid = int(np.isfinite(flat).sum())
    taken = min(valid, 4 * n_best)
    while taken:
        best: dict[str, AnswerSpan] = {}
        least = np.partition(flat, len(flat) - taken)[len(flat) - taken]
        candidates = np.flatnonzero(flat >= least)
        for place in candidates[np.argsort(-flat[candidates], kind="stable")]:
            window, first, more = np.unravel_index(place, scores.shape)
            tokens = windows.context_index[window, [first, first + more]]
            span = _cut(context, int(offsets[tokens[0], 0]), int(offsets[tokens[1], 1]), float(flat[place]))
            if span.text:
                best.setdefault(span.text, span)
            if len(best) == n_best:
                return list(best.values())
        if taken == valid:
            return list(best.values())
        taken = min(valid, 4 * taken)
    return []


def _cut(context: str, start: int, end: int, score: float) -> AnswerSpan:
    """The text of a span without white space at its ends."""
    text = context[start:end]
    start += len(text) - len(text.lstrip())
    text = text.strip()
    return AnswerSpan(text, start, start + len(text), score, 0.0)


def _softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp(x_i) / sum_j exp(x_j); empty for an empty list."""
    if not len(scores) or scores.max() == -np.inf:
        return np.zeros_like(scores)
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()
