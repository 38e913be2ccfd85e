"""Contrastive and triplet losses: by hand, beside PyTorch's, and at extremes."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmobj.errors import UserError
from lmobj.losses import (
    cosine_similarity,
    cosine_triplet_loss,
    euclidean_distance,
    euclidean_triplet_loss,
    info_nce,
    squared_euclidean_triplet_loss,
    unit_vectors,
)

A, P, N = jnp.asarray([[3.0, 4.0]]), jnp.asarray([[4.0, 3.0]]), jnp.asarray([[3.0, 0.0]])
"""|a - p| = sqrt 2, |a - n| = 4, cos(a, p) = 24/25, cos(a, n) = 3/5."""
TRIPLETS = [cosine_triplet_loss, euclidean_triplet_loss, squared_euclidean_triplet_loss]


def test_info_nce_by_hand() -> None:
    # Similarities 1, 2, 3 at temperature 0.5 are logits 2, 4, 6; the target is the second, and the third is none.
    similarity, target = jnp.asarray([[1.0, 2.0, 3.0]]), jnp.asarray([1])
    every = math.log(math.exp(2) + math.exp(4) + math.exp(6)) - 4
    np.testing.assert_allclose(info_nce(similarity, target, temperature=0.5), [every], rtol=1e-6)
    candidates = jnp.asarray([[True, False, False]])  # the target counts in any case
    found = info_nce(similarity, target, temperature=0.5, candidates=candidates)
    np.testing.assert_allclose(found, [math.log1p(math.exp(-2))], atol=1e-6)  # 1e-6 is a few ulps of the logits
    assert info_nce(similarity, jnp.asarray([3])) == math.inf


def test_what_is_no_candidate_does_not_round_the_others() -> None:
    # 0.1 and 0.3 beside a 30,000 that is none: log(1 + exp(0.2)) to the last digits, though 0.1 - 30,000 has but two.
    similarity, candidates = jnp.asarray([[3e4, 0.1, 0.3]]), jnp.asarray([[False, True, True]])
    found = info_nce(similarity, jnp.asarray([1]), candidates=candidates)
    np.testing.assert_allclose(found, [math.log1p(math.exp(0.2))], rtol=1e-6)


def test_info_nce_is_cross_entropy() -> None:
    torch = pytest.importorskip("torch")
    similarity = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    targets = np.asarray([3, 0, 6, 2, 2])
    wanted = torch.nn.functional.cross_entropy(torch.tensor(similarity / 0.07), torch.tensor(targets), reduction="none")
    found = info_nce(jnp.asarray(similarity), jnp.asarray(targets), temperature=0.07)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "margin", "expected"),
    [
        (cosine_triplet_loss, 0.5, 3 / 5 - 24 / 25 + 0.5),
        (cosine_triplet_loss, 0.1, 0),
        (euclidean_triplet_loss, 3, math.sqrt(2) - 4 + 3),
        (euclidean_triplet_loss, 1, 0),
        (squared_euclidean_triplet_loss, 15, 2 - 16 + 15),
        (squared_euclidean_triplet_loss, 1, 0),
    ],
)
def test_triplets_by_hand(loss, margin, expected) -> None:
    np.testing.assert_allclose(loss(A, P, N, margin=margin), [expected], rtol=1e-5, atol=1e-6)


def test_euclidean_triplets_are_those_of_pytorch() -> None:
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(1).normal(size=(3, 6, 4)).astype(np.float32)
    wanted = torch.nn.functional.triplet_margin_loss(*map(torch.tensor, draw), margin=1.0, reduction="none", eps=0)
    np.testing.assert_allclose(
        euclidean_triplet_loss(*map(jnp.asarray, draw), margin=1.0), wanted, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("loss", TRIPLETS)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4])
def test_triplets_are_finite_at_extremes(loss, scale) -> None:
    """Vectors that are huge, tiny or zero, and equal ones."""
    x = scale * jnp.asarray([[1.0, -1.0, 0.5], [1.0, -1.0, 0.5]])
    for given in ((x, x, x), (x, -x, x), (x, 0 * x, -x)):
        value, grads = jax.value_and_grad(lambda *v: jnp.sum(loss(*v, margin=0.2)), argnums=(0, 1, 2))(*given)
        assert all(np.all(np.isfinite(each)) for each in (value, *grads))


def test_info_nce_is_finite_at_extremes() -> None:
    similarity = jnp.asarray([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]])
    targets = jnp.asarray([1, 1])
    value, grad = jax.value_and_grad(lambda s: jnp.sum(info_nce(s, targets, temperature=0.01)))(similarity)
    np.testing.assert_allclose(value, 2e6, rtol=1e-5)
    assert np.all(np.isfinite(grad))


def test_sums_are_not_made_in_bfloat16() -> None:
    """257 parts of 1/257 in bfloat16 would not add up to 1."""
    x = jnp.ones((1, 257), jnp.bfloat16)
    assert cosine_similarity(x, x).dtype == jnp.float32
    np.testing.assert_allclose(cosine_similarity(x, x), [1], rtol=1e-5)
    np.testing.assert_allclose(euclidean_distance(x, 0 * x), [math.sqrt(257)], rtol=1e-6)
    assert info_nce(x, jnp.asarray([0])).dtype == jnp.float32
    np.testing.assert_allclose(info_nce(x, jnp.asarray([0])), [math.log(257)], rtol=1e-6)


def test_distances_and_unit_vectors() -> None:
    np.testing.assert_allclose(unit_vectors(A), [[0.6, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(unit_vectors(jnp.zeros((1, 2))), [[0, 0]])
    np.testing.assert_allclose(euclidean_distance(A, A), [0])
    # Unit vectors: the gradient of |x / |x|| is 0, since the length says nothing.
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(unit_vectors(x) ** 2))(A), [[0, 0]], atol=1e-6)


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(UserError, match=r"temperature is 0\.0; it must be a finite number above 0"):
        info_nce(jnp.ones((1, 2)), jnp.asarray([0]), temperature=0.0)
    with pytest.raises(UserError, match="targets must be integers"):
        info_nce(jnp.ones((1, 2)), jnp.asarray([0.0]))
    for loss in TRIPLETS:
        with pytest.raises(UserError, match="margin is -1; it must be a finite number above 0"):
            loss(A, P, N, margin=-1)
        with pytest.raises(UserError, match="must have the same last axis"):
            loss(A, P, jnp.ones((1, 3)), margin=1.0)
