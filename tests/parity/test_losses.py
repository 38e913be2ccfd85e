"""Losses against PyTorch's and Transformers', values and gradients, in 64 bits on random inputs.

Where theirs has no unreduced form, the sum is compared. PyTorch adds 1e-12 to the squares of lengths in cosines, which
is a hundredth of what is allowed here; its triplets' 1e-6 is set to 0. Transformers' label smoother adds up in 32 bits
whatever comes in, so it is compared to 1e-6. GKD is TRL's formula, written with PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch.nn import functional  # noqa: E402
from transformers.loss.loss_for_object_detection import sigmoid_focal_loss  # noqa: E402
from transformers.trainer_pt_utils import LabelSmoother  # noqa: E402

from lmobj import losses  # noqa: E402

pytestmark = pytest.mark.parity

N, V, D = 40, 7, 5
Loss = Callable[..., Any]


def _normal(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(map(len, shapes)))
    return [2 * rng.normal(size=shape) for shape in shapes]


TARGETS = np.random.default_rng(1).integers(0, V, N)
BITS = np.random.default_rng(2).integers(0, 2, N)
PROBABILITIES = np.random.default_rng(3).dirichlet(np.ones(V), N)
LOGITS, VECTORS, NUMBERS = ((N, V),), ((N, D), (N, D)), ((N,), (N,))
TEACHER = ((N, V), (N, V))


def _smoothed(x: jax.Array) -> jax.Array:
    return losses.label_smoothed_nll(losses.logit_stats(x, TARGETS), epsilon=0.1, num_classes=V)


def _their_smoother(x: Any) -> Any:
    return LabelSmoother(epsilon=0.1)((x,), torch.tensor(TARGETS)) * N


def _their_ranking(x: Any, y: Any) -> Any:
    return functional.margin_ranking_loss(x, y, torch.ones(N, dtype=torch.float64), margin=0.5, reduction="none")


def _their_cosines(margin: float, similar: Sequence[int]) -> Loss:
    signs = torch.tensor(similar) * 2 - 1
    return lambda a, b: functional.cosine_embedding_loss(a, b, signs, margin=margin, reduction="none")


def _their_kl(student: Any, teacher: Any, temperature: float) -> Any:
    """DistilBERT's, without T^2: from log-probabilities of the student to probabilities of the teacher."""
    theirs = functional.log_softmax(student / temperature, dim=-1), functional.softmax(teacher / temperature, dim=-1)
    return functional.kl_div(*theirs, reduction="none").sum(-1)


def _their_distillation(student: Any, teacher: Any) -> Any:
    """DistilBERT's loss as its code has it, with a mean over rows."""
    theirs = functional.log_softmax(student / 2, dim=-1), functional.softmax(teacher / 2, dim=-1)
    return torch.nn.KLDivLoss(reduction="batchmean")(*theirs) * 2**2


def _their_jensen_shannon(student: Any, teacher: Any, beta: float, temperature: float) -> Any:
    """GKD's loss as TRL has it."""
    s, t = (functional.log_softmax(x / temperature, dim=-1) for x in (student, teacher))
    m = torch.logsumexp(torch.stack([s + math.log(1 - beta), t + math.log(beta)]), dim=0)
    of_teacher, of_student = (functional.kl_div(m, x, reduction="none", log_target=True) for x in (t, s))
    return (beta * of_teacher + (1 - beta) * of_student).sum(-1)


CASES: dict[str, tuple[Sequence[tuple[int, ...]], Loss, Loss]] = {
    "squared_error": (NUMBERS, losses.squared_error, lambda x, y: functional.mse_loss(x, y, reduction="none")),
    "huber_loss": (
        NUMBERS,
        lambda x, y: losses.huber_loss(x, y, delta=0.7),
        lambda x, y: functional.huber_loss(x, y, delta=0.7, reduction="none"),
    ),
    "token_nll": (
        LOGITS,
        lambda x: losses.token_nll(x, TARGETS),
        lambda x: functional.cross_entropy(x, torch.tensor(TARGETS), reduction="none"),
    ),
    "label_smoothed_nll": (
        LOGITS,
        _smoothed,
        lambda x: functional.cross_entropy(x, torch.tensor(TARGETS), reduction="none", label_smoothing=0.1),
    ),
    "soft_target_nll": (
        LOGITS,
        lambda x: losses.soft_target_nll(x, PROBABILITIES),
        lambda x: functional.cross_entropy(x, torch.tensor(PROBABILITIES), reduction="none"),
    ),
    "binary_nll": (
        ((N,),),
        lambda x: losses.binary_nll(x, BITS),
        lambda x: functional.binary_cross_entropy_with_logits(x, torch.tensor(BITS).double(), reduction="none"),
    ),
    "binary_nll of soft labels": (
        LOGITS,
        lambda x: losses.binary_nll(x, PROBABILITIES),
        lambda x: functional.binary_cross_entropy_with_logits(x, torch.tensor(PROBABILITIES), reduction="none"),
    ),
    "focal_loss without focus": (
        LOGITS,
        lambda x: losses.focal_loss(x, TARGETS, gamma=0.0),
        lambda x: functional.cross_entropy(x, torch.tensor(TARGETS), reduction="none"),
    ),
    "forward_kl": (
        TEACHER,
        lambda s, t: losses.forward_kl(s, t, temperature=2.0),
        lambda s, t: _their_kl(s, t, 2.0),
    ),
    "reverse_kl": (
        TEACHER,
        lambda s, t: losses.reverse_kl(s, t, temperature=0.9),
        lambda s, t: _their_kl(t, s, 0.9),
    ),
    "jensen_shannon": (
        TEACHER,
        lambda s, t: losses.jensen_shannon(s, t, beta=0.3, temperature=0.9),
        lambda s, t: _their_jensen_shannon(s, t, 0.3, 0.9),
    ),
    "jensen_shannon, symmetric": (TEACHER, losses.jensen_shannon, lambda s, t: _their_jensen_shannon(s, t, 0.5, 1.0)),
    "euclidean_triplet_loss": (
        (*VECTORS, (N, D)),
        lambda a, p, n: losses.euclidean_triplet_loss(a, p, n, margin=1.0),
        lambda a, p, n: functional.triplet_margin_loss(a, p, n, margin=1.0, eps=0, reduction="none"),
    ),
    "cosine_embedding_loss": (
        VECTORS,
        lambda a, b: losses.cosine_embedding_loss(a, b, BITS, margin=-0.2),
        _their_cosines(-0.2, BITS),
    ),
    "cosine_distance": (VECTORS, losses.cosine_distance, _their_cosines(0.0, [1] * N)),
    "cosine_similarity": (VECTORS, losses.cosine_similarity, functional.cosine_similarity),
    "unit_vectors": (((N, D),), losses.unit_vectors, functional.normalize),
    "margin_ranking_loss": (NUMBERS, lambda x, y: losses.margin_ranking_loss(x, y, margin=0.5), _their_ranking),
    "Transformers' label smoother": (LOGITS, lambda x: jnp.sum(_smoothed(x)), _their_smoother),
    "Transformers' focal loss": (
        ((N, 1),),
        lambda x: jnp.sum(losses.binary_focal_loss(x, BITS[:, None], gamma=2.0, alpha=0.25)),
        lambda x: sigmoid_focal_loss(x, torch.tensor(BITS[:, None]).double(), num_boxes=1),
    ),
    "DistilBERT's distillation": (
        TEACHER,
        lambda s, t: 2**2 * jnp.mean(losses.forward_kl(s, t, temperature=2.0)),
        _their_distillation,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    shapes, ours, theirs = CASES[name]
    inputs = _normal(*shapes)
    # A weight for each element, so that no gradient stands for another.
    tensors = [torch.tensor(x, requires_grad=True) for x in inputs]
    wanted = theirs(*tensors)
    assert wanted.dtype == torch.float64
    weights = np.random.default_rng(4).uniform(0.5, 2, tuple(wanted.shape))
    (wanted * torch.tensor(weights)).sum().backward()
    with jax.enable_x64(True):
        value, back = jax.vjp(jax.jit(ours), *map(jnp.asarray, inputs))
        gradients = back(jnp.asarray(weights))
    assert np.abs(wanted.detach().numpy()).max() > 0.1
    allowed = 1e-6 if "smoother" in name else 1e-10
    np.testing.assert_allclose(value, wanted.detach().numpy(), rtol=allowed, atol=allowed)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        assert float(tensor.grad.abs().max()) > 1e-3
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=10 * allowed, atol=allowed)
