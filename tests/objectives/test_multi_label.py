"""Multi-label classification by hand and beside PyTorch: labels, weights of classes, and what counts as right."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmobj import losses
from lmobj.batch import RowSpec, row_arrays
from lmobj.errors import UserError
from lmobj.objectives import MultiLabel, _row_task, denominators, total_loss
from tests.mutants import Mutant, assert_killed
from tests.objectives.learning import ENCODER
from tests.objectives.test_classification import VOCAB, Head, Model, context, examples

OBJECTIVE = MultiLabel(classes=3)


class Signed(Head):
    """The logits (-1, 0, 1) in every row: its first state is 1."""

    def classifier(self, pooled: Any) -> Any:
        return pooled[:, :1] * jnp.arange(-1.0, 2.0)


def labelled() -> dict[str, Any]:
    """The rows of classification: the first of the last two, the second of all but the second, the third empty."""
    return examples() | {"label_sets": jnp.asarray([[0.0, 1, 1], [1, 0, 1], [1, 1, 1]])}


def told(objective: MultiLabel) -> tuple[Any, float]:
    batch = labelled()
    noise_keys, ctx = context(batch)
    example = objective.corrupt(noise_keys, batch, ctx)
    terms = objective.terms({"model": Model(), "heads": Signed()}, example, (), ctx)
    return terms, float(total_loss(terms, denominators(objective, example), objective.coefficients))


def test_the_loss_is_the_mean_over_classes_and_rows_that_have_text() -> None:
    # softplus(-1) = s, softplus(0) = log 2, softplus(1) = s + 1. First row: -1 is no class, s; 0 is, log 2; 1 is, s.
    # Second: -1 is a class, s + 1; 0 is none, log 2; 1 is, s. Over 2 x 3.
    s = math.log1p(math.exp(-1))
    terms, total = told(OBJECTIVE)
    np.testing.assert_allclose(terms.metrics["bce"], (4 * s + 1 + 2 * math.log(2), 6), rtol=1e-6)
    assert total == pytest.approx((4 * s + 1 + 2 * math.log(2)) / 6, rel=1e-6)
    # A logit of 0 tells the class: the first row is right, the second is not.
    np.testing.assert_allclose(terms.metrics["exact_match"], (1, 2))
    np.testing.assert_allclose(terms.outputs["logits"][:2], [[-1, 0, 1]] * 2)


def test_weights_of_classes_are_those_of_pytorch() -> None:
    torch = pytest.importorskip("torch")
    loss = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0, 0.5, 2.0]))
    expected = loss(torch.tensor([[-1.0, 0, 1]] * 2), torch.tensor([[0.0, 1, 1], [1, 0, 1]]))
    terms, total = told(MultiLabel(classes=3, class_weights=(3, 0.5, 2)))
    assert total == pytest.approx(float(expected), rel=1e-6)
    assert float(terms.metrics["bce"][0]) == pytest.approx(float(told(OBJECTIVE)[0].metrics["bce"][0]))


def test_rows_asked_for() -> None:
    spec = OBJECTIVE.rows(VOCAB, 32)
    assert spec == RowSpec("examples", 32, (4,), (5,), ("label_sets",), classes=3)
    assert row_arrays(spec)["label_sets"] == ("float32", (3,))
    head = OBJECTIVE.build_heads(ENCODER.head_style, VOCAB, nnx.Rngs(params=0))
    assert head(jnp.zeros((2, 5, ENCODER.width))).shape == (2, 3)


def test_what_cannot_be_done_is_refused() -> None:
    for settings, message in (
        ({"classes": 1}, "classes is 1"),
        ({"class_weights": (1.0,)}, "class_weights is .*2 finite numbers"),
        ({"class_weights": (1.0, math.inf)}, "class_weights is .*finite"),
    ):
        with pytest.raises(UserError, match=message):
            MultiLabel(**settings)
    with pytest.raises(UserError, match=r"classes is 3, but the data has 2 classes \(cat, dog\)"):
        OBJECTIVE.check_classes(lambda source: ["cat", "dog"])


def _reversed(corrupt: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, keys, batch, ctx: corrupt(self, keys, batch | {"label_sets": 1 - batch["label_sets"]}, ctx)


def _mean_over_rows(weights: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, example: {"bce": jnp.sum(example.weights)}


CHECKS = (
    test_the_loss_is_the_mean_over_classes_and_rows_that_have_text,
    test_weights_of_classes_are_those_of_pytorch,
)
MUTANTS = [
    Mutant("labels reversed", MultiLabel, "corrupt", _reversed),
    Mutant("classes are added up", MultiLabel, "weights", _mean_over_rows),
    Mutant("empty rows count", _row_task, "row_weights", lambda _: lambda b: jnp.ones(len(b["tokens"]))),
    Mutant("signs changed", losses, "binary_nll", lambda nll: lambda logits, labels: nll(-logits, labels)),
    Mutant("one right class is enough", jnp, "all", lambda _: jnp.any),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    assert_killed(monkeypatch, mutant, CHECKS)
