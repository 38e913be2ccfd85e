"""The cloze test: which words are hidden, and what counts as a hit, on rows and logits made by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmobj import masks
from lmobj.evaluate import Cloze, cloze_hits
from lmobj.models import OutputHead

MASK = 1
IS_WORD = np.array([False] * 6 + [True] * 6)
"""Ids 0 to 5 are special tokens, marks and pieces of words; 6 to 11 may be words."""


def make_rows() -> dict[str, np.ndarray]:
    """Three rows of 8.

    0: 7 and 8 are one word in two pieces and 4 is a mark, so the words of one token are 6 at 1 and 9 at 5.
    1: two documents, cut at both ends. The first token may be the rest of a word; 8 at 2 is the last of its document
       and 7 at 7 the last of the row, so that nobody knows where they end. That leaves 1, 3, 4, 5 and 6.
    2: padding after one mark.
    """
    starts = np.ones((3, 8), bool)
    starts[0, 3] = False
    return {
        "tokens": np.array([[2, 6, 7, 8, 4, 9, 3, 0], [6, 7, 8, 9, 10, 11, 6, 7], [4, 0, 0, 0, 0, 0, 0, 0]], np.int32),
        "segment_ids": np.array([[1] * 7 + [0], [1] * 3 + [2] * 5, [1] + [0] * 7], np.int32),
        "positions": np.array([[*range(7), 0], [0, 1, 2, *range(5)], [0] * 8], np.int32),
        "word_starts": starts,
    }


def test_words_of_one_token_are_hidden() -> None:
    rows = make_rows()
    cloze = Cloze.make(rows, IS_WORD, mask_id=MASK, per_row=6)
    assert cloze.where.tolist() == [[1, 5, -1, -1, -1, -1], [1, 3, 4, 5, 6, -1]]
    assert cloze.answers.tolist() == [[6, 9, -1, -1, -1, -1], [7, 9, 10, 11, 6, -1]]
    assert cloze.tokens.tolist() == [[2, 1, 7, 8, 4, 1, 3, 0], [6, 1, 8, 1, 1, 1, 1, 7]]
    for name in ("segment_ids", "positions"):
        np.testing.assert_array_equal(getattr(cloze, name), rows[name][:2])
    assert cloze.count == 7
    np.testing.assert_array_equal(rows["tokens"], make_rows()["tokens"])  # the rows given are left as they are


def test_no_more_words_than_wanted_and_no_more_in_a_row() -> None:
    # Both rows have two words to give, the first and the last of theirs; the fourth is one too many.
    cloze = Cloze.make(make_rows(), IS_WORD, mask_id=MASK, count=3, per_row=2)
    assert cloze.where.tolist() == [[1, 5], [1, -1]]
    assert cloze.tokens[1].tolist() == [6, 1, 8, 9, 10, 11, 6, 7]
    # Rows that are not full: of the seven words the last is one too many.
    cloze = Cloze.make(make_rows(), IS_WORD, mask_id=MASK, count=6, per_row=6)
    assert cloze.where.tolist() == [[1, 5, -1, -1, -1, -1], [1, 3, 4, 5, -1, -1]]
    # The fullest row alone has four words.
    assert Cloze.make(make_rows(), IS_WORD, mask_id=MASK, count=4, per_row=4).where.tolist() == [[1, 3, 5, 6]]


def test_rows_are_taken_evenly() -> None:
    rows = {name: np.repeat(value[1:2], 100, axis=0) for name, value in make_rows().items()}
    rows["positions"] = np.arange(100)[:, None] + np.zeros((1, 8), np.int32)  # to tell the rows apart
    cloze = Cloze.make(rows, IS_WORD, mask_id=MASK, count=20, per_row=5)
    assert cloze.count == 20
    assert cloze.positions[:, 0].tolist() == [0, 33, 66, 99]


def test_without_words_there_is_no_cloze() -> None:
    cloze = Cloze.make(make_rows(), np.zeros(12, bool), mask_id=MASK)
    assert cloze.count == 0
    assert cloze.tokens.shape == (0, 8)


def test_the_baseline_always_guesses_the_same() -> None:
    cloze = Cloze.make(make_rows(), IS_WORD, mask_id=MASK)
    assert cloze.baseline(np.array([6, 9])) == 4 / 7  # of 6, 9, 7, 9, 10, 11, 6
    assert cloze.baseline(np.array([5])) == 0.0


class Fixed(nnx.Module):
    """The logits of position p are row p of a table, if the mask is the one that a masked language model needs."""

    def __init__(self, logits: Any) -> None:
        self.logits = nnx.Param(jnp.asarray(logits, jnp.float32))

    def hidden(self, tokens: jax.Array, *, mask: masks.AttentionMask, positions: jax.Array, **_: Any) -> jax.Array:
        assert not mask.causal
        assert mask.segment_ids is not None
        return self.logits[...][positions]

    def head_hidden(self, hidden: jax.Array) -> jax.Array:
        return hidden

    def head_table(self) -> OutputHead:
        return OutputHead(jnp.eye(self.logits.shape[1]))


@pytest.mark.parametrize(
    ("logits", "hit"),
    [
        ([0, 1, 9, 2], True),  # the answer, 2, is the first
        ([9, 1, 5, 2], True),  # the second
        ([9, 8, 5, 2], False),  # the third
        ([9, 5, 5, 2], False),  # second or third, as ties are broken
        ([5, 5, 5, 5], False),  # a model that knows nothing
        ([np.nan] * 4, False),  # a model that diverged
    ],
)
def test_a_hit_is_an_answer_among_the_k_best(logits: list[float], hit: bool) -> None:
    other = [3, 2, 1, 0]
    arrays = {
        "tokens": [[0, MASK, 3]],
        "segment_ids": [[1, 1, 1]],
        "positions": [[0, 1, 2]],
        "where": [[1, 2, -1]],
        "answers": [[2, 0, -1]],
    }
    hits = cloze_hits(Fixed([other, logits, other]), *(jnp.asarray(value) for value in arrays.values()), k=2)
    assert hits.tolist() == [[hit, True, False]]
