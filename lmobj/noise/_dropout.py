"""Dropout whose mask is a hash of where an element stands, so that no generator state is needed.

The keep bit of element (i_1, ..., i_n) of a row is a function of (row seed, layer, site, i_1, ..., i_n) alone: the
indices are hashed in one axis after the other, the last axis innermost. It therefore does not depend on the array's
sizes (padding), on the batch the row is in, on the mesh, or on resume. The arrays hashed before the last axis are
smaller by that axis, so the cost is about one integer hash per element.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from lmobj.noise._hash import fold_index, fold_places, mix

__all__ = ["dropout"]


def dropout(
    x: Float[Array, "*shape"],
    rate: float,
    seeds: UInt32[Array, " B"],
    *,
    layer: Int[Array, ""] | int,
    site: int,
    batch_axis: int = 0,
) -> Float[Array, "*shape"]:
    """Zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate).

    Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", in the inverted form.
    The hash has 32 bits: two rows of the last axis in 2^32 share a mask, and `rate` is exact to 2^-32.

    Args:
      x: array with rows along `batch_axis`.
      rate: probability of zero, in [0, 1); 0 returns `x`.
      seeds: one 32-bit seed per row (`batch.dropout_seeds`).
      layer: index of the layer, may be traced; tells the layers of a scan apart.
      site: which dropout of the layer this is, a small static number.
      batch_axis: axis of `x` that the seeds belong to.

    Raises:
      ValueError: `rate` is outside [0, 1), or the seeds do not fit the axis.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout: the rate is {rate}; it must be in [0, 1).")
    if seeds.shape != (x.shape[batch_axis],):
        raise ValueError(f"dropout: {seeds.shape} seeds for {x.shape[batch_axis]} rows; give one seed per row.")
    if rate == 0:
        return x
    bits = _bits(x.shape, seeds, layer, site, batch_axis % x.ndim)
    keep = bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(keep, x * (1 / (1 - rate)), jnp.zeros((), x.dtype))


def _bits(
    shape: tuple[int, ...], seeds: UInt32[Array, " B"], layer: Int[Array, ""] | int, site: int, batch_axis: int
) -> UInt32[Array, "*shape"]:
    """32 random bits per element."""
    address = jnp.asarray(layer).astype(jnp.uint32) * jnp.uint32(256) + jnp.uint32(site)
    state = mix(seeds ^ fold_index(jnp.uint32(0), address))
    state = state.reshape([-1 if axis == batch_axis else 1 for axis in range(len(shape))])
    return fold_places(state, shape, but=batch_axis)
