"""Losses of pairs: two vectors that are similar or not, or two scores of which one is to be higher.

All are computed in `promote_types(dtype, float32)` and have finite gradients where vectors are zero or coincide, too.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmobj.errors import UserError
from lmobj.losses._distances import check_vectors, cosine_distance, cosine_similarity, euclidean_distance

__all__ = [
    "cosine_contrastive_loss",
    "cosine_embedding_loss",
    "euclidean_contrastive_loss",
    "margin_ranking_loss",
]


def euclidean_contrastive_loss(
    a: Float[Array, "*N D"], b: Float[Array, "*N D"], similar: Bool[Array, "*N"] | Int[Array, "*N"], *, margin: float
) -> Float[Array, "*N"]:
    """Contrastive loss of pairs on Euclidean distance, unreduced: similar ones attract, others repel up to a margin.

        y d^2 / 2 + (1 - y) max(0, margin - d)^2 / 2,  d = |a - b|

    A pair that is not similar and coincides costs margin^2 / 2 and has no gradient: it has no direction to part in.

    Args:
      a, b: [..., D].
      similar: [...] y: 1 or True for a pair that is similar, 0 or False for one that is not.
      margin: above 0.

    Raises:
      UserError: shapes or types that do not fit, or the margin is out of range.

    Source: Hadsell et al. 2006, "Dimensionality Reduction by Learning an Invariant Mapping", eq. 4, whose Y is 1 - y.
    """
    _check("euclidean_contrastive_loss", a, b, similar, margin, lowest=0)
    return _contrastive(euclidean_distance(a, b), similar, margin)


def cosine_contrastive_loss(
    a: Float[Array, "*N D"], b: Float[Array, "*N D"], similar: Bool[Array, "*N"] | Int[Array, "*N"], *, margin: float
) -> Float[Array, "*N"]:
    """Contrastive loss of pairs on cosine distance, unreduced: similar ones attract, others repel up to a margin.

        y d^2 / 2 + (1 - y) max(0, margin - d)^2 / 2,  d = 1 - cos(a, b)

    Args:
      a, b: [..., D].
      similar: [...] y: 1 or True for a pair that is similar, 0 or False for one that is not.
      margin: above 0; distances are at most 2.

    Raises:
      UserError: shapes or types that do not fit, or the margin is out of range.

    Source: Hadsell et al. 2006, "Dimensionality Reduction by Learning an Invariant Mapping", eq. 4, on another
    distance, as the library sentence-transformers has it by default, with margin 0.5.
    """
    _check("cosine_contrastive_loss", a, b, similar, margin, lowest=0)
    return _contrastive(cosine_distance(a, b), similar, margin)


def cosine_embedding_loss(
    a: Float[Array, "*N D"],
    b: Float[Array, "*N D"],
    similar: Bool[Array, "*N"] | Int[Array, "*N"],
    *,
    margin: float = 0.0,
) -> Float[Array, "*N"]:
    """Similar pairs are to have a cosine of 1, others one of at most the margin, unreduced.

        y (1 - cos(a, b)) + (1 - y) max(0, cos(a, b) - margin)

    Args:
      a, b: [..., D].
      similar: [...] y: 1 or True for a pair that is similar, 0 or False for one that is not (PyTorch: 1 and -1).
      margin: in (-1, 1); 0 asks for a right angle.

    Raises:
      UserError: shapes or types that do not fit, or the margin is out of range.

    Source: `torch.nn.functional.cosine_embedding_loss`, which adds 1e-12 to the square of each length.
    """
    _check("cosine_embedding_loss", a, b, similar, margin, lowest=-1, highest=1)
    cosine = cosine_similarity(a, b)
    return jnp.where(similar.astype(bool), 1 - cosine, jnp.maximum(cosine - margin, 0))


def margin_ranking_loss(
    higher: Float[Array, "*N"], lower: Float[Array, "*N"], *, margin: float = 0.0
) -> Float[Array, "*N"]:
    """Hinge of two scores, unreduced: one is to be higher than the other, by a margin.

        max(0, lower - higher + margin)

    Args:
      higher: [...] the score that is to be higher.
      lower: [...] the score that is to be lower.
      margin: at least 0.

    Raises:
      UserError: the shapes differ, or the margin is out of range.

    Source: Collobert et al. 2011, "Natural Language Processing (Almost) from Scratch", section 4.2, with margin 1, for
    a window of text and the same with another word; `torch.nn.functional.margin_ranking_loss` with a target of 1.
    """
    if higher.shape != lower.shape:
        raise UserError(f"margin_ranking_loss: scores {higher.shape} and {lower.shape} must have the same shape.")
    if not 0 <= margin < math.inf:
        raise UserError(f"margin_ranking_loss: margin is {margin}; it must be a finite number, at least 0.")
    kind = jnp.promote_types(jnp.promote_types(higher.dtype, lower.dtype), jnp.float32)
    return jnp.maximum(lower.astype(kind) - higher.astype(kind) + margin, 0)


def _contrastive(distance: Float[Array, "*N"], similar: Array, margin: float) -> Float[Array, "*N"]:
    return jnp.square(jnp.where(similar.astype(bool), distance, jnp.maximum(margin - distance, 0))) / 2


def _check(
    name: str, a: Array, b: Array, similar: Array, margin: float, *, lowest: float, highest: float = math.inf
) -> None:
    check_vectors(name, a, b)
    shape = jnp.broadcast_shapes(a.shape, b.shape)[:-1]
    if similar.shape != shape or jnp.issubdtype(similar.dtype, jnp.floating):
        raise UserError(
            f"{name}: similar must be booleans or integers of shape {shape}, not {similar.dtype}{list(similar.shape)}."
        )
    if not lowest < margin < highest:
        top = "" if highest == math.inf else f" and below {highest}"
        raise UserError(f"{name}: margin is {margin}; it must be a finite number above {lowest}{top}.")
