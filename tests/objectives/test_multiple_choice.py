"""Multiple choice by hand: which states are read, missing choices, and that choices do not see one another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmobj import losses, masks
from lmobj.batch import RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import EncoderConfig, PairHead
from lmobj.objectives import MultipleChoice, _row_task, denominators, total_loss
from lmobj.objectives._row_task import RowTask
from tests.mutants import Mutant, assert_killed
from tests.objectives.learning import ENCODER
from tests.objectives.test_classification import Model, context

VOCAB = Vocabulary(size=16, pad=0, eos=3, cls=4, sep=5, mask=6)
OBJECTIVE = MultipleChoice(choices=3, dropout=0.0)


def examples() -> dict[str, Any]:
    """Rows of 13: three choices of 4, 5 and 4 tokens; two of 5 and 4; nothing. Labels 2, 0 and, of nothing, 2."""
    tokens = [[4, 7, 5, 8, 4, 7, 9, 5, 10, 4, 7, 5, 11], [4, 12, 5, 13, 14, 4, 12, 5, 15] + [0] * 4, [0] * 13]
    segments = [[1] * 4 + [2] * 5 + [3] * 4, [1] * 5 + [2] * 4 + [0] * 4, [0] * 13]
    positions = [[*range(4), *range(5), *range(4)], [*range(5), *range(4)] + [0] * 4, [0] * 13]
    types = [[0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1], [0, 0, 0, 1, 1, 0, 0, 0, 1] + [0] * 4, [0] * 13]
    batch = {"tokens": tokens, "segment_ids": segments, "positions": positions, "token_types": types}
    return {name: jnp.asarray(x) for name, x in batch.items()} | {
        "labels": jnp.asarray([2, 0, 2]),
        "row_ids": jnp.asarray([[0, 0], [0, 1], [0, 2]]),
    }


class Head:
    """A tenth of the first hidden state's first number: places count from 1."""

    def pooled(self, hidden: Any) -> Any:
        return hidden[:, 0]

    def classifier(self, pooled: Any) -> Any:
        return pooled[:, :1] / 10


def terms_of(objective: MultipleChoice) -> tuple[Any, Any]:
    batch = examples()
    noise_keys, ctx = context(batch)
    example = objective.corrupt(noise_keys, batch, ctx)
    return objective.terms({"model": Model(), "heads": Head()}, example, (), ctx), example


def test_the_loss_is_over_the_choices_that_are_there() -> None:
    # First tokens stand at 1, 5 and 10 in the first row, at 1 and 6 in the second, which has no third choice.
    terms, example = terms_of(OBJECTIVE)
    first = math.log(math.exp(0.1) + math.exp(0.5) + math.exp(1.0)) - 1.0
    second = math.log(math.exp(0.1) + math.exp(0.6)) - 0.1
    np.testing.assert_allclose(terms.metrics["nll"], (first + second, 2), rtol=1e-6)
    np.testing.assert_allclose(terms.metrics["accuracy"], (1, 2))
    np.testing.assert_allclose(terms.outputs["logits"][:2], [[0.1, 0.5, 1.0], [0.1, 0.6, -np.inf]], rtol=1e-6)
    total = total_loss(terms, denominators(OBJECTIVE, example), OBJECTIVE.coefficients)
    np.testing.assert_allclose(total, (first + second) / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("last", [[0.4, 0.9, 1.3], [0.5, 0.9, -np.inf]]), ("mean", [[0.25, 0.7, 1.15], [0.3, 0.75, -np.inf]])],
)
def test_other_states_of_a_choice(pooling: Any, expected: list[list[float]]) -> None:
    # The last tokens of the segments, and the means of 1 .. 4, 5 .. 9, 10 .. 13 and 1 .. 5, 6 .. 9.
    terms, _ = terms_of(MultipleChoice(choices=3, pooling=pooling, attention="causal"))
    np.testing.assert_allclose(terms.outputs["logits"][:2], expected, rtol=1e-6)


def test_a_row_is_its_choices_each_by_itself() -> None:
    batch = examples()
    config = EncoderConfig(layers=1, width=8, heads=2, max_length=13, vocab_multiple=1, init_std=0.3)
    models = {
        "model": config.build(VOCAB, nnx.Rngs(params=0)),
        "heads": PairHead(config.head_style, 1, nnx.Rngs(params=1)),
    }
    noise_keys, ctx = context(batch)
    whole = OBJECTIVE.terms(models, OBJECTIVE.corrupt(noise_keys, batch, ctx), (), ctx).outputs["logits"]
    for row, count in ((0, 3), (1, 2)):
        for choice in range(count):
            inside = np.flatnonzero(np.asarray(batch["segment_ids"][row]) == choice + 1)
            hidden = models["model"].hidden(
                batch["tokens"][row, inside][None],
                mask=masks.bidirectional(),
                token_types=batch["token_types"][row, inside][None],
            )
            np.testing.assert_allclose(whole[row, choice], models["heads"](hidden)[0, 0], rtol=1e-5, atol=1e-6)


def test_rows_asked_for() -> None:
    assert OBJECTIVE.rows(VOCAB, 32) == RowSpec("choices", 32, (4,), (5,), ("labels",), classes=3)
    head = OBJECTIVE.build_heads(ENCODER.head_style, VOCAB, nnx.Rngs(params=0))
    assert head(jnp.zeros((2, 5, ENCODER.width))).shape == (2, 1)


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(UserError, match=r"objective\.choices is 1; it must be at least 2"):
        MultipleChoice(choices=1)
    OBJECTIVE.check_classes(lambda source: ["0", "1"])
    with pytest.raises(UserError, match=r"choices is 3, but .* with 4 choices; accepted: 4 or more"):
        OBJECTIVE.check_classes(lambda source: ["0", "1", "2", "3"])
    with pytest.raises(UserError, match=r"no \[CLS\]"):
        OBJECTIVE.rows(dataclasses.replace(VOCAB, cls=None), 32)


def _first_alone(inside: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, segments: inside(self, jnp.minimum(segments, 1))


def _all_there(stats: Callable[..., Any]) -> Callable[..., Any]:
    return lambda logits, labels, vocab_mask: stats(logits, labels)


def _no_types(corrupt: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *given: dataclasses.replace(corrupt(*given), token_types=None)


def _labels_from_1(corrupt: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, keys, batch, ctx: corrupt(self, keys, {**batch, "labels": batch["labels"] - 1}, ctx)


CHECKS = (test_the_loss_is_over_the_choices_that_are_there, test_a_row_is_its_choices_each_by_itself)
MUTANTS = [
    Mutant("one choice is read", RowTask, "inside", _first_alone),
    Mutant("missing choices count", losses, "logit_stats", _all_there),
    Mutant("labels count from 1", RowTask, "corrupt", _labels_from_1),
    Mutant(
        "choices see one another",
        masks.AttentionMask,
        "packed",
        lambda _: lambda mask, segments: dataclasses.replace(mask, segment_ids=segments > 0),
    ),
    Mutant("no token types", RowTask, "corrupt", _no_types),
    Mutant("empty rows count", _row_task, "row_weights", lambda _: lambda b: jnp.ones(len(b["tokens"]))),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    assert_killed(monkeypatch, mutant, CHECKS)
