"""Token dropout of the tasks: in training alone, ordinary tokens alone, by the rows' own keys, labels as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.objectives import (
    Classification,
    Context,
    ExtractiveQA,
    Objective,
    Regression,
    TokenClassification,
    _token_dropout,
    step_keys,
)
from lmobj.objectives._token_dropout import DropsTokens
from tests.mutants import Mutant, assert_killed

VOCAB = Vocabulary(size=40, pad=0, unk=1, cls=4, sep=5, mask=6)
TASKS = [
    Classification(token_dropout=0.5),
    Regression(token_dropout=0.5),
    TokenClassification(token_dropout=0.5),
    ExtractiveQA(token_dropout=0.5),
]


def rows() -> dict[str, Any]:
    """Eight rows of 24: 20 words and an unknown one between [CLS] and [SEP]; every other with 4 words less."""
    tokens = np.zeros((8, 24), np.int32)
    for row, words in enumerate((20, 16) * 4):
        tokens[row, : words + 3] = [4, *range(10, 10 + words), 1, 5]
    segments = (tokens > 0).astype(np.int32)
    tags = np.where(tokens > 6, tokens % 2, -1).astype(np.int32)
    batch = {
        "tokens": tokens,
        "segment_ids": segments,
        "positions": np.arange(24) * segments,
        "token_types": np.zeros_like(tokens),
        "row_ids": np.array([[i % 2, 3 + i] for i in range(8)], np.int32),
        "labels": np.arange(8, dtype=np.int32) % 2,
        "scores": np.arange(8, dtype=np.float32),
        "tags": tags,
        "spans": np.array([[2, 4], [7, 7]] * 4, np.int32),
    }
    return jax.tree.map(jnp.asarray, batch)


def corrupted(task: Objective, train: bool, batch: dict[str, Any], step: int = 0, vocab: Vocabulary = VOCAB) -> Any:
    noise_keys, model_keys = step_keys(jax.random.key(0, impl="threefry2x32"), batch["row_ids"], step)
    return jax.jit(lambda keys, b: task.corrupt(keys, b, Context(model_keys, step, vocab, train=train)))(
        noise_keys, batch
    )


def test_tokens_are_dropped_in_training_alone_and_labels_stay() -> None:
    batch = rows()
    for task in TASKS:
        example, plain = corrupted(task, True, batch), corrupted(task, False, batch)
        np.testing.assert_array_equal(plain.inputs, batch["tokens"])
        hidden = np.asarray(example.inputs == VOCAB.mask)
        np.testing.assert_array_equal(example.inputs, np.where(hidden, VOCAB.mask, batch["tokens"]))
        text = np.asarray((batch["segment_ids"] > 0) & ~jnp.isin(batch["tokens"], jnp.asarray([4, 5])))
        assert not (hidden & ~text).any()
        assert 54 <= hidden.sum() <= 98  # 152 at 1/2: within 3.5 standard deviations of 76
        for name in ("targets", "weights", "positions"):
            np.testing.assert_array_equal(getattr(example, name), getattr(plain, name))


def test_a_rows_tokens_depend_on_its_address_alone() -> None:
    batch, task = rows(), TASKS[0]
    both = np.asarray(corrupted(task, True, batch).inputs)
    swapped = np.asarray(corrupted(task, True, {name: x[::-1] for name, x in batch.items()}).inputs)
    np.testing.assert_array_equal(both, swapped[::-1])
    assert (both[0] != np.asarray(corrupted(task, True, batch, step=1).inputs)[0]).any(), "every step anew"
    same = {name: x[:1].repeat(2, axis=0) for name, x in batch.items()} | {"row_ids": batch["row_ids"][:2]}
    one, other = np.asarray(corrupted(task, True, same).inputs)
    assert (one != other).any(), "every row by itself"


def test_a_vocabulary_without_a_mask_has_its_unknown_token() -> None:
    batch = rows()
    inputs = corrupted(TASKS[2], True, batch, vocab=Vocabulary(size=40, unk=1, cls=4, sep=5)).inputs
    assert set(np.asarray(inputs[inputs != batch["tokens"]]).tolist()) == {1}
    for task in TASKS:
        with pytest.raises(UserError, match=r"token_dropout is 0\.5, and the vocabulary has neither \[MASK\]"):
            task.rows(Vocabulary(size=40, cls=4, sep=5), 24)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_rates_that_are_refused(rate: float) -> None:
    for kind in (Classification, TokenClassification):
        with pytest.raises(UserError, match=r"objective\.token_dropout is .*; it must be in \[0, 1\)"):
            kind(token_dropout=rate)


def _in_evaluation_too(dropped: Callable[..., Any]) -> Callable[..., Any]:
    def always(self: Any, keys: Any, batch: Any, ctx: Context) -> Any:
        return dropped(self, keys, batch, Context(ctx.keys, ctx.step, ctx.vocab))

    return always


def _one_key(dropped: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, keys, batch, ctx: dropped(self, keys[jnp.zeros(len(keys), int)], batch, ctx)


def _of_places(_: Any) -> Callable[..., Any]:
    def dropped(self: Any, keys: Any, batch: Any, ctx: Context) -> Any:
        places = jax.random.split(jax.random.key(0), len(keys))
        return ORIGINAL(self, places, batch, ctx)

    return dropped


ORIGINAL = DropsTokens.dropped
CHECKS = (test_tokens_are_dropped_in_training_alone_and_labels_stay, test_a_rows_tokens_depend_on_its_address_alone)
MUTANTS = [
    Mutant("in evaluation too", DropsTokens, "dropped", _in_evaluation_too),
    Mutant("never", DropsTokens, "dropped", lambda _: lambda self, keys, batch, ctx: batch),
    Mutant("one key for all rows", DropsTokens, "dropped", _one_key),
    Mutant("by the place in the batch", DropsTokens, "dropped", _of_places),
    Mutant("special tokens too", _token_dropout, "maskable", lambda _: lambda batch, vocab: batch["segment_ids"] > 0),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    assert_killed(monkeypatch, mutant, CHECKS)
