"""Losses of one class among many, a token of the vocabulary for one, and the statistics that they are made of."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmobj.errors import UserError

__all__ = [
    "LogitStats",
    "below_largest",
    "check_classes",
    "label_smoothed_nll",
    "logit_stats",
    "nll",
    "offtarget_smoothed_nll",
    "offtarget_smoothing_entropy",
    "token_nll",
    "z_loss",
]


class LogitStats(NamedTuple):
    """Statistics over the vocabulary of each token's logits, in float32 or wider. All have the targets' shape."""

    target_logit: Float[Array, "*N"]
    """The target's logit; -inf for a target that is no existing class."""
    logsumexp: Float[Array, "*N"]
    """log sum_v exp(logits[v]) over the classes that exist."""
    sum_logits: Float[Array, "*N"]
    """sum_v logits[v] over the classes that exist."""
    max_logit: Float[Array, "*N"]
    """The highest logit of a class that exists; a constant to differentiation."""

    @property
    def correct(self) -> Bool[Array, "*N"]:
        """Whether no class has a higher logit than the target: top-1 accuracy, where a tie counts as correct."""
        return self.target_logit >= self.max_logit


def logit_stats(
    logits: Float[Array, "*N V"],
    targets: Int[Array, "*N"],
    *,
    vocab_mask: Bool[Array, " V"] | None = None,
    vocab_size: int | None = None,
) -> LogitStats:
    """The statistics of logits at hand, in `promote_types(logits, float32)`.

        logits[target],  log sum_v exp(logits[v]),  sum_v logits[v],  max_v logits[v]

    Args:
      logits: [..., V].
      targets: [...] class ids.
      vocab_mask: [V] (or [..., V]), True for the classes that exist.
      vocab_size: the number of real classes where the logits are padded.

    Returns:
      `LogitStats`. A target that is no existing class has a `target_logit` of -inf, so that its NLL is +inf.

    Raises:
      UserError: shapes or types that do not fit.

    Source: Blanchard et al. 2021, "Accurately computing the log-sum-exp and softmax functions", for the
    logarithm of a sum that does not overflow.
    """
    check_classes("logit_stats", logits, targets)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    classes = jnp.arange(logits.shape[-1])
    exists = jnp.ones_like(classes, bool) if vocab_mask is None else vocab_mask
    if vocab_size is not None:
        exists &= classes < vocab_size
    inside = logits if vocab_mask is None and vocab_size is None else jnp.where(exists, logits, -jnp.inf)
    index = jnp.clip(targets, 0, logits.shape[-1] - 1)
    target_logit = jnp.take_along_axis(inside, index[..., None], axis=-1)[..., 0]
    return LogitStats(
        target_logit=jnp.where(targets == index, target_logit, -jnp.inf),
        logsumexp=jax.nn.logsumexp(inside, axis=-1),
        sum_logits=jnp.sum(jnp.where(exists, logits, 0), axis=-1),
        max_logit=jax.lax.stop_gradient(jnp.max(inside, axis=-1)),
    )


def token_nll(logits: Float[Array, "*N V"], targets: Int[Array, "*N"]) -> Float[Array, "*N"]:
    """Negative log-likelihood of each target in nats, unreduced.

        -log p_t = logsumexp(logits) - logits[t],  p = softmax(logits)

    Computed in `promote_types(logits, float32)`, from how far logits are below the largest: so it is as exact for
    large ones. Where logits come from a table, `linear_token_nll` does without them.

    Args:
      logits: [..., V] unnormalised log-probabilities.
      targets: [...] t, class ids; an id outside 0..V-1 has an NLL of +inf.

    Raises:
      UserError: shapes or types that do not fit.

    Source: Bishop 2006, "Pattern Recognition and Machine Learning", eq. 4.108; of the next token Bengio et al. 2003, "A
    Neural Probabilistic Language Model", section 2.
    """
    check_classes("token_nll", logits, targets)
    return nll(logit_stats(below_largest(logits), targets))


def nll(stats: LogitStats) -> Float[Array, "*N"]:
    """Negative log-likelihood of each target in nats, from statistics.

        logsumexp - target_logit

    Args:
      stats: of `logit_stats` or `linear_logit_stats`.

    Source: as for `token_nll`.
    """
    return stats.logsumexp - stats.target_logit


def label_smoothed_nll(stats: LogitStats, *, epsilon: float, num_classes: int | Int[Array, ""]) -> Float[Array, "*N"]:
    """Cross-entropy in nats with epsilon / V of the target distribution on every class, the target included.

        -sum_v q_v log p_v = (1 - epsilon) nll + epsilon (logsumexp - sum_logits / V)
        q_v = (1 - epsilon) [v = t] + epsilon / V

    Args:
      stats: statistics over V classes.
      epsilon: in [0, 1).
      num_classes: V, the number of classes that exist.

    Raises:
      UserError: epsilon out of range.

    Source: Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision",
    https://arxiv.org/abs/1512.00567, section 7; `torch.nn.functional.cross_entropy(label_smoothing=...)`.
    """
    _check_epsilon("label_smoothed_nll", epsilon)
    return (1 - epsilon) * nll(stats) + epsilon * (stats.logsumexp - stats.sum_logits / num_classes)


def offtarget_smoothed_nll(
    stats: LogitStats, *, epsilon: float, num_classes: int | Int[Array, ""]
) -> Float[Array, "*N"]:
    """Cross-entropy in nats with 1 - epsilon of the target distribution on the target, the rest on the other classes.

        -sum_v q_v log p_v = (1 - epsilon - low) nll + low (V logsumexp - sum_logits),  low = epsilon / (V - 1)
        q_t = 1 - epsilon,  q_v = low for every other v

    t5x also subtracts the entropy of q, so that a perfect fit costs 0: subtract `offtarget_smoothing_entropy` for that.

    Args:
      stats: statistics over V classes.
      epsilon: in [0, 1).
      num_classes: V, the number of classes that exist; at least 2.

    Raises:
      UserError: epsilon out of range.

    Source: `label_smoothed_nll_loss` of fairseq and `compute_weighted_cross_entropy` of t5x.
    """
    _check_epsilon("offtarget_smoothed_nll", epsilon)
    low = epsilon / (num_classes - 1)
    return (1 - epsilon - low) * nll(stats) + low * (num_classes * stats.logsumexp - stats.sum_logits)


def offtarget_smoothing_entropy(*, epsilon: float, num_classes: int) -> float:
    """Entropy in nats of the target distribution of `offtarget_smoothed_nll`, its lowest possible value.

        -(1 - epsilon) log(1 - epsilon) - epsilon log(epsilon / (V - 1))

    Args:
      epsilon: in [0, 1).
      num_classes: V, the number of classes that exist; at least 2.

    Raises:
      UserError: epsilon out of range.

    Source: `compute_weighted_cross_entropy` of t5x, which adds 1e-20 inside the second logarithm; here 0 log 0 = 0.
    """
    _check_epsilon("offtarget_smoothing_entropy", epsilon)
    if epsilon == 0:
        return 0.0
    return -(1 - epsilon) * math.log(1 - epsilon) - epsilon * math.log(epsilon / (num_classes - 1))


def z_loss(stats: LogitStats) -> Float[Array, "*N"]:
    """What keeps the softmax's normaliser near 1; T5X and PaLM add 1e-4 of it to the NLL.

        logsumexp^2

    With a coefficient z the gradient of nll + z z_loss with respect to the logits is
    (1 + 2 z logsumexp) softmax - [v = t].

    Args:
      stats: of `logit_stats` or `linear_logit_stats`.

    Source: Chowdhery et al. 2022, "PaLM: Scaling Language Modeling with Pathways", https://arxiv.org/abs/2204.02311,
    section 5.
    """
    return jnp.square(stats.logsumexp)


def below_largest(logits: Float[Array, "*N V"]) -> Float[Array, "*N V"]:
    """logits - max logits, in `promote_types(logits, float32)`: what losses that depend on differences alone are exact
    with. The largest is a constant to differentiation."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))


def check_classes(name: str, logits: Array, targets: Array) -> None:
    """Raises UserError, for the function `name`, where there is not one integer for each row of logits."""
    if logits.ndim < 1 or targets.shape != logits.shape[:-1] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise UserError(
            f"{name}: targets must be integers of shape {logits.shape[:-1]} for logits of shape {logits.shape}, "
            f"not {targets.dtype}{list(targets.shape)}."
        )


def _check_epsilon(name: str, epsilon: float) -> None:
    if not 0 <= epsilon < 1:
        raise UserError(f"{name}: epsilon is {epsilon}; it must be at least 0 and below 1.")
