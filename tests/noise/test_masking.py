"""Masking: counts by hand, distributions by chi-square, rows untouched by padding."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lmobj import noise
from lmobj.errors import UserError
from lmobj.noise import MaskedTokens

CLS, SEP, MASK, PAD, VOCAB = 1, 2, 3, 0, 16


def keys_of(rows: int, seed: int = 0) -> jax.Array:
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(rows))


def bert_row(length: int, row_length: int) -> tuple[jax.Array, jax.Array]:
    """[CLS] 5 6 7 ... [SEP] of `length` tokens, padded to `row_length`; and its candidates."""
    body = [5 + i % 10 for i in range(length - 2)]
    tokens = jnp.array([CLS, *body, SEP] + [PAD] * (row_length - length), jnp.int32)
    return tokens, tokens > MASK


def assert_fits(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Pearson's chi-square test at 0.1%; the seeds are fixed, so the outcome is too."""
    expected = counts.sum() * np.asarray(probabilities)
    assert expected.min() > 5
    assert stats.chisquare(counts, expected).pvalue > 1e-3


MASKERS = {
    "exact": noise.mask_tokens,
    "roberta": noise.mask_tokens_roberta,
    "whole_words": lambda key, tokens, candidates, **settings: noise.mask_whole_words(
        key, tokens, candidates, jnp.ones_like(candidates), **settings
    ),
    "bernoulli": lambda key, tokens, candidates, length, **settings: noise.mask_tokens_bernoulli(
        key, tokens, candidates, **settings
    ),
    "ngrams": lambda key, tokens, candidates, **settings: noise.mask_ngrams(
        key, tokens, candidates, jnp.ones_like(candidates), **settings
    ),
    "spans": lambda key, tokens, candidates, length, **settings: MaskedTokens(
        *noise.mask_spans(key, tokens, candidates, jnp.ones_like(candidates), jnp.ones_like(tokens), **settings)[:4]
    ),
}
every_masker = pytest.mark.parametrize("name", list(MASKERS))


def run(name: str, rows: int, tokens: jax.Array, candidates: jax.Array, seed: int = 0, **settings) -> MaskedTokens:
    """The masker `name` over `rows` copies of one row, each with its own key."""
    settings = {"length": tokens.shape[0], "mask_id": MASK, "vocab_size": VOCAB, **settings}
    masker = functools.partial(MASKERS[name], tokens=tokens, candidates=candidates, **settings)
    return jax.device_get(jax.jit(jax.vmap(masker))(keys_of(rows, seed)))


@pytest.mark.parametrize(
    ("length", "count"),
    # length * 0.15 = 0.45, 1.5, 4.5, 7.5, 19.2, 76.8; halves go to the even neighbour, and at least 1.
    [(3, 1), (10, 2), (30, 4), (50, 8), (128, 19), (512, 77)],
)
def test_exact_count_rounds_half_to_even_and_counts_specials(length: int, count: int) -> None:
    tokens, candidates = bert_row(length, 512)
    masked = run("exact", 3, tokens, candidates, length=length, num_predictions=77)
    np.testing.assert_array_equal(masked.weights.sum(1), count)
    assert noise.prediction_count(length) == count


def test_count_is_capped_by_slots_and_by_candidates() -> None:
    tokens, candidates = bert_row(50, 64)
    capped = run("exact", 4, tokens, candidates, length=50, num_predictions=5)
    np.testing.assert_array_equal(capped.weights, np.ones((4, 5)))
    few = run("exact", 4, tokens, candidates & (jnp.arange(64) < 4), length=50, num_predictions=20)
    np.testing.assert_array_equal(few.weights.sum(1), 3)  # 8 asked for; candidates are positions 1, 2, 3
    np.testing.assert_array_equal(few.positions[:, :3], [[1, 2, 3]] * 4)


@every_masker
def test_slots_describe_the_row(name: str) -> None:
    tokens, candidates = bert_row(40, 48)
    masked = run(name, 64, tokens, candidates, length=40, num_predictions=12, mask_rate=0.25)
    assert masked.tokens.dtype == np.int32
    assert masked.positions.dtype == np.int32
    assert masked.weights.dtype == np.float32
    for row, positions, targets, weights in zip(*masked, strict=True):
        used = int(weights.sum())
        np.testing.assert_array_equal(weights, np.arange(12) < used)
        assert (np.diff(positions[:used]) > 0).all()  # ascending, hence distinct
        assert np.asarray(candidates)[positions[:used]].all()
        np.testing.assert_array_equal(targets[:used], np.asarray(tokens)[positions[:used]])
        np.testing.assert_array_equal(positions[used:], 0)
        np.testing.assert_array_equal(targets[used:], 0)
        elsewhere = np.setdiff1d(np.arange(48), positions[:used])
        np.testing.assert_array_equal(row[elsewhere], np.asarray(tokens)[elsewhere])


@every_masker
@pytest.mark.parametrize(
    "rows",
    [[[PAD] * 4, [CLS, PAD, PAD, PAD], [CLS, SEP, PAD, PAD], [CLS, SEP, SEP, SEP]], [[CLS]]],
    ids=["specials", "one"],
)
def test_rows_without_candidates_have_no_predictions(name: str, rows: list[list[int]]) -> None:
    tokens = jnp.array(rows, jnp.int32)
    settings = {"num_predictions": 3, "mask_rate": 1.0, "mask_id": MASK, "vocab_size": VOCAB}
    masker = functools.partial(MASKERS[name], **settings)
    masked = jax.jit(jax.vmap(lambda key, row: masker(key, row, row > MASK, length=jnp.sum(row != PAD))))(
        keys_of(len(rows)), tokens
    )
    np.testing.assert_array_equal(masked.tokens, tokens)
    for slots in masked[1:]:
        np.testing.assert_array_equal(slots, np.zeros((len(rows), 3)))


@every_masker
def test_padding_changes_nothing(name: str) -> None:
    settings = {"length": 30, "num_predictions": 10, "mask_rate": 0.3}
    short = run(name, 50, *bert_row(30, 30), **settings)
    long = run(name, 50, *bert_row(30, 77), **settings)
    np.testing.assert_array_equal(long.tokens[:, :30], short.tokens)
    for padded, plain in zip(long[1:], short[1:], strict=True):
        np.testing.assert_array_equal(padded, plain)


@every_masker
def test_rows_do_not_depend_on_the_batch_or_on_x64(name: str) -> None:
    tokens, candidates = bert_row(30, 32)
    settings = {"length": 30, "num_predictions": 10, "mask_id": MASK, "vocab_size": VOCAB}
    together = run(name, 6, tokens, candidates, **settings)
    one = jax.jit(functools.partial(MASKERS[name], tokens=tokens, candidates=candidates, **settings))
    alone = [one(key) for key in keys_of(6)]
    with jax.enable_x64(True):
        wide = run(name, 6, tokens, candidates, **settings)
    for batched, x64, *single in zip(together, wide, *alone, strict=True):
        np.testing.assert_array_equal(batched, np.stack(single))
        np.testing.assert_array_equal(batched, x64)


def test_every_subset_of_positions_is_equally_likely() -> None:
    # 3 of 6 candidates: C(6, 3) = 20 subsets.
    tokens, candidates = bert_row(8, 9)
    rows = 100_000
    masked = run("exact", rows, tokens, candidates, length=6, num_predictions=3, mask_rate=0.5)
    np.testing.assert_array_equal(masked.weights, np.ones((rows, 3)))
    codes, counts = np.unique(masked.positions @ [100, 10, 1], return_counts=True)
    subsets = [100 * a + 10 * b + c for a, b, c in itertools.combinations(range(1, 7), 3)]
    np.testing.assert_array_equal(codes, subsets)
    assert_fits(counts, np.full(20, 1 / 20))


def test_robertas_subsets_are_equally_likely_whatever_their_count() -> None:
    # 5 candidates at 0.5: 2.5, so 2 or 3 with equal chance, and C(5, 2) = C(5, 3) = 10 subsets of each: 1 / 20 each.
    tokens, candidates = bert_row(7, 9)
    rows = 100_000
    masked = run("roberta", rows, tokens, candidates, length=5, num_predictions=3, mask_rate=0.5)
    counts = np.bincount(np.sum(2**masked.positions * masked.weights.astype(int), axis=1), minlength=64)
    subsets = [sum(2**i for i in s) for n in (2, 3) for s in itertools.combinations(range(1, 6), n)]
    assert counts[subsets].sum() == rows
    assert_fits(counts[subsets], np.full(20, 1 / 20))


@pytest.mark.parametrize("name", ["exact", "roberta", "whole_words", "bernoulli", "ngrams"])
def test_replacements_are_80_10_10_over_the_whole_vocabulary(name: str) -> None:
    # All tokens are 7. A replacement is random with probability 0.1, uniform over the 16 ids, 7 and specials included.
    tokens = jnp.full((12,), 7, jnp.int32)
    masked = run(name, 12_000, tokens, tokens > 0, num_predictions=12, mask_rate=0.9)  # 11 each, or 10.8 on average
    selected = masked.weights > 0
    drawn = np.take_along_axis(masked.tokens, masked.positions, 1)[selected]
    assert drawn.size > 1e5
    probabilities = np.full(VOCAB, 0.1 / 16)
    probabilities[MASK] += 0.8
    probabilities[7] += 0.1
    assert_fits(np.bincount(drawn, minlength=VOCAB), probabilities)


@pytest.mark.parametrize("name", ["exact", "roberta", "whole_words", "bernoulli", "ngrams"])
def test_replacements_are_independent_within_a_row(name: str) -> None:
    # Two tokens per row (one word where words count); each is masked, changed or kept. V is huge, so a random
    # token practically never equals the original or the mask.
    tokens = jnp.full((2,), 7, jnp.int32)
    starts = jnp.array([True, False])
    masker = {
        **MASKERS,
        "whole_words": functools.partial(noise.mask_whole_words, word_starts=starts),
        "ngrams": functools.partial(noise.mask_ngrams, word_starts=starts),
    }[name]
    settings = {"length": 2, "num_predictions": 2, "mask_rate": 1.0, "mask_id": MASK, "vocab_size": 2**30}
    draw = jax.jit(jax.vmap(lambda key: masker(key, tokens, tokens > 0, **settings).tokens))
    drawn = np.asarray(draw(keys_of(100_000)))
    kind = np.where(drawn == MASK, 0, np.where(drawn == 7, 1, 2))
    shares = np.array([0.8, 0.1, 0.1])
    assert_fits(np.bincount(kind @ [3, 1], minlength=9), np.outer(shares, shares).ravel())


def test_shares_are_settings() -> None:
    tokens, candidates = bert_row(30, 30)
    settings = {"num_predictions": 28, "mask_rate": 1.0}
    all_masked = run("exact", 2, tokens, candidates, mask_share=1.0, random_share=0.0, **settings)
    np.testing.assert_array_equal(all_masked.tokens[:, 1:-1], MASK)
    all_kept = run("exact", 2, tokens, candidates, mask_share=0.0, random_share=0.0, **settings)
    np.testing.assert_array_equal(all_kept.tokens, np.stack([tokens] * 2))
    np.testing.assert_array_equal(all_kept.weights, 1)  # kept tokens are predicted too


def test_roberta_rounds_the_count_at_random_and_draws_no_specials() -> None:
    # 10 tokens at 0.15: 1.5, so 1 or 2 with equal chance; 12 tokens: 1.8, so 1 with chance 0.2, 2 with 0.8.
    # 4 tokens: 0.6, so 0 with chance 0.4.
    masker = functools.partial(noise.mask_tokens_roberta, num_predictions=3, mask_id=MASK, vocab_size=VOCAB)
    draw = jax.jit(jax.vmap(lambda key, row, ok, n: masker(key, row, ok, length=n).weights, (0, None, None, None)))
    for length, shares in ((10, [0, 0.5, 0.5]), (12, [0, 0.2, 0.8]), (4, [0.4, 0.6, 0])):
        weights = np.asarray(draw(keys_of(100_000), *bert_row(length, 16), length))
        counts = np.bincount(weights.sum(1).astype(int), minlength=4)
        possible = np.array([*shares, 0.0]) > 0
        np.testing.assert_array_equal(counts > 0, possible)
        assert_fits(counts[possible], np.array(shares)[possible[:3]])
    tokens = jnp.full((12,), 7, jnp.int32)
    specials = (15, 0, 1, 2, MASK, 9, 9, 400)  # in any order, repeated, and one beyond the vocabulary
    shares = {"mask_share": 0.0, "random_share": 1.0}
    masked = run(
        "roberta", 10_000, tokens, tokens > 0, num_predictions=12, mask_rate=1.0, special_ids=specials, **shares
    )
    allowed = np.setdiff1d(np.arange(VOCAB), specials)
    counts = np.bincount(masked.tokens.ravel(), minlength=VOCAB)
    assert counts.sum() == counts[allowed].sum() == 120_000
    assert_fits(counts[allowed], np.full(10, 1 / 10))


def test_bernoulli_selects_each_candidate_by_itself() -> None:
    # Three candidates at 0.3: the 8 outcomes have probabilities 0.3^k 0.7^(3-k). In place: slot i is position i.
    tokens, candidates = bert_row(5, 6)
    masked = run("bernoulli", 100_000, tokens, candidates, mask_rate=0.3)
    np.testing.assert_array_equal(masked.positions[0], np.arange(6))
    np.testing.assert_array_equal(masked.targets[0], tokens)
    np.testing.assert_array_equal(masked.weights[:, [0, 4, 5]], 0)
    outcome = masked.weights[:, 1:4].astype(int) @ [4, 2, 1]
    chosen = np.array([0, 1, 1, 2, 1, 2, 2, 3])
    assert_fits(np.bincount(outcome, minlength=8), 0.3**chosen * 0.7 ** (3 - chosen))
    np.testing.assert_array_equal(masked.tokens[masked.weights == 0], np.stack([tokens] * 100_000)[masked.weights == 0])


def test_bernoulli_takes_a_traced_rate() -> None:
    tokens, candidates = bert_row(5, 6)
    masker = functools.partial(noise.mask_tokens_bernoulli, mask_id=MASK, vocab_size=VOCAB)
    traced = jax.jit(lambda key, rate: masker(key, tokens, candidates, mask_rate=rate))
    for rate in (0.1, 0.9):
        for got, want in zip(
            traced(jax.random.key(5), rate), masker(jax.random.key(5), tokens, candidates, mask_rate=rate), strict=True
        ):
            np.testing.assert_array_equal(got, want)


def test_bernoulli_with_slots_keeps_a_uniform_subset_of_the_selected() -> None:
    # Rate 1 selects all 5 candidates; 2 slots keep each of the C(5, 2) = 10 pairs equally often.
    tokens, candidates = bert_row(7, 7)
    masked = run("bernoulli", 100_000, tokens, candidates, num_predictions=2, mask_rate=1.0)
    codes, counts = np.unique(masked.positions @ [10, 1], return_counts=True)
    np.testing.assert_array_equal(codes, [10 * a + b for a, b in itertools.combinations(range(1, 6), 2)])
    assert_fits(counts, np.full(10, 1 / 10))
    # Where the slots suffice, both forms select the same tokens.
    in_place = run("bernoulli", 50, tokens, candidates, mask_rate=0.4)
    in_slots = run("bernoulli", 50, tokens, candidates, num_predictions=5, mask_rate=0.4)
    np.testing.assert_array_equal(in_place.tokens, in_slots.tokens)
    np.testing.assert_array_equal(in_place.weights.sum(1), in_slots.weights.sum(1))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mask_rate": 0.0}, "mask_rate is 0.0"),
        ({"mask_rate": 1.5}, "mask_rate is 1.5"),
        ({"mask_share": 0.8, "random_share": 0.3}, "mask_share is 0.8 and random_share is 0.3"),
        ({"mask_share": -0.1}, "mask_share is -0.1"),
        ({"num_predictions": 0}, "num_predictions is 0"),
    ],
)
@every_masker
def test_impossible_settings_are_refused(name: str, settings: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=named):
        run(name, 1, *bert_row(8, 8), **{"num_predictions": 2, **settings})
