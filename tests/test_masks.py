"""Masks: every constructor against the rule written as a loop over queries and keys."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from lmobj import masks
from lmobj.masks import AttentionMask

L = 10
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
PREFIX = np.array([[1, 1, 0, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]], bool)

Rule = Callable[[int, int, int], bool]
"""(row, query, key) -> visible."""

CASES: dict[str, tuple[AttentionMask, Rule]] = {
    "causal": (masks.causal(), lambda b, i, j: j <= i),
    "bidirectional": (masks.bidirectional(), lambda b, i, j: True),
    "prefix": (masks.prefix(jnp.asarray(PREFIX)), lambda b, i, j: j <= i or bool(PREFIX[b, j])),
    "window 1": (masks.sliding_window(1), lambda b, i, j: i == j),
    "window 3": (masks.sliding_window(3), lambda b, i, j: j in (i - 2, i - 1, i)),
}


def brute(rule: Rule, queries: int, keys: int) -> np.ndarray:
    """The rule, written out: [2, 1, queries, keys]."""
    return np.array([[[[rule(b, i, j) for j in range(keys)] for i in range(queries)]] for b in range(2)])


@pytest.mark.parametrize("name", CASES)
def test_constructor_equals_the_rule(name: str) -> None:
    mask, rule = CASES[name]
    np.testing.assert_array_equal(np.broadcast_to(mask.dense(L, L), (2, 1, L, L)), brute(rule, L, L))


@pytest.mark.parametrize("name", CASES)
def test_packed_keeps_to_the_segment(name: str) -> None:
    mask, rule = CASES[name]
    dense = mask.packed(jnp.asarray(SEGMENTS)).dense(L, L)
    np.testing.assert_array_equal(
        dense, brute(lambda b, i, j: rule(b, i, j) and bool(SEGMENTS[b, i] == SEGMENTS[b, j]), L, L)
    )
    assert np.asarray(dense).any(axis=-1).all(), "a query, padding included, sees nothing"


@pytest.mark.parametrize("name", ["causal", "window 3", "prefix"])
@pytest.mark.parametrize("offset", [4, (4, 6)])
def test_at_an_offset_the_mask_is_rows_of_the_whole(name: str, offset: int | tuple[int, int]) -> None:
    mask, rule = CASES[name]
    first = np.broadcast_to(offset, (2,))
    dense = np.broadcast_to(mask.at(jnp.asarray(offset)).dense(3, L), (2, 1, 3, L))
    np.testing.assert_array_equal(dense, brute(lambda b, i, j: rule(b, int(first[b]) + i, j), 3, L))


def test_cached_queries_of_a_packed_row() -> None:
    # Queries 3 and 4 of each row against the keys of the whole row.
    mask = masks.causal().packed(jnp.asarray(SEGMENTS[:, 3:5]), jnp.asarray(SEGMENTS)).at(3)
    expected = brute(lambda b, i, j: j <= i + 3 and bool(SEGMENTS[b, i + 3] == SEGMENTS[b, j]), 2, L)
    np.testing.assert_array_equal(mask.dense(2, L), expected)


def test_window_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="window is 0"):
        masks.sliding_window(0)
