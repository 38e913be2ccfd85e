"""Logit filters: by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmobj.evaluate import min_p_filter, repetition_penalty, top_k_filter, top_p_filter

NONE = -np.inf
PROBABILITIES = [0.1, 0.4, 0.05, 0.3, 0.15]  # descending: tokens 1, 3, 4, 0, 2, summing to 0.4, 0.7, 0.85, 0.95, 1
LOGITS = jnp.log(jnp.array(PROBABILITIES)) + 7.0  # a shift of all logits changes no probability


def kept(filtered: jax.Array) -> list[int]:
    """Tokens with finite logits, which must be those of the input."""
    finite = np.isfinite(filtered)
    np.testing.assert_array_equal(filtered[finite], LOGITS[finite])
    np.testing.assert_array_equal(filtered[~finite], NONE)
    return np.flatnonzero(finite).tolist()


@pytest.mark.parametrize(
    ("k", "tokens"), [(1, [1]), (2, [1, 3]), (4, [0, 1, 3, 4]), (5, list(range(5))), (9, list(range(5)))]
)
def test_top_k(k: int, tokens: list[int]) -> None:
    assert kept(top_k_filter(LOGITS, k)) == tokens


@pytest.mark.parametrize(
    ("p", "tokens"),
    # 0.5 is not reached by 0.4, so the next token is needed; 0.69 is reached by 0.7, 0.71 is not.
    [
        (1e-6, [1]),
        (0.39, [1]),
        (0.5, [1, 3]),
        (0.69, [1, 3]),
        (0.71, [1, 3, 4]),
        (0.96, list(range(5))),
        (1.0, list(range(5))),
    ],
)
def test_top_p(p: float, tokens: list[int]) -> None:
    assert kept(top_p_filter(LOGITS, p)) == tokens


@pytest.mark.parametrize(
    ("p", "tokens"),
    # Thresholds are p * 0.4: 0.396, 0.28, 0.14, 0.06, 0.04.
    [(0.99, [1]), (0.7, [1, 3]), (0.35, [1, 3, 4]), (0.15, [0, 1, 3, 4]), (0.1, list(range(5)))],
)
def test_min_p(p: float, tokens: list[int]) -> None:
    assert kept(min_p_filter(LOGITS, p)) == tokens


def test_equal_logits_stay_or_go_together() -> None:
    logits = jnp.log(jnp.array([0.25, 0.25, 0.125, 0.125, 0.25]))
    np.testing.assert_array_equal(np.isfinite(top_k_filter(logits, 2)), [1, 1, 0, 0, 1])
    np.testing.assert_array_equal(np.isfinite(top_p_filter(logits, 0.3)), [1, 1, 0, 0, 1])
    np.testing.assert_array_equal(np.isfinite(top_p_filter(logits, 0.8)), [1, 1, 1, 1, 1])


def test_filters_stack_and_work_on_each_row() -> None:
    rows = jnp.stack([LOGITS, LOGITS[::-1]])
    once = top_k_filter(rows, 3)  # 0.4, 0.3, 0.15 stay: renormalised 8/17, 6/17, 3/17
    np.testing.assert_array_equal(np.isfinite(top_p_filter(once, 0.8)), [[0, 1, 0, 1, 0], [0, 1, 0, 1, 0]])
    np.testing.assert_array_equal(np.isfinite(top_p_filter(once, 0.85)), [[0, 1, 0, 1, 1], [1, 1, 0, 1, 0]])
    np.testing.assert_array_equal(np.isfinite(min_p_filter(once, 0.01)), np.isfinite(once))


def test_repetition_penalty() -> None:
    logits = jnp.array([2.0, -2.0, 3.0, -1.0, 0.0, NONE])
    seen = jnp.array([True, True, False, False, True, True])
    np.testing.assert_array_equal(repetition_penalty(logits, seen, 2.0), [1.0, -4.0, 3.0, -1.0, 0.0, NONE])
    np.testing.assert_array_equal(repetition_penalty(logits, seen, 0.5), [4.0, -1.0, 3.0, -1.0, 0.0, NONE])
