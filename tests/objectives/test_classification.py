"""Classification and regression by hand: labels, weights, what a row sees, and what is learnt."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmobj import masks, noise
from lmobj.batch import RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import EncoderConfig, PairHead
from lmobj.objectives import (
    Classification,
    Context,
    Member,
    Mixture,
    Regression,
    _row_task,
    denominators,
    step_keys,
    total_loss,
)
from tests.mutants import Mutant, assert_killed
from tests.objectives.learning import ENCODER, PairTopics, learn

VOCAB = Vocabulary(size=16, pad=0, eos=3, cls=4, sep=5, mask=6)
CLASSES = 3
OBJECTIVE = Classification(classes=CLASSES)


def examples() -> dict[str, Any]:
    """Rows of 8: [CLS] 2 [SEP] 3 [SEP]; [CLS] 1 [SEP] 1 [SEP] and padding; nothing. Labels 2, 0 and, of nothing, 0."""
    tokens = jnp.asarray([[4, 7, 8, 5, 10, 11, 12, 5], [4, 14, 5, 15, 5, 0, 0, 0], [0] * 8])
    types = jnp.asarray([[0] * 4 + [1] * 4, [0] * 3 + [1] * 2 + [0] * 3, [0] * 8])
    segments = (tokens > 0).astype(jnp.int32)
    return {
        "tokens": tokens,
        "segment_ids": segments,
        "positions": jnp.arange(8) * segments,
        "token_types": types,
        "labels": jnp.asarray([2, 0, 0]),
        "row_ids": jnp.asarray([[0, 0], [0, 1], [0, 2]]),
    }


def context(batch: dict[str, Any], train: bool = False) -> tuple[Any, Context]:
    noise_keys, model = step_keys(jax.random.key(0, impl="threefry2x32"), batch["row_ids"], 0)
    return noise_keys, Context(model, 0, VOCAB, train=train)


class Model:
    """Hidden states that say only which place a token has, and what the model was given."""

    def hidden(self, tokens: Any, **given: Any) -> Any:
        self.given = given
        return jnp.broadcast_to(jnp.arange(1.0, tokens.shape[1] + 1)[:, None], (*tokens.shape, 2))


class Head:
    """The first hidden state of a row as it is, and the logits (0, 1, 2) times it."""

    def pooled(self, hidden: Any) -> Any:
        return hidden[:, 0]

    def classifier(self, pooled: Any) -> Any:
        return pooled[:, :1] * jnp.arange(3.0)


def test_the_loss_is_the_mean_over_the_rows_that_have_text() -> None:
    batch = examples()
    noise_keys, ctx = context(batch)
    example = OBJECTIVE.corrupt(noise_keys, batch, ctx)
    model = Model()
    terms = OBJECTIVE.terms({"model": model, "heads": Head()}, example, (), ctx)
    assert model.given["token_types"] is batch["token_types"]
    # Logits 0, 1, 2 in every row: with z = log(1 + e + e^2), label 2 costs z - 2 and label 0 costs z.
    z = math.log(1 + math.e + math.e**2)
    np.testing.assert_allclose(terms.sums["nll"], 2 * z - 2, rtol=1e-6)
    np.testing.assert_allclose(terms.metrics["nll"], (2 * z - 2, 2), rtol=1e-6)
    np.testing.assert_allclose(terms.metrics["accuracy"], (1, 2))
    weights = denominators(OBJECTIVE, example)
    np.testing.assert_allclose(total_loss(terms, weights, OBJECTIVE.coefficients), z - 1, rtol=1e-6)


def test_weights_of_classes_and_smoothing_are_those_of_pytorch() -> None:
    # Logits 0, 1, 2 in both rows, labels 2 and 0: with z as above, -log p is z, z - 1, z - 2. Weights 1, 2, 4, and 0.3
    # of the target spread over three classes: 0.7 w_y nll_y + 0.1 (1 z + 2 (z - 1) + 4 (z - 2)), over 4 + 1.
    batch = examples()
    noise_keys, ctx = context(batch)
    objective = Classification(classes=3, class_weights=(1, 2, 4), label_smoothing=0.3)
    example = objective.corrupt(noise_keys, batch, ctx)
    terms = objective.terms({"model": Model(), "heads": Head()}, example, (), ctx)
    z = math.log(1 + math.e + math.e**2)
    expected = (0.7 * (4 * (z - 2) + z) + 2 * 0.1 * (7 * z - 10)) / 5
    total = total_loss(terms, denominators(objective, example), objective.coefficients)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    np.testing.assert_allclose(terms.metrics["nll"], (2 * z - 2, 2), rtol=1e-6)
    np.testing.assert_allclose(terms.outputs["logits"][:2], [[0, 1, 2]] * 2)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # States count places from 1: the last of 8 and of 5 tokens, the means of 1..8 and 1..5; an empty row has none.
        ({"pooling": "first"}, [1, 1]),
        ({"pooling": "last"}, [8, 5]),
        ({"pooling": "mean"}, [4.5, 3]),
        ({"pooling": "last", "attention": "causal"}, [8, 5]),
    ],
)
def test_regression_reads_the_state_that_it_is_told_to(settings: dict[str, Any], expected: list[float]) -> None:
    batch = examples() | {"scores": jnp.asarray([2.0, 1.0, 9.0])}
    noise_keys, ctx = context(batch)
    objective = Regression(**settings)
    example = objective.corrupt(noise_keys, batch, ctx)
    model = Model()
    terms = objective.terms({"model": model, "heads": Head()}, example, (), ctx)
    # The head gives 0, 1, 2 times the state, of which the first, a 0, would be all that is read.
    np.testing.assert_allclose(terms.sums["mse"], 2.0**2 + 1.0**2)

    class Second(Head):
        def classifier(self, pooled: Any) -> Any:
            return pooled[:, :1]

    terms = objective.terms({"model": model, "heads": Second()}, example, (), ctx)
    np.testing.assert_allclose(terms.outputs["scores"][:2], expected)
    np.testing.assert_allclose(terms.metrics["mse"], ((expected[0] - 2) ** 2 + (expected[1] - 1) ** 2, 2))
    assert model.given["mask"].causal == ("attention" in settings)
    assert (model.given["token_types"] is None) == ("attention" in settings)


def test_the_pooled_state_is_dropped_in_training_alone() -> None:
    batch = examples()

    class Wide(Head):
        """The pooled state's numbers, 4096 of which are kept or dropped, added up."""

        def pooled(self, hidden: Any) -> Any:
            return jnp.ones((hidden.shape[0], 4096))

        def classifier(self, pooled: Any) -> Any:
            return jnp.stack([pooled.sum(1) / 4096, jnp.zeros(len(pooled))], axis=1)

    def loss(rate: float, train: bool) -> float:
        noise_keys, ctx = context(batch, train)
        objective = Classification(classes=2, dropout=rate)
        example = objective.corrupt(noise_keys, {**batch, "labels": jnp.zeros(3, jnp.int32)}, ctx)
        return float(objective.terms({"model": Model(), "heads": Wide()}, example, (), ctx).sums["nll"])

    whole = 2 * math.log1p(math.exp(-1))
    assert loss(0.5, train=False) == pytest.approx(whole, rel=1e-6)
    assert loss(0.0, train=True) == pytest.approx(whole, rel=1e-6)
    # Kept numbers count double: their mean is 1 within 4 / sqrt(4096), and not exactly.
    assert loss(0.5, train=True) == pytest.approx(whole, rel=0.06)
    assert loss(0.5, train=True) != pytest.approx(whole, rel=1e-5)


def test_a_label_is_predicted_from_its_own_row_and_all_of_it() -> None:
    """By gradient: every place of the batch has a position of its own, and so a row of the position table."""
    batch = examples()
    rows, length = batch["tokens"].shape
    noise_keys, ctx = context(batch)
    config = EncoderConfig(layers=2, width=8, heads=2, max_length=rows * length, vocab_multiple=1, init_std=0.3)
    graph, state = nnx.split(config.build(VOCAB, nnx.Rngs(params=0)))
    heads = PairHead(config.head_style, CLASSES, nnx.Rngs(params=1))
    example = OBJECTIVE.corrupt(noise_keys, batch, ctx)
    example = dataclasses.replace(example, positions=jnp.arange(rows * length).reshape(rows, length))

    @jax.jit
    def reach(row: Any) -> Any:
        one = dataclasses.replace(example, weights=jnp.zeros((rows, 1)).at[row].set(1.0))

        def loss(table: Any) -> Any:
            params = nnx.to_pure_dict(state)
            params["embeddings"]["positions"]["table"] = table
            return OBJECTIVE.terms({"model": nnx.merge(graph, params), "heads": heads}, one, (), ctx).sums["nll"]

        gradient = jax.grad(loss)(nnx.to_pure_dict(state)["embeddings"]["positions"]["table"])
        return jnp.linalg.norm(gradient, axis=-1).reshape(rows, length)

    for row in (0, 1):
        expected = (np.asarray(batch["segment_ids"]) > 0) & (np.arange(rows)[:, None] == row)
        np.testing.assert_array_equal(np.asarray(reach(row)) > 0, expected)


def test_rows_asked_for() -> None:
    assert OBJECTIVE.rows(VOCAB, 32) == RowSpec("examples", 32, (4,), (5,), ("labels",))
    head = OBJECTIVE.build_heads(ENCODER.head_style, VOCAB, nnx.Rngs(params=0))
    assert head(jnp.zeros((2, 5, ENCODER.width))).shape == (2, CLASSES)


def test_what_cannot_be_done_is_refused() -> None:
    for settings, message in (
        ({"classes": 1}, "classes is 1"),
        ({"dropout": 1.0}, r"dropout is 1\.0"),
        ({"label_smoothing": 1.0}, r"label_smoothing is 1\.0"),
        ({"class_weights": (1.0,)}, "class_weights is .*2 finite numbers"),
        ({"class_weights": (0.0, 0.0)}, "not all 0"),
        ({"class_weights": (1.0, -1.0)}, "0 or more"),
        ({"pooling": "all"}, "pooling is 'all'; accepted: first, last, mean"),
        ({"attention": "causal"}, "first token sees nothing"),
    ):
        with pytest.raises(UserError, match=message):
            Classification(**settings)
    for missing, message in (({"cls": None}, r"no \[CLS\]"), ({"sep": None}, r"no \[SEP\]")):
        with pytest.raises(UserError, match=message):
            OBJECTIVE.rows(dataclasses.replace(VOCAB, **missing), 32)
    OBJECTIVE.check_classes(lambda source: ["contradiction", "entailment", "neutral"])
    with pytest.raises(UserError, match=r"classes is 3, but the data has 2 classes \(no, yes\); accepted: .*classes=2"):
        OBJECTIVE.check_classes(lambda source: ["no", "yes"])


def test_members_of_a_mixture_tell_the_classes_of_their_own_sources() -> None:
    classes = {"one": ["no", "yes"], "two": ["contradiction", "entailment", "neutral"]}
    members = {name: Member(Classification(classes=len(names)), source=name) for name, names in classes.items()}
    Mixture(members=members).check_classes(lambda source: classes[str(source)])
    with pytest.raises(UserError, match=r"objective\.members\.one\.objective\.classes is 2, but the data has 3"):
        Mixture(members=members).check_classes(lambda source: classes["two"])


@pytest.mark.slow
def test_pairs_of_texts_are_told_apart() -> None:
    """Half of the pairs are of one topic: 1 for whoever sees both texts, and 1/2 for whoever sees one."""
    language = PairTopics(task="next_sentence")
    metrics = learn(Classification(classes=2), ENCODER, language.vocab, *language.batches(steps=250), lr=1e-2)
    assert metrics["accuracy"] > 0.95


def _labels_changed(corrupt: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, keys, batch, ctx: corrupt(self, keys, {**batch, "labels": 2 - batch["labels"]}, ctx)


def _predicts_nothing_of_b(corrupt: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given: dataclasses.replace(corrupt(*given), token_types=None)


BY_HAND = (
    test_the_loss_is_the_mean_over_the_rows_that_have_text,
    test_the_pooled_state_is_dropped_in_training_alone,
)
BY_GRADIENT = (test_a_label_is_predicted_from_its_own_row_and_all_of_it,)
MUTANTS = [
    (Mutant("labels reversed", Classification, "corrupt", _labels_changed), BY_HAND),
    (Mutant("no token types", Classification, "corrupt", _predicts_nothing_of_b), BY_HAND),
    (Mutant("empty rows count", _row_task, "row_weights", lambda _: lambda b: jnp.ones(len(b["tokens"]))), BY_HAND),
    (Mutant("no dropout", noise, "dropout", lambda _: lambda x, *_, **__: x), BY_HAND),
    (Mutant("dropout in evaluation", Context, "dropout", lambda _: jnp.arange(3, dtype=jnp.uint32)), BY_HAND),
    (Mutant("padding is seen", masks.AttentionMask, "packed", lambda _: lambda m, *_: m), BY_GRADIENT),
    (Mutant("a mask of the left side", masks, "bidirectional", lambda _: masks.causal), BY_GRADIENT),
]


@pytest.mark.parametrize(("mutant", "checks"), MUTANTS, ids=[str(mutant) for mutant, _ in MUTANTS])
def test_mutants_are_noticed(
    monkeypatch: pytest.MonkeyPatch, mutant: Mutant, checks: tuple[Callable[[], None], ...]
) -> None:
    assert_killed(monkeypatch, mutant, checks)
