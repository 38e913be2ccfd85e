"""Sentence pairs by hand: labels, weights and denominators of both terms, what each term sees, and what is learnt."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmobj import masks
from lmobj.batch import RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import EncoderConfig, PairHead
from lmobj.objectives import Context, MaskedLM, _sentence_pairs, denominators, step_keys, total_loss
from lmobj.objectives._sentence_pairs import NextSentencePrediction, SentenceOrderPrediction
from tests.mutants import Mutant, assert_killed
from tests.objectives.learning import ENCODER, PairTopics, learn
from tests.objectives.uniform import Uniform

VOCAB = Vocabulary(size=16, pad=0, eos=3, cls=4, sep=5, mask=6)
KINDS = [NextSentencePrediction, SentenceOrderPrediction]
JOINT = NextSentencePrediction(masked_lm=MaskedLM(mask_rate=0.3, mask_share=1.0, random_share=0.0))


def pairs() -> dict[str, Any]:
    """Rows of 10: [CLS] 3 [SEP] 4 [SEP]; [CLS] 1 [SEP] 1 [SEP] and padding; nothing. Labels 1, 0 and, of nothing, 0."""
    tokens = jnp.asarray([[4, 7, 8, 9, 5, 10, 11, 12, 13, 5], [4, 14, 5, 15, 5, 0, 0, 0, 0, 0], [0] * 10])
    types = jnp.asarray([[0] * 5 + [1] * 5, [0] * 3 + [1] * 2 + [0] * 5, [0] * 10])
    segments = (tokens > 0).astype(jnp.int32)
    return {
        "tokens": tokens,
        "segment_ids": segments,
        "positions": jnp.arange(10) * segments,
        "token_types": types,
        "pair_labels": jnp.asarray([1, 0, 0]),
        "row_ids": jnp.asarray([[0, 0], [0, 1], [0, 2]]),
    }


def context(batch: dict[str, Any]) -> tuple[Any, Context]:
    noise, model = step_keys(jax.random.key(0, impl="threefry2x32"), batch["row_ids"], 0)
    return noise, Context(model, 0, VOCAB, train=False)


def rather_class_1(hidden: Any) -> Any:
    """A head that gives class 1 three nats more than class 0 in the first row, and one more in the others."""
    return jnp.asarray([[0.0, 3.0], [0.0, 1.0], [0.0, 1.0]])


PAIRS = math.log1p(math.exp(-3)) + 1 + math.log1p(math.exp(-1))
"""Row 0 has label 1: log(1 + e^-3). Row 1 has label 0: log(1 + e). The empty row costs nothing."""


def terms_of(objective: Any) -> tuple[Any, Any]:
    batch = pairs()
    noise, ctx = context(batch)
    example = objective.corrupt(noise, batch, ctx)
    model = Uniform(VOCAB.size)
    terms = objective.terms({"model": model, "heads": rather_class_1}, example, (), ctx)
    assert model.given["token_types"] is batch["token_types"]
    return terms, denominators(objective, example)


def test_both_terms_have_their_own_sums_and_denominators() -> None:
    objective = NextSentencePrediction(masked_lm=MaskedLM(mask_rate=0.3))
    terms, weights = terms_of(objective)
    # round(0.3 * 10) = 3 of row 0 and round(0.3 * 5) = 2 (half to even) of row 1, log 16 each.
    np.testing.assert_allclose(terms.sums["nll"], 5 * math.log(16), rtol=1e-6)
    np.testing.assert_allclose(weights["nll"], 5 + 1e-5, rtol=1e-7)
    np.testing.assert_allclose(terms.sums["nsp"], PAIRS, rtol=1e-6)
    assert float(weights["nsp"]) == 2
    assert [float(x) for x in terms.metrics["nsp_accuracy"]] == [1, 2]
    np.testing.assert_allclose(terms.metrics["nll"], (5 * math.log(16), 5), rtol=1e-6)
    loss = total_loss(terms, weights, objective.coefficients)
    np.testing.assert_allclose(loss, 5 * math.log(16) / (5 + 1e-5) + PAIRS / 2, rtol=1e-6)
    assert SentenceOrderPrediction().coefficients == {"nll": 1.0, "sop": 1.0}
    assert SentenceOrderPrediction().epsilon == {"nll": 1e-5}


def test_pairs_without_masked_lm() -> None:
    batch = pairs()
    noise, ctx = context(batch)
    for kind in KINDS:
        objective = kind(masked_lm=None)
        example = objective.corrupt(noise, batch, ctx)
        np.testing.assert_array_equal(example.inputs, batch["tokens"])
        terms, weights = terms_of(objective)
        assert terms.sums.keys() == weights.keys() == objective.coefficients.keys() == {kind.TERM}
        assert terms.metrics.keys() == {f"{kind.TERM}_accuracy"}
        np.testing.assert_allclose(terms.sums[kind.TERM], PAIRS, rtol=1e-6)
        assert float(weights[kind.TERM]) == 2


def test_corruption_knows_nothing_of_the_label() -> None:
    batch = pairs()
    noise, ctx = context(batch)
    example = JOINT.corrupt(noise, batch, ctx)
    other = JOINT.corrupt(noise, {**batch, "pair_labels": 1 - batch["pair_labels"]}, ctx)
    for name in ("inputs", "targets", "weights", "predict", "positions", "token_types"):
        np.testing.assert_array_equal(getattr(example, name), getattr(other, name))
    # What is predicted is hidden, and is what stood there.
    predicted = example.weights > 0
    at = functools.partial(jnp.take_along_axis, indices=example.predict, axis=1)
    np.testing.assert_array_equal(at(example.inputs)[predicted], 6)
    np.testing.assert_array_equal(at(batch["tokens"])[predicted], example.targets[predicted])
    assert int(predicted.sum()) == 5
    assert not np.isin(example.targets[predicted], [4, 5]).any()


def test_the_pair_is_read_from_cls_alone() -> None:
    style = ENCODER.head_style._replace(width=4)
    head = PairHead(style, 2, nnx.Rngs(params=0))
    hidden = jax.random.normal(jax.random.key(1), (3, 5, 4))
    reach = jax.grad(lambda h: jnp.sum(head(h)[:, 0] - head(h)[:, 1]))(hidden)
    assert np.abs(reach[:, 0]).min() > 0
    assert not np.any(reach[:, 1:])


def test_terms_see_their_own_row_and_all_of_it() -> None:
    """By gradient: every place of the batch has a position of its own, and so a row of the position table."""
    batch = pairs()
    rows, length = batch["tokens"].shape
    noise, ctx = context(batch)
    config = EncoderConfig(layers=2, width=8, heads=2, max_length=rows * length, vocab_multiple=1, init_std=0.3)
    graph, state = nnx.split(config.build(VOCAB, nnx.Rngs(params=0)))
    heads = PairHead(config.head_style, 2, nnx.Rngs(params=1))
    example = JOINT.corrupt(noise, batch, ctx)
    example = dataclasses.replace(example, positions=jnp.arange(rows * length).reshape(rows, length))
    slots = example.weights.size

    @jax.jit
    def reach(slot: Any) -> Any:
        """[rows, L] of the loss of one masked token, or from `slots` on of one row's pair."""
        pair_weights = jnp.zeros(rows).at[slot - slots].set(slot >= slots, mode="drop")
        weights = jnp.zeros(slots).at[slot].set(1.0, mode="drop").reshape(example.weights.shape)
        one = dataclasses.replace(example, weights=weights, extra={**example.extra, "pair_weights": pair_weights})

        def loss(table: Any) -> Any:
            params = nnx.to_pure_dict(state)
            params["embeddings"]["positions"]["table"] = table
            models = {"model": nnx.merge(graph, params), "heads": heads}
            return sum(JOINT.terms(models, one, (), ctx).sums.values())

        gradient = jax.grad(loss)(nnx.to_pure_dict(state)["embeddings"]["positions"]["table"])
        return jnp.linalg.norm(gradient, axis=-1).reshape(rows, length)

    filled = np.asarray(batch["segment_ids"]) > 0
    masked = [(i, i // example.weights.shape[1]) for i in np.flatnonzero(example.weights).tolist()]
    assert len(masked) == 5
    for slot, row in [*masked, (slots, 0), (slots + 1, 1)]:
        expected = filled & (np.arange(rows)[:, None] == row)
        np.testing.assert_array_equal(np.asarray(reach(slot)) > 0, expected, err_msg=f"slot {slot} of row {row}")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_asked_for(kind: Any) -> None:
    rows = kind(masked_lm=MaskedLM(selection="whole_word"), short_rate=0.2).rows(VOCAB, 32)
    pairing = "next_sentence" if kind is NextSentencePrediction else "sentence_order"
    assert rows == RowSpec("pairs", 32, (4,), (5,), ("word_starts",), pairing=pairing, short_rate=0.2)
    assert kind(masked_lm=None).rows(dataclasses.replace(VOCAB, mask=None), 32).fields == ()
    assert kind().short_rate == 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("settings", "vocab", "message"),
    [
        ({"short_rate": 1.5}, {}, r"short_rate is 1\.5"),
        ({"masked_lm": MaskedLM(layout="single")}, {}, "masked_lm.layout is 'single'"),
        ({}, {"cls": None}, r"the vocabulary has no \[CLS\]; set"),
        ({}, {"cls": None, "sep": None}, r"no \[CLS\] and no \[SEP\]"),
        ({}, {"mask": None}, r"needs \[MASK\]"),
        ({"masked_lm": MaskedLM(mask_rate=0.9)}, {}, "leaves none to read"),
    ],
)
def test_what_cannot_be_done_is_refused(
    kind: Any, settings: dict[str, Any], vocab: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        kind(**settings).rows(dataclasses.replace(VOCAB, **vocab), 10)


@pytest.mark.slow
def test_next_sentence_is_learnt_beside_masked_words() -> None:
    """Whoever sees both texts knows the label, and of a masked word the topic and the text: one of two synonyms.

    A model that does not see both texts at once is at 1/2 of the labels, and one that sees the hidden words is at 1 of
    the words; without its neighbours a word is one of 16.
    """
    language = PairTopics(task="next_sentence")
    objective = NextSentencePrediction(masked_lm=MaskedLM(mask_share=1.0, random_share=0.0))
    metrics = learn(objective, ENCODER, language.vocab, *language.batches(steps=300), lr=1e-2)
    assert metrics["nsp_accuracy"] > 0.95
    assert abs(metrics["accuracy"] - 1 / language.synonyms) < 0.05


def test_sentence_order_is_learnt_alone() -> None:
    """1 for whoever tells the texts and their order apart, else 1/2."""
    language = PairTopics(task="sentence_order")
    objective = SentenceOrderPrediction(masked_lm=None)
    metrics = learn(objective, ENCODER, language.vocab, *language.batches(steps=150), lr=1e-2)
    assert metrics["sop_accuracy"] > 0.95


def _labels_swapped(corrupt: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, keys, batch, ctx: corrupt(self, keys, {**batch, "pair_labels": 1 - batch["pair_labels"]}, ctx)


def _without_types(corrupt: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given: dataclasses.replace(corrupt(*given), token_types=None)


def _targets_shifted(corrupt: Callable[..., Any]) -> Callable[..., Any]:
    def shifted(*given: Any) -> Any:
        example = corrupt(*given)
        return dataclasses.replace(example, targets=jnp.roll(example.targets, 1, axis=1))

    return shifted


def _one_denominator(weights: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, example: dict.fromkeys(weights(self, example), jnp.sum(example.weights))


def _ones(batch: dict[str, Any]) -> Any:
    return jnp.ones(len(batch["tokens"]))


_BASE = _sentence_pairs._SentencePairs
BY_HAND = (test_both_terms_have_their_own_sums_and_denominators, test_corruption_knows_nothing_of_the_label)
MUTANTS = [
    (Mutant("swapped label", _BASE, "corrupt", _labels_swapped), BY_HAND),
    (Mutant("shifted targets", MaskedLM, "corrupt", _targets_shifted), BY_HAND),
    (Mutant("no token types", _BASE, "corrupt", _without_types), BY_HAND),
    (Mutant("empty rows count", _sentence_pairs, "row_weights", lambda _: _ones), BY_HAND),
    (Mutant("one denominator for both", _BASE, "weights", _one_denominator), BY_HAND),
    (Mutant("no epsilon", _BASE, "epsilon", lambda _: {}), BY_HAND),
    (Mutant("pooled from the second token", PairHead, "pooled", lambda f: lambda self, h: f(self, h[:, 1:])),
     (test_the_pair_is_read_from_cls_alone,)),
    (Mutant("rows see one another's padding", masks.AttentionMask, "packed", lambda _: lambda m, *_: m),
     (test_terms_see_their_own_row_and_all_of_it,)),
    (Mutant("a mask of the left side", masks, "bidirectional", lambda _: masks.causal),
     (test_terms_see_their_own_row_and_all_of_it,)),
]  # fmt: skip


@pytest.mark.parametrize(("mutant", "checks"), MUTANTS, ids=[str(mutant) for mutant, _ in MUTANTS])
def test_mutants_are_noticed(
    monkeypatch: pytest.MonkeyPatch, mutant: Mutant, checks: tuple[Callable[[], None], ...]
) -> None:
    assert_killed(monkeypatch, mutant, checks)
