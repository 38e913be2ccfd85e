"""Distances between vectors, and losses that want one of two distances larger than the other by a margin.

All are computed in `promote_types(dtype, float32)` over the last axis, unreduced, and have finite gradients where
vectors are zero or coincide, too.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmobj.errors import UserError

__all__ = [
    "cosine_similarity",
    "cosine_triplet_loss",
    "euclidean_distance",
    "euclidean_triplet_loss",
    "squared_euclidean_triplet_loss",
    "unit_vectors",
]


def unit_vectors(x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """x / |x| over the last axis; 0 for a vector of zeros."""
    x = _precise(x)
    # Divided by its largest number first, whose square may be out of range.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    x = x / jnp.where(largest > 0, largest, 1)
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.where(squares > 0, squares, 1))


def cosine_similarity(a: Float[Array, "*N D"], b: Float[Array, "*N D"]) -> Float[Array, "*N"]:
    """a . b / (|a| |b|), in [-1, 1]; 0 where either is a vector of zeros.

    Raises:
      UserError: the last axes differ.
    """
    _check("cosine_similarity", a, b)
    return jnp.sum(unit_vectors(a) * unit_vectors(b), axis=-1)


def euclidean_distance(a: Float[Array, "*N D"], b: Float[Array, "*N D"]) -> Float[Array, "*N"]:
    """|a - b|; without gradient where the two are equal.

    Raises:
      UserError: the last axes differ.
    """
    squares = _squared_distance("euclidean_distance", a, b)
    apart = squares > 0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1)), 0)


def cosine_triplet_loss(
    anchors: Float[Array, "*N D"], positives: Float[Array, "*N D"], negatives: Float[Array, "*N D"], *, margin: float
) -> Float[Array, "*N"]:
    """max(0, cos(a, n) - cos(a, p) + margin), unreduced: the distance is 1 - cos.

    Args:
      anchors, positives, negatives: [..., D] a, p and n, whose shapes broadcast.
      margin: above 0. The loss is in [0, 2 + margin].

    Raises:
      UserError: the last axes differ, or the margin is out of range.

    Source: the hinge of Schroff et al. 2015, "FaceNet: A Unified Embedding for Face Recognition and Clustering", eq. 2,
    on another distance. Between unit vectors it is half the squared Euclidean one.
    """
    _check_margin("cosine_triplet_loss", margin)
    return _hinge(-cosine_similarity(anchors, positives), -cosine_similarity(anchors, negatives), margin)


def euclidean_triplet_loss(
    anchors: Float[Array, "*N D"], positives: Float[Array, "*N D"], negatives: Float[Array, "*N D"], *, margin: float
) -> Float[Array, "*N"]:
    """max(0, |a - p| - |a - n| + margin), unreduced.

    Args:
      anchors, positives, negatives: [..., D] a, p and n, whose shapes broadcast.
      margin: above 0.

    Raises:
      UserError: the last axes differ, or the margin is out of range.

    Source: Reimers and Gurevych 2019, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks", section 3, with
    margin 1; `torch.nn.functional.triplet_margin_loss` adds 1e-6 to every difference.
    """
    _check_margin("euclidean_triplet_loss", margin)
    return _hinge(euclidean_distance(anchors, positives), euclidean_distance(anchors, negatives), margin)


def squared_euclidean_triplet_loss(
    anchors: Float[Array, "*N D"], positives: Float[Array, "*N D"], negatives: Float[Array, "*N D"], *, margin: float
) -> Float[Array, "*N"]:
    """max(0, |a - p|^2 - |a - n|^2 + margin), unreduced.

    Args:
      anchors, positives, negatives: [..., D] a, p and n, whose shapes broadcast.
      margin: above 0.

    Raises:
      UserError: the last axes differ, or the margin is out of range.

    Source: Schroff et al. 2015, "FaceNet: A Unified Embedding for Face Recognition and Clustering", eq. 2, there of
    unit vectors with margin 0.2.
    """
    name = "squared_euclidean_triplet_loss"
    _check_margin(name, margin)
    return _hinge(_squared_distance(name, anchors, positives), _squared_distance(name, anchors, negatives), margin)


def _hinge(near: Float[Array, "*N"], far: Float[Array, "*N"], margin: float) -> Float[Array, "*N"]:
    return jnp.maximum(near - far + margin, 0)


def _squared_distance(name: str, a: Float[Array, "*N D"], b: Float[Array, "*N D"]) -> Float[Array, "*N"]:
    _check(name, a, b)
    return jnp.sum(jnp.square(_precise(a) - _precise(b)), axis=-1)


def _precise(x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _check(name: str, a: Float[Array, "*N D"], b: Float[Array, "*N D"]) -> None:
    if a.ndim < 1 or b.ndim < 1 or a.shape[-1] != b.shape[-1]:
        raise UserError(f"{name}: vectors {a.shape} and {b.shape} must have the same last axis.")


def _check_margin(name: str, margin: float) -> None:
    if not 0 < margin < math.inf:
        raise UserError(f"{name}: margin is {margin}; it must be a finite number above 0.")
