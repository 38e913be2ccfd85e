"""Gumbel noise by hashing: its values written out, its distribution, and what it depends on."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lmobj.noise import fold_index, gumbel

SEEDS = jax.random.bits(jax.random.key(0), (1024,), "uint32")


def mix(x: int) -> int:
    """lowbias32 on Python integers."""
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def test_noise_equals_the_hash_written_out() -> None:
    drawn = gumbel(SEEDS[:3, None], jnp.arange(4))
    assert drawn.dtype == jnp.float32
    for row, i in np.ndindex(3, 4):
        bits = mix(int(SEEDS[row]) ^ (i + 1) * 0x9E3779B9 % 2**32)
        assert int(fold_index(SEEDS[row], jnp.asarray(i))) == bits
        expected = -math.log(-math.log1p(-(bits + 0.5) / 2**32))
        assert float(drawn[row, i]) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_noise_is_finite_at_both_ends() -> None:
    # mix(0) = 0, so that a seed which cancels the index has bits 0, the rarest noise: -log(2^-33) = 33 log 2. The
    # other end, bits 2^32 - 1, is the image of one seed: found by inverting the bijection. 1 - 2^-24: -log(24 log 2).
    def unmix(x: int) -> int:
        x ^= x >> 16
        x = x * pow(0x846CA68B, -1, 2**32) % 2**32
        x ^= (x >> 15) ^ (x >> 30)
        x = x * pow(0x7FEB352D, -1, 2**32) % 2**32
        return x ^ (x >> 16)

    assert mix(unmix(12345)) == 12345
    ends = jnp.asarray([unmix(0) ^ 0x9E3779B9, unmix(2**32 - 1) ^ 0x9E3779B9], jnp.uint32)
    np.testing.assert_allclose(
        gumbel(ends, jnp.zeros(2, jnp.int32)), [33 * math.log(2), -math.log(24 * math.log(2))], rtol=1e-5
    )


def test_noise_has_gumbels_distribution() -> None:
    drawn = np.asarray(gumbel(SEEDS[:, None], jnp.arange(1024)), np.float64).ravel()  # 2^20 draws
    assert stats.kstest(drawn, "gumbel_r").pvalue > 1e-3
    # The tail decides which rare classes are drawn at all: as many above 8 as exp(-exp(-8)) says, within 4 sigma.
    expected = drawn.size * -math.expm1(-math.exp(-8))
    assert abs(np.sum(drawn > 8) - expected) < 4 * math.sqrt(expected)


@pytest.mark.parametrize("other", ["next seed", "next index", "index + 256"])
def test_noise_at_different_addresses_is_independent(other: str) -> None:
    # Of 2^19 pairs both halves of the distribution on each side: a correlation r has a standard deviation of 2^-9.5.
    drawn = np.asarray(gumbel(SEEDS[:, None], jnp.arange(1024))) > -math.log(math.log(2))
    pairs = {
        "next seed": (drawn[:-1], drawn[1:]),
        "next index": (drawn[:, :-1], drawn[:, 1:]),
        "index + 256": (drawn[:, :-256], drawn[:, 256:]),
    }
    a, b = (x.ravel() for x in pairs[other])
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(a.size)
