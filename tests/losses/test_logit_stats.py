"""Losses on full logits, against a slow NumPy reference and against numbers worked out by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lmobj import losses
from lmobj.errors import UserError


def logits_and_targets(seed: int = 0, classes: int = 10) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(seed))
    return 3 * jax.random.normal(keys[0], (4, 5, classes)), jax.random.randint(keys[1], (4, 5), 0, classes)


def numpy_log_softmax(logits: np.ndarray) -> np.ndarray:
    out = np.empty(logits.shape)
    for index in np.ndindex(logits.shape[:-1]):
        row = logits[index].astype(np.float64)
        out[index] = row - (math.log(math.fsum(math.exp(x - row.max()) for x in row)) + row.max())
    return out


def numpy_cross_entropy(logits: np.ndarray, q: np.ndarray) -> np.ndarray:
    """-sum_v q[v] log p[v], where classes with q = 0 count for nothing."""
    return -np.sum(np.where(q > 0, q * numpy_log_softmax(logits), 0), axis=-1)


def test_token_nll_is_minus_the_log_probability() -> None:
    with jax.enable_x64(True):
        logits, targets = logits_and_targets()
        expected = numpy_cross_entropy(np.asarray(logits), np.eye(10)[np.asarray(targets)])
        nll = losses.token_nll(logits, targets)
        assert nll.shape == targets.shape
        assert nll.dtype == jnp.float64
        np.testing.assert_allclose(nll, expected, rtol=1e-12)


def test_token_nll_by_hand() -> None:
    # p = (1, 2, 5) / 8, so the NLLs are log 8, log 4 and log 1.6.
    logits = jnp.log(jnp.array([[1.0, 2.0, 5.0]] * 3))
    np.testing.assert_allclose(
        losses.token_nll(logits, jnp.arange(3)), [math.log(8), math.log(4), math.log(1.6)], rtol=1e-6
    )


def test_token_nll_of_bfloat16_is_computed_in_float32() -> None:
    logits = jnp.array([[0.0, 1.0, 2.0]], jnp.bfloat16)  # exact in bfloat16
    nll = losses.token_nll(logits, jnp.array([0]))
    assert nll.dtype == jnp.float32
    # log(1 + e + e^2) = 2.4076060; bfloat16 would round it to 2.40625
    np.testing.assert_allclose(nll, [math.log(1 + math.e + math.e**2)], rtol=1e-6)


@pytest.mark.parametrize("target", [-100, -1, 3, 50])
def test_an_id_that_is_no_class_has_no_probability(target: int) -> None:
    logits = jnp.zeros((1, 3))
    targets = jnp.array([target])
    assert losses.token_nll(logits, targets) == math.inf
    gradient = jax.grad(lambda x: losses.logit_stats(x, targets).logsumexp.sum())(logits)
    np.testing.assert_allclose(gradient, np.full((1, 3), 1 / 3), rtol=1e-6)


def test_label_smoothing_as_in_pytorch() -> None:
    # epsilon / V on every class, the target's included: q = 0.91 on the target and 0.01 elsewhere for V = 10.
    with jax.enable_x64(True):
        logits, targets = logits_and_targets()
        q = 0.9 * np.eye(10)[np.asarray(targets)] + 0.01
        got = losses.label_smoothed_nll(losses.logit_stats(logits, targets), epsilon=0.1, num_classes=10)
        np.testing.assert_allclose(got, numpy_cross_entropy(np.asarray(logits), q), rtol=1e-12)


@pytest.mark.parity
def test_label_smoothing_against_pytorch() -> None:
    torch = pytest.importorskip("torch")
    logits, targets = logits_and_targets(seed=1)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(np.asarray(logits)).reshape(20, 10),
        torch.tensor(np.asarray(targets)).reshape(20).long(),
        reduction="none",
        label_smoothing=0.1,
    )
    got = losses.label_smoothed_nll(losses.logit_stats(logits, targets), epsilon=0.1, num_classes=10)
    np.testing.assert_allclose(got.reshape(20), expected.numpy(), rtol=2e-6)


def test_offtarget_smoothing_as_in_fairseq_and_t5x() -> None:
    with jax.enable_x64(True):
        logits, targets = logits_and_targets()
        stats = losses.logit_stats(logits, targets)
        got = losses.offtarget_smoothed_nll(stats, epsilon=0.1, num_classes=10)
        # epsilon / (V - 1) = 0.1 / 9 on each wrong class
        q = np.where(np.eye(10)[np.asarray(targets)] == 1, 0.9, 0.1 / 9)
        np.testing.assert_allclose(got, numpy_cross_entropy(np.asarray(logits), q), rtol=1e-12)
        # fairseq writes it as .8889 nll + .0111 sum_v -log p[v] (V = 10, epsilon = .1)
        everywhere = -np.sum(numpy_log_softmax(np.asarray(logits)), axis=-1)
        fairseq = 0.8889 * np.asarray(losses.nll(stats)) + 0.0111 * everywhere
        np.testing.assert_allclose(got, fairseq, rtol=2e-3)


def test_offtarget_smoothing_entropy_is_the_least_loss() -> None:
    entropy = losses.offtarget_smoothing_entropy(epsilon=0.1, num_classes=10)
    # .9 log(1 / .9) + .1 log 90 = .09482 + .44998
    assert round(entropy, 4) == 0.5448
    with jax.enable_x64(True):
        # A perfect fit: p = q.
        logits = jnp.log(jnp.array([[0.9] + [0.1 / 9] * 9]))
        fit = losses.offtarget_smoothed_nll(losses.logit_stats(logits, jnp.array([0])), epsilon=0.1, num_classes=10)
        np.testing.assert_allclose(fit, [entropy], rtol=1e-12)
    assert losses.offtarget_smoothing_entropy(epsilon=0.0, num_classes=10) == 0


def test_no_smoothing_is_the_nll() -> None:
    stats = losses.logit_stats(*logits_and_targets())
    for smoothed in (losses.label_smoothed_nll, losses.offtarget_smoothed_nll):
        np.testing.assert_array_equal(smoothed(stats, epsilon=0.0, num_classes=10), losses.nll(stats))


@pytest.mark.parametrize("epsilon", [-0.1, 1.0])
def test_epsilon_out_of_range(epsilon: float) -> None:
    stats = losses.logit_stats(*logits_and_targets())
    with pytest.raises(UserError, match=rf"epsilon is {epsilon}"):
        losses.label_smoothed_nll(stats, epsilon=epsilon, num_classes=10)
    with pytest.raises(UserError, match=rf"epsilon is {epsilon}"):
        losses.offtarget_smoothed_nll(stats, epsilon=epsilon, num_classes=10)


def test_z_loss_scales_the_softmax_in_the_gradient() -> None:
    # d (nll + z logsumexp^2) / d logits = (1 + 2 z logsumexp) softmax - onehot(target)
    with jax.enable_x64(True):
        logits, targets = logits_and_targets()
        z = 0.01

        def loss(x: jax.Array) -> jax.Array:
            stats = losses.logit_stats(x, targets)
            return jnp.sum(losses.nll(stats) + z * losses.z_loss(stats))

        p = np.exp(numpy_log_softmax(np.asarray(logits)))
        log_z = np.asarray(logits)[..., :1] - numpy_log_softmax(np.asarray(logits))[..., :1]
        expected = (1 + 2 * z * log_z) * p - np.eye(10)[np.asarray(targets)]
        np.testing.assert_allclose(jax.grad(loss)(logits), expected, atol=1e-14)
        np.testing.assert_allclose(losses.z_loss(losses.logit_stats(logits, targets)), log_z[..., 0] ** 2, rtol=1e-12)


def test_classes_that_do_not_exist_count_for_nothing() -> None:
    with jax.enable_x64(True):
        logits, targets = logits_and_targets()
        targets = jnp.minimum(targets, 6)
        keep = np.array([0, 1, 2, 3, 4, 5, 6])
        subset = losses.logit_stats(logits[..., keep], targets)
        by_size = losses.logit_stats(logits, targets, vocab_size=7)
        by_mask = losses.logit_stats(logits, targets, vocab_mask=jnp.arange(10) < 7)
        for got in (by_size, by_mask):
            for name, value, expected in zip(got._fields, got, subset, strict=True):
                np.testing.assert_allclose(value, expected, rtol=1e-13, err_msg=name)
        assert losses.nll(losses.logit_stats(logits, jnp.full((4, 5), 8), vocab_size=7)).min() == math.inf


def test_correct_is_argmax_and_ties_count() -> None:
    logits, targets = logits_and_targets()
    np.testing.assert_array_equal(losses.logit_stats(logits, targets).correct, jnp.argmax(logits, -1) == targets)
    tie = jnp.array([[1.0, 1.0, 0.0]] * 3)
    np.testing.assert_array_equal(losses.logit_stats(tie, jnp.arange(3)).correct, [True, True, False])


def test_gradients() -> None:
    with jax.enable_x64(True):
        logits, targets = logits_and_targets(classes=4)

        def all_losses(x: jax.Array) -> list[jax.Array]:
            stats = losses.logit_stats(x, targets)
            return [
                losses.nll(stats),
                losses.z_loss(stats),
                losses.label_smoothed_nll(stats, epsilon=0.2, num_classes=4),
                losses.offtarget_smoothed_nll(stats, epsilon=0.2, num_classes=4),
            ]

        check_grads(all_losses, (logits,), order=2, modes=["fwd", "rev"])


def test_wrong_shapes_and_types() -> None:
    with pytest.raises(UserError, match=r"integers of shape \(4, 5\)"):
        losses.token_nll(jnp.zeros((4, 5, 3)), jnp.zeros((4,), jnp.int32))
    with pytest.raises(UserError, match="not float32"):
        losses.token_nll(jnp.zeros((4, 3)), jnp.zeros((4,)))


def test_importing_losses_loads_neither_flax_nor_tfds() -> None:
    heavy = ("flax", "tensorflow", "tensorflow_datasets", "optax", "orbax", "grain", "pydantic")
    code = f"import sys, lmobj.losses; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
