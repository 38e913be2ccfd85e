"""Whole-word masking against a plain transcription of the greedy rule, with the same random order."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lmobj import noise
from lmobj.noise._masking import selection_scores
from lmobj.noise._whole_words import _take_in_order

SETTINGS = {"mask_id": 3, "vocab_size": 100}


def greedy(candidates: np.ndarray, starts: np.ndarray, scores: np.ndarray, count: int) -> list[int]:
    """BERT's rule, word by word: take words in order of score, skipping each that would overshoot the count."""
    words: list[list[int]] = []
    for i in np.flatnonzero(candidates):
        if words and not starts[i]:
            words[-1].append(int(i))
        else:
            words.append([int(i)])
    selected: list[int] = []
    for _, word in sorted(zip(scores.tolist(), words, strict=False)):
        if len(selected) + len(word) <= count:
            selected += word
    return sorted(selected)


def random_rows(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows with special tokens strewn in, and words of one to many pieces, more of them in later rows."""
    rng = np.random.default_rng(0)
    candidates = rng.random((rows, length)) < 0.9
    starts = rng.random((rows, length)) < np.linspace(0.02, 1.0, rows)[:, None]
    return candidates, starts


@pytest.mark.parametrize("mask_rate", [0.15, 0.5])
def test_equals_the_greedy_rule_with_the_same_order(mask_rate: float) -> None:
    rows, length, slots = 60, 48, 20
    candidates, starts = random_rows(rows, length)
    tokens = np.random.default_rng(1).integers(10, 100, (rows, length))
    lengths = np.random.default_rng(2).integers(1, length + 1, rows)
    keys = jax.random.split(jax.random.key(7), rows)
    masker = functools.partial(noise.mask_whole_words, num_predictions=slots, mask_rate=mask_rate, **SETTINGS)
    masked = jax.jit(jax.vmap(lambda key, t, c, s, n: masker(key, t, c, s, length=n)))(
        keys, tokens, candidates, starts, lengths
    )
    skipped = 0
    for row in range(rows):
        count = min(slots, max(1, round(int(lengths[row]) * mask_rate)))
        scores = selection_scores(jax.random.split(keys[row])[0], jnp.ones(length, bool))
        expected = greedy(candidates[row], starts[row], np.asarray(scores), count)
        used = int(masked.weights[row].sum())
        assert list(masked.positions[row][:used]) == expected
        skipped += used < min(count, candidates[row].sum())
    assert skipped > 3  # the rows do exercise skipping


def test_budget_rule_by_hand() -> None:
    # Budget 7: 3 fits (left 4), 5 does not, 2 fits (left 2), 0 is no word, 3 does not, 1 fits (left 1), 2 does not,
    # 1 fits (left 0), 1 does not.
    sizes = jnp.array([3, 5, 2, 0, 3, 1, 2, 1, 1])
    taken = _take_in_order(sizes, jnp.int32(7))
    np.testing.assert_array_equal(taken, [1, 0, 1, 0, 0, 1, 0, 1, 0])
    np.testing.assert_array_equal(_take_in_order(sizes, jnp.int32(0)), np.zeros(9))
    np.testing.assert_array_equal(_take_in_order(jnp.array([9, 8]), jnp.int32(7)), [0, 0])


def test_budget_rule_equals_the_loop() -> None:
    rng = np.random.default_rng(3)
    sizes = rng.geometric(0.3, (300, 40)) * (rng.random((300, 40)) < 0.8)
    budgets = rng.integers(0, 60, 300)
    taken = np.asarray(jax.jit(jax.vmap(_take_in_order))(sizes, budgets))
    for row, budget, got in zip(sizes, budgets, taken, strict=True):
        rest = int(budget)
        for size, is_taken in zip(row, got, strict=True):
            assert is_taken == (0 < size <= rest)
            rest -= int(size) * int(is_taken)


def test_words_are_whole_and_join_the_candidate_before_across_specials() -> None:
    # Positions 1-2 continue no word, so they are one; 3-4 a word; 7 continues it across the separators 5 and 6.
    candidates = jnp.array([0, 1, 1, 1, 1, 0, 0, 1, 1, 0], bool)
    starts = jnp.array([1, 0, 0, 1, 0, 1, 1, 0, 1, 0], bool)
    masker = functools.partial(noise.mask_whole_words, length=3, num_predictions=3, mask_rate=1.0, **SETTINGS)
    draw = jax.jit(jax.vmap(lambda key: masker(key, jnp.arange(10, 20), candidates, starts)))
    masked = draw(jax.random.split(jax.random.key(0), 200))
    seen = {tuple(p[: int(w.sum())].tolist()) for p, w in zip(masked.positions, masked.weights, strict=True)}
    # Count 3. If (3, 4, 7) comes first it is all; otherwise it is skipped and both others fit.
    assert seen == {(3, 4, 7), (1, 2, 8)}


def test_each_word_is_equally_likely_whatever_its_place() -> None:
    # Six words of two tokens, count 2: one word per row.
    tokens = jnp.arange(10, 22)
    starts = jnp.arange(12) % 2 == 0
    masker = functools.partial(noise.mask_whole_words, length=2, num_predictions=2, mask_rate=1.0, **SETTINGS)
    draw = jax.jit(jax.vmap(lambda key: masker(key, tokens, tokens > 0, starts).positions))
    positions = np.asarray(draw(jax.random.split(jax.random.key(1), 100_000)))
    np.testing.assert_array_equal(positions[:, 1], positions[:, 0] + 1)
    assert stats.chisquare(np.bincount(positions[:, 0] // 2, minlength=6)).pvalue > 1e-3


def test_single_token_words_select_what_mask_tokens_selects() -> None:
    # With one token per word both rules are the same, so even the draws agree.
    tokens = jnp.arange(10, 50)
    settings = {"length": 40, "num_predictions": 10, **SETTINGS}
    every = jnp.ones(40, bool)
    keys = jax.random.split(jax.random.key(0), 5)
    words = jax.jit(jax.vmap(lambda key: noise.mask_whole_words(key, tokens, every, every, **settings)))(keys)
    plain = jax.jit(jax.vmap(lambda key: noise.mask_tokens(key, tokens, every, **settings)))(keys)
    for got, want in zip(words, plain, strict=True):
        np.testing.assert_array_equal(got, want)
