"""A cloze test for masked language models: whole words of held-out rows are hidden, and the model guesses them.

Every word is one token, so that a guess is right or wrong as a whole; unlike the training loss the figure compares
models with different mask rates, and with a unigram that always guesses the most frequent words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool
from numpy.typing import NDArray

from lmobj import masks
from lmobj.evaluate._decoding import output_logits
from lmobj.models import LanguageModel

__all__ = ["Cloze", "cloze_hits"]


@dataclass(frozen=True)
class Cloze:
    """Rows with words hidden. All arrays are [R, L] but `where` and `answers`, [R, K]; unused slots are -1."""

    tokens: NDArray[np.int32]
    segment_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    where: NDArray[np.int32]
    answers: NDArray[np.int32]

    @property
    def count(self) -> int:
        """Hidden words."""
        return int(np.sum(self.where >= 0))

    @classmethod
    def make(
        cls,
        rows: Mapping[str, NDArray],
        is_word: Bool[NDArray, " V"],
        *,
        mask_id: int,
        count: int = 500,
        per_row: int = 8,
    ) -> Cloze:
        """Hides about `count` words, at most `per_row` in a row, spread evenly over the rows and within each.

        Args:
          rows: `tokens`, `segment_ids`, `positions` and `word_starts`, each [R, L].
          is_word: [V], True for tokens that may be a word by themselves.
          mask_id: the id of [MASK].
          count: words wanted; fewer where the rows have fewer.
          per_row: most words hidden in one row.
        """
        tokens, segments, starts = rows["tokens"], rows["segment_ids"], rows["word_starts"]
        # A word is one token where it begins a word and the next token, of the same segment, begins another.
        # A row's first token may be the rest of a word that the row's start cuts.
        alone = np.zeros(tokens.shape, bool)
        here, after = np.s_[:, 1:-1], np.s_[:, 2:]
        alone[here] = starts[here] & starts[after] & (segments[here] == segments[after]) & (segments[here] > 0)
        candidates = alone & is_word[tokens]
        chosen = _rows_with(np.minimum(candidates.sum(1), per_row), count)
        where = np.full((len(chosen), per_row), -1, np.int32)
        for slot, row in enumerate(chosen):
            found = np.flatnonzero(candidates[row])
            found = found[_spread(len(found), per_row)]
            where[slot, : len(found)] = found
        where.reshape(-1)[np.flatnonzero(where >= 0)[count:]] = -1
        answers = np.where(where >= 0, np.take_along_axis(tokens[chosen], np.maximum(where, 0), 1), -1)
        hidden = tokens[chosen].copy()
        rows_of, slots = np.nonzero(where >= 0)
        hidden[rows_of, where[rows_of, slots]] = mask_id
        return cls(hidden, segments[chosen], rows["positions"][chosen], where, answers.astype(np.int32))

    def baseline(self, guesses: NDArray[np.integer]) -> float:
        """The share of words among `guesses`, for a model that guesses the same for every word."""
        answers = self.answers[self.where >= 0]
        return float(np.mean(np.isin(answers, guesses)))


def cloze_hits(
    model: LanguageModel, tokens: Array, segment_ids: Array, positions: Array, where: Array, answers: Array, *, k: int
) -> Array:
    """[R, K] bool: the answer is among the k most probable tokens. Slots with `where` of -1 are False.

    Ties count against the model: one whose logits are all equal, or not numbers, guesses nothing.
    """
    hidden = model.hidden(tokens, mask=masks.bidirectional().packed(segment_ids), positions=positions)
    at = jnp.take_along_axis(hidden, jnp.maximum(where, 0)[..., None], axis=1)
    logits = output_logits(model, at)
    answer = jnp.take_along_axis(logits, jnp.maximum(answers, 0)[..., None], axis=-1)
    return (jnp.sum(~(logits < answer), axis=-1) <= k) & (where >= 0)  # the answer itself is one of them


def _rows_with(available: NDArray[np.integer], count: int) -> NDArray[np.intp]:
    """Rows, evenly spread, that hold `count` words together: the fullest ones, so that they are few."""
    for fewest in range(int(available.max(initial=0)), 0, -1):
        rows = np.flatnonzero(available >= fewest)
        if fewest == 1 or available[rows].sum() >= count:
            return rows[_spread(len(rows), -(-count // fewest))]
    return np.zeros(0, np.intp)


def _spread(available: int, wanted: int) -> NDArray[np.intp]:
    """At most `wanted` indices below `available`, evenly spaced."""
    return (
        np.unique(np.linspace(0, available - 1, min(available, wanted)).round().astype(np.intp))
        if available
        else np.zeros(0, np.intp)
    )
