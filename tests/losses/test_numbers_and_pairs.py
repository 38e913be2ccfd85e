"""Squared and Huber errors, losses of pairs of vectors and scores: by hand, limits, gradients and what is refused."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lmobj.errors import UserError
from lmobj.losses import (
    cosine_contrastive_loss,
    cosine_distance,
    cosine_embedding_loss,
    cosine_triplet_loss,
    euclidean_contrastive_loss,
    euclidean_distance,
    huber_loss,
    margin_ranking_loss,
    squared_error,
)

ZERO, FIVE = jnp.zeros((1, 2)), jnp.asarray([[3.0, 4.0]])
TURNED = jnp.asarray([[4.0, 3.0]])
"""|0 - (3, 4)| = 5, cos((3, 4), (4, 3)) = 24/25."""
YES, NO = jnp.asarray([True]), jnp.asarray([0])


def test_squared_error_by_hand() -> None:
    found = squared_error(jnp.asarray([1.0, -2.0, 0.5]), jnp.asarray([3, -2, 0]))
    np.testing.assert_allclose(found, [4, 0, 0.25])
    with jax.enable_x64(True):
        assert squared_error(jnp.zeros(1), jnp.zeros(1, jnp.float64)).dtype == jnp.float64
        assert squared_error(jnp.zeros(1, jnp.float32), jnp.zeros(1, jnp.int64)).dtype == jnp.float32


def test_huber_by_hand() -> None:
    # |e| = 1/2, 1, 3: with delta 1 e^2/2 = 1/8 and 1/2, then 3 - 1/2; with delta 2 the last is 2 (3 - 1).
    predictions = jnp.asarray([0.5, -1.0, 3.0])
    np.testing.assert_allclose(huber_loss(predictions, jnp.zeros(3)), [0.125, 0.5, 2.5])
    np.testing.assert_allclose(huber_loss(predictions, jnp.zeros(3), delta=2.0), [0.125, 0.5, 4])
    np.testing.assert_allclose(huber_loss(jnp.zeros(3), predictions, delta=2.0), [0.125, 0.5, 4])


def test_huber_is_between_squared_and_absolute_error() -> None:
    predictions, targets = jax.random.normal(jax.random.key(0), (2, 50))
    large = huber_loss(predictions, targets, delta=1e6)
    np.testing.assert_allclose(large, squared_error(predictions, targets) / 2, rtol=1e-6)
    small = huber_loss(predictions, targets, delta=1e-6) / 1e-6
    np.testing.assert_allclose(small, np.abs(predictions - targets), atol=1e-6)
    # Its slope is the error, cut off at delta.
    slope = jax.grad(lambda x: jnp.sum(huber_loss(x, targets, delta=0.7)))(predictions)
    np.testing.assert_allclose(slope, np.clip(predictions - targets, -0.7, 0.7), rtol=1e-5, atol=1e-6)


def test_contrastive_by_hand() -> None:
    # d = 5: similar 25/2; not, with a margin of 7, (7 - 5)^2 / 2; with one of 4, nothing.
    np.testing.assert_allclose(euclidean_contrastive_loss(ZERO, FIVE, YES, margin=7), [12.5])
    np.testing.assert_allclose(euclidean_contrastive_loss(ZERO, FIVE, NO, margin=7), [2])
    np.testing.assert_allclose(euclidean_contrastive_loss(ZERO, FIVE, NO, margin=4), [0])
    np.testing.assert_allclose(euclidean_contrastive_loss(FIVE, FIVE, NO, margin=4), [8])
    # d = 1/25: similar 1/1250; not, with a margin of 1/2, (23/50)^2 / 2.
    np.testing.assert_allclose(cosine_contrastive_loss(FIVE, TURNED, YES, margin=0.5), [1 / 1250], rtol=1e-4)
    np.testing.assert_allclose(cosine_contrastive_loss(FIVE, TURNED, NO, margin=0.5), [0.46**2 / 2], rtol=1e-5)


def test_similar_pairs_attract_and_others_repel() -> None:
    """The gradient with respect to a points away from b for a similar pair (descent goes nearer), else towards it."""
    for loss in (euclidean_contrastive_loss, cosine_contrastive_loss, cosine_embedding_loss):
        margin = {"margin": 7.0} if loss is euclidean_contrastive_loss else {"margin": 0.5}
        for similar, sign in ((YES, 1), (NO, -1)):
            slope = jax.grad(lambda a, loss=loss, y=similar, m=margin: loss(a, TURNED, y, **m)[0])(FIVE)
            assert sign * float(jnp.sum(slope * (FIVE - TURNED))) > 0


def test_cosine_embedding_by_hand() -> None:
    np.testing.assert_allclose(cosine_embedding_loss(FIVE, TURNED, YES), [1 / 25], rtol=1e-5)
    np.testing.assert_allclose(cosine_embedding_loss(FIVE, TURNED, NO), [24 / 25], rtol=1e-6)
    np.testing.assert_allclose(cosine_embedding_loss(FIVE, TURNED, NO, margin=0.5), [0.46], rtol=1e-6)
    np.testing.assert_allclose(cosine_embedding_loss(FIVE, -TURNED, NO), [0])
    np.testing.assert_allclose(cosine_embedding_loss(FIVE, -TURNED, YES), [49 / 25], rtol=1e-6)


def test_cosine_distance_by_hand() -> None:
    np.testing.assert_allclose(cosine_distance(FIVE, 10 * TURNED), [1 / 25], rtol=1e-5)
    np.testing.assert_allclose(cosine_distance(FIVE, -FIVE), [2], rtol=1e-6)
    np.testing.assert_allclose(cosine_distance(FIVE, ZERO), [1])


def test_margin_ranking_by_hand() -> None:
    higher, lower = jnp.asarray([3.0, 3.0, 1.0]), jnp.asarray([1.0, 2.5, 3.0])
    np.testing.assert_allclose(margin_ranking_loss(higher, lower), [0, 0, 2])
    np.testing.assert_allclose(margin_ranking_loss(higher, lower, margin=1), [0, 0.5, 3])


def test_lengths_whose_squares_have_no_float() -> None:
    for scale in (1e-30, 1e30):
        np.testing.assert_allclose(euclidean_distance(scale * FIVE, ZERO), [5 * scale], rtol=1e-6)
        slope = jax.grad(lambda a: euclidean_distance(a, ZERO)[0])(scale * FIVE)
        np.testing.assert_allclose(slope, [[0.6, 0.8]], rtol=1e-6)


def test_gradients() -> None:
    with jax.enable_x64(True):
        a, b = jax.random.normal(jax.random.key(1), (2, 4, 3), jnp.float64)
        similar = jnp.asarray([1, 0, 1, 0])
        check_grads(lambda a, b: euclidean_contrastive_loss(a, b, similar, margin=9.0), (a, b), order=1)
        check_grads(lambda a, b: cosine_contrastive_loss(a, b, similar, margin=3.0), (a, b), order=1)
        check_grads(lambda a, b: cosine_embedding_loss(a, b, similar, margin=-0.99), (a, b), order=1)
        check_grads(lambda a, b: huber_loss(a, b, delta=0.3), (a, b), order=1)
        check_grads(lambda a, b: margin_ranking_loss(a, b, margin=9.0), (a, b), order=1)


def test_a_vector_in_two_distances_has_its_gradient_rounded_once() -> None:
    keys = jax.random.split(jax.random.key(2), 3)
    triplet = [jax.random.normal(key, (20, 4), jnp.bfloat16) for key in keys]

    def slope(x: jax.Array) -> jax.Array:
        return jax.grad(lambda a: jnp.sum(cosine_triplet_loss(a, *triplet[1:], margin=5.0)))(x)

    wide = slope(triplet[0].astype(jnp.float32))
    np.testing.assert_array_equal(slope(triplet[0]), wide.astype(jnp.bfloat16))


def test_what_cannot_be_done_is_refused() -> None:
    for loss in (squared_error, huber_loss):
        with pytest.raises(UserError, match=rf"{loss.__name__}: predictions \(2,\) and targets \(1,\) must have the"):
            loss(jnp.ones(2), jnp.ones(1))
    for delta in (0, -1.0, math.inf):
        with pytest.raises(UserError, match=f"delta is {delta}; it must be a finite number above 0"):
            huber_loss(jnp.ones(1), jnp.ones(1), delta=delta)
    with pytest.raises(UserError, match=r"scores \(2,\) and \(1,\) must have the same shape"):
        margin_ranking_loss(jnp.ones(2), jnp.ones(1))
    with pytest.raises(UserError, match="margin is -1; it must be a finite number, at least 0"):
        margin_ranking_loss(jnp.ones(1), jnp.ones(1), margin=-1)
    for loss in (euclidean_contrastive_loss, cosine_contrastive_loss, cosine_embedding_loss):
        with pytest.raises(UserError, match=f"{loss.__name__}: vectors .* must have the same last axis"):
            loss(ZERO, jnp.ones((1, 3)), YES, margin=0.5)
        for similar in (YES[0], jnp.ones(1)):
            with pytest.raises(UserError, match=r"similar must be booleans or integers of shape \(1,\), not"):
                loss(ZERO, FIVE, similar, margin=0.5)
        lowest = -1 if loss is cosine_embedding_loss else 0
        with pytest.raises(UserError, match=f"margin is {lowest}; it must be a finite number above {lowest}"):
            loss(ZERO, FIVE, YES, margin=lowest)
    with pytest.raises(UserError, match=r"margin is 1; it must be a finite number above -1 and below 1\."):
        cosine_embedding_loss(ZERO, FIVE, YES, margin=1)
    with pytest.raises(UserError, match="cosine_distance: vectors"):
        cosine_distance(ZERO, jnp.ones((1, 3)))
