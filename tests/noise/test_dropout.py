"""Dropout: its mask against a slow reference, its statistics, and what it must not depend on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmobj.noise import dropout

SEEDS = jax.random.bits(jax.random.key(0), (8,), "uint32")


def kept(shape: tuple[int, ...], rate: float, seeds: jax.Array, *, layer: int = 0, site: int = 0) -> np.ndarray:
    """1 where dropout keeps, else 0."""
    return np.asarray(dropout(jnp.ones(shape), rate, seeds, layer=layer, site=site) != 0)


def mix(x: int) -> int:
    """lowbias32 on Python integers."""
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def test_mask_equals_the_hash_written_out() -> None:
    rate, layer, site, golden = 0.3, 5, 2, 0x9E3779B9
    x = np.asarray(dropout(jnp.full((2, 3, 4), 2.0), rate, SEEDS[:2], layer=layer, site=site))
    for row, i, j in np.ndindex(2, 3, 4):
        state = mix(int(SEEDS[row]) ^ mix((layer * 256 + site + 1) * golden % 2**32))
        state = mix(state ^ ((i + 1) * golden % 2**32))
        state = mix(state ^ ((j + 1) * golden % 2**32))
        expected = 2.0 / 0.7 if state >= 0.3 * 2**32 else 0.0
        assert x[row, i, j] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_keep_rate_by_chi_square(rate: float) -> None:
    # 4096 groups of 512 elements: sum (kept - n p)^2 / (n p q) is chi-square with 4096 degrees of freedom, whose mean
    # is 4096 and whose standard deviation is sqrt(2 * 4096) = 90.5. Four of them each way: a fair hash fails once in
    # 16,000 seeds, and the seeds are fixed. Too even a mask fails too.
    keep = kept((8, 512, 512), rate, SEEDS).reshape(4096, 512)
    chi_square = np.sum((keep.sum(axis=1) - 512 * (1 - rate)) ** 2 / (512 * rate * (1 - rate)))
    assert abs(chi_square - 4096) < 4 * 90.5
    # The whole: 2^21 elements, within four standard deviations of a proportion.
    assert abs(keep.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / 2**21)


@pytest.mark.parametrize("other", ["layer", "site", "row", "next column", "next row of the array", "column + 256"])
def test_masks_of_different_addresses_are_independent(other: str) -> None:
    shape = (8, 256, 512)
    base = kept(shape, 0.5, SEEDS)
    pairs = {
        "layer": lambda: (base, kept(shape, 0.5, SEEDS, layer=1)),
        "site": lambda: (base, kept(shape, 0.5, SEEDS, site=1)),
        "row": lambda: (base[:-1], base[1:]),
        "next column": lambda: (base[..., :-1], base[..., 1:]),
        "next row of the array": lambda: (base[:, :-1], base[:, 1:]),
        "column + 256": lambda: (base[..., :256], base[..., 256:]),
    }
    a, b = pairs[other]()
    # 2 x 2 table of two fair coins: each cell holds a quarter; chi-square with 3 degrees of freedom, 21.1 at p = 1e-4.
    counts = np.bincount((2 * a + b).ravel(), minlength=4)
    assert np.sum((counts - a.size / 4) ** 2 / (a.size / 4)) < 21.1


def test_similar_seeds_give_independent_masks() -> None:
    a, b = (kept((4, 512, 128), 0.5, jnp.arange(4, dtype=jnp.uint32) + first) for first in (0, 4))
    counts = np.bincount((2 * a + b).ravel(), minlength=4)
    assert np.sum((counts - a.size / 4) ** 2 / (a.size / 4)) < 21.1


def test_mask_depends_on_indices_alone() -> None:
    whole = kept((8, 6, 10), 0.5, SEEDS)
    np.testing.assert_array_equal(kept((8, 4, 7), 0.5, SEEDS), whole[:, :4, :7])  # padding
    np.testing.assert_array_equal(kept((3, 6, 10), 0.5, SEEDS[2:5]), whole[2:5])  # batch split
    moved = dropout(jnp.ones((6, 8, 10)), 0.5, SEEDS, layer=0, site=0, batch_axis=1)  # time-major
    np.testing.assert_array_equal(np.asarray(moved != 0).swapaxes(0, 1), whole)


def test_layer_may_be_traced_and_vmap_and_jit_keep_the_mask() -> None:
    def one(layer: jax.Array) -> jax.Array:
        return dropout(jnp.ones((8, 5)), 0.5, SEEDS, layer=layer, site=1)

    scanned = jax.jit(lambda: jax.lax.map(one, jnp.arange(3)))()
    rows = jax.vmap(lambda seed: dropout(jnp.ones((1, 5)), 0.5, seed[None], layer=2, site=1)[0])(SEEDS)
    for layer in range(3):
        np.testing.assert_array_equal(scanned[layer], dropout(jnp.ones((8, 5)), 0.5, SEEDS, layer=layer, site=1))
    np.testing.assert_array_equal(scanned[2], rows)


def test_gradient_is_the_mask() -> None:
    y, pullback = jax.vjp(lambda x: dropout(x, 0.25, SEEDS, layer=0, site=0), jnp.ones((8, 9)))
    np.testing.assert_array_equal(pullback(jnp.ones((8, 9)))[0], y)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_dtype_stays(dtype: str) -> None:
    with jax.enable_x64(True):
        y = dropout(jnp.full((8, 64), 3, dtype), 0.1, SEEDS, layer=0, site=0)
        assert y.dtype == dtype
        kept_values = np.asarray(y.astype("float64"))[np.asarray(y) != 0]
        precision = {"bfloat16": 2**-8, "float32": 2**-23, "float64": 2**-52}[dtype]
        np.testing.assert_allclose(kept_values, 3 / 0.9, rtol=2 * precision)


def test_rate_zero_is_the_identity_and_bad_calls_are_refused() -> None:
    x = jnp.ones((8, 3))
    assert dropout(x, 0.0, SEEDS, layer=0, site=0) is x
    with pytest.raises(ValueError, match=r"rate is 1\.0"):
        dropout(x, 1.0, SEEDS, layer=0, site=0)
    with pytest.raises(ValueError, match="one seed per row"):
        dropout(x, 0.5, SEEDS[:2], layer=0, site=0)
