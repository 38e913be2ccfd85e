"""Token dropout: rates by chi-square, what is never dropped, rows untouched by padding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lmobj import noise
from lmobj.errors import UserError
from lmobj.noise import _token_dropout
from tests.mutants import Mutant, assert_killed

CLS, SEP, MASK, PAD = 1, 2, 3, 0


def dropped(tokens: list[int], rate: float, rows: int = 4000) -> np.ndarray:
    """Rows of these tokens, each dropped by a key of its own."""
    row = jnp.asarray(tokens, jnp.int32)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(jnp.arange(rows))
    drop = functools.partial(noise.drop_tokens, rate=rate, replacement_id=MASK)
    return np.asarray(jax.jit(jax.vmap(lambda key: drop(key, row, row > MASK)))(keys))


def test_tokens_are_dropped_at_the_rate() -> None:
    rows = dropped([CLS, 7, 8, 9, SEP, PAD], 0.5)
    # Of 2^3 sets of the three tokens all but the whole one are dropped, which loses one of its own: each pair then has
    # 1/8 + 1/3 of 1/8, and every other set 1/8.
    sets = (rows[:, 1:4] == MASK) @ np.array([1, 2, 4])
    counts = np.bincount(sets, minlength=8)
    assert counts[7] == 0, "one always stays"
    expected = np.array([3, 3, 3, 4, 3, 4, 4]) / 24
    assert stats.chisquare(counts[:7], expected * counts.sum()).pvalue > 1e-3


def test_what_is_not_dropped_is_as_it_was() -> None:
    rows = dropped([CLS, 7, 8, 9, SEP, PAD], 0.5, rows=50)
    np.testing.assert_array_equal(rows[:, [0, 4, 5]], [[CLS, SEP, PAD]] * 50)
    assert np.isin(rows[:, 1:4], [7, 8, 9, MASK]).all()
    np.testing.assert_array_equal(np.where(rows == MASK, [CLS, 7, 8, 9, SEP, PAD], rows)[:, 1:4], [[7, 8, 9]] * 50)
    np.testing.assert_array_equal(dropped([CLS, 7, SEP], 0.999, rows=50), [[CLS, 7, SEP]] * 50)
    np.testing.assert_array_equal(dropped([CLS, 7, 8, SEP], 0.0, rows=50), [[CLS, 7, 8, SEP]] * 50)


def test_padding_changes_nothing() -> None:
    short, long = (dropped([CLS, *range(7, 27), SEP] + [PAD] * more, 0.3, rows=20) for more in (0, 10))
    np.testing.assert_array_equal(long[:, :22], short)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_rates_that_are_none(rate: float) -> None:
    with pytest.raises(UserError, match=r"rate is .*in \[0, 1\)"):
        dropped([CLS, 7, SEP], rate, rows=1)


def _everywhere(drop: Callable[..., Any]) -> Callable[..., Any]:
    return lambda key, tokens, candidates, **settings: drop(key, tokens, jnp.ones_like(candidates), **settings)


MUTANTS = [
    Mutant("special tokens too", noise, "drop_tokens", _everywhere),
    Mutant("nothing has to stay", _token_dropout.jnp, "max", lambda _: lambda x: jnp.uint32(2**32 - 1)),
    Mutant("the least of all", _token_dropout.jnp, "max", lambda _: jnp.min),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    checks = (test_what_is_not_dropped_is_as_it_was, test_tokens_are_dropped_at_the_rate)
    assert_killed(monkeypatch, mutant, checks)
