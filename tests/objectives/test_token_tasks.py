"""Token classification and extractive QA by hand: what is predicted from what, padding, dropout, what is learnt."""

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

from lmobj import losses, masks, noise
from lmobj.batch import NO_TAG, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import EncoderConfig, TokenHead
from lmobj.objectives import (
    Context,
    ExtractiveQA,
    Objective,
    TokenClassification,
    _extractive_qa,
    _token_classification,
    denominators,
    step_keys,
    total_loss,
)
from tests.mutants import Mutant, assert_killed
from tests.objectives.learning import ENCODER, FIRST, learn, vocabulary

VOCAB = Vocabulary(size=16, pad=0, eos=3, cls=4, sep=5, mask=6)
TAGS = TokenClassification(classes=3)
ENDS = ExtractiveQA()


def examples() -> dict[str, Any]:
    """Rows of 8, of which the last is empty: three tagged tokens, and answers (3, 4) and, of a question that has none,
    [CLS]. What the empty row has for tags and answer must not matter."""
    tokens = jnp.asarray([[4, 7, 5, 8, 9, 10, 5, 0], [4, 7, 5, 11, 5, 0, 0, 0], [0] * 8])
    segments = (tokens > 0).astype(jnp.int32)
    tags = jnp.full(tokens.shape, NO_TAG).at[0, 1].set(2).at[0, 3].set(0).at[1, 1].set(1).at[2].set(0)
    return {
        "tokens": tokens,
        "segment_ids": segments,
        "positions": jnp.arange(8) * segments,
        "token_types": jnp.asarray([[0] * 3 + [1] * 4 + [0], [0] * 3 + [1] * 2 + [0] * 3, [0] * 8]),
        "tags": tags,
        "spans": jnp.asarray([[3, 4], [0, 0], [1, 1]]),
        "row_ids": jnp.asarray([[0, 0], [0, 1], [0, 2]]),
    }


def context(batch: dict[str, Any], train: bool = False) -> tuple[Any, Context]:
    noise_keys, model = step_keys(jax.random.key(0, impl="threefry2x32"), batch["row_ids"], 0)
    return noise_keys, Context(model, 0, VOCAB, train=train)


class Model:
    """Hidden states that say only which place a token has, from 1, and what the model was given."""

    def hidden(self, tokens: Any, **given: Any) -> Any:
        self.given = given
        return jnp.broadcast_to(jnp.arange(1.0, tokens.shape[1] + 1)[:, None], (*tokens.shape, 1))


def classes_by_place(hidden: Any) -> Any:
    """Logits 0, p, 2p at place p."""
    return hidden * jnp.arange(3.0)


def ends_by_place(hidden: Any) -> Any:
    """At place p, p for the start and -p for the end."""
    return hidden * jnp.asarray([1.0, -1.0])


def run(objective: Objective, head: Callable[[Any], Any], batch: dict[str, Any]) -> tuple[Any, float, dict[str, Any]]:
    """Terms, the loss, and what the model was given."""
    noise_keys, ctx = context(batch)
    example = objective.corrupt(noise_keys, batch, ctx)
    model = Model()
    terms = objective.terms({"model": model, "heads": head}, example, (), ctx)
    return terms, float(total_loss(terms, denominators(objective, example), objective.coefficients)), model.given


def test_tags_cost_the_mean_over_the_tokens_that_have_one() -> None:
    terms, loss, _ = run(TAGS, classes_by_place, examples())
    # With z(p) = log(1 + e^p + e^2p): tag 2 at place 2 costs z(2) - 4, tag 0 at place 4 z(4), tag 1 at place 2
    # z(2) - 2. The last class is always the likeliest: one of three is right.
    z = {p: math.log(1 + math.exp(p) + math.exp(2 * p)) for p in (2, 4)}
    total = 2 * z[2] + z[4] - 6
    np.testing.assert_allclose(terms.sums["nll"], total, rtol=1e-6)
    np.testing.assert_allclose(terms.metrics["nll"], (total, 3), rtol=1e-6)
    np.testing.assert_allclose(terms.metrics["accuracy"], (1, 3))
    np.testing.assert_allclose(loss, total / 3, rtol=1e-6)
    np.testing.assert_allclose(terms.outputs["logits"][1, 2], [0, 3, 6])


def test_an_answer_costs_the_mean_over_both_ends_of_the_rows_that_have_text() -> None:
    terms, loss, given = run(ENDS, ends_by_place, examples())
    # Row 0 has 7 places and row 1 has 5: up(n) = log sum_(p<=n) e^p, and down(n) = log sum_(p<=n) e^-p. The answer of
    # row 0 is at places 4 and 5, that of row 1 at place 1, where of the four ends only this one's is the likeliest.
    up = {n: math.log(sum(math.exp(p) for p in range(1, n + 1))) for n in (5, 7)}
    down = {n: math.log(sum(math.exp(-p) for p in range(1, n + 1))) for n in (5, 7)}
    total = (up[7] - 4) + (down[7] + 5) + (up[5] - 1) + (down[5] + 1)
    np.testing.assert_allclose(terms.sums["nll"], total, rtol=1e-6)
    np.testing.assert_allclose(terms.metrics["nll"], (total, 4), rtol=1e-6)
    np.testing.assert_allclose(terms.metrics["accuracy"], (1, 4))
    np.testing.assert_allclose(loss, total / 4, rtol=1e-6)
    inf = math.inf
    np.testing.assert_allclose(terms.outputs["start_logits"][:2], [[*range(1, 8), -inf], [*range(1, 6), *[-inf] * 3]])
    np.testing.assert_allclose(terms.outputs["end_logits"][1], [-1, -2, -3, -4, -5, -inf, -inf, -inf])
    assert given["token_types"] is not None
    assert not given["mask"].causal


@pytest.mark.parametrize("objective", [TAGS, ENDS], ids=lambda o: o.name)
def test_what_the_model_is_given(objective: Objective) -> None:
    batch, head = examples(), classes_by_place if objective is TAGS else ends_by_place
    assert run(objective, head, batch)[2]["token_types"] is batch["token_types"]
    untyped = dataclasses.replace(objective, token_types=False)
    assert run(untyped, head, batch)[2]["token_types"] is None
    causal = dataclasses.replace(objective, attention="causal")
    given = run(causal, head, batch)[2]
    assert given["token_types"] is None
    assert given["mask"].causal
    assert (causal.causal, causal.use(8).causal, objective.use(8).causal) == (True, True, False)
    del batch["token_types"]  # as sentences of tagged words have none
    assert run(objective, head, batch)[2]["token_types"] is None


@pytest.mark.parametrize("kind", [TokenClassification, ExtractiveQA], ids=lambda kind: kind.name)
def test_states_are_dropped_in_training_alone(kind: Any) -> None:
    class Wide:
        def hidden(self, tokens: Any, **_: Any) -> Any:
            return jnp.ones((*tokens.shape, 4096))

    def head(hidden: Any) -> Any:
        """The mean of the state's numbers, and 0."""
        return jnp.stack([hidden.mean(-1), jnp.zeros(hidden.shape[:-1])], axis=-1)

    batch = examples() | {"tags": jnp.zeros((3, 8), jnp.int32)}

    def outputs(rate: float, train: bool) -> Any:
        noise_keys, ctx = context(batch, train)
        objective = kind(dropout=rate)
        example = objective.corrupt(noise_keys, batch, ctx)
        found = objective.terms({"model": Wide(), "heads": head}, example, (), ctx).outputs
        return np.asarray(found["logits"][0, :7, 0] if kind is TokenClassification else found["start_logits"][0, :7])

    np.testing.assert_allclose(outputs(0.5, train=False), 1, rtol=1e-6)
    np.testing.assert_allclose(outputs(0.0, train=True), 1, rtol=1e-6)
    # Kept numbers count double: their mean is 1 within 5 / sqrt(4096), and each token's is another.
    dropped = outputs(0.5, train=True)
    np.testing.assert_allclose(dropped, 1, atol=0.08)
    assert len(set(dropped.tolist())) == 7


@pytest.mark.parametrize("objective", [TAGS, ENDS], ids=lambda o: o.name)
def test_a_prediction_sees_its_own_row_and_all_of_it(objective: Any) -> None:
    reach = seen(objective)
    segments = np.asarray(examples()["segment_ids"])
    for row, slot in ((0, 1), (1, 1)):
        expected = (segments > 0) & (np.arange(3)[:, None] == row)
        np.testing.assert_array_equal(reach(row, slot) > 0, expected)


def test_a_causal_model_tells_a_tag_from_what_is_before() -> None:
    reach = seen(dataclasses.replace(TAGS, attention="causal"))
    expected = np.zeros((3, 8), bool)
    expected[0, :4] = True
    np.testing.assert_array_equal(reach(0, 3) > 0, expected)


def seen(objective: Any) -> Callable[[int, int], Any]:
    """(row, slot) -> [B, L] how far the loss at one prediction depends on the input at each place.

    Every place of the batch has a position of its own, and so a row of the position table.
    """
    batch = examples()
    rows, length = batch["tokens"].shape
    noise_keys, ctx = context(batch)
    config = EncoderConfig(layers=2, width=8, heads=2, max_length=rows * length, vocab_multiple=1, init_std=0.3)
    graph, state = nnx.split(config.build(VOCAB, nnx.Rngs(params=0)))
    heads = objective.build_heads(config.head_style, VOCAB, nnx.Rngs(params=1))
    example = objective.corrupt(noise_keys, batch, ctx)
    example = dataclasses.replace(example, positions=jnp.arange(rows * length).reshape(rows, length))

    @jax.jit
    def reach(row: Any, slot: Any) -> Any:
        one = dataclasses.replace(example, weights=jnp.zeros_like(example.weights).at[row, slot].set(1.0))

        def loss(table: Any) -> Any:
            params = nnx.to_pure_dict(state)
            params["embeddings"]["positions"]["table"] = table
            return objective.terms({"model": nnx.merge(graph, params), "heads": heads}, one, (), ctx).sums["nll"]

        gradient = jax.grad(loss)(nnx.to_pure_dict(state)["embeddings"]["positions"]["table"])
        return jnp.linalg.norm(gradient, axis=-1).reshape(rows, length)

    return lambda row, slot: np.asarray(reach(row, slot))


def test_rows_asked_for() -> None:
    assert TAGS.rows(VOCAB, 32) == RowSpec("tagged", 32, (4,), (5,), ("tags",))
    assert ENDS.rows(VOCAB, 32) == RowSpec("questions", 32, (4,), (5,), ("spans",))
    for objective, out in ((TAGS, 3), (ENDS, 2)):
        head = objective.build_heads(ENCODER.head_style, VOCAB, nnx.Rngs(params=0))
        assert isinstance(head, TokenHead)
        assert head(jnp.zeros((2, 5, ENCODER.width))).shape == (2, 5, out)


def test_what_cannot_be_done_is_refused() -> None:
    for kind in (TokenClassification, ExtractiveQA):
        for settings, message in (
            ({"dropout": 1.0}, r"objective\.dropout is 1\.0"),
            ({"attention": "both"}, r"objective\.attention is 'both'; accepted: bidirectional, causal"),
        ):
            with pytest.raises(UserError, match=message):
                kind(**settings)
        for missing, message in (({"cls": None}, r"no \[CLS\]"), ({"sep": None}, r"no \[SEP\]")):
            with pytest.raises(UserError, match=f"{kind.name} needs .*{message}"):
                kind().rows(dataclasses.replace(VOCAB, **missing), 32)
    with pytest.raises(UserError, match=r"objective\.classes is 1"):
        TokenClassification(classes=1)
    TAGS.check_classes(lambda source: ["O", "B-PER", "I-PER"])
    with pytest.raises(UserError, match=r"classes is 3, but the data has 2 classes \(O, B-X\); .*objective\.classes=2"):
        TAGS.check_classes(lambda source: ["O", "B-X"])


ROWS, WORDS = 16, 12


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "ceiling"), [("bidirectional", 1.0), ("causal", 2 / 3)])
def test_tags_are_told_from_neighbours(attention: Any, ceiling: float) -> None:
    """The tag of an even word is the kind of the next one, that of an odd word the kind of the one before, of three
    kinds: whoever sees what is before alone has 1/2 + 1/2 * 1/3."""

    def batch(rng: np.random.Generator) -> dict[str, Any]:
        words = rng.integers(0, 12, (ROWS, WORDS))
        neighbours = np.where(words % 2 == 0, np.roll(words, -1, axis=1), np.roll(words, 1, axis=1))
        tags = neighbours % 3
        tags[:, [0, -1]] = NO_TAG  # one of whose neighbours is not there
        return _padded(words + FIRST) | {"tags": tags.astype(np.int32)}

    objective = TokenClassification(classes=3, dropout=0.0, attention=attention)
    metrics = learn(objective, ENCODER, vocabulary(12), *_stacked(batch, steps=300), lr=1e-2)
    assert abs(metrics["accuracy"] - ceiling) < 0.05


@pytest.mark.slow
def test_answers_are_found() -> None:
    """The answer is the word of the question and the one after it; a third of the texts do not have it."""

    rows, words, text_words = 32, 8, 5

    def batch(rng: np.random.Generator) -> dict[str, Any]:
        tokens, spans = np.zeros((rows, WORDS), int), np.zeros((rows, 2), int)
        for row in range(rows):
            asked, *text = rng.permutation(words)[: text_words + 1] + FIRST
            if row % 3:
                at = int(rng.integers(0, text_words - 1))
                text[at] = asked
                spans[row] = 3 + at, 4 + at
            tokens[row, : 4 + text_words] = [4, asked, 5, *text, 5]
        types = (np.arange(WORDS) > 2) & (tokens > 0)
        return _padded(tokens) | {"token_types": types.astype(np.int32), "spans": spans.astype(np.int32)}

    metrics = learn(ExtractiveQA(dropout=0.0), ENCODER, vocabulary(words), *_stacked(batch, steps=600), lr=5e-3)
    assert metrics["accuracy"] > 0.95


def _padded(tokens: Any) -> dict[str, Any]:
    segments = (tokens > 0).astype(np.int32)
    return {
        "tokens": tokens.astype(np.int32),
        "segment_ids": segments,
        "positions": np.arange(tokens.shape[1], dtype=np.int32) * segments,
        "row_ids": np.stack([np.zeros(len(tokens)), np.arange(len(tokens))], axis=1).astype(np.int32),
    }


def _stacked(batch: Callable[[np.random.Generator], dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Batches to learn from, and a few that are held out."""
    rng = np.random.default_rng(0)
    stacks = [[batch(rng) for _ in range(count)] for count in (steps, 10)]
    return [{name: np.stack([each[name] for each in stack]) for name in stack[0]} for stack in stacks]


def _given(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[..., Any]:
    """Of `corrupt`: the same of a changed batch."""
    return lambda corrupt: lambda self, keys, batch, ctx: corrupt(self, keys, batch | change(batch), ctx)


def _check(test: Callable[..., None], *given: Any) -> Callable[[], None]:
    return lambda: test(*given)


TAGS_BY_HAND = [test_tags_cost_the_mean_over_the_tokens_that_have_one]
ENDS_BY_HAND = [test_an_answer_costs_the_mean_over_both_ends_of_the_rows_that_have_text]
DROPOUT = [_check(test_states_are_dropped_in_training_alone, kind) for kind in (TokenClassification, ExtractiveQA)]
SIGHT = [_check(test_a_prediction_sees_its_own_row_and_all_of_it, TAGS)]
MUTANTS: list[tuple[Mutant, list[Callable[[], None]]]] = [
    (
        Mutant("tags moved", TokenClassification, "corrupt", _given(lambda b: {"tags": jnp.roll(b["tags"], 1, 1)})),
        TAGS_BY_HAND,
    ),
    (Mutant("no tag is a tag", _token_classification, "NO_TAG", lambda _: -2), TAGS_BY_HAND),
    (
        Mutant(
            "tags of padding count",
            TokenClassification,
            "corrupt",
            _given(lambda b: {"segment_ids": jnp.ones_like(b["segment_ids"])}),
        ),
        TAGS_BY_HAND,
    ),
    (
        Mutant("ends exchanged", ExtractiveQA, "corrupt", _given(lambda b: {"spans": b["spans"][:, ::-1]})),
        ENDS_BY_HAND,
    ),
    (
        Mutant("empty rows are asked", _extractive_qa, "row_weights", lambda _: lambda b: jnp.ones(len(b["tokens"]))),
        ENDS_BY_HAND,
    ),
    (
        Mutant("padding may be the answer", losses, "logit_stats", lambda stats: lambda x, y, **_: stats(x, y)),
        ENDS_BY_HAND,
    ),
    (Mutant("no token types", ExtractiveQA, "corrupt", _given(lambda _: {"token_types": None})), ENDS_BY_HAND),
    (Mutant("no dropout", noise, "dropout", lambda _: lambda x, *_, **__: x), DROPOUT[:1]),
    (Mutant("no dropout of questions", noise, "dropout", lambda _: lambda x, *_, **__: x), DROPOUT[1:]),
    (Mutant("dropout in evaluation", Context, "dropout", lambda _: jnp.arange(3, dtype=jnp.uint32)), DROPOUT),
    (Mutant("padding is seen", masks.AttentionMask, "packed", lambda _: lambda m, *_: m), SIGHT),
    (Mutant("a mask of the left side", masks, "bidirectional", lambda _: masks.causal), SIGHT),
]


@pytest.mark.parametrize(("mutant", "checks"), MUTANTS, ids=[str(mutant) for mutant, _ in MUTANTS])
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant, checks: list[Callable[[], None]]) -> None:
    assert_killed(monkeypatch, mutant, checks)
