"""Matching by hand: which texts are candidates, what is read of each text, and parts of a batch; and what is learnt.

That meshes, microbatches and mapped parts give the loss and the gradient of the whole batch is in the contract test.
"""

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

from lmobj import masks
from lmobj.batch import RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import EncoderConfig
from lmobj.objectives import Context, InBatchContrastive, Triplet, _bi_encoder, denominators, step_keys, total_loss
from tests.mutants import Mutant, assert_killed
from tests.objectives.learning import ENCODER, FIRST, learn, vocabulary

VOCAB = Vocabulary(size=16, pad=0, eos=3, cls=4, sep=5, mask=6)
DOT = InBatchContrastive(negatives=1, normalise=False, temperature=1.0, pooling="first")


def texts(ids: list[list[int]], sizes: list[list[int]]) -> dict[str, Any]:
    """Rows of 8 places, whose texts have these ids and so many tokens each, every token the id of its text + 1."""
    shape = (len(ids), 8)
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    for row, lengths in enumerate(sizes):
        which = np.repeat(np.arange(len(lengths)), lengths)
        tokens[row, : len(which)] = np.asarray(ids[row])[which] + 1
        segments[row, : len(which)] = which + 1
        positions[row, : len(which)] = np.concatenate([np.arange(n) for n in [0, *lengths]])
    arrays = {"tokens": tokens, "segment_ids": segments, "positions": positions, "text_ids": np.asarray(ids)}
    rows = np.arange(len(ids))
    return {name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()} | {
        "row_ids": jnp.asarray(np.stack([0 * rows, rows], 1), jnp.int32)
    }


def batch() -> dict[str, Any]:
    """Three queries 0, 4 and 6; the texts of the first two are equal, the third has no negative; and an empty row.

    Row 0: query 0, its text 1, against 2. Row 1: query 4, its text 1, against 3. Row 2: query 6, its text 5.
    """
    return texts([[0, 1, 2], [4, 1, 3], [6, 5, 0], [0, 0, 0]], [[2, 3, 2], [2, 2, 2], [1, 3], []])


def context(rows: dict[str, Any], train: bool = False) -> tuple[Any, Context]:
    noise_keys, model = step_keys(jax.random.key(0, impl="threefry2x32"), rows["row_ids"], 0)
    return noise_keys, Context(model, 0, VOCAB, train=train)


class Model:
    """States of a token: (token, 1)."""

    def hidden(self, tokens: Any, **given: Any) -> Any:
        self.given = given
        return jnp.stack([tokens, jnp.ones_like(tokens)], -1).astype(jnp.float32)


def found(objective: Any, rows: dict[str, Any]) -> tuple[Any, Any]:
    """(terms, loss)."""
    noise_keys, ctx = context(rows)
    example = objective.corrupt(noise_keys, rows, ctx)
    terms = objective.terms({"model": Model()}, example, (), ctx)
    return terms, total_loss(terms, denominators(objective, example), objective.coefficients)


def nll(similarities: list[float]) -> float:
    """-log of the first one's softmax."""
    return math.log(sum(math.exp(s) for s in similarities)) - similarities[0]


def test_candidates_by_hand() -> None:
    # Text t has the vector (t + 1, 1), so query q and text t the similarity (q + 1)(t + 1) + 1. Query 0 is to find text
    # 1 among 1, 2, 3 and 5, since the second 1 is its own text again, and query 4 likewise; query 6 text 5 among 5, 1,
    # 1, 2 and 3. The empty row is nowhere.
    terms, loss = found(DOT, batch())
    s = lambda q, *each: [(q + 1) * (t + 1) + 1.0 for t in each]  # noqa: E731
    expected = [nll(s(0, 1, 2, 3, 5)), nll(s(4, 1, 2, 3, 5)), nll(s(6, 5, 1, 1, 2, 3))]
    np.testing.assert_allclose(terms.sums["contrastive"], sum(expected), rtol=1e-6)
    np.testing.assert_allclose(loss, sum(expected) / 3, rtol=1e-6)
    np.testing.assert_allclose(terms.metrics["accuracy"], (1, 3))
    np.testing.assert_allclose(terms.outputs["embeddings"][2], [[7, 1], [6, 1], [0, 0]])


def test_texts_of_equal_queries_are_no_negatives() -> None:
    rows = texts([[0, 1, 2], [0, 3, 4], [6, 5, 2]], [[1, 1, 1]] * 3)
    _, loss = found(DOT, rows)
    s = lambda q, *each: [(q + 1) * (t + 1) + 1.0 for t in each]  # noqa: E731
    # Row 0 does not look at text 3, row 1 not at text 1: both belong to query 0.
    expected = nll(s(0, 1, 2, 4, 5, 2)) + nll(s(0, 3, 2, 4, 5, 2)) + nll(s(6, 5, 2, 2, 1, 3, 4))
    np.testing.assert_allclose(loss, expected / 3, rtol=1e-6)


def test_a_text_that_is_the_query_is_no_negative() -> None:
    """Queries that are each other's text: nothing is left to be told from, in either direction."""
    rows = texts([[0, 1, 0], [1, 0, 0]], [[2, 3], [2, 2]])
    for symmetric in (False, True):
        terms, loss = found(dataclasses.replace(DOT, symmetric=symmetric), rows)
        assert float(loss) == pytest.approx(0, abs=1e-6)
        np.testing.assert_allclose(terms.metrics["accuracy"], (2, 2))


def test_both_directions_and_cosines_by_hand() -> None:
    # Backwards: text 1 of row 0 looks for query 0 among 0 and 6, since query 4 has the same text; row 1 for 4 among 4
    # and 6; row 2 for 6 among 6, 0 and 4. Vectors are (t + 1, 1) / sqrt((t + 1)^2 + 1), the temperature is 1/2.
    objective = dataclasses.replace(DOT, normalise=True, temperature=0.5, symmetric=True)
    _, loss = found(objective, batch())

    def s(q: int, t: int) -> float:
        return 2 * ((q + 1) * (t + 1) + 1) / math.hypot(q + 1, 1) / math.hypot(t + 1, 1)

    there = [[s(q, t) for t in own] for q, own in ((0, (1, 2, 3, 5)), (4, (1, 2, 3, 5)), (6, (5, 1, 1, 2, 3)))]
    back = [[s(q, t) for q in own] for t, own in ((1, (0, 6)), (1, (4, 6)), (5, (6, 0, 4)))]
    np.testing.assert_allclose(loss, sum(map(nll, there + back)) / 6, rtol=1e-6)


def test_triplets_by_hand() -> None:
    # Queries 0 and 4 with text 1 and negatives 2 and 3; the third row has none. Unit vectors (t + 1, 1) / length.
    def unit(t: int) -> Any:
        return np.asarray([t + 1, 1]) / math.hypot(t + 1, 1)

    def gap(power: float, q: int, n: int) -> float:
        return float(np.sum((unit(q) - unit(1)) ** 2) ** power - np.sum((unit(q) - unit(n)) ** 2) ** power)

    for distance, power, scale in (("euclidean", 0.5, 1), ("squared_euclidean", 1, 1), ("cosine", 1, 0.5)):
        terms, loss = found(Triplet(distance=distance, margin=0.6, pooling="first"), batch())
        each = [scale * gap(power, 0, 2) + 0.6, scale * gap(power, 4, 3) + 0.6]
        assert min(each) > 0
        np.testing.assert_allclose(loss, sum(each) / 2, rtol=1e-4)
        np.testing.assert_allclose(terms.metrics["accuracy"], (1, 2))


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("first", [[1, 3, 6], [2, 0, 0]]), ("last", [[2, 5, 6], [4, 0, 0]]), ("mean", [[1.5, 4, 6], [3, 0, 0]])],
)
def test_states_of_texts(pooling: Any, expected: list[list[float]]) -> None:
    segments = jnp.asarray([[1, 1, 2, 2, 2, 3, 0], [0, 1, 1, 1, 0, 0, 0]])
    hidden = jnp.broadcast_to(jnp.arange(1.0, 8)[:, None], (2, 7, 1)).astype(jnp.bfloat16)
    states = _bi_encoder.text_states(hidden, segments, 3, pooling)
    assert states.dtype == jnp.float32
    np.testing.assert_allclose(states[..., 0], expected, rtol=1e-6)


def test_parts_add_up_to_the_batch() -> None:
    """The statistics of two parts are the texts of the batch, with which each gives its own queries' loss."""
    rows = batch()
    noise_keys, ctx = context(rows)
    example = DOT.corrupt(noise_keys, rows, ctx)
    whole = DOT.terms({"model": Model()}, example, (), ctx)
    part_ctx = dataclasses.replace(ctx, parts=2)
    parts = [jax.tree.map(lambda x, i=i: x[i::2], example) for i in range(2)]
    statistics = jax.tree.map(jnp.add, *(DOT.statistics({"model": Model()}, part, (), part_ctx) for part in parts))
    given = dataclasses.replace(part_ctx, statistics=statistics)
    terms = [DOT.terms({"model": Model()}, part, (), given) for part in parts]
    np.testing.assert_allclose(sum(one.sums["contrastive"] for one in terms), whole.sums["contrastive"], rtol=1e-6)
    np.testing.assert_allclose(sum(one.metrics["accuracy"][0] for one in terms), 1)
    # Of the first part alone: queries 0 and 6 of rows 0 and 2.
    s = lambda q, *each: [(q + 1) * (t + 1) + 1.0 for t in each]  # noqa: E731
    np.testing.assert_allclose(
        terms[0].sums["contrastive"], nll(s(0, 1, 2, 3, 5)) + nll(s(6, 5, 1, 1, 2, 3)), rtol=1e-6
    )


def test_a_text_is_read_by_itself_and_whole() -> None:
    """By gradient: every place of the batch has a position of its own, and so a row of the position table."""
    rows = batch()
    count, length = rows["tokens"].shape
    noise_keys, ctx = context(rows)
    config = EncoderConfig(layers=2, width=8, heads=2, max_length=count * length, vocab_multiple=1, init_std=0.3)
    graph, state = nnx.split(config.build(VOCAB, nnx.Rngs(params=0)))
    example = DOT.corrupt(noise_keys, rows, ctx)
    example = dataclasses.replace(example, positions=jnp.arange(count * length).reshape(count, length))

    @jax.jit
    def reach(row: Any, text: Any) -> Any:
        def first_number(table: Any) -> Any:
            params = nnx.to_pure_dict(state)
            params["embeddings"]["positions"]["table"] = table
            return DOT.embed({"model": nnx.merge(graph, params)}, example, ctx)[row, text, 0]

        gradient = jax.grad(first_number)(nnx.to_pure_dict(state)["embeddings"]["positions"]["table"])
        return jnp.linalg.norm(gradient, axis=-1).reshape(count, length)

    for row, text in ((0, 0), (0, 1), (1, 2), (2, 1)):
        own = (np.asarray(rows["segment_ids"]) == text + 1) & (np.arange(count)[:, None] == row)
        np.testing.assert_array_equal(np.asarray(reach(row, text)) > 0, own)


def test_rows_asked_for() -> None:
    assert InBatchContrastive().rows(VOCAB, 32) == RowSpec("texts", 32, (4,), (5,), ("text_ids",), texts=2)
    assert Triplet(negatives=2).rows(VOCAB, 32).texts == 4
    model = Model()
    noise_keys, ctx = context(batch())
    objective = dataclasses.replace(DOT, attention="causal", pooling="last")
    objective.terms({"model": model}, objective.corrupt(noise_keys, batch(), ctx), (), ctx)
    assert model.given["mask"].causal
    assert objective.use(32)[:3] == (32, 0, True)


def test_what_cannot_be_done_is_refused() -> None:
    for kind, settings, message in (
        (InBatchContrastive, {"temperature": 0.0}, r"temperature is 0\.0"),
        (InBatchContrastive, {"negatives": -1}, "negatives is -1; accepted: 0 or more"),
        (InBatchContrastive, {"pooling": "all"}, "pooling is 'all'; accepted: first, mean, last"),
        (InBatchContrastive, {"attention": "causal", "pooling": "first"}, "first token sees nothing"),
        (Triplet, {"negatives": 0}, "negatives is 0; accepted: 1 or more"),
        (Triplet, {"margin": 0.0}, r"margin is 0\.0"),
        (Triplet, {"distance": "manhattan"}, "distance is 'manhattan'; accepted: cosine, euclidean"),
    ):
        with pytest.raises(UserError, match=message):
            kind(**settings)
    with pytest.raises(UserError, match=r"no \[CLS\]"):
        InBatchContrastive().rows(dataclasses.replace(VOCAB, cls=None), 32)


def _matched_words(steps: int, rows: int, seed: int) -> dict[str, Any]:
    """Queries [CLS] a b [SEP] whose text is [CLS] a' b' [SEP], with words of its own for every word: 36 queries."""
    draw = np.random.default_rng(seed)
    a, b = draw.integers(0, 6, (2, steps, rows))
    cls, sep = np.full_like(a, 4), np.full_like(a, 5)
    words = FIRST + np.stack([a, b + 6, a + 12, b + 18])
    tokens = np.stack([cls, words[0], words[1], sep, cls, words[3], words[2], sep], -1)
    numbers = np.arange(steps * rows).reshape(steps, rows)
    each = {
        "tokens": tokens,
        "segment_ids": np.broadcast_to(np.repeat([1, 2], 4), tokens.shape),
        "positions": np.broadcast_to(np.tile(np.arange(4), 2), tokens.shape),
        "text_ids": np.stack([6 * a + b, 36 + 6 * a + b], -1),
        "row_ids": np.stack([0 * numbers, numbers], -1),
    }
    return {name: jnp.asarray(x, jnp.int32) for name, x in each.items()}


@pytest.mark.slow
def test_texts_are_found() -> None:
    """1 for whoever tells both words, near 1/6 of a batch for whoever tells one: equal texts are no negatives."""
    metrics = learn(
        InBatchContrastive(temperature=0.1),
        ENCODER,
        vocabulary(24),
        _matched_words(200, 16, 0),
        _matched_words(16, 16, 1),
    )
    assert metrics["accuracy"] > 0.97


def _forward_only(value: Any) -> Any:
    return value


def _no_ids(corrupt: Callable[..., Any]) -> Callable[..., Any]:
    def changed(self: Any, keys: Any, rows: Any, ctx: Any) -> Any:
        ids = jnp.arange(rows["text_ids"].size, dtype=jnp.int32).reshape(rows["text_ids"].shape)
        return corrupt(self, keys, {**rows, "text_ids": ids}, ctx)

    return changed


BY_HAND = (
    test_candidates_by_hand,
    test_texts_of_equal_queries_are_no_negatives,
    test_both_directions_and_cosines_by_hand,
)
BY_GRADIENT = (test_a_text_is_read_by_itself_and_whole,)
_losses = _bi_encoder.losses
MUTANTS = [
    (Mutant("equal texts are negatives", InBatchContrastive, "corrupt", _no_ids), BY_HAND),
    (
        Mutant("all texts are there", _bi_encoder, "texts_there", lambda _: lambda s, n: jnp.ones((len(s), n), bool)),
        BY_HAND,
    ),
    (
        Mutant(
            "temperature is a factor",
            _losses,
            "similarity_stats",
            lambda stats: lambda s, t, *, temperature, **more: stats(s * temperature, t, **more),
        ),
        BY_HAND,
    ),
    (Mutant("no unit vectors", _losses, "unit_vectors", lambda _: _forward_only), BY_HAND),
    (
        Mutant(
            "places are those of another part",
            InBatchContrastive,
            "statistics",
            lambda f: lambda *a: jax.tree.map(lambda x: jnp.roll(x, 1, 0), f(*a)),
        ),
        (test_parts_add_up_to_the_batch,),
    ),
    (
        Mutant(
            "texts see one another",
            masks.AttentionMask,
            "packed",
            lambda _: lambda m, s: dataclasses.replace(m, segment_ids=jnp.minimum(s, 1)),
        ),
        BY_GRADIENT,
    ),
    (Mutant("a mask of the left side", masks, "bidirectional", lambda _: masks.causal), BY_GRADIENT),
]


@pytest.mark.parametrize(("mutant", "checks"), MUTANTS, ids=[str(mutant) for mutant, _ in MUTANTS])
def test_mutants_are_noticed(
    monkeypatch: pytest.MonkeyPatch, mutant: Mutant, checks: tuple[Callable[[], None], ...]
) -> None:
    assert_killed(monkeypatch, mutant, checks)
