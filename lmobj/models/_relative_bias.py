"""T5's relative positions: a trained bias of attention logits for each head and each bucket of distances.

    logit_ij = q_i . k_j + b_[bucket(j - i)]

Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", section 2.1.
One table serves all layers of a stack. Distances are those of places in the row: inside a packed document they are the
distances of its positions, which have no gaps, and other documents are not seen.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lmobj.models._layers import Embedding, Init

__all__ = ["RelativeBias", "relative_buckets"]


class RelativeBias(nnx.Module):
    """The biases by bucket and head."""

    def __init__(
        self,
        heads: int,
        *,
        buckets: int,
        distance: int,
        bidirectional: bool,
        init: Init,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.table = Embedding(buckets, heads, axes=(None, "heads"), init=init, param_dtype=param_dtype, rngs=rngs)
        self.buckets, self.distance, self.bidirectional = buckets, distance, bidirectional

    def row(self, length: int, dtype: jnp.dtype) -> Float[Array, "1 H L L"]:
        """The bias of a row over itself."""
        # Entry (i, j) is number (j - i) mod 2 L of the distances 0 .. L - 1, -L .. -1: copies of these, cut into rows
        # that are shorter by one, put each query's distances one place further.
        distances = np.concatenate([np.arange(length), np.arange(-length, 0)])
        by_distance = self._of(distances, dtype).T
        copies = jnp.tile(by_distance, (1, length))[:, : length * (2 * length - 1)]
        return copies.reshape(-1, length, 2 * length - 1)[None, :, :, :length]

    def cached(self, positions: Int[Array, "B T"], slots: int, dtype: jnp.dtype) -> Float[Array, "B H T S"]:
        """The bias of new tokens over a cache, whose slots are positions."""
        by_distance = self._of(np.arange(-slots, slots), dtype)
        numbers = jnp.arange(slots) - positions[:, :, None] + slots
        return jnp.moveaxis(jnp.take(by_distance, numbers, axis=0, mode="clip"), -1, 1)

    def _of(self, distances: np.ndarray, dtype: jnp.dtype) -> Float[Array, "P H"]:
        numbers = relative_buckets(
            distances, buckets=self.buckets, distance=self.distance, bidirectional=self.bidirectional
        )
        return self.table(jnp.asarray(numbers), dtype)


def relative_buckets(distances: np.ndarray, *, buckets: int, distance: int, bidirectional: bool) -> np.ndarray:
    """The bucket of each distance key - query.

    With both directions, half of the buckets are for keys behind the query and half for those ahead; else keys ahead
    share bucket 0 with the query itself. Of a direction's n buckets the first n / 2 hold one distance each, the others
    are as wide as the logarithm makes them, up to `distance`, and the last holds all beyond.

    Source: `_relative_position_bucket` in Mesh TensorFlow's transformer_layers.py, whose float32 this keeps.
    """
    reach = np.abs(distances) if bidirectional else np.maximum(-distances, 0)
    of_direction = buckets // 2 if bidirectional else buckets
    exact = of_direction // 2
    ratio = np.log(np.maximum(reach, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(distance / exact))
    far = exact + (ratio * np.float32(of_direction - exact)).astype(np.int32)
    number = np.where(reach < exact, reach, np.minimum(far, of_direction - 1))
    ahead = of_direction if bidirectional else 0
    return (number + np.where(distances > 0, ahead, 0)).astype(np.int32)
