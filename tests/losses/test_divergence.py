"""Soft targets, KL both ways and Jensen-Shannon: by hand, identities and limits, gradients and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lmobj.errors import UserError
from lmobj.losses import forward_kl, jensen_shannon, reverse_kl, soft_target_nll, token_nll

HALVES, QUARTERS = jnp.log(jnp.asarray([[0.5, 0.5]])), jnp.log(jnp.asarray([[0.25, 0.75]]))
INF = math.inf
KL_OF_HALVES = math.log(4 / 3) / 2
"""KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 log 2 + 1/2 log 2/3."""
KL_OF_QUARTERS = math.log(1 / 2) / 4 + 3 * math.log(3 / 2) / 4
WITH_TEACHER = [forward_kl, reverse_kl, jensen_shannon]


def draws(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """A student's and a teacher's logits [4, 6]."""
    return tuple(2 * jax.random.normal(key, (4, 6)) for key in jax.random.split(jax.random.key(seed)))


def test_kl_by_hand() -> None:
    np.testing.assert_allclose(forward_kl(QUARTERS, HALVES), [KL_OF_HALVES], rtol=1e-6)
    np.testing.assert_allclose(forward_kl(HALVES, QUARTERS), [KL_OF_QUARTERS], rtol=1e-6)
    np.testing.assert_allclose(reverse_kl(QUARTERS, HALVES), [KL_OF_QUARTERS], rtol=1e-6)
    np.testing.assert_allclose(reverse_kl(HALVES, QUARTERS), [KL_OF_HALVES], rtol=1e-6)


@pytest.mark.parametrize("loss", WITH_TEACHER)
def test_temperature_divides_both_logits(loss: Callable[..., jax.Array]) -> None:
    student, teacher = draws()
    np.testing.assert_allclose(loss(3 * student, 3 * teacher, temperature=3.0), loss(student, teacher), rtol=1e-5)


def test_jensen_shannon_by_hand() -> None:
    # t = (1/2, 1/2), s = (1/4, 3/4); beta 1/2: m = (3/8, 5/8); beta 0.2: m = (3/10, 7/10).
    t, s = (1 / 2, 1 / 2), (1 / 4, 3 / 4)
    for beta, m in ((0.5, (3 / 8, 5 / 8)), (0.2, (3 / 10, 7 / 10))):
        of_teacher = sum(x * math.log(x / y) for x, y in zip(t, m, strict=True))
        of_student = sum(x * math.log(x / y) for x, y in zip(s, m, strict=True))
        wanted = beta * of_teacher + (1 - beta) * of_student
        np.testing.assert_allclose(jensen_shannon(QUARTERS, HALVES, beta=beta), [wanted], rtol=1e-5)


def test_soft_targets_by_hand() -> None:
    # -(1/2 log 1/4 + 1/2 log 3/4) = log 4 - 1/2 log 3
    np.testing.assert_allclose(soft_target_nll(QUARTERS, jnp.asarray([[0.5, 0.5]])), [math.log(4) - math.log(3) / 2])
    np.testing.assert_allclose(soft_target_nll(QUARTERS, jnp.asarray([[0.0, 2.0]])), [-2 * math.log(3 / 4)], rtol=1e-6)


def test_one_hot_targets_have_the_nll() -> None:
    logits, _ = draws()
    targets = jnp.asarray([0, 5, 2, 2])
    found = soft_target_nll(logits, jax.nn.one_hot(targets, 6))
    np.testing.assert_allclose(found, token_nll(logits, targets), rtol=1e-6)


def test_identities() -> None:
    student, teacher = draws()
    with jax.enable_x64(True):
        student, teacher = student.astype(jnp.float64), teacher.astype(jnp.float64)
        forward = forward_kl(student, teacher, temperature=0.7)
        np.testing.assert_array_equal(forward, reverse_kl(teacher, student, temperature=0.7))
        assert np.all(forward > 0.01)
        for loss in WITH_TEACHER:
            np.testing.assert_allclose(loss(student, student + 100), np.zeros(4), atol=1e-13)  # softmax ignores the 100
        # cross-entropy = KL + entropy
        q = jax.nn.softmax(teacher)
        entropy = -jnp.sum(q * jnp.log(q), axis=-1)
        np.testing.assert_allclose(soft_target_nll(student, q), forward_kl(student, teacher) + entropy, rtol=1e-13)
        half = jensen_shannon(student, teacher)
        np.testing.assert_allclose(half, jensen_shannon(teacher, student), rtol=1e-13)
        assert np.all((half > 0) & (half < math.log(2)))
        mostly = jensen_shannon(student, teacher, beta=0.9)
        np.testing.assert_allclose(mostly, jensen_shannon(teacher, student, beta=0.1), rtol=1e-13)


def test_jensen_shannon_tends_to_both_kls() -> None:
    """JS / beta -> KL(t || s) for beta -> 0, JS / (1 - beta) -> KL(s || t) for beta -> 1, values and gradients."""
    with jax.enable_x64(True):
        student, teacher = (x.astype(jnp.float64) for x in draws())
        for beta, weight, limit in ((1e-7, 1e-7, forward_kl), (1 - 1e-7, 1e-7, reverse_kl)):
            near = jensen_shannon(student, teacher, beta=beta) / weight
            np.testing.assert_allclose(near, limit(student, teacher), rtol=1e-5)
            slope = jax.grad(lambda x, beta=beta: jnp.sum(jensen_shannon(x, teacher, beta=beta)))(student) / weight
            wanted = jax.grad(lambda x, limit=limit: jnp.sum(limit(x, teacher)))(student)
            np.testing.assert_allclose(slope, wanted, rtol=1e-4, atol=1e-5)


def test_high_temperatures_compare_logits() -> None:
    """T^2 KL -> sum_v (z_v - mean z)^2 / (2 V), z the difference of logits (Hinton et al. 2015, eq. 4): why T^2."""
    with jax.enable_x64(True):
        student, teacher = (x.astype(jnp.float64) for x in draws())
        wanted = jnp.var(student - teacher, axis=-1) / 2
        for loss in (forward_kl, reverse_kl):
            np.testing.assert_allclose(1e8 * loss(student, teacher, temperature=1e4), wanted, rtol=1e-3)


def test_classes_that_are_ruled_out() -> None:
    # The teacher rules out the last class, which the student gives a half: reverse KL is infinite, forward log 2.
    student, teacher = jnp.asarray([[0.0, 0.0]]), jnp.asarray([[0.0, -INF]])
    np.testing.assert_allclose(forward_kl(student, teacher), [math.log(2)], rtol=1e-6)
    assert reverse_kl(student, teacher) == INF
    assert forward_kl(teacher, student) == INF
    # Two that share no class: log 2, and the entropy of beta.
    apart = jnp.asarray([[-INF, 0.0]])
    np.testing.assert_allclose(jensen_shannon(apart, teacher), [math.log(2)], rtol=1e-6)
    entropy = -0.2 * math.log(0.2) - 0.8 * math.log(0.8)
    np.testing.assert_allclose(jensen_shannon(apart, teacher, beta=0.2), [entropy], rtol=1e-6)
    # A class that both rule out counts for nothing, in gradients, too.
    more = jnp.asarray([[-INF]])
    for loss in WITH_TEACHER:
        few, many = (QUARTERS, HALVES), tuple(jnp.concatenate([x, more], axis=-1) for x in (QUARTERS, HALVES))
        np.testing.assert_array_equal(loss(*many), loss(*few))
        slopes = jax.grad(lambda *x, loss=loss: loss(*x)[0], (0, 1))
        for slope, wanted in zip(slopes(*many), slopes(*few), strict=True):
            np.testing.assert_allclose(slope, np.pad(wanted, ((0, 0), (0, 1))), rtol=1e-6)
    padded = jnp.concatenate([QUARTERS, more], axis=-1)
    q = jnp.asarray([[0.5, 0.5, 0.0]])
    np.testing.assert_allclose(soft_target_nll(padded, q), soft_target_nll(QUARTERS, q[:, :2]))
    assert np.all(np.isfinite(jax.grad(lambda *x: soft_target_nll(*x)[0], (0, 1))(padded, q)))
    assert soft_target_nll(padded, q[:, ::-1]) == INF
    # One that the teacher gives a probability too small for 32 bits, and the student none.
    assert np.isfinite(forward_kl(jnp.asarray([[0.0, -INF]]), jnp.asarray([[0.0, -200.0]])))[0]


def test_gradients() -> None:
    with jax.enable_x64(True):
        student, teacher = (x.astype(jnp.float64) for x in draws())
        s, t = jax.nn.softmax(student / 2), jax.nn.softmax(teacher / 2)
        # d forward / d student logits = (s - t) / T
        slope = jax.grad(lambda x: jnp.sum(forward_kl(x, teacher, temperature=2.0)))(student)
        np.testing.assert_allclose(slope, (s - t) / 2, atol=1e-15)
        # d reverse / d student logits = s (log s - log t - KL) / T
        ratio = jnp.log(s) - jnp.log(t)
        slope = jax.grad(lambda x: jnp.sum(reverse_kl(x, teacher, temperature=2.0)))(student)
        np.testing.assert_allclose(slope, s * (ratio - jnp.sum(s * ratio, -1, keepdims=True)) / 2, atol=1e-15)
        # d cross-entropy / d logits = softmax sum q - q, / d q = -log softmax; q need not add up to 1
        q = t * 3
        slopes = jax.grad(lambda x, q: jnp.sum(soft_target_nll(x, q)), (0, 1))(student, q)
        np.testing.assert_allclose(slopes[0], 3 * jax.nn.softmax(student) - q, atol=1e-14)
        np.testing.assert_allclose(slopes[1], -jax.nn.log_softmax(student), atol=1e-14)
        for loss in WITH_TEACHER:
            check_grads(lambda *x, loss=loss: loss(*x, temperature=2.0), (student[:2], teacher[:2]), order=2)


def test_what_cannot_be_done_is_refused() -> None:
    for loss in WITH_TEACHER:
        with pytest.raises(UserError, match=r"logits \(1, 2\) and teacher_logits \(2,\) must have the same shape"):
            loss(HALVES, HALVES[0])
        for temperature in (0, -1.0, INF):
            with pytest.raises(UserError, match=f"{loss.__name__}: temperature is {temperature}; it must be"):
                loss(HALVES, HALVES, temperature=temperature)
    for beta in (0, 1.0, 1.5):
        with pytest.raises(UserError, match=rf"beta is {beta}; it must be above 0 and below 1 \(forward_kl"):
            jensen_shannon(HALVES, HALVES, beta=beta)
    with pytest.raises(UserError, match=r"logits \(1, 2\) and probabilities \(1, 3\) must have the same shape"):
        soft_target_nll(HALVES, jnp.ones((1, 3)))
