"""The span-boundary objective by hand: sums, denominators, what it reads, what it refuses; and what it learns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from lmobj import masks
from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.models import EncoderConfig, OutputHead, SpanBoundaryHead
from lmobj.objectives import (
    Context,
    Example,
    SpanBoundary,
    _span_boundary,
    denominators,
    step_keys,
    total_loss,
)
from tests.mutants import Mutant, assert_killed
from tests.objectives.learning import ENCODER, FIRST, _batch, _Language, learn
from tests.objectives.uniform import Uniform

VOCAB = Vocabulary(size=16, pad=0, cls=4, sep=5, mask=6)
KEY = jax.random.key(0, impl="threefry2x32")


class UniformHead(Uniform):
    """A head for which every token is equally likely too."""

    bias = jnp.zeros(VOCAB.size)

    def __call__(self, left: Any, right: Any, offset: Any) -> Any:
        return left


def batch_of_three() -> dict[str, Any]:
    """[CLS] 10 words [SEP]; [CLS] 2 words [SEP] and padding, too short for a span inside; two documents of 5 words."""
    words = jnp.asarray([[4, *range(7, 16), 7, 5], [4, 7, 8, 5] + [0] * 8, [4, 7, 8, 9, 10, 11, 12, 13, 14, 15, 7, 5]])
    segments = jnp.asarray([[1] * 12, [1] * 4 + [0] * 8, [1] * 6 + [2] * 6])
    ids = jnp.stack([jnp.zeros(3, jnp.int32), jnp.arange(3, dtype=jnp.int32)], 1)
    starts = jnp.ones_like(words, bool)
    return {
        "tokens": words,
        "segment_ids": segments,
        "positions": 0 * words,
        "row_ids": ids,
        "word_starts": starts,
    }


def corrupted(objective: SpanBoundary, batch: dict[str, Any], step: int = 0) -> tuple[Example, Context]:
    noise, model = step_keys(KEY, batch["row_ids"], step)
    ctx = Context(model, 0, VOCAB, train=False)
    return objective.corrupt(noise, batch, ctx), ctx


def test_both_terms_have_their_own_sums_and_denominators() -> None:
    """ceil(.3 * 10) = 3, ceil(.3 * 2) = 1 and 3 masked tokens; in `sbo` are those with words in sight on both sides."""
    batch, objective = batch_of_three(), SpanBoundary(mask_rate=0.3, max_span=2)
    inside = 0
    for step in range(4):
        example, ctx = corrupted(objective, batch, step)
        np.testing.assert_array_equal(example.weights.sum(1), [3, 1, 3])
        masked = example.weights > 0
        original = jnp.take_along_axis(batch["tokens"], example.predict, axis=1)
        np.testing.assert_array_equal(example.targets[masked], original[masked])
        count = 0
        for row, texts in enumerate([[range(1, 11)], [range(1, 3)], [range(1, 6), range(6, 11)]]):
            chosen = {int(p) for p, w in zip(example.predict[row], example.weights[row], strict=True) if w}
            for text in texts:
                held = [t for t in text if t in chosen]
                count += sum(
                    any(t not in chosen for t in text if t < at) and any(t not in chosen for t in text if t > at)
                    for at in held
                )
        terms = objective.terms({"model": Uniform(VOCAB.size), "heads": UniformHead(VOCAB.size)}, example, (), ctx)
        np.testing.assert_allclose(terms.sums["nll"], 7 * math.log(16), rtol=1e-6)
        np.testing.assert_allclose(terms.sums["sbo"], count * math.log(16), rtol=1e-6)
        loss = total_loss(terms, denominators(objective, example), objective.coefficients)
        np.testing.assert_allclose(loss, math.log(16) * (1 + count / (count + 1)), rtol=1e-6)
        inside += count
    assert inside > 3


def test_rows_too_short_and_rows_of_nothing_count_nothing() -> None:
    batch, objective = batch_of_three(), SpanBoundary(mask_rate=0.3, max_span=2)
    short = {name: jnp.repeat(x[1:2], 3, axis=0) for name, x in batch.items()}
    for rows in (short, {name: x if name == "row_ids" else 0 * x for name, x in short.items()}):
        example, ctx = corrupted(objective, {**rows, "word_starts": short["word_starts"]})
        assert float(objective.weights(example)["sbo"]) == 0
        terms = objective.terms({"model": Uniform(VOCAB.size), "heads": UniformHead(VOCAB.size)}, example, (), ctx)
        assert float(terms.sums["sbo"]) == 0
        assert np.isfinite(float(total_loss(terms, denominators(objective, example), objective.coefficients)))


def test_documents_of_a_row_see_themselves_alone() -> None:
    example, _ = corrupted(SpanBoundary(mask_rate=0.3, max_span=2), batch_of_three())
    sees = np.broadcast_to(example.mask.dense(12, 12), (3, 1, 12, 12))[2, 0]
    np.testing.assert_array_equal(sees, np.kron(np.eye(2), np.ones((6, 6))))


def head(width: int = 6, offset_width: int = 3) -> tuple[SpanBoundaryHead, dict[str, np.ndarray]]:
    """A head with all parameters drawn, and these."""
    style = EncoderConfig(layers=1, width=width, heads=1, max_length=8).head_style
    made = SpanBoundaryHead(style, 16, nnx.Rngs(params=0), max_targets=4, offset_width=offset_width)
    graph, state = nnx.split(made)
    flat, tree = jax.tree.flatten(state)
    draw = np.random.default_rng(0)
    flat = [jnp.asarray(draw.normal(size=x.shape), jnp.float32) for x in flat]
    made = nnx.merge(graph, jax.tree.unflatten(tree, flat))
    paths = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(made)))
    return made, {".".join(k.key for k in path): np.asarray(x, np.float64) for path, x in paths}


def test_head_is_two_layers_over_the_borders_and_the_offset() -> None:
    """LayerNorm(GELU(W [left; right; offset] + b)), twice, in NumPy."""
    made, p = head()
    draw = np.random.default_rng(1)
    left, right = draw.normal(size=(2, 1, 5, 6))
    offset = np.array([[0, 3, 1, 2, 0]])

    def layer(x: np.ndarray, name: str) -> np.ndarray:
        y = x @ p[f"{name}.kernel"] + p[f"{name}.bias"]
        y = y * (1 + erf(y / np.sqrt(2))) / 2
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-12)
        return y * p[f"{name}_norm.scale"] + p[f"{name}_norm.bias"]

    joined = np.concatenate([left, right, p["offsets.table"][offset]], -1)
    expected = layer(layer(joined, "first"), "second")
    got = made(jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32), jnp.asarray(offset))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_boundary_predictions_read_the_two_borders_and_the_offset_alone() -> None:
    """By gradient of each prediction's loss with respect to all hidden states and all offsets' vectors."""
    made, _ = head()
    graph, params = nnx.split(made)
    example, _ = corrupted(SpanBoundary(mask_rate=0.3, max_span=3, max_targets=4), batch_of_three())
    tokens = batch_of_three()["tokens"]
    draw = np.random.default_rng(2)
    hidden = jnp.asarray(draw.normal(size=(3, 12, 6)), jnp.float32)
    table = jnp.asarray(draw.normal(size=(24, 6)), jnp.float32)  # longer than the vocabulary, as padded tables are

    class Model:
        def head_table(self) -> OutputHead:
            return OutputHead(table, vocab_size=16)

    @jax.jit
    def reach(row: Any, slot: Any) -> tuple[Any, Any]:
        def loss(hidden: Any, params: Any) -> Any:
            stats = _span_boundary.boundary_stats(
                {"model": Model(), "heads": nnx.merge(graph, params)}, hidden, example
            )
            return (stats.logsumexp - stats.target_logit)[row, slot]

        by_hidden, by_params = jax.grad(loss, argnums=(0, 1))(hidden, params)
        return jnp.linalg.norm(by_hidden, axis=-1), jnp.linalg.norm(by_params["offsets"]["table"][...], axis=-1)

    checked = 0
    for row, slot in zip(*np.nonzero(np.asarray(example.extra["boundary_weights"])), strict=True):
        at = int(example.predict[row, slot])
        chosen = {int(p) for p, w in zip(example.predict[row], example.weights[row], strict=True) if w}
        left = max(t for t in range(at) if t not in chosen)
        right = min(t for t in range(at, 12) if t not in chosen)
        assert int(tokens[row, left]) > 6
        assert int(tokens[row, right]) > 6
        expected = np.zeros((3, 12), bool)
        expected[row, [left, right]] = True
        by_hidden, by_offset = reach(row, slot)
        np.testing.assert_array_equal(np.asarray(by_hidden) > 0, expected)
        np.testing.assert_array_equal(np.asarray(by_offset) > 0, np.arange(4) == at - left - 1)
        checked += 1
    assert checked > 2


@pytest.mark.parametrize(
    ("settings", "vocab", "length", "message"),
    [
        ({"mask_rate": 1.0}, VOCAB, 16, r"mask_rate is 1\.0"),
        ({"mask_share": 0.9, "random_share": 0.2}, VOCAB, 16, r"random_share is 0\.2"),
        ({"span_probability": 1.0}, VOCAB, 16, r"span_probability is 1\.0"),
        ({"max_targets": 0}, VOCAB, 16, "max_targets is 0"),
        ({"offset_width": 0}, VOCAB, 16, "offset_width is 0"),
        ({"mask_rate": 0.9}, VOCAB, 8, r"selects 6 of the 6 ordinary tokens"),
        ({}, VOCAB, 11, r"max_span is 10 words, and a row of data\.length 11 has 9 ordinary tokens"),
        ({}, Vocabulary(size=16), 16, r"span_boundary needs \[MASK\]"),
    ],
)
def test_what_cannot_be_done_is_refused(settings: dict[str, Any], vocab: Vocabulary, length: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SpanBoundary(**settings).rows(vocab, length)


def test_a_table_of_another_width_is_refused() -> None:
    config = EncoderConfig(layers=1, width=16, heads=2, max_length=8, embedding_width=8)
    objective = SpanBoundary()

    def start() -> None:
        heads = objective.build_heads(config.head_style, VOCAB, nnx.Rngs(params=0))
        objective.init({"model": config.build(VOCAB, nnx.Rngs(params=0)), "heads": heads}, KEY, 2)

    with pytest.raises(UserError, match=r"width 16 .* output table of width 8"):
        jax.eval_shape(start)


def test_rows_asked_for() -> None:
    rows = SpanBoundary().rows(VOCAB, 16)
    assert (rows.layout, rows.prefix, rows.suffix, rows.fields) == ("single", (4,), (5,), ("word_starts",))


@dataclass(frozen=True)
class Counting(_Language):
    """Each row counts up from a word of its own, modulo `words`; a token is any word at all with chance `surprise`.

    Whoever sees a few tokens of the row knows the count at every place: right with (1 - surprise) + surprise / words,
    in place and from a span's borders alike. From the borders, who does not know a token's offset in its span knows
    only that it follows the left one: well below. Who sees the token itself is at 1.
    """

    words: int = 6
    surprise: float = 0.1

    @property
    def ceiling(self) -> float:
        return (1 - self.surprise) + self.surprise / self.words

    def _batches(self, draw: np.random.Generator, steps: int, rows: int) -> dict[str, Any]:
        shape = (steps, rows, self.length)
        count = (draw.integers(0, self.words, (steps, rows, 1)) + np.arange(self.length)) % self.words
        tokens = np.where(draw.random(shape) < self.surprise, draw.integers(0, self.words, shape), count)
        return _batch(FIRST + tokens, word_starts=np.ones(shape, bool))


@pytest.mark.slow
def test_spans_are_learnt_in_place_and_from_their_borders() -> None:
    language = Counting()
    objective = SpanBoundary(
        mask_rate=0.2, max_span=4, offset_width=16, mask_share=1.0, random_share=0.0, layout="packed"
    )
    metrics = learn(objective, ENCODER, language.vocab, *language.batches(steps=400, held_out=64), lr=1e-2)
    assert abs(metrics["accuracy"] - language.ceiling) < 0.04
    assert abs(metrics["sbo_accuracy"] - language.ceiling) < 0.04


def _changed(change: Callable[[Example], dict[str, Any]]) -> Callable[[Any], Any]:
    """A replacement of `corrupt` with other fields."""

    def replacement(corrupt: Any) -> Any:
        def mutated(*given: Any) -> Example:
            example = corrupt(*given)
            return dataclasses.replace(example, **change(example))

        return mutated

    return replacement


def _with_extra(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Any], Any]:
    """A replacement of `corrupt` whose spans have other borders."""
    return _changed(lambda example: {"extra": {**example.extra, **change(example.extra)}})


BY_HAND = (test_both_terms_have_their_own_sums_and_denominators, test_documents_of_a_row_see_themselves_alone)
BY_GRADIENT = (test_boundary_predictions_read_the_two_borders_and_the_offset_alone,)
NO_OFFSET = Mutant(
    "no offset",
    SpanBoundaryHead,
    "__call__",
    lambda f: lambda self, left, right, offset: f(self, left, right, 0 * offset),
)
MUTANTS = [
    (Mutant("no epsilon", SpanBoundary, "epsilon", lambda _: {}), BY_HAND),
    (
        Mutant(
            "one denominator for both",
            SpanBoundary,
            "weights",
            lambda f: lambda self, example: dict.fromkeys(f(self, example), jnp.sum(example.weights)),
        ),
        BY_HAND,
    ),
    (Mutant("every masked token has borders", SpanBoundary, "corrupt",
            _with_extra(lambda extra: {"boundary_weights": jnp.ones_like(extra["boundary_weights"])})), BY_HAND),
    (Mutant("documents see one another", masks.AttentionMask, "packed", lambda _: lambda m, _: m), BY_HAND),
    (Mutant("empty slots count", SpanBoundary, "corrupt",
            _changed(lambda example: {"weights": jnp.ones_like(example.weights)})), BY_HAND),
    (Mutant("shifted target", SpanBoundary, "corrupt",
            _changed(lambda example: {"targets": jnp.roll(example.targets, 1, axis=1)})), BY_HAND),
    (Mutant("a mask of the left side", masks, "bidirectional", lambda _: masks.causal), BY_HAND),
    (Mutant("border inside the span", SpanBoundary, "corrupt",
            _with_extra(lambda extra: {"left": extra["left"] + 1})), BY_GRADIENT),
    (Mutant("left border twice", SpanBoundary, "corrupt",
            _with_extra(lambda extra: {"right": extra["left"]})), BY_GRADIENT),
    (Mutant("offset from 1", SpanBoundary, "corrupt",
            _with_extra(lambda extra: {"offset": extra["offset"] + 1})), BY_GRADIENT),
    (Mutant("borders swapped", SpanBoundaryHead, "__call__",
            lambda f: lambda self, left, right, offset: f(self, right, left, offset)),
     (test_head_is_two_layers_over_the_borders_and_the_offset,)),
    (NO_OFFSET, (test_head_is_two_layers_over_the_borders_and_the_offset,)),
]  # fmt: skip


@pytest.mark.parametrize(("mutant", "checks"), MUTANTS, ids=[str(mutant) for mutant, _ in MUTANTS])
def test_mutants_are_noticed(
    monkeypatch: pytest.MonkeyPatch, mutant: Mutant, checks: tuple[Callable[[], None], ...]
) -> None:
    assert_killed(monkeypatch, mutant, checks)


@pytest.mark.slow
def test_what_is_learnt_tells_the_offset_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_killed(monkeypatch, NO_OFFSET, [test_spans_are_learnt_in_place_and_from_their_borders])
