"""What can be said of a score from a few seeds, and of a difference between two systems."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmobj.errors import UserError

__all__ = ["PairedBootstrap", "SeedDifference", "SeedSpread", "paired_bootstrap", "seed_difference", "seed_spread"]

_NUMBERS_AT_ONCE = 1 << 22
"""Of counts of examples in resamples: 32 MiB."""


class SeedSpread(NamedTuple):
    """One score over n seeds."""

    mean: float
    deviation: float | None
    """sqrt(sum_i (x_i - mean)^2 / (n - 1)); None with one seed."""
    low: float | None
    """Lower end of the confidence interval of the mean; None with one seed."""
    high: float | None
    n: int

    def show(self, percent: bool = False) -> str:
        """Mean and deviation as `61.2 ± 0.5`, with as many digits as say something."""
        scale, digits = (100, 1) if percent else (1, 4)
        text = f"{self.mean * scale:.{digits}f}"
        return text if self.deviation is None else f"{text} ± {self.deviation * scale:.{digits}f}"


class SeedDifference(NamedTuple):
    """The difference between the means of two systems' scores over their seeds, first - second."""

    difference: float
    error: float | None
    """Its standard error; None where a system has one seed."""
    low: float | None
    """Lower end of its confidence interval; None where a system has one seed."""
    high: float | None


class PairedBootstrap(NamedTuple):
    """The difference between two systems on the same examples, first - second."""

    difference: float
    low: float
    """Lower end of the confidence interval of the difference."""
    high: float
    p_value: float
    """Two-sided: how often a difference at least so large would be seen if there were none."""
    wins: float
    """Share of resamples in which the first is better, equal ones counting half."""


def seed_spread(values: Sequence[float], *, confidence: float = 0.95) -> SeedSpread:
    """Mean, standard deviation and Student's interval of one score over seeds.

        mean +- t s / sqrt(n),   t the (1 + confidence) / 2 quantile with n - 1 degrees of freedom

    Args:
      values: a score for each seed.
      confidence: of the interval, between 0 and 1.

    Raises:
      UserError: no values, some that are not finite, or a confidence out of range.

    Source: Student 1908, "The Probable Error of a Mean".
    """
    _check_confidence(confidence)
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise UserError(f"the values are {list(values)!r:.60}; accepted: a finite score for each seed, at least one.")
    if len(x) == 1:
        return SeedSpread(float(x[0]), None, None, None, 1)
    mean, deviation = float(x.mean()), float(x.std(ddof=1))
    margin = _t_quantile(confidence, len(x) - 1) * deviation / np.sqrt(len(x))
    return SeedSpread(mean, deviation, float(mean - margin), float(mean + margin), len(x))


def seed_difference(first: Sequence[float], second: Sequence[float], *, confidence: float = 0.95) -> SeedDifference:
    """How far the means of two systems over their seeds are apart, and how sure that is over other seeds.

        d = mean x - mean y,   e = sqrt(v_x + v_y),   v_x = s_x^2 / n_x
        d +- t e,   t the (1 + confidence) / 2 quantile with (v_x + v_y)^2 / (v_x^2 / (n_x - 1) + v_y^2 / (n_y - 1))
        degrees of freedom

    Seeds are not paired: equal ones have nothing in common where the systems differ.

    Args:
      first, second: a score for each seed of a system; they may have other seeds, and more or fewer.
      confidence: of the interval, between 0 and 1.

    Raises:
      UserError: as `seed_spread`.

    Source: Welch 1947, "The generalization of Student's problem when several different population variances are
    involved".
    """
    x, y = (seed_spread(values, confidence=confidence) for values in (first, second))
    difference = x.mean - y.mean
    if x.deviation is None or y.deviation is None:
        return SeedDifference(difference, None, None, None)
    v = np.array([x.deviation**2 / x.n, y.deviation**2 / y.n])
    error = float(np.sqrt(v.sum()))
    if not error:
        return SeedDifference(difference, 0.0, difference, difference)
    freedom = float(v.sum() ** 2 / (v**2 / np.array([x.n - 1, y.n - 1])).sum())
    margin = _t_quantile(confidence, freedom) * error
    return SeedDifference(difference, error, difference - margin, difference + margin)


def paired_bootstrap(
    first: ArrayLike,
    second: ArrayLike,
    *,
    seed: int,
    samples: int = 10_000,
    confidence: float = 0.95,
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None,
) -> PairedBootstrap:
    """Whether one system is better than another on the same examples, by resampling the examples.

        d = s(first) - s(second),    d*_b the same on resample b of the N examples, drawn with replacement
        p = (1 + #{b: |d*_b - d| >= |d|}) / (1 + samples)

    p is that of the null hypothesis of no difference, with the bootstrap distribution moved to have its mean there
    (Efron and Tibshirani), and never 0. The interval is the percentile interval of d*. `wins` is what Koehn calls the
    confidence that the first is better; 1 - wins is often quoted as a one-sided p-value.

    Args:
      first, second: [N] a score for each example, or [N, K] what `statistic` needs of it.
      seed: of the resamples.
      samples: B, how many.
      confidence: of the interval, between 0 and 1.
      statistic: [B, K] means over examples -> [B] scores, for scores that are no means of examples' scores: F1 from
        true, found and right entities of each sentence. None: the mean itself.

    Raises:
      UserError: shapes that differ, no examples, values that are not finite, or a setting out of range.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", sections 13.3 and 16.4; Koehn 2004,
    "Statistical Significance Tests for Machine Translation Evaluation", section 3.
    """
    _check_confidence(confidence)
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.shape != b.shape or a.ndim not in (1, 2) or not a.size or not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError(f"scores have the shapes {a.shape} and {b.shape}; accepted: [N] or [N, K] both, finite.")
    if samples < 1 or (a.ndim == 2) != (statistic is not None):
        raise UserError(f"samples is {samples}; accepted: at least 1, and a statistic for [N, K] alone.")
    score = statistic or (lambda means: means[:, 0])
    pair = np.stack([a.reshape(len(a), -1), b.reshape(len(b), -1)])  # [2, N, K]
    observed = _difference(pair.mean(1, keepdims=True), score)[0]
    resampled = np.concatenate([_difference(weights @ pair, score) for weights in _weights(len(a), samples, seed)])
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    # The last digits of two sums of the same numbers may differ; such differences are equal.
    slack = 1e-12 * (np.abs(resampled).max() + abs(observed))
    extreme = int(np.sum(np.abs(resampled - observed) >= abs(observed) - slack))
    wins = np.mean(resampled > slack) + 0.5 * np.mean(np.abs(resampled) <= slack)
    return PairedBootstrap(float(observed), float(low), float(high), (1 + extreme) / (1 + samples), float(wins))


def _weights(count: int, samples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """[B', N] shares of the examples in each resample, some resamples at a time; each row adds up to 1."""
    rng = np.random.default_rng(seed)
    at_once = max(1, _NUMBERS_AT_ONCE // count)
    for done in range(0, samples, at_once):
        yield _shares(rng, count, min(at_once, samples - done))


def _shares(rng: np.random.Generator, count: int, samples: int) -> NDArray[np.float64]:
    drawn = rng.integers(0, count, (samples, count)) + count * np.arange(samples)[:, None]
    return np.bincount(drawn.reshape(-1), minlength=samples * count).reshape(samples, count) / count


def _difference(
    means: NDArray[np.float64], score: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> NDArray[np.float64]:
    """[B]: what separates two systems whose means are [2, B, K]."""
    return np.asarray(score(means[0])) - np.asarray(score(means[1]))


def _t_quantile(confidence: float, freedom: float) -> float:
    """Of Student's distribution: what lies between its negative and itself has the probability `confidence`."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + confidence) / 2))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise UserError(f"confidence is {confidence}; it must be between 0 and 1.")
