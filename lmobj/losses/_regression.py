"""Losses of numbers: how far a prediction is from its target."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmobj.errors import UserError

__all__ = ["huber_loss", "squared_error"]


def squared_error(
    predictions: Float[Array, "*N"], targets: Float[Array, "*N"] | Int[Array, "*N"]
) -> Float[Array, "*N"]:
    """Square of the difference, unreduced, in the square of the targets' unit.

        (prediction - target)^2

    Computed in the common type of both and float32. Between hidden states or attention scores of a student and its
    teacher it is the loss of TinyBERT.

    Args:
      predictions: [...].
      targets: [...].

    Raises:
      UserError: the shapes differ.

    Source: twice the summand of Bishop 2006, "Pattern Recognition and Machine Learning", eq. 1.2.
    """
    return jnp.square(_error("squared_error", predictions, targets))


def huber_loss(
    predictions: Float[Array, "*N"], targets: Float[Array, "*N"] | Int[Array, "*N"], *, delta: float = 1.0
) -> Float[Array, "*N"]:
    """Half the squared error of small errors, linear in large ones, unreduced; its slope is at most delta.

        e^2 / 2                      where |e| <= delta,  e = prediction - target
        delta (|e| - delta / 2)      elsewhere

    Computed in the common type of both and float32. For a large delta it is half the `squared_error`; for a small one
    delta times the absolute error.

    Args:
      predictions: [...].
      targets: [...].
      delta: above 0, in the targets' unit.

    Raises:
      UserError: the shapes differ, or delta is out of range.

    Source: Huber 1964, "Robust Estimation of a Location Parameter", whose k is delta.
    """
    if not 0 < delta < math.inf:
        raise UserError(f"huber_loss: delta is {delta}; it must be a finite number above 0.")
    size = jnp.abs(_error("huber_loss", predictions, targets))
    # One formula for both parts, so that neither overflows where the other holds.
    near = jnp.minimum(size, delta)
    return near * (size - near / 2)


def _error(name: str, predictions: Array, targets: Array) -> Float[Array, "*N"]:
    if predictions.shape != targets.shape:
        raise UserError(
            f"{name}: predictions {predictions.shape} and targets {targets.shape} must have the same shape."
        )
    kind = jnp.promote_types(predictions.dtype, jnp.float32)
    if jnp.issubdtype(targets.dtype, jnp.floating):
        kind = jnp.promote_types(kind, targets.dtype)
    return predictions.astype(kind) - targets.astype(kind)
