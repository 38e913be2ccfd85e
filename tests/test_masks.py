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


# One half of five tokens in the order 2 3 0 1 4, of which 1 and 2 are masked and 4 is CLS. By hand: 0 and 3 are visible
# and so come at -1; 1 comes at 3, 2 at 0, 4 at 4. Targets are 1 and 2; the others see one further, themselves included.
FIXTURE_KEY_RANK = jnp.array([[-1, 3, 0, -1, 4]])
FIXTURE_QUERY_RANK = jnp.array([[0, 3, 0, 0, 5]])
FIXTURE_BLOCKED = ["01101", "01001", "01101", "01101", "00000"]
"""Of the authors' `_local_perm` on this input: row i has 1 where i does not see j."""


def as_strings(dense: jnp.ndarray) -> list[str]:
    """A mask [1, 1, Q, S] as rows of 0 (seen) and 1 (blocked)."""
    return ["".join("01"[not seen] for seen in row) for row in np.asarray(dense)[0, 0]]


def test_permutation_on_the_fixture() -> None:
    query = masks.permutation(FIXTURE_QUERY_RANK, FIXTURE_KEY_RANK)
    assert as_strings(query.dense(5, 5)) == FIXTURE_BLOCKED
    # The content stream also sees itself. Target 1 and target 2 alone did not: CLS and the visible tokens did.
    content = masks.permutation(FIXTURE_QUERY_RANK, FIXTURE_KEY_RANK, sees_self=True)
    assert as_strings(content.dense(5, 5)) == ["01101", "00001", "01001", "01101", "00000"]
    assert query.may_be_empty
    assert not content.may_be_empty
    assert not masks.causal().may_be_empty


def test_gathered_queries_are_rows_of_the_whole() -> None:
    gathered = masks.permutation(FIXTURE_QUERY_RANK[:, jnp.array([1, 2, 0])], FIXTURE_KEY_RANK)
    assert as_strings(gathered.dense(3, 5)) == [FIXTURE_BLOCKED[i] for i in (1, 2, 0)]


def test_the_first_of_an_order_without_visible_tokens_sees_nothing() -> None:
    mask = masks.permutation(jnp.array([[0, 1]]), jnp.array([[0, 1]]))
    assert as_strings(mask.dense(2, 2)) == ["11", "01"]


def test_a_permutation_hides_padding() -> None:
    # The fixture and two tokens of padding, visible by their rank: hidden from the row, which is hidden from them.
    pad = jnp.zeros((1, 2), jnp.int32)
    mask = masks.permutation(
        jnp.concatenate([FIXTURE_QUERY_RANK, pad], axis=1), jnp.concatenate([FIXTURE_KEY_RANK, pad - 1], axis=1)
    )
    segments = jnp.array([[1] * 5 + [0] * 2])
    assert as_strings(mask.packed(segments).dense(7, 7)) == [row + "11" for row in FIXTURE_BLOCKED] + ["1111100"] * 2
    # Gathered queries have their segments gathered.
    chosen = jnp.array([2, 5])
    queries = masks.permutation(jnp.array([[0, 0]]), mask.key_rank).packed(segments[:, chosen], segments)
    assert as_strings(queries.dense(2, 7)) == ["0110111", "1111100"]


MEMORY = np.array([[0, 0, 1], [1, 1, 1]], bool)


@pytest.mark.parametrize("name", CASES)
def test_memory_comes_first_and_changes_nothing_else(name: str) -> None:
    mask, _ = CASES[name]
    packed = mask.packed(jnp.asarray(SEGMENTS))
    for plain in (mask, packed):
        dense = np.asarray(plain.with_memory(jnp.asarray(MEMORY)).dense(L, 3 + L))
        assert dense.shape == (2, 1, L, 3 + L)
        np.testing.assert_array_equal(dense[..., :3], np.broadcast_to(MEMORY[:, None, None], (2, 1, L, 3)))
        np.testing.assert_array_equal(dense[..., 3:], np.broadcast_to(plain.dense(L, L), (2, 1, L, L)))


def test_memory_under_a_permutation() -> None:
    # The token that would see itself is at its index among the tokens, not among the keys.
    content = masks.permutation(FIXTURE_QUERY_RANK, FIXTURE_KEY_RANK, sees_self=True)
    with_memory = content.with_memory(jnp.array([[False, True]]))
    assert as_strings(with_memory.dense(5, 7)) == ["10" + row for row in as_strings(content.dense(5, 5))]
