"""Sigmoid cross-entropy: values by hand, extremes, gradients."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lmobj import losses
from lmobj.errors import UserError


def test_by_hand() -> None:
    # sigmoid(log 3) = 3/4: label 1 costs log 4/3, label 0 costs log 4; sigmoid(0) = 1/2 costs log 2 either way.
    x = math.log(3)
    got = losses.binary_nll(jnp.array([x, x, 0.0, 0.0]), jnp.array([1, 0, 1, 0]))
    np.testing.assert_allclose(got, [math.log(4 / 3), math.log(4), math.log(2), math.log(2)], rtol=1e-6)


def test_soft_and_boolean_labels() -> None:
    logits = jnp.array([-2.0, 0.5, 3.0])
    hard = losses.binary_nll(logits, jnp.array([True, False, True]))
    np.testing.assert_array_equal(hard, losses.binary_nll(logits, jnp.array([1.0, 0.0, 1.0])))
    # linear in the label
    mixed = 0.25 * losses.binary_nll(logits, jnp.ones(3)) + 0.75 * losses.binary_nll(logits, jnp.zeros(3))
    np.testing.assert_allclose(losses.binary_nll(logits, jnp.full(3, 0.25)), mixed, rtol=1e-6)


def test_extremes_neither_overflow_nor_vanish() -> None:
    # For a large |x| the NLL is |x| on the wrong side, and exp(-|x|) on the right one.
    logits = jnp.array([1000.0, -1000.0, 30.0, -30.0])
    np.testing.assert_allclose(losses.binary_nll(logits, jnp.array([0, 1, 1, 0])), [1000, 1000, *[math.exp(-30)] * 2])
    gradient = jax.grad(lambda x: jnp.sum(losses.binary_nll(x, jnp.array([0, 1, 1, 0]))))(logits)
    np.testing.assert_allclose(gradient, [1, -1, -math.exp(-30), math.exp(-30)], rtol=1e-5)


def test_gradient_is_sigmoid_minus_label() -> None:
    with jax.enable_x64(True):
        logits = jnp.array([-3.0, -0.5, 0.0, 0.25, 4.0])
        labels = jnp.array([1.0, 0.0, 1.0, 0.3, 0.0])
        gradient = jax.grad(lambda x: jnp.sum(losses.binary_nll(x, labels)))(logits)
        np.testing.assert_allclose(gradient, 1 / (1 + np.exp(-np.asarray(logits))) - np.asarray(labels), atol=1e-15)
        check_grads(lambda x: losses.binary_nll(x, labels), (logits,), order=2, modes=["fwd", "rev"])


def test_bfloat16_is_computed_in_float32() -> None:
    got = losses.binary_nll(jnp.array([1.0], jnp.bfloat16), jnp.array([1], jnp.int32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [math.log1p(math.exp(-1))], rtol=1e-6)


def test_shapes_must_agree() -> None:
    with pytest.raises(UserError, match=r"logits \(2,\) and labels \(3,\)"):
        losses.binary_nll(jnp.zeros(2), jnp.zeros(3))
