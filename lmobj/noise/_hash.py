"""Random bits by hashing where an element stands, so that no generator state is needed.

A seed is 32 bits. Indices are folded into it one after the other; whoever folds the same indices gets the same bits,
whatever the array around the element, the mesh or the order of evaluation. It costs about one integer hash per
element, several times less than threefry bits on a CPU.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

__all__ = ["fold_index", "fold_places", "gumbel"]

_GOLDEN = 0x9E3779B9
"""2^32 / golden ratio, odd: multiples of it spread consecutive indices over all bits before they are hashed."""


def fold_index(seeds: UInt32[Array, "*shape"], index: Int[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """32 random bits, or new seeds, for each pair of a seed and an index >= 0; the two broadcast."""
    return mix(seeds ^ ((index.astype(jnp.uint32) + jnp.uint32(1)) * jnp.uint32(_GOLDEN)))


def fold_places(
    seeds: UInt32[Array, "*shape"], shape: tuple[int, ...], *, but: int | None = None
) -> UInt32[Array, ...]:
    """32 random bits for each element of an array of a shape, by its place: an index is folded in axis by axis, the
    last innermost.

    The arrays hashed before the last axis are smaller by that axis, so the cost is about one hash per element.

    Args:
      seeds: as many axes as the shape has, each of its size or of size 1.
      shape: of the array.
      but: an axis whose index is left out, because the seeds tell its elements apart.
    """
    for axis, size in enumerate(shape):
        if axis != but:
            index = jnp.arange(size).reshape([-1 if other == axis else 1 for other in range(len(shape))])
            seeds = fold_index(seeds, index)
    return seeds


def gumbel(seeds: UInt32[Array, "*shape"], index: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Standard Gumbel noise -log(-log u) for each pair of a seed and an index, in float32; the two broadcast.

    u = 1 - (b + 1/2) / 2^32 of the bits b, but at least 2^-24. Rare large values are resolved best: they reach 22.9,
    where u itself in float32 would end at 16.6 and exclude every class of probability below 1e-7.
    """
    tail = jnp.minimum((fold_index(seeds, index).astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-tail))


def mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """A bijection of 32-bit integers in which every input bit moves about half of the output bits.

    The constants are `lowbias32` of Wellons 2018, "Prospecting for Hash Functions" (bias 0.17), after the finaliser
    of MurmurHash3.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
