"""Losses of triplets: an anchor is to be nearer to its positive than to its negative, by a margin."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from lmobj.errors import UserError
from lmobj.losses._distances import check_vectors, cosine_similarity, euclidean_distance, precise, squared_distance

__all__ = ["cosine_triplet_loss", "euclidean_triplet_loss", "squared_euclidean_triplet_loss"]


def cosine_triplet_loss(
    anchors: Float[Array, "*N D"], positives: Float[Array, "*N D"], negatives: Float[Array, "*N D"], *, margin: float
) -> Float[Array, "*N"]:
    """Hinge of a triplet on cosine distance, 1 - cos, unreduced, in [0, 2 + margin].

        max(0, cos(a, n) - cos(a, p) + margin)

    Args:
      anchors, positives, negatives: [..., D] a, p and n, whose shapes broadcast.
      margin: above 0.

    Raises:
      UserError: the last axes differ, or the margin is out of range.

    Source: the hinge of Schroff et al. 2015, "FaceNet: A Unified Embedding for Face Recognition and Clustering", eq. 2,
    on another distance. Between unit vectors it is half the squared Euclidean one.
    """
    _check("cosine_triplet_loss", anchors, positives, negatives, margin)
    anchors = precise(anchors)
    return _hinge(-cosine_similarity(anchors, positives), -cosine_similarity(anchors, negatives), margin)


def euclidean_triplet_loss(
    anchors: Float[Array, "*N D"], positives: Float[Array, "*N D"], negatives: Float[Array, "*N D"], *, margin: float
) -> Float[Array, "*N"]:
    """Hinge of a triplet on Euclidean distance, unreduced.

        max(0, |a - p| - |a - n| + margin)

    Args:
      anchors, positives, negatives: [..., D] a, p and n, whose shapes broadcast.
      margin: above 0.

    Raises:
      UserError: the last axes differ, or the margin is out of range.

    Source: Reimers and Gurevych 2019, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks", section 3, with
    margin 1; `torch.nn.functional.triplet_margin_loss` adds 1e-6 to every difference.
    """
    _check("euclidean_triplet_loss", anchors, positives, negatives, margin)
    anchors = precise(anchors)
    return _hinge(euclidean_distance(anchors, positives), euclidean_distance(anchors, negatives), margin)


def squared_euclidean_triplet_loss(
    anchors: Float[Array, "*N D"], positives: Float[Array, "*N D"], negatives: Float[Array, "*N D"], *, margin: float
) -> Float[Array, "*N"]:
    """Hinge of a triplet on squared Euclidean distance, unreduced.

        max(0, |a - p|^2 - |a - n|^2 + margin)

    Args:
      anchors, positives, negatives: [..., D] a, p and n, whose shapes broadcast.
      margin: above 0.

    Raises:
      UserError: the last axes differ, or the margin is out of range.

    Source: Schroff et al. 2015, "FaceNet: A Unified Embedding for Face Recognition and Clustering", eq. 2, there of
    unit vectors with margin 0.2.
    """
    _check("squared_euclidean_triplet_loss", anchors, positives, negatives, margin)
    anchors = precise(anchors)
    return _hinge(squared_distance(anchors, positives), squared_distance(anchors, negatives), margin)


def _hinge(near: Float[Array, "*N"], far: Float[Array, "*N"], margin: float) -> Float[Array, "*N"]:
    return jnp.maximum(near - far + margin, 0)


def _check(name: str, anchors: Array, positives: Array, negatives: Array, margin: float) -> None:
    if not 0 < margin < math.inf:
        raise UserError(f"{name}: margin is {margin}; it must be a finite number above 0.")
    check_vectors(name, anchors, positives)
    check_vectors(name, anchors, negatives)
