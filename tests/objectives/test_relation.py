"""Relation classification by hand: which states are read, in which order, and what is learnt of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmobj import masks, noise
from lmobj.batch import RowSpec
from lmobj.errors import UserError
from lmobj.objectives import Context, RelationClassification, _relation, denominators, total_loss
from tests.mutants import Mutant, assert_killed
from tests.objectives.learning import ENCODER
from tests.objectives.test_classification import VOCAB, Model, context, examples

OBJECTIVE = RelationClassification(classes=3, dropout=0.0)


def marked() -> dict[str, Any]:
    """The rows of classification, with head and tail at 6 and 2, at 1 and 3, and of nothing beyond the row."""
    batch = examples() | {"spans": jnp.asarray([[6, 2], [1, 3], [9, 9]])}
    del batch["token_types"]
    return batch


class Head:
    """The logits (0, head / 10, tail / 5), of states that count places from 1."""

    def __call__(self, states: Any) -> Any:
        head, tail = states[:, 0, 0], states[:, 1, 0]
        return jnp.stack([jnp.zeros_like(head), head / 10, tail / 5], axis=1)


def terms_of(objective: RelationClassification, train: bool = False) -> tuple[Any, Any, Model]:
    batch, model = marked(), Model()
    noise_keys, ctx = context(batch, train)
    example = objective.corrupt(noise_keys, batch, ctx)
    return objective.terms({"model": model, "heads": Head()}, example, (), ctx), example, model


def test_the_states_of_both_markers_are_read_in_order() -> None:
    # States 7 and 3, label 2: logits 0, 0.7, 0.6. States 2 and 4, label 0: 0, 0.2, 0.8.
    terms, example, model = terms_of(OBJECTIVE)
    np.testing.assert_allclose(terms.outputs["logits"][:2], [[0, 0.7, 0.6], [0, 0.2, 0.8]], rtol=1e-6)
    first = math.log(1 + math.exp(0.7) + math.exp(0.6)) - 0.6
    second = math.log(1 + math.exp(0.2) + math.exp(0.8))
    np.testing.assert_allclose(terms.metrics["nll"], (first + second, 2), rtol=1e-6)
    np.testing.assert_allclose(terms.metrics["accuracy"], (0, 2))
    total = total_loss(terms, denominators(OBJECTIVE, example), OBJECTIVE.coefficients)
    np.testing.assert_allclose(total, (first + second) / 2, rtol=1e-6)
    assert model.given["token_types"] is None
    assert not model.given["mask"].causal
    np.testing.assert_array_equal(model.given["mask"].segment_ids, marked()["segment_ids"])


def test_states_are_dropped_in_training_alone() -> None:
    half = RelationClassification(classes=3, dropout=0.5)
    whole = terms_of(OBJECTIVE)[0].outputs["logits"][:2]
    np.testing.assert_allclose(terms_of(half)[0].outputs["logits"][:2], whole)
    dropped = np.asarray(terms_of(half, train=True)[0].outputs["logits"][:2])
    assert not np.allclose(dropped, whole)
    assert np.all(np.isclose(dropped, 0) | np.isclose(dropped, 2 * np.asarray(whole)))


def test_the_head_is_one_linear_map_of_both() -> None:
    head = OBJECTIVE.build_heads(ENCODER.head_style, VOCAB, nnx.Rngs(params=0))
    states = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, ENCODER.width)))
    kernel, bias = head.classifier.kernel[...], head.classifier.bias[...]
    expected = states[:, 0] @ kernel[: ENCODER.width] + states[:, 1] @ kernel[ENCODER.width :] + bias
    np.testing.assert_allclose(head(states), expected, rtol=1e-4, atol=1e-6)


def test_rows_asked_for() -> None:
    assert OBJECTIVE.rows(VOCAB, 32) == RowSpec("relations", 32, (4,), (5,), ("labels", "spans"))


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(UserError, match="classes is 1"):
        RelationClassification(classes=1)
    with pytest.raises(UserError, match=r"attention is 'causal', .*; accepted: bidirectional"):
        RelationClassification(attention="causal")
    with pytest.raises(UserError, match=r"no \[SEP\]"):
        OBJECTIVE.rows(dataclasses.replace(VOCAB, sep=None), 32)
    with pytest.raises(UserError, match=r"classes is 3, but the data has 1 classes \(saw\); accepted: other data"):
        OBJECTIVE.check_classes(lambda source: ["saw"])


def _swapped(corrupt: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, keys, batch, ctx: corrupt(self, keys, {**batch, "spans": batch["spans"][:, ::-1]}, ctx)


def _one_further(corrupt: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, keys, batch, ctx: corrupt(self, keys, {**batch, "spans": batch["spans"] + 1}, ctx)


CHECKS = (test_the_states_of_both_markers_are_read_in_order, test_states_are_dropped_in_training_alone)
MUTANTS = [
    Mutant("head and tail changed", RelationClassification, "corrupt", _swapped),
    Mutant("the token after the marker", RelationClassification, "corrupt", _one_further),
    Mutant("empty rows count", _relation, "row_weights", lambda _: lambda b: jnp.ones(len(b["tokens"]))),
    Mutant("no dropout", noise, "dropout", lambda _: lambda x, *_, **__: x),
    Mutant("dropout in evaluation", Context, "dropout", lambda _: jnp.arange(3, dtype=jnp.uint32)),
    Mutant("a mask of the left side", masks, "bidirectional", lambda _: masks.causal),
    Mutant(
        "padding is seen",
        masks.AttentionMask,
        "packed",
        lambda _: lambda m, x: dataclasses.replace(m, segment_ids=0 * x),
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    assert_killed(monkeypatch, mutant, CHECKS)
