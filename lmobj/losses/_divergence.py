"""Losses of a distribution: a student's softmax against the probabilities of a teacher, or any other soft targets.

All are sums over the last axis in nats, from log-softmax, in the common type of both arrays and float32. A class that
both rule out (a logit of -inf, a probability of 0) counts for nothing: 0 log 0 = 0. Gradients reach both arrays, so
stop the teacher's: `jax.lax.stop_gradient(teacher_logits)`.

With a temperature T both softmaxes are of logits / T, and gradients are some T^2 times smaller; Hinton et al. 2015,
section 2, and DistilBERT multiply the loss by T^2, GKD does not. That factor is the caller's.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmobj.errors import UserError
from lmobj.losses._logit_stats import below_largest

__all__ = ["forward_kl", "jensen_shannon", "reverse_kl", "soft_target_nll"]


def soft_target_nll(logits: Float[Array, "*N V"], probabilities: Float[Array, "*N V"]) -> Float[Array, "*N"]:
    """Cross-entropy in nats of a softmax to target probabilities, unreduced: `token_nll` where those are one-hot.

        -sum_v q_v log p_v,  p = softmax(logits)

    It is `forward_kl` plus the entropy of q, which does not depend on the logits.

    Args:
      logits: [..., V] unnormalised log-probabilities.
      probabilities: [..., V] q, at least 0. They are taken as they are: where they sum to c, the loss is c times that
        of q / c.

    Raises:
      UserError: the shapes differ.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2; Sanh et al. 2019,
    "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter", section 2, L_ce.
    """
    _check_shapes("soft_target_nll", logits, probabilities, "probabilities")
    kind = _common(logits, probabilities)
    log_p, q = jax.nn.log_softmax(logits.astype(kind), axis=-1), probabilities.astype(kind)
    return -jnp.sum(q * jnp.where((q == 0) & jnp.isneginf(log_p), 0, log_p), axis=-1)


def forward_kl(
    logits: Float[Array, "*N V"], teacher_logits: Float[Array, "*N V"], *, temperature: float = 1.0
) -> Float[Array, "*N"]:
    """Kullback-Leibler divergence KL(teacher || student) in nats, unreduced: the student covers all that is likely.

        sum_v t_v (log t_v - log s_v),  t = softmax(teacher_logits / T),  s = softmax(logits / T)

    The loss of distillation in DistilBERT is T^2 times this. It is +inf where the student rules out a class that the
    teacher does not.

    Args:
      logits: [..., V] of the student.
      teacher_logits: [..., V].
      temperature: T, above 0.

    Raises:
      UserError: the shapes differ, or the temperature is out of range.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2 (there the cross-entropy,
    which has the same gradient); `torch.nn.functional.kl_div(log s, t)`.
    """
    log_s, log_t = _log_softmaxes("forward_kl", logits, teacher_logits, temperature)
    return _kl(log_t, log_s)


def reverse_kl(
    logits: Float[Array, "*N V"], teacher_logits: Float[Array, "*N V"], *, temperature: float = 1.0
) -> Float[Array, "*N"]:
    """Kullback-Leibler divergence KL(student || teacher) in nats, unreduced: the student avoids what is unlikely.

        sum_v s_v (log s_v - log t_v),  t = softmax(teacher_logits / T),  s = softmax(logits / T)

    It is +inf where the teacher rules out a class that the student does not.

    Args:
      logits: [..., V] of the student.
      teacher_logits: [..., V].
      temperature: T, above 0.

    Raises:
      UserError: the shapes differ, or the temperature is out of range.

    Source: Gu et al. 2024, "MiniLLM: Knowledge Distillation of Large Language Models", section 2.1, there of whole
    texts; of tokens Agarwal et al. 2024, "On-Policy Distillation of Language Models: Learning from Self-Generated
    Mistakes", section 2.
    """
    log_s, log_t = _log_softmaxes("reverse_kl", logits, teacher_logits, temperature)
    return _kl(log_s, log_t)


def jensen_shannon(
    logits: Float[Array, "*N V"],
    teacher_logits: Float[Array, "*N V"],
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Float[Array, "*N"]:
    """Generalised Jensen-Shannon divergence in nats, unreduced: between forward and reverse KL, and never infinite.

        beta KL(t || m) + (1 - beta) KL(s || m),  m = beta t + (1 - beta) s,
        t = softmax(teacher_logits / T),  s = softmax(logits / T)

    At most -beta log beta - (1 - beta) log(1 - beta), where t and s share no class; with beta 1/2 that is log 2, and
    the divergence is symmetric. Near 0 it is beta times `forward_kl`, near 1 it is 1 - beta times `reverse_kl`, and at
    either it would be 0 with a gradient of 0: take those functions there, as the code of GKD does.

    Args:
      logits: [..., V] of the student.
      teacher_logits: [..., V].
      beta: weight of the teacher in the mixture m, in (0, 1).
      temperature: T, above 0.

    Raises:
      UserError: the shapes differ, or beta or the temperature is out of range.

    Source: Agarwal et al. 2024, "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    section 2; Lin 1991, "Divergence Measures Based on the Shannon Entropy", section 4.
    """
    if not 0 < beta < 1:
        raise UserError(
            f"jensen_shannon: beta is {beta}; it must be above 0 and below 1 (forward_kl stands for 0, reverse_kl for "
            "1)."
        )
    log_s, log_t = _log_softmaxes("jensen_shannon", logits, teacher_logits, temperature)
    # Where both are -inf, so is log m, but logaddexp has no gradient there; the terms count for nothing anyhow.
    absent = jnp.isneginf(log_t) & jnp.isneginf(log_s)
    of_teacher, of_student = (jnp.where(absent, 0, x) for x in (log_t, log_s))
    log_m = jnp.logaddexp(math.log(beta) + of_teacher, math.log1p(-beta) + of_student)
    return beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m)


def _kl(log_p: Float[Array, "*N V"], log_q: Float[Array, "*N V"]) -> Float[Array, "*N"]:
    """sum_v p (log p - log q), where classes with p = 0, be it by underflow, count for nothing."""
    p = jnp.exp(log_p)
    return jnp.sum(p * jnp.where(p == 0, 0, log_p - log_q), axis=-1)


def _log_softmaxes(
    name: str, logits: Array, teacher_logits: Array, temperature: float
) -> tuple[Float[Array, "*N V"], Float[Array, "*N V"]]:
    _check_shapes(name, logits, teacher_logits, "teacher_logits")
    if isinstance(temperature, int | float) and not 0 < temperature < math.inf:
        raise UserError(f"{name}: temperature is {temperature}; it must be a finite number above 0.")
    kind = _common(logits, teacher_logits)
    return _log_softmax(logits.astype(kind), temperature), _log_softmax(teacher_logits.astype(kind), temperature)


def _log_softmax(logits: Float[Array, "*N V"], temperature: float) -> Float[Array, "*N V"]:
    """Of logits / temperature, divided after the largest is taken away: rounding a quotient costs by its size."""
    return jax.nn.log_softmax(below_largest(logits) / temperature, axis=-1)


def _common(x: Array, y: Array) -> jnp.dtype:
    return jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)


def _check_shapes(name: str, logits: Array, other: Array, key: str) -> None:
    if logits.ndim < 1 or logits.shape != other.shape:
        raise UserError(f"{name}: logits {logits.shape} and {key} {other.shape} must have the same shape, [..., V].")
