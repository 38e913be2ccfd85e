"""Seeds and differences: by hand, against all resamples of three examples, and against a plain loop."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from mutants import Mutant, assert_killed
from scipy import stats

from lmobj.errors import UserError
from lmobj.evaluate import _resampling, paired_bootstrap, seed_difference, seed_spread


def test_spread_by_hand() -> None:
    # Deviations -1, 0, 1: s = 1. Student's 97.5% quantile with 2 degrees of freedom is 4.302653 in any table.
    spread = seed_spread([1.0, 2.0, 3.0])
    margin = 4.302653 / np.sqrt(3)
    assert spread == (2, 1, pytest.approx(2 - margin, abs=1e-6), pytest.approx(2 + margin, abs=1e-6), 3)
    # With one degree of freedom the quantile is tan(pi (q - 1/2)): of 75%, 1.
    assert seed_spread([0.0, 2.0], confidence=0.5)[2:4] == pytest.approx((0, 2), abs=1e-12)
    assert seed_spread([0.5]) == (0.5, None, None, None, 1)


def test_a_difference_over_seeds_is_welchs() -> None:
    x, y = [0.8, 0.9, 0.85], [0.7, 0.72]
    found = seed_difference(x, y, confidence=0.9)
    peer = stats.ttest_ind(x, y, equal_var=False)
    interval = peer.confidence_interval(0.9)
    assert found.difference == pytest.approx(0.85 - 0.71)
    assert found.error == pytest.approx(np.sqrt(0.05**2 / 3 + 0.0002 / 2))  # deviations 0.05 and 0.02 / sqrt(2)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert seed_difference([0.5], y)[1:] == (None, None, None)
    assert seed_difference([0.5, 0.5], [0.25, 0.25]) == (0.25, 0.0, 0.25, 0.25)


def test_three_examples_have_27_resamples() -> None:
    first, second = [0.9, 0.2, 0.5], [0.1, 0.4, 0.2]  # differences 0.8, -0.2, 0.3, their mean 0.3
    means = np.array([np.mean(drawn) for drawn in itertools.product([0.8, -0.2, 0.3], repeat=3)])
    samples = 40_000
    result = paired_bootstrap(first, second, seed=0, samples=samples)
    assert result.difference == pytest.approx(0.3, rel=1e-14)
    # Five standard deviations of a share over 40,000 draws are at most 5 * 0.5 / 200 = 0.0125.
    assert result.p_value == pytest.approx(np.mean(np.abs(means - 0.3) > 0.3 - 1e-9), abs=0.0125)
    assert result.wins == pytest.approx(np.mean(means > 1e-9), abs=0.0125)
    # 1 of 27 resamples is -0.2 and 1 is 0.8, more than 2.5% each.
    assert (result.low, result.high) == pytest.approx((-0.2, 0.8), abs=1e-12)


def f1(means: np.ndarray) -> np.ndarray:
    return 2 * means[:, 2] / (means[:, 0] + means[:, 1])


def entities(rng: np.random.Generator, true: np.ndarray) -> np.ndarray:
    """True, found and right entities of each sentence."""
    right = rng.binomial(true, 0.7)
    return np.stack([true, right + rng.integers(0, 2, len(true)), right], 1).astype(float)


def test_equals_the_loop_with_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of means, and of an F1 from counts; some resamples at a time or all at once."""
    rng = np.random.default_rng(0)
    true = rng.integers(1, 5, 25)
    a, b = entities(rng, true), entities(rng, true)
    drawn = np.random.default_rng(7).integers(0, 25, (300, 25))
    score = {None: lambda x: x[:, 0].mean(), f1: lambda x: 2 * x[:, 2].sum() / (x[:, 0].sum() + x[:, 1].sum())}
    for statistic, plain in score.items():
        for at_once in (1 << 22, 25 * 70):
            monkeypatch.setattr(_resampling, "_NUMBERS_AT_ONCE", at_once)
            pair = (a, b) if statistic else (a[:, 0] - a[:, 1], b[:, 0] - b[:, 1])
            two = [each if statistic else each[:, None] for each in pair]
            result = paired_bootstrap(*pair, seed=7, samples=300, confidence=0.9, statistic=statistic)
            d = plain(two[0]) - plain(two[1])
            each = np.array([plain(two[0][i]) - plain(two[1][i]) for i in drawn])
            assert result.difference == pytest.approx(d, abs=1e-14)
            assert (result.low, result.high) == pytest.approx(np.quantile(each, [0.05, 0.95]), abs=1e-13)
            assert result.p_value == (1 + np.sum(np.abs(each - d) >= abs(d) - 1e-12)) / 301
            assert result.wins == pytest.approx(np.mean(each > 1e-12) + np.mean(np.abs(each) <= 1e-12) / 2, abs=1e-13)


def test_the_other_way_round_is_the_mirror() -> None:
    a, b = np.random.default_rng(1).random((2, 40))
    one, other = paired_bootstrap(a, b, seed=3, samples=500), paired_bootstrap(b, a, seed=3, samples=500)
    assert (other.difference, other.low, other.high) == pytest.approx((-one.difference, -one.high, -one.low), abs=1e-14)
    assert other.p_value == one.p_value
    assert other.wins == pytest.approx(1 - one.wins, abs=1e-14)
    assert paired_bootstrap(a, b, seed=3, samples=500) == one
    assert paired_bootstrap(a, b, seed=4, samples=500) != one


def test_no_difference_and_a_sure_one() -> None:
    a = np.linspace(0, 1, 30)
    assert paired_bootstrap(a, a, seed=0, samples=200) == (0, 0, 0, 1, 0.5)
    sure = paired_bootstrap(a + 0.1, a, seed=0, samples=199)
    assert sure.p_value == 1 / 200
    assert sure.wins == 1
    assert (sure.low, sure.high) == pytest.approx((0.1, 0.1), abs=1e-13)


def test_without_a_difference_one_in_twenty_is_called_one() -> None:
    """The level of the test: p <= 0.05 in 5% of 400 comparisons of alike systems, and intervals that hold 0 in 95%."""
    rng = np.random.default_rng(2)
    results = [paired_bootstrap(*rng.normal(size=(2, 60)), seed=i, samples=300) for i in range(400)]
    # 20 are expected, with a standard deviation of sqrt(400 * 0.05 * 0.95) = 4.4; small samples add a little.
    assert 5 <= sum(result.p_value <= 0.05 for result in results) <= 40
    assert 5 <= sum(not result.low <= 0 <= result.high for result in results) <= 40


def test_what_cannot_be_compared_is_refused() -> None:
    for a, b in (([1.0], [1.0, 2.0]), ([], []), ([np.nan], [1.0]), (1.0, 2.0)):
        with pytest.raises(UserError, match="scores have the shapes"):
            paired_bootstrap(a, b, seed=0)
    with pytest.raises(UserError, match="samples is 0"):
        paired_bootstrap([1.0], [2.0], seed=0, samples=0)
    with pytest.raises(UserError, match=r"a statistic for \[N, K\] alone"):
        paired_bootstrap([[1.0]], [[2.0]], seed=0)
    for confidence in (0.0, 1.0, 95.0):
        with pytest.raises(UserError, match="confidence is"):
            paired_bootstrap([1.0], [2.0], seed=0, confidence=confidence)
    for values in ([], [np.inf]):
        with pytest.raises(UserError, match="the values are"):
            seed_spread(values)


@pytest.mark.parametrize(
    "mutant",
    [
        Mutant("without replacement", _resampling, "_shares", lambda _: lambda rng, n, b: np.full((b, n), 1 / n)),
        Mutant("examples are not paired", _resampling, "_difference",
               lambda f: lambda means, score: f(np.stack([means[0], np.roll(means[1], 1, 0)]), score)),
    ],
    ids=str,
)  # fmt: skip
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    assert_killed(monkeypatch, mutant, [test_three_examples_have_27_resamples, test_no_difference_and_a_sure_one])
