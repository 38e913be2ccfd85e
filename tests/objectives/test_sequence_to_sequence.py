"""Sequence to sequence by hand: both texts, lengths, ends and losses; what is refused; and it learns to reverse."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmobj.batch import RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import EncoderDecoderConfig, OutputHead, RowUse
from lmobj.objectives import Context, Example, SequenceToSequence, denominators, total_loss
from tests.mutants import Mutant, assert_killed
from tests.objectives.learning import SEQ2SEQ, Reversals, learn

VOCAB = Vocabulary(size=16, pad=0, unk=1, bos=2, eos=3)
KEY = jax.random.key(0, impl="threefry2x32")
ROWS = [[7, 8, 9, 3, 10, 11, 3, 0, 0], [7, 3, 12, 13, 14, 15, 3, 0, 0], [0] * 9, [7, 8, 3, 0, 0, 0, 0, 0, 0]]
"""Of 3 tokens with 2, of 1 with 4; an empty row; and a source without a target."""


def example_of(objective: SequenceToSequence) -> tuple[Example, Context]:
    tokens = jnp.asarray(ROWS)
    types = jnp.asarray([[0] * 4 + [1] * 3 + [0] * 2, [0] * 2 + [1] * 5 + [0] * 2, [0] * 9, [0] * 9])
    batch = {"tokens": tokens, "segment_ids": (tokens > 0).astype(jnp.int32), "token_types": types}
    keys = jax.random.split(KEY, 4)
    ctx = Context(keys, 0, VOCAB, train=False)
    return objective.corrupt(keys, batch, ctx), ctx


def test_source_and_target_of_each_row() -> None:
    example, _ = example_of(SequenceToSequence(target_length=5))  # of 9 tokens, which leaves 4 to the source
    np.testing.assert_array_equal(example.inputs, [[7, 8, 9, 3], [7, 3, 0, 0], [0] * 4, [7, 8, 3, 0]])
    np.testing.assert_array_equal(example.targets, [[10, 11, 3, 0, 0], [12, 13, 14, 15, 3], [0] * 5, [0] * 5])
    np.testing.assert_array_equal(example.decoder_inputs[:2], [[0, 10, 11, 3, 0], [0, 12, 13, 14, 15]])
    np.testing.assert_array_equal(example.weights, [[1, 1, 1, 0, 0], [1] * 5, [0] * 5, [0] * 5])
    assert example.cross_mask is not None
    assert example.decoder_mask is not None
    seen = jnp.asarray([[1, 1, 1, 1], [1, 1, 0, 0], [0] * 4, [1, 1, 1, 0]])
    np.testing.assert_array_equal(example.mask.segment_ids, seen)
    assert example.decoder_mask.causal
    started, _ = example_of(SequenceToSequence(target_length=5, decoder_start="eos"))
    np.testing.assert_array_equal(started.decoder_inputs[:2, 0], [3, 3])
    assert float(SequenceToSequence().weights(example)["nll"]) == 8


def test_texts_that_are_opened() -> None:
    """Rooms of 5 and 6 tokens, of which 4 and 5 are of the row."""
    objective = SequenceToSequence(target_length=6, open_texts=True, decoder_start="eos")
    example, _ = example_of(objective)
    np.testing.assert_array_equal(example.inputs, [[2, 7, 8, 9, 3], [2, 7, 3, 0, 0], [0] * 5, [2, 7, 8, 3, 0]])
    np.testing.assert_array_equal(example.targets[:2], [[2, 10, 11, 3, 0, 0], [2, 12, 13, 14, 15, 3]])
    assert example.decoder_inputs is not None
    np.testing.assert_array_equal(example.decoder_inputs[:2], [[3, 2, 10, 11, 3, 0], [3, 2, 12, 13, 14, 15]])
    np.testing.assert_array_equal(example.weights, [[1, 1, 1, 1, 0, 0], [1] * 6, [0] * 6, [0] * 6])
    spec = objective.rows(VOCAB, 5)
    assert (spec.length, spec.second_length) == (9, 5)
    assert objective.use(5) == RowUse(5, 6, decoder_length=6)
    assert objective.around(VOCAB) == ((2,), (3,))
    with pytest.raises(UserError, match=r"objective.open_texts is true, and the vocabulary has no <s>"):
        objective.rows(dataclasses.replace(VOCAB, bos=None), 5)


def test_both_in_one_row() -> None:
    example, _ = example_of(SequenceToSequence(target_length=5, rendering="decoder"))
    np.testing.assert_array_equal(example.inputs[:2], [[7, 8, 9, 3, 10, 11, 3, 0, 0], [7, 3, 12, 13, 14, 15, 3, 0, 0]])
    assert example.predict is not None
    # The last token of the source, which is its end, predicts the first of the target.
    np.testing.assert_array_equal(example.predict[:2, 0], [3, 1])
    np.testing.assert_array_equal(example.weights[:2], [[1, 1, 1, 0, 0], [1] * 5])


class Skewed:
    """Logits that are 1 for token 10 and 0 for the 15 others, whatever is read."""

    def encode(self, tokens: Any, **_: Any) -> Any:
        return tokens[..., None].astype(float)

    def decode(self, tokens: Any, encoded: Any, **_: Any) -> Any:
        return jnp.ones((*tokens.shape, 1))

    def head_hidden(self, hidden: Any) -> Any:
        return hidden

    def head_table(self) -> OutputHead:
        return OutputHead(jnp.zeros((16, 1)).at[10].set(1.0))


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_the_loss_by_hand(epsilon: float) -> None:
    """Of 8 tokens one is 10, whose -log p is log Z - 1, and that of the 7 others log Z, with Z = e + 15. Smoothing
    takes epsilon of it and gives the mean over the vocabulary, log Z - 1 / 16, instead. The nll has none of it."""
    objective = SequenceToSequence(target_length=5, label_smoothing=epsilon)
    example, ctx = example_of(objective)
    terms = objective.terms({"model": Skewed()}, example, (), ctx)
    log_z = math.log(math.e + 15)
    expected = (1 - epsilon) * (log_z - 1 / 8) + epsilon * (log_z - 1 / 16)
    found = float(total_loss(terms, denominators(objective, example), objective.coefficients))
    assert found == pytest.approx(expected, rel=1e-6)
    total, weight = terms.metrics["nll"]
    assert float(total) / float(weight) == pytest.approx(log_z - 1 / 8, rel=1e-6)
    total, weight = terms.metrics["accuracy"]
    assert float(total) / float(weight) == 1 / 8


def test_rows_hold_a_source_of_data_length_and_a_target_of_its_own() -> None:
    assert SequenceToSequence(target_length=5).rows(VOCAB, 8) == RowSpec(
        "examples", 13, suffix=(3,), two_texts=True, second_length=5
    )
    assert SequenceToSequence().rows(VOCAB, 8).second_length == 8
    joined = SequenceToSequence(target_length=5, rendering="decoder")
    assert joined.rows(VOCAB, 8) == RowSpec("examples", 8, suffix=(3,), two_texts=True, second_length=5)
    assert SequenceToSequence(rendering="decoder").rows(VOCAB, 8).second_length == 4
    assert SequenceToSequence(target_length=5).use(8) == RowUse(8, 5, decoder_length=5)
    assert joined.use(8) == RowUse(8, 5)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"target_length": 1}, "objective.target_length is 1; it must be at least 2"),
        ({"rendering": "both"}, "objective.rendering is 'both'"),
        ({"decoder_start": "cls"}, "objective.decoder_start is 'cls'"),
        ({"label_smoothing": 1.0}, "objective.label_smoothing is 1.0"),
    ],
    ids=["target", "rendering", "start", "smoothing"],
)
def test_settings_that_cannot_be(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        SequenceToSequence(**settings)


def test_rows_and_models_that_cannot_be() -> None:
    with pytest.raises(UserError, match="sequence_to_sequence ends inputs and targets with an end-of-sequence token"):
        SequenceToSequence().rows(Vocabulary(size=9), 8)
    with pytest.raises(UserError, match=r"objective.decoder_start is bos, and the vocabulary has no such token"):
        SequenceToSequence(decoder_start="bos").rows(dataclasses.replace(VOCAB, bos=None), 8)
    with pytest.raises(UserError, match=r"data.length is 6; accepted: 7 or more"):
        SequenceToSequence(target_length=5, rendering="decoder").rows(VOCAB, 6)
    with pytest.raises(UserError, match=r"objective.target_length is 65 and model.max_length is 64; raise that to"):
        SequenceToSequence(target_length=65).check_model(EncoderDecoderConfig(max_length=64))
    SequenceToSequence(target_length=64).check_model(EncoderDecoderConfig(max_length=64))


MUTANTS = [
    Mutant(
        "a token less for the source",
        SequenceToSequence,
        "rooms",
        lambda f: lambda self, raw: (lambda x: x._replace(inputs=x.inputs - 1))(f(self, raw)),
    ),
    Mutant("ends cost nothing", SequenceToSequence, "weights", lambda f: lambda s, e: {"nll": f(s, e)["nll"] - 2}),
    Mutant("targets without an end", SequenceToSequence, "denoise", lambda f: lambda *a: _shorter(f(*a))),
]


def _shorter(found: Any) -> Any:
    return found._replace(target_length=jnp.maximum(found.target_length - 1, 0))


CHECKS = [test_source_and_target_of_each_row, lambda: test_the_loss_by_hand(0.0)]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    assert_killed(monkeypatch, mutant, CHECKS)


def test_it_learns_to_reverse() -> None:
    language = Reversals()
    objective = SequenceToSequence(target_length=language.length // 2)
    metrics = learn(objective, SEQ2SEQ, language.vocab, *language.batches(steps=400, rows=32), lr=1e-2)
    assert abs(metrics["accuracy"] - language.ceiling) < 0.03
