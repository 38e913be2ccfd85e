"""ELECTRA's corruption: counts and labels by hand, distributions by chi-square, rows untouched by padding."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lmobj import noise
from lmobj.errors import UserError
from lmobj.noise import MaskedTokens

CLS, SEP, MASK, PAD = 1, 2, 3, 0


def bert_row(length: int, row_length: int) -> tuple[jax.Array, jax.Array]:
    """[CLS] 5 6 7 ... [SEP] of `length` tokens, padded to `row_length`; and its candidates."""
    tokens = jnp.array([CLS, *[5 + i % 10 for i in range(length - 2)], SEP] + [PAD] * (row_length - length), jnp.int32)
    return tokens, tokens > MASK


def keys_of(rows: int) -> jax.Array:
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(0)))(jnp.arange(rows))


def run(rows: int, tokens: jax.Array, candidates: jax.Array, **settings: Any) -> MaskedTokens:
    """`rows` copies of one row, each masked by its own key."""
    settings = {"length": tokens.shape[0], "mask_id": MASK, **settings}
    masker = functools.partial(noise.mask_tokens_electra, tokens=tokens, candidates=candidates, **settings)
    return jax.device_get(jax.jit(jax.vmap(masker))(keys_of(rows)))


def assert_fits(counts: np.ndarray, probabilities: Any) -> None:
    """Pearson's chi-square test at 0.1%; the seeds are fixed, so the outcome is too."""
    expected = counts.sum() * np.asarray(probabilities)
    assert expected.min() > 5
    assert stats.chisquare(counts, expected).pvalue > 1e-3


@pytest.mark.parametrize("replacement", [True, False])
def test_count_rounds_half_to_even_and_counts_specials(replacement: bool) -> None:
    # length * 0.15 = 0.45, 1.5, 4.5, 7.5, 19.2, 76.8; at least 1.
    lengths, counts = [3, 10, 30, 50, 128, 512], np.asarray([1, 2, 4, 8, 19, 77])
    rows, candidates = (jnp.stack(x) for x in zip(*(bert_row(n, 512) for n in lengths), strict=True))
    for slots in (79, 5):
        mask = functools.partial(
            noise.mask_tokens_electra, num_predictions=slots, mask_id=MASK, replacement=replacement
        )
        masked = jax.vmap(lambda *row, length, mask=mask: mask(*row, length=length))(
            keys_of(6), rows, candidates, length=jnp.asarray(lengths)
        )
        np.testing.assert_array_equal(masked.weights, np.arange(slots) < np.minimum(counts, slots)[:, None])


@pytest.mark.parametrize("replacement", [True, False])
def test_slots_describe_the_row(replacement: bool) -> None:
    tokens, candidates = bert_row(40, 48)
    masked = run(64, tokens, candidates, length=40, num_predictions=12, mask_rate=0.25, replacement=replacement)
    original = np.asarray(tokens)
    shared = 0
    for row, positions, targets, weights in zip(*masked, strict=True):
        assert weights.sum() == 10
        assert np.asarray(candidates)[positions[:10]].all()
        np.testing.assert_array_equal(targets[:10], original[positions[:10]])
        np.testing.assert_array_equal([positions[10:], targets[10:]], 0)
        changed = np.flatnonzero(row != original)
        assert set(changed) <= set(positions[:10])
        np.testing.assert_array_equal(row[changed], MASK)  # hidden or as it was, never random
        shared += 10 - len(set(positions[:10]))
    assert (shared > 0) == replacement


@pytest.mark.parametrize("replacement", [True, False])
def test_rows_without_candidates_have_no_predictions(replacement: bool) -> None:
    masked = run(3, jnp.asarray([CLS, SEP, PAD]), jnp.zeros(3, bool), num_predictions=2, replacement=replacement)
    np.testing.assert_array_equal(masked.tokens, [[CLS, SEP, PAD]] * 3)
    for slots in masked[1:]:
        np.testing.assert_array_equal(slots, np.zeros((3, 2)))


def test_padding_and_x64_change_nothing() -> None:
    settings = {"length": 30, "num_predictions": 10, "mask_rate": 0.3}
    short = run(50, *bert_row(30, 30), **settings)
    for padded, plain in zip(run(50, *bert_row(30, 77), **settings), short, strict=True):
        np.testing.assert_array_equal(padded[:, : plain.shape[1]], plain)
    more = run(50, *bert_row(30, 30), **settings | {"num_predictions": 14})  # as a longer row has more slots
    np.testing.assert_array_equal(more.tokens, short.tokens)
    np.testing.assert_array_equal(more.positions[:, :10], short.positions)
    with jax.enable_x64(True):
        for wide, plain in zip(run(50, *bert_row(30, 30), **settings), short, strict=True):
            np.testing.assert_array_equal(wide, plain)


def test_draws_are_uniform_with_replacement() -> None:
    rows = 100_000
    masked = run(rows, *bert_row(20, 20), num_predictions=6, mask_rate=0.3)
    np.testing.assert_array_equal(masked.weights, 1)
    # Positions 1 .. 18: all 324 pairs of the first two slots, and each position in any slot.
    first, second = (masked.positions[:, slot] - 1 for slot in (0, 1))
    assert_fits(np.bincount(first * 18 + second, minlength=324), np.full(324, 1 / 324))
    assert_fits(np.bincount(masked.positions.ravel(), minlength=19)[1:19], np.full(18, 1 / 18))
    # Different ones of 126 in 19 draws: 126 (1 - (125 / 126)^19) = 17.70; the standard deviation of one row is 1.06.
    wide = run(2_000, *bert_row(128, 128), num_predictions=19)
    distinct = np.mean([len(set(row)) for row in wide.positions])
    assert abs(distinct - 126 * (1 - (125 / 126) ** 19)) < 4 * 1.06 / np.sqrt(2_000)


def test_each_slot_masks_with_85_percent() -> None:
    # Two slots over 2 tokens. Alone (probability 1/2 that they differ) each is masked with 0.85; together, with
    # 1 - 0.15^2 = 0.9775. Codes: differ: neither, one, both; same: not, masked.
    tokens = jnp.full((2,), 7, jnp.int32)
    masked = run(100_000, tokens, tokens > 0, num_predictions=2, mask_rate=1.0)
    np.testing.assert_array_equal(masked.weights, 1)
    hidden = (masked.tokens == MASK).sum(1)
    same = masked.positions[:, 0] == masked.positions[:, 1]
    assert (hidden[same] < 2).all()
    assert_fits(
        np.bincount(np.where(same, 3 + hidden, hidden), minlength=5),
        0.5 * np.asarray([0.15**2, 2 * 0.15 * 0.85, 0.85**2, 0.15**2, 1 - 0.15**2]),
    )


def test_without_replacement_tokens_are_different_and_85_percent_masked() -> None:
    tokens = jnp.full((8,), 7, jnp.int32)
    masked = run(100_000, tokens, tokens > 0, num_predictions=4, mask_rate=0.5, replacement=False)
    assert (np.diff(masked.positions) > 0).all()
    # Of C(8, 4) = 70 subsets each is as likely, and so are pairs and single tokens.
    subsets = [sum(2**i for i in subset) for subset in itertools.combinations(range(8), 4)]
    counts = np.bincount((2**masked.positions).sum(1), minlength=256)
    assert counts[subsets].sum() == 100_000
    assert_fits(counts[subsets], np.full(70, 1 / 70))
    hidden = np.take_along_axis(masked.tokens, masked.positions, 1) == MASK
    assert_fits(np.bincount(hidden.ravel().astype(int)), [0.15, 0.85])


def replaced(positions: list[int], weights: list[int], sampled: list[int]) -> tuple[list[int], list[int]]:
    """The row [10 .. 15] with samples in the slots given; (tokens, labels)."""
    result = noise.replace_tokens(jnp.arange(10, 16), *(jnp.asarray(x) for x in (positions, weights, sampled)))
    return result.tokens.tolist(), result.replaced.astype(int).tolist()


@pytest.mark.parametrize(
    ("slots", "tokens", "labels"),
    [
        pytest.param(([2, 4], [1, 1], [30, 31]), [10, 11, 30, 13, 31, 15], [0, 0, 1, 0, 1, 0], id="replaced"),
        pytest.param(([2, 4], [1, 1], [12, 31]), [10, 11, 12, 13, 31, 15], [0, 0, 0, 0, 1, 0], id="sampled itself"),
        pytest.param(([2, 0], [1, 0], [30, 31]), [10, 11, 30, 13, 14, 15], [0, 0, 1, 0, 0, 0], id="an empty slot"),
        pytest.param(([0, 0], [0, 0], [30, 31]), [10, 11, 12, 13, 14, 15], [0] * 6, id="only empty slots"),
        pytest.param(([0, 0], [1, 0], [30, 31]), [30, 11, 12, 13, 14, 15], [1, 0, 0, 0, 0, 0], id="position 0 drawn"),
        pytest.param(([3, 3, 1], [1, 1, 1], [30, 31, 32]), [10, 32, 12, 30, 14, 15], [0, 1, 0, 1, 0, 0], id="twice"),
        pytest.param(([3, 3], [1, 1], [13, 31]), [10, 11, 12, 13, 14, 15], [0] * 6, id="twice, itself first"),
        pytest.param(([3, 3], [1, 1], [31, 13]), [10, 11, 12, 31, 14, 15], [0, 0, 0, 1, 0, 0], id="twice, itself last"),
        pytest.param(([3, 3], [0, 1], [30, 31]), [10, 11, 12, 31, 14, 15], [0, 0, 0, 1, 0, 0], id="twice, one empty"),
    ],
)
def test_labels(slots: tuple[list[int], list[int], list[int]], tokens: list[int], labels: list[int]) -> None:
    # The reference writes floor((30 + 31) / 2) = 30 or floor((31 + 13) / 2) = 22 where slots meet; the first counts.
    assert replaced(*slots) == (tokens, labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_rate": 0.0}, r"mask_rate is 0\.0"),
        ({"mask_share": 1.5}, r"mask_share is 1\.5"),
        ({"num_predictions": 0}, "num_predictions is 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(1, *bert_row(8, 8), **{"num_predictions": 2, **settings})
