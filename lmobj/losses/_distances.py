"""Lengths of vectors, and how near two of them are.

All are computed in `promote_types(dtype, float32)` over the last axis, and have finite gradients where vectors are zero
or coincide, too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmobj.errors import UserError

__all__ = ["cosine_distance", "cosine_similarity", "euclidean_distance", "squared_distance", "unit_vectors"]


def unit_vectors(x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """Vectors of length 1 that point the same way; a vector of zeros stays one.

        x / |x|

    Args:
      x: [..., D].

    Source: the definition. Divided by the largest number first, as in LAPACK's `dnrm2`, so that no square overflows.
    """
    x = precise(x)
    x = x / _scale(x)
    squares = jnp.sum(x * x, axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.where(squares > 0, squares, 1))


def cosine_similarity(a: Float[Array, "*N D"], b: Float[Array, "*N D"]) -> Float[Array, "*N"]:
    """Cosine of the angle between two vectors, in [-1, 1]; 0 where either is a vector of zeros.

        a . b / (|a| |b|)

    Args:
      a, b: [..., D], whose shapes broadcast.

    Raises:
      UserError: the last axes differ.

    Source: the definition; for texts Reimers and Gurevych 2019, "Sentence-BERT: Sentence Embeddings using Siamese
    BERT-Networks", section 3.
    """
    check_vectors("cosine_similarity", a, b)
    return jnp.sum(unit_vectors(a) * unit_vectors(b), axis=-1)


def cosine_distance(a: Float[Array, "*N D"], b: Float[Array, "*N D"]) -> Float[Array, "*N"]:
    """How far the angle between two vectors is from 0, in [0, 2], unreduced; 1 where either is a vector of zeros.

        1 - a . b / (|a| |b|)

    Between the last hidden states of a student and its teacher it is the cosine loss of DistilBERT.

    Args:
      a, b: [..., D], whose shapes broadcast.

    Raises:
      UserError: the last axes differ.

    Source: Sanh et al. 2019, "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter", section
    2, L_cos; in its code `torch.nn.CosineEmbeddingLoss` of similar pairs.
    """
    check_vectors("cosine_distance", a, b)
    return 1 - cosine_similarity(a, b)


def euclidean_distance(a: Float[Array, "*N D"], b: Float[Array, "*N D"]) -> Float[Array, "*N"]:
    """Length of the difference of two vectors; without gradient where the two are equal.

        |a - b| = sqrt( sum_d (a_d - b_d)^2 )

    Args:
      a, b: [..., D], whose shapes broadcast.

    Raises:
      UserError: the last axes differ.

    Source: the definition. Divided by the largest number first, as in LAPACK's `dnrm2`, so that no square overflows.
    """
    check_vectors("euclidean_distance", a, b)
    difference = precise(a) - precise(b)
    scale = _scale(difference)
    squares = jnp.sum(jnp.square(difference / scale), axis=-1)
    apart = squares > 0
    return jnp.where(apart, scale[..., 0] * jnp.sqrt(jnp.where(apart, squares, 1)), 0)


def squared_distance(a: Float[Array, "*N D"], b: Float[Array, "*N D"]) -> Float[Array, "*N"]:
    """|a - b|^2, for vectors that fit."""
    return jnp.sum(jnp.square(precise(a) - precise(b)), axis=-1)


def check_vectors(name: str, a: Float[Array, "*N D"], b: Float[Array, "*N D"]) -> None:
    """Raises UserError, for the function `name`, where the last axes differ."""
    if a.ndim < 1 or b.ndim < 1 or a.shape[-1] != b.shape[-1]:
        raise UserError(f"{name}: vectors {a.shape} and {b.shape} must have the same last axis.")


def _scale(x: Float[Array, "*N D"]) -> Float[Array, "*N 1"]:
    """The largest absolute value of each vector, 1 for one of zeros; a constant to differentiation."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    return jnp.where(largest > 0, largest, 1)


def precise(x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    """In float32 at least. What takes part in two distances goes through this once: its gradients add up before they
    are rounded to its own type."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
