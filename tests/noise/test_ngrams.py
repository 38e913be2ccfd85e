"""N-gram masking against ALBERT's sequential procedure: by exact probabilities, and draw by draw."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lmobj import noise
from lmobj.errors import UserError
from lmobj.noise import _ngrams
from lmobj.noise._masking import selection_scores
from tests.noise.sequential import ngram_probabilities, ngram_selection

SETTINGS = {"mask_id": 3, "vocab_size": 100}


def selected_sets(masked: noise.MaskedTokens) -> list[frozenset[int]]:
    return [frozenset(p[: int(w)].tolist()) for p, w in zip(masked.positions, masked.weights.sum(1), strict=True)]


def words_of(starts: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(np.arange(len(starts)), np.flatnonzero(starts[1:]) + 1)]


# Words of 1, 2, 1, 1, 3, 1 tokens.
STARTS = np.array([1, 1, 0, 1, 1, 1, 0, 0, 1], bool)


@pytest.mark.parametrize(("max_ngram", "count"), [(3, 4), (2, 3), (1, 4), ("whole words", 4)])
def test_every_set_of_tokens_has_its_probability(max_ngram: int | str, count: int) -> None:
    """Overshoot, shorter runs, covered words and the row's end included; 100,000 rows."""
    rows, L = 100_000, len(STARTS)
    masker = noise.mask_whole_words if max_ngram == "whole words" else noise.mask_ngrams
    more = {} if max_ngram == "whole words" else {"max_ngram": max_ngram}
    mask = functools.partial(masker, length=L, num_predictions=count, mask_rate=1.0, **SETTINGS, **more)
    draw = jax.jit(jax.vmap(lambda key: mask(key, jnp.arange(10, 10 + L), jnp.ones(L, bool), jnp.asarray(STARTS))))
    masked = jax.device_get(draw(jax.random.split(jax.random.key(0), rows)))
    expected = ngram_probabilities(words_of(STARTS), count, 1 if max_ngram == "whole words" else max_ngram)
    assert sum(expected.values()) == pytest.approx(1)
    codes = masked.positions * masked.weights.astype(int) @ (L ** np.arange(count))
    table = {sum(t * L**i for i, t in enumerate(sorted(chosen))): chance for chosen, chance in expected.items()}
    names, counts = np.unique(codes, return_counts=True)
    assert set(names.tolist()) <= set(table)
    by_code = dict(zip(names.tolist(), counts.tolist(), strict=True))
    observed = np.array([by_code.get(code, 0) for code in table])
    assert rows * min(table.values()) > 5
    assert len(table) > 8
    assert stats.chisquare(observed, rows * np.array(list(table.values()))).pvalue > 1e-3


def test_drawn_sizes_are_six_three_and_two_elevenths() -> None:
    # 1 : 1/2 : 1/3 = 6 : 3 : 2. The first run of a row has these, if the longest fits and it is not near the end.
    sizes = _ngrams._draw_sizes(jax.random.uniform(jax.random.key(1), (200_000,)), 3)
    counts = np.bincount(np.asarray(sizes), minlength=4)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:], 200_000 * np.array([6, 3, 2]) / 11).pvalue > 1e-3


def test_equals_the_procedure_with_the_same_draws() -> None:
    rows, L, slots = 60, 48, 20
    rng = np.random.default_rng(0)
    starts = rng.random((rows, L)) < np.linspace(0.1, 1.0, rows)[:, None]
    lengths = rng.integers(1, L + 1, rows)
    candidates = np.arange(L) < lengths[:, None]
    keys = jax.random.split(jax.random.key(7), rows)
    mask = functools.partial(noise.mask_ngrams, num_predictions=slots, mask_rate=0.3, max_ngram=4, **SETTINGS)
    masked = jax.device_get(
        jax.jit(jax.vmap(lambda k, c, s, n: mask(k, jnp.arange(L), c, s, length=n)))(keys, candidates, starts, lengths)
    )
    short = 0
    for row, got in enumerate(selected_sets(masked)):
        words = words_of(starts[row, : lengths[row]])
        order_key, size_key, _ = jax.random.split(keys[row], 3)
        scores = np.asarray(selection_scores(order_key, jnp.ones(L, bool)))[: len(words)]
        drawn = np.asarray(_ngrams._draw_sizes(jax.random.uniform(size_key, (L,), jnp.float32), 4))
        count = min(slots, max(1, round(int(lengths[row]) * 0.3)))
        assert got == ngram_selection(words, np.argsort(scores).tolist(), drawn.tolist(), count)
        short += len(got) < count
    assert short  # some rows have no run left that fits


def test_runs_of_no_word_are_refused() -> None:
    with pytest.raises(UserError, match="max_ngram is 0"):
        noise.mask_ngrams(
            jax.random.key(0), jnp.arange(4), jnp.ones(4, bool), jnp.ones(4, bool), length=4, num_predictions=1,
            max_ngram=0, **SETTINGS,
        )  # fmt: skip
