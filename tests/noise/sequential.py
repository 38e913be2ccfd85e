"""The papers' sequential procedures of selecting tokens: by exact probabilities, and step by step with given draws."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence

__all__ = ["ngram_probabilities", "ngram_selection", "span", "span_probabilities"]

Selected = frozenset[int]


def ngram_run(words: Sequence[Sequence[int]], word: int, n: int, chosen: Selected, budget: int) -> Selected:
    """What ALBERT adds at `word` when it draws n: nothing, or the tokens of the longest run of n words or fewer that
    fits, unless one is chosen already."""
    for size in range(n, 0, -1):
        run = {token for w in words[word : word + size] for token in w}
        if len(chosen) + len(run) <= budget:
            return chosen if chosen & run else chosen | run
    return chosen


def ngram_selection(
    words: Sequence[Sequence[int]], order: Sequence[int], drawn: Sequence[int], budget: int
) -> Selected:
    """ALBERT's procedure with the words in this order and these n by word."""
    return functools.reduce(lambda chosen, w: ngram_run(words, w, drawn[w], chosen, budget), order, frozenset())


def ngram_probabilities(words: Sequence[Sequence[int]], budget: int, max_ngram: int) -> dict[Selected, float]:
    """The probability of each set of tokens under ALBERT's procedure. `max_ngram` 1 is whole-word masking."""
    share = [1 / n / sum(1 / m for m in range(1, max_ngram + 1)) for n in range(1, max_ngram + 1)]
    states = {(frozenset(range(len(words))), frozenset()): 1.0}
    for _ in words:
        following: Counter[tuple[frozenset[int], Selected]] = Counter()
        for (left, chosen), chance in states.items():
            for word in left:
                for n in range(1, max_ngram + 1):
                    after = ngram_run(words, word, n, chosen, budget)
                    following[left - {word}, after] += chance / len(left) * share[n - 1]
        states = dict(following)
    return {chosen: chance for (_, chosen), chance in states.items()}


def span(starts: Sequence[bool], anchor: int, words: int, chosen: Selected, budget: int) -> Selected:
    """What SpanBERT has chosen after a span of that many words at this anchor, token by token."""
    token = anchor
    while token > 0 and not starts[token]:
        token -= 1
    while words and token < len(starts) and len(chosen) < budget:
        chosen |= {token}
        token += 1
        words -= token == len(starts) or starts[token]
    return chosen


def span_probabilities(starts: Sequence[bool], budget: int, p: float, max_span: int) -> dict[Selected, float]:
    """The probability of each set of tokens under SpanBERT's procedure, in a text of one stretch."""
    share = [p * (1 - p) ** (n - 1) for n in range(1, max_span + 1)]
    share = [x / sum(share) for x in share]

    @functools.cache
    def after(chosen: Selected) -> dict[Selected, float]:
        if len(chosen) >= budget:
            return {chosen: 1.0}
        total: Counter[Selected] = Counter()
        free = [token for token in range(len(starts)) if token not in chosen]
        for anchor in free:
            for n in range(1, max_span + 1):
                for end, chance in after(span(starts, anchor, n, chosen, budget)).items():
                    total[end] += chance * share[n - 1] / len(free)
        return dict(total)

    return after(frozenset())
