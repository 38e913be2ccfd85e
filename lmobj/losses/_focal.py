"""Focal losses: the NLL with less weight on what is already classified well.

The weight (1 - p)^gamma is exp(gamma log(1 - p)), where log(1 - p) comes from the logits and not from p: for p near 1
neither it nor its gradient, which for gamma < 1 grows without bound in p, is lost.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmobj.errors import UserError
from lmobj.losses._binary import check_binary
from lmobj.losses._logit_stats import below_largest, check_classes, token_nll

__all__ = ["binary_focal_loss", "focal_loss"]


def binary_focal_loss(
    logits: Float[Array, "*N"],
    labels: Bool[Array, "*N"] | Int[Array, "*N"] | Float[Array, "*N"],
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
) -> Float[Array, "*N"]:
    """Focal loss in nats of independent yes-or-no labels, unreduced.

        -y alpha (1 - p)^gamma log p - (1 - y) (1 - alpha) p^gamma log(1 - p),  p = sigmoid(x)

    where without alpha both its factors are 1. Computed in `promote_types(logits, float32)`. With gamma 0 and without
    alpha it is `binary_nll`.

    Args:
      logits: [...] x, the log-odds of the label 1.
      labels: [...] y: 0 or 1; the loss of a probability between is the mean over labels drawn with it.
      gamma: at least 0.
      alpha: weight of label 1 in (0, 1), 1 - alpha being that of label 0; the paper's best is 0.25 with gamma 2.

    Raises:
      UserError: the shapes differ, or gamma or alpha is out of range.

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", eq. 5; without alpha eq. 4.
    """
    check_binary("binary_focal_loss", logits, labels)
    _check_gamma("binary_focal_loss", gamma)
    if alpha is not None and not 0 < alpha < 1:
        raise UserError(f"binary_focal_loss: alpha is {alpha}; it must be above 0 and below 1, or None.")
    x = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    y = labels.astype(x.dtype)
    one, zero = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    nll_one, nll_zero = jax.nn.softplus(-x), jax.nn.softplus(x)
    return one * y * jnp.exp(-gamma * nll_zero) * nll_one + zero * (1 - y) * jnp.exp(-gamma * nll_one) * nll_zero


def focal_loss(logits: Float[Array, "*N V"], targets: Int[Array, "*N"], *, gamma: float = 2.0) -> Float[Array, "*N"]:
    """Focal loss in nats of one class among several, unreduced.

        -(1 - p_t)^gamma log p_t,  p = softmax(logits)

    Computed in `promote_types(logits, float32)`. With gamma 0 it is `token_nll`. The paper's alpha is a weight for each
    class, which is the caller's to multiply with: `alpha[targets] * focal_loss(...)`. Of two classes it is the
    `binary_focal_loss` of the difference of their logits.

    Args:
      logits: [..., V] unnormalised log-probabilities; -inf for a class that does not exist.
      targets: [...] t, class ids; an id outside 0..V-1 has a loss of +inf.
      gamma: at least 0.

    Raises:
      UserError: shapes or types that do not fit, or gamma is out of range.

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", eq. 4, there of two classes.
    """
    _check_gamma("focal_loss", gamma)
    check_classes("focal_loss", logits, targets)
    logits = below_largest(logits)
    others = jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], -jnp.inf, logits)
    alone = jnp.all(jnp.isneginf(others), axis=-1)  # no other class: p_t = 1, and log(1 - p_t) would have no gradient
    rest = jax.nn.logsumexp(jnp.where(alone[..., None], 0, others), axis=-1) - jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(alone, 0**gamma, jnp.exp(gamma * jnp.where(alone, 0, rest))) * token_nll(logits, targets)


def _check_gamma(name: str, gamma: float) -> None:
    if not 0 <= gamma < math.inf:
        raise UserError(f"{name}: gamma is {gamma}; it must be a finite number, at least 0.")
