"""Focal losses: by hand, without focus, of two classes, their gradients and what is refused."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lmobj.errors import UserError
from lmobj.losses import binary_focal_loss, binary_nll, focal_loss, token_nll

LOGITS, LABELS = jnp.asarray([-3.0, -0.5, 0.0, 0.25, 4.0]), jnp.asarray([1, 0, 1, 1, 0])
EIGHTHS = jnp.log(jnp.asarray([[1.0, 2.0, 5.0]]))


def test_binary_by_hand() -> None:
    # p = sigmoid(log 3) = 3/4: label 1 costs (1/4)^2 log 4/3, label 0 costs (3/4)^2 log 4.
    x = jnp.full(2, math.log(3))
    one, zero = math.log(4 / 3) / 16, 9 * math.log(4) / 16
    np.testing.assert_allclose(binary_focal_loss(x, jnp.asarray([1, 0])), [one, zero], rtol=1e-6)
    weighted = binary_focal_loss(x, jnp.asarray([True, False]), alpha=0.2)
    np.testing.assert_allclose(weighted, [0.2 * one, 0.8 * zero], rtol=1e-6)
    cubed = binary_focal_loss(x, jnp.asarray([1, 0]), gamma=3.0)
    np.testing.assert_allclose(cubed, [one / 4, 3 * zero / 4], rtol=1e-6)
    soft = binary_focal_loss(x[:1], jnp.asarray([0.3]))
    np.testing.assert_allclose(soft, [0.3 * one + 0.7 * zero], rtol=1e-6)


def test_classes_by_hand() -> None:
    # p = (1, 2, 5) / 8: (1 - p)^2 is (7/8)^2, (6/8)^2 and (3/8)^2.
    wanted = [49 / 64 * math.log(8), 36 / 64 * math.log(4), 9 / 64 * math.log(1.6)]
    np.testing.assert_allclose(focal_loss(jnp.repeat(EIGHTHS, 3, axis=0), jnp.arange(3)), wanted, rtol=1e-6)
    root = focal_loss(EIGHTHS, jnp.asarray([2]), gamma=0.5)
    np.testing.assert_allclose(root, [math.sqrt(3 / 8) * math.log(1.6)], rtol=1e-6)


def test_a_hundredth_at_nine_tenths() -> None:
    """Lin et al. 2017, section 3.2: with gamma 2 an example of p_t = 0.9 costs a hundredth of its cross-entropy."""
    x = jnp.asarray([math.log(9)])
    np.testing.assert_allclose(binary_focal_loss(x, jnp.ones(1)), binary_nll(x, jnp.ones(1)) / 100, rtol=1e-5)


def test_without_focus_it_is_the_nll() -> None:
    np.testing.assert_array_equal(binary_focal_loss(LOGITS, LABELS, gamma=0), binary_nll(LOGITS, LABELS))
    logits = jnp.stack([LOGITS, LOGITS**2, -LOGITS], axis=-1)
    np.testing.assert_array_equal(focal_loss(logits, LABELS, gamma=0), token_nll(logits, LABELS))


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_two_classes_are_one_decision(gamma: float) -> None:
    two = jnp.stack([1 - LOGITS, jnp.ones_like(LOGITS)], axis=-1)
    np.testing.assert_allclose(
        focal_loss(two, LABELS, gamma=gamma), binary_focal_loss(LOGITS, LABELS, gamma=gamma), rtol=1e-5, atol=1e-7
    )


def test_gradients() -> None:
    with jax.enable_x64(True):
        logits = LOGITS.astype(jnp.float64)
        # Lin et al. 2017, appendix B: dFL / dx = y (1 - p_t)^gamma (gamma p_t log p_t + p_t - 1), y in {-1, 1}.
        sign = 2 * np.asarray(LABELS) - 1
        p = 1 / (1 + np.exp(-sign * np.asarray(logits)))
        for gamma in (0.5, 2.0):
            slope = jax.grad(lambda x, gamma=gamma: jnp.sum(binary_focal_loss(x, LABELS, gamma=gamma)))(logits)
            np.testing.assert_allclose(slope, sign * (1 - p) ** gamma * (gamma * p * np.log(p) + p - 1), rtol=1e-12)
        several = jnp.stack([logits, logits**2, -logits], axis=-1)
        check_grads(lambda x: focal_loss(x, LABELS, gamma=1.5), (several,), order=2)
        check_grads(lambda x: binary_focal_loss(x, LABELS, gamma=1.5, alpha=0.3), (logits,), order=2)


def test_what_is_certain_costs_nothing() -> None:
    """A class that is alone, by -inf or by itself, has finite gradients for any gamma; a class that is none, +inf."""
    for logits in (jnp.asarray([[0.0, -math.inf]]), jnp.asarray([[3.0]])):
        for gamma in (0.0, 0.5, 2.0):
            loss = functools.partial(focal_loss, targets=jnp.asarray([0]), gamma=gamma)
            value, slope = jax.value_and_grad(lambda x, loss=loss: loss(x)[0])(logits)
            assert value == 0
            np.testing.assert_array_equal(slope, jnp.zeros_like(logits))
    assert focal_loss(EIGHTHS, jnp.asarray([3])) == math.inf


def test_what_cannot_be_done_is_refused() -> None:
    for gamma in (-0.5, math.inf):
        with pytest.raises(UserError, match=f"binary_focal_loss: gamma is {gamma}; it must be a finite number"):
            binary_focal_loss(LOGITS, LABELS, gamma=gamma)
        with pytest.raises(UserError, match=f"focal_loss: gamma is {gamma}"):
            focal_loss(EIGHTHS, jnp.asarray([0]), gamma=gamma)
    for alpha in (0.0, 1.0):
        with pytest.raises(UserError, match=f"alpha is {alpha}; it must be above 0 and below 1, or None"):
            binary_focal_loss(LOGITS, LABELS, alpha=alpha)
    with pytest.raises(UserError, match=r"binary_focal_loss: logits \(5,\) and labels \(3,\)"):
        binary_focal_loss(LOGITS, LABELS[:3])
    with pytest.raises(UserError, match="focal_loss: targets must be integers of shape"):
        focal_loss(EIGHTHS, jnp.asarray([0.0]))
