"""Permutation LM: who informs which prediction, the memory, the loss, and what it learns."""

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

from lmobj import noise
from lmobj.batch import Batch, Vocabulary
from lmobj.errors import UserError
from lmobj.models import DecoderConfig, Memory, OutputHead, XLNet, XLNetConfig
from lmobj.objectives import Context, Example, PermutationLM, denominators, step_keys, total_loss
from lmobj.objectives import _permutation_lm as module
from tests.mutants import Mutant, assert_killed
from tests.objectives.learning import Batches, learn, vocabulary

VOCAB = Vocabulary(size=64, pad=0, eos=1, cls=2, sep=3)
ROWS, LENGTH, REUSE = 2, 16, 8
TINY = XLNetConfig(layers=2, width=16, heads=2, memory_length=6, vocab_multiple=8, init_std=0.3)
OBJECTIVE = PermutationLM(num_predictions=6, mask_alpha=2)


def make_batch() -> Batch:
    """[8 tokens | A A A SEP B B SEP CLS], and a row that ends after 13 tokens; no word is there twice."""
    words = 4 + np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH)
    words[0, [11, 14]], words[0, 15] = VOCAB.sep or 0, VOCAB.cls or 0
    real = np.arange(LENGTH) < np.array([[16], [13]])
    types = np.array([0] * 12 + [1] * 3 + [2])
    arrays = {
        "tokens": np.where(real, words, 0),
        "segment_ids": real,
        "token_types": np.broadcast_to(types, real.shape),
        "row_ids": [[0, 0], [0, 1]],
    }
    more = {"word_starts": jnp.ones(real.shape, bool), "backward": jnp.asarray([False, True])}
    return {name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()} | more


def context(seed: int = 0) -> tuple[Any, Context]:
    noise_keys, model_keys = step_keys(jax.random.key(seed, impl="threefry2x32"), make_batch()["row_ids"], 0)
    return noise_keys, Context(model_keys, 0, VOCAB, train=False)


def example_of(seed: int = 0, label: int = 0) -> Example:
    batch = make_batch() | {"pair_labels": jnp.full(ROWS, label)}
    corrupt = _corruption(PermutationLM.corrupt, PermutationLM._sizes, noise.permute_tokens)
    keys, ctx = context(seed)
    return corrupt(keys, batch, ctx)


@functools.cache
def _corruption(*mutable: Any) -> Callable[..., Example]:
    """Compiled once, and again for every mutant."""
    return jax.jit(lambda keys, batch, ctx: OBJECTIVE.corrupt(keys, batch, ctx))


@functools.cache
def model() -> XLNet:
    return nnx.jit(lambda: TINY.build(VOCAB, nnx.Rngs(3)))()


class Untied:
    """A model whose table lets no gradient through, so that a token's gradient is what the model made of reading it."""

    def __init__(self, model: XLNet) -> None:
        self.model = model
        self.hidden, self.recurrent, self.two_streams = model.hidden, model.recurrent, model.two_streams
        self.init_memory, self.head_hidden, self.head_style = model.init_memory, model.head_hidden, model.head_style

    def head_table(self) -> OutputHead:
        return jax.tree.map(jax.lax.stop_gradient, self.model.head_table())


def losses_of(example: Example, embedding: Any, memory: Memory | None) -> tuple[Any, Any]:
    """([B, K] losses of each prediction by itself, the new memory) as a function of the embedding."""
    graphdef, state = nnx.split(model())
    params = nnx.to_pure_dict(state)
    params["tokens"]["table"] = embedding
    models: Any = {"model": Untied(nnx.merge(graphdef, params))}
    shape = example.weights.shape

    def one(weights: Any) -> Any:
        terms = OBJECTIVE.terms(models, dataclasses.replace(example, weights=weights), memory, context()[1])
        return terms.sums["nll"], terms.carried

    each, carried = jax.vmap(one)(jnp.eye(shape[0] * shape[1]).reshape(-1, *shape))
    return each.reshape(shape), jax.tree.map(lambda x: x[0], carried)


def memory_of(valid: Any) -> Memory:
    states = jax.random.normal(jax.random.key(9), (ROWS, TINY.layers, TINY.memory_length, TINY.width))
    return Memory(states, jnp.broadcast_to(jnp.asarray(valid, bool), (ROWS, TINY.memory_length)))


def test_targets_and_counts() -> None:
    """6 of 16: 3 in each half. In row 1, 13 long, floor(3 * 5 / 8) = 1 in the second half. Separators never."""
    seen = set()
    for seed in range(8):
        example = example_of(seed)
        np.testing.assert_array_equal(example.inputs, make_batch()["tokens"])
        at = np.asarray(example.predict)
        there = np.take_along_axis(np.asarray(example.inputs), at, axis=1)
        predicted = np.asarray(example.weights) > 0
        np.testing.assert_array_equal(np.asarray(example.targets)[predicted], there[predicted])
        assert there[predicted].min() >= 4
        assert ((at < REUSE) & predicted).sum(axis=1).tolist() == [3, 3]
        assert ((at >= REUSE) & predicted)[1].sum() == 1
        seen |= set(at[predicted])
    assert seen >= set(range(REUSE)) | {8, 9, 10, 12, 13}


def test_whether_b_follows_a_changes_nothing() -> None:
    for one, other in zip(jax.tree.leaves(example_of(label=0)), jax.tree.leaves(example_of(label=1)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_tokens_that_are_no_targets_see_one_another_and_what_comes_before() -> None:
    """Of their half no targets and no separators; of the other the second half sees all, and the first nothing."""
    example = example_of()
    sees = np.asarray(example.mask.dense(LENGTH, LENGTH))[:, 0]
    first = np.arange(LENGTH) < REUSE
    hidden_by_order = 0
    for b, at, weights in zip(range(ROWS), np.asarray(example.predict), np.asarray(example.weights), strict=True):
        tokens, length = np.asarray(example.inputs[b]), int(example.mask.segment_ids[b].sum())
        real, ordinary = np.arange(LENGTH) < length, (np.arange(LENGTH) < length) & (tokens > 3)
        ordinary[at[weights > 0]] = False
        for i in np.flatnonzero(ordinary):
            expected = real & (first if first[i] else ~first) & ordinary
            np.testing.assert_array_equal(sees[b, i], expected | (~first[i] & first & real))
        for i in np.flatnonzero(real & ~ordinary):
            half = first if first[i] else ~first
            assert sees[b, i][ordinary & half].all()
            assert sees[b, i, i]
            assert (sees[b, i] & ~half).sum() == (0 if first[i] else REUSE)
            hidden_by_order += (~sees[b, i] & half & real).sum()
    assert hidden_by_order > 3


def test_gradients_reach_what_the_order_shows_and_nothing_else() -> None:
    example = example_of()
    table = model().tokens.table[...]
    jacobian = jax.jit(jax.jacrev(lambda table: losses_of(example, table, None)[0]))(table)
    reach = np.linalg.norm(jacobian, axis=-1) > 0  # [B, K, V]
    batch, at = make_batch(), np.asarray(example.predict)
    for b in range(ROWS):
        tokens, length = np.asarray(batch["tokens"][b]), int(batch["segment_ids"][b].sum())
        order = np.asarray(example.mask.key_rank)[b]
        targets = {int(i) for i, w in zip(at[b], example.weights[b], strict=True) if w}
        for k in np.flatnonzero(example.weights[b]):
            i = int(at[b, k])
            sees = {j for j in range(length) if reach[b, k, tokens[j]]}
            first, second = set(range(REUSE)), set(range(REUSE, length))
            here, other = (first, second) if i < REUSE else (second, first)
            ordinary = {j for j in here if tokens[j] > 3} - targets
            assert i not in sees
            assert ordinary <= sees, "tokens that are not targets are seen by all of their half"
            assert (sees & other) == (set() if i < REUSE else first), (
                "the second half sees the first, never the reverse"
            )
            later = here - ordinary  # targets, and separators, of which two are the same token
            expected = {tokens[j] for j in later if order[j] < order[i]}
            assert {tokens[j] for j in later & sees} == expected
        outside = set(range(VOCAB.size)) - set(tokens[:length].tolist())
        assert not reach[b][:, sorted(outside)].any(), "padding, or the other row"
    # Of two targets in one half one sees the other, and only one.
    a, c = (int(x) for x in at[0, :2])
    assert reach[0, 0, make_batch()["tokens"][0, c]] != reach[0, 1, make_batch()["tokens"][0, a]]


def test_content_stream_sees_itself_and_the_query_stream_never() -> None:
    example = example_of()
    content = np.asarray(example.mask.dense(LENGTH, LENGTH))[:, 0]
    query = np.asarray(module.query_mask(example).dense(6, LENGTH))[:, 0]
    assert content[:, np.arange(LENGTH), np.arange(LENGTH)].all()
    at = np.asarray(example.predict)
    predicted = np.asarray(example.weights) > 0
    assert not np.take_along_axis(query, at[..., None], axis=2)[predicted].any()
    itself = np.take_along_axis(content, at[..., None], axis=1) & (np.arange(LENGTH) != at[..., None])
    np.testing.assert_array_equal(query[predicted], itself[predicted])


def test_memory_is_the_reused_tokens_and_has_no_gradient() -> None:
    example = example_of()
    table = model().tokens.table[...]
    _, new = jax.jit(lambda: losses_of(example, table, memory_of(True)))()
    # The first layer's inputs are the embeddings: of the 8 tokens that the next row goes on from, the last 6.
    np.testing.assert_array_equal(new.states[:, 0], table[np.asarray(example.inputs)[:, REUSE - 6 : REUSE]])
    assert new.valid.all()
    gradient = jax.jit(jax.grad(lambda table: jnp.sum(losses_of(example, table, memory_of(True))[1].states)))(table)
    assert not np.any(gradient)


def test_rows_that_are_one_half_are_remembered_whole() -> None:
    class Asked(Even):
        """Says how many tokens it was to remember, as the memory."""

        def __init__(self) -> None:
            self.hidden = self.recurrent = self.init_memory = self.head_hidden = lambda x, **_: x

        def two_streams(self, tokens: Any, predict: Any, *, reuse: Any, **_: Any) -> Any:
            return None, jnp.zeros((*predict.shape, TINY.width)), reuse

    for objective, remembered in (
        (PermutationLM(reuse=0), None),
        (PermutationLM(reuse=4), 4),
        (PermutationLM(), REUSE),
    ):
        models: Any = {"model": Asked()}
        assert objective.terms(models, example_of(), None, context()[1]).carried == remembered


def test_memory_is_seen_where_it_is_valid() -> None:
    example = example_of()
    table = model().tokens.table[...]
    valid = np.array([False, False, False, True, True, False])
    states = memory_of(valid).states
    jacobian = jax.jit(jax.jacrev(lambda states: losses_of(example, table, Memory(states, memory_of(valid).valid))[0]))(
        states
    )
    reach = np.linalg.norm(jacobian, axis=-1) > 0  # [B, K, B, n, M]
    for b, k in np.argwhere(np.asarray(example.weights) > 0):
        np.testing.assert_array_equal(reach[b, k, b], np.broadcast_to(valid, (TINY.layers, len(valid))))
        assert not reach[b, k, 1 - b].any()


def test_backward_rows_are_told_to_the_model() -> None:
    example = example_of()
    table = model().tokens.table[...]
    losses = jax.jit(lambda example: losses_of(example, table, None)[0])
    forward = dataclasses.replace(example, extra=example.extra | {"backward": jnp.asarray([False, False])})
    difference = np.abs(np.asarray(losses(example)) - np.asarray(losses(forward))).max(axis=1)
    assert difference[0] < 1e-5 < 1e-2 < difference[1]


class Even(Untied):
    """All logits are zero."""

    def head_table(self) -> OutputHead:
        return OutputHead(jnp.zeros((VOCAB.size, TINY.width)))


def test_loss_is_the_mean_over_targets_and_nothing_without_any() -> None:
    keys, ctx = context()
    weights = np.array(example_of().weights)
    assert weights.sum() < weights.size  # row 1 is short

    @jax.jit
    def loss(batch: Batch) -> Any:
        example = OBJECTIVE.corrupt(keys, batch, ctx)
        terms = OBJECTIVE.terms({"model": Even(model())}, example, None, ctx)
        return terms.sums["nll"], total_loss(terms, denominators(OBJECTIVE, example), OBJECTIVE.coefficients)

    np.testing.assert_allclose(loss(make_batch()), math.log(VOCAB.size) * np.array([weights.sum(), 1]), rtol=1e-6)
    assert loss(make_batch() | {"tokens": jnp.full((ROWS, LENGTH), VOCAB.sep)}) == (0, 0)


def test_rows_asked_for() -> None:
    rows = PermutationLM().rows(VOCAB, 512)
    assert (rows.layout, rows.reuse, rows.prefix, rows.suffix) == ("stream_pairs", 256, (1,), (3, 2))
    assert (rows.fields, rows.bidirectional) == (("word_starts",), True)
    assert not PermutationLM(bidirectional=False).rows(VOCAB, 512).bidirectional
    assert PermutationLM()._sizes(512) == (256, 256, 85)  # the paper's


@pytest.mark.parametrize(
    ("settings", "vocab", "length", "message"),
    [
        ({}, Vocabulary(size=16, cls=2), 16, r"the vocabulary has no \[SEP\]; set"),
        ({}, Vocabulary(size=16, sep=2), 16, r"the vocabulary has no \[CLS\]; set"),
        ({"perm_size": 3}, VOCAB, 16, "perm_size is 3, which does not divide"),
        ({"reuse": 12}, VOCAB, 16, r"objective\.reuse is 12, .*accepted: 1 to data\.length - 5 = 11"),
        ({"reuse": 0, "num_predictions": 3}, VOCAB, 16, r"objective\.reuse is 0"),
        ({"num_predictions": 16}, VOCAB, 16, "num_predictions is 16"),
        ({"mask_alpha": 0}, VOCAB, 16, "mask_alpha is 0"),
        ({"max_span": 0}, VOCAB, 16, "max_span is 0"),
        ({"num_predictions": 0}, VOCAB, 16, "num_predictions is 0"),
    ],
)
def test_refuses_what_cannot_be_done(settings: dict[str, Any], vocab: Vocabulary, length: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PermutationLM(**settings).rows(vocab, length)


def test_refuses_a_model_with_one_stream() -> None:
    decoder = nnx.eval_shape(lambda: DecoderConfig(layers=1, width=8, heads=2).build(VOCAB, nnx.Rngs(0)))
    with pytest.raises(UserError, match=r"needs a model with two streams and Decoder has one"):
        OBJECTIVE.init({"model": decoder}, jax.random.key(0), 2)


WORDS = 8


def copies(steps: int, rows: int, seed: int) -> Batches:
    """Rows whose second half repeats the first; batches come in twos with the same rows, one after the other.

    Without memory the first half is anybody's guess and the second is known, for it sees all of the first. With the
    first half of the batch before in its memory, every second batch is known altogether:

        ceiling = 1/2 * (1/2 * (1 + 1 / words) + 1)
    """
    draw = np.random.default_rng(seed)
    half = np.repeat(draw.integers(0, WORDS, (steps // 2, rows, REUSE)), 2, axis=0)
    tokens = 7 + np.concatenate([half, half], axis=-1)
    numbers = np.arange(steps * rows).reshape(steps, rows)
    arrays = {
        "tokens": tokens,
        "segment_ids": np.ones_like(tokens),
        "token_types": np.zeros_like(tokens),
        "row_ids": np.stack([np.full_like(numbers, seed), numbers], axis=-1),
    }
    return {name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()} | {
        "word_starts": jnp.ones(tokens.shape, bool)
    }


def test_learns_copies_from_the_row_and_from_memory() -> None:
    """0.781. Without memory 0.563; whoever sees the second half from the first, or the target itself, is at 1."""
    config = XLNetConfig(
        layers=1,
        width=32,
        heads=2,
        mlp_width=64,
        memory_length=REUSE,
        vocab_multiple=1,
        init_std=0.3,
        dropout=0.0,
        attention_dropout=0.0,
        remat="none",
    )
    metrics = learn(OBJECTIVE, config, vocabulary(WORDS), copies(240, 16, 0), copies(32, 16, 1), lr=1e-2)
    assert abs(metrics["accuracy"] - (0.5 * (1 + 1 / WORDS) + 1) / 2) < 0.04


def _forgets(terms: Any) -> Any:
    return lambda self, models, example, carried, ctx: terms(self, models, example, carried, ctx)._replace(
        carried=carried
    )


def _changed(corrupt: Callable[[Example], Example]) -> Callable[[Any], Any]:
    return lambda original: lambda self, keys, batch, ctx: corrupt(original(self, keys, batch, ctx))


def _one_later(query_mask: Any) -> Any:
    """The query stream sees its own token, as if it were a token to read."""

    def mutated(example: Example) -> Any:
        later = {"prediction_rank": example.extra["prediction_rank"] + 1}
        return query_mask(dataclasses.replace(example, extra=later))

    return mutated


def _no_direction(example: Example) -> Example:
    return dataclasses.replace(example, extra={name: x for name, x in example.extra.items() if name != "backward"})


def _all_slots(example: Example) -> Example:
    return dataclasses.replace(example, weights=jnp.ones_like(example.weights))


def _reversed(example: Example) -> Example:
    """A token sees what comes after it."""
    mask: Any = example.mask
    later: Any = {"query_rank": -mask.query_rank, "key_rank": -mask.key_rank}
    return dataclasses.replace(example, mask=dataclasses.replace(mask, **later))


def _blind_to_itself(example: Example) -> Example:
    return dataclasses.replace(example, mask=dataclasses.replace(example.mask, sees_self=False))


def _targets_shifted(example: Example) -> Example:
    return dataclasses.replace(example, targets=jnp.roll(example.targets, 1, axis=1))


def _no_reuse(two_streams: Any) -> Any:
    return lambda self, *args, reuse, **options: two_streams(self, *args, reuse=None, **options)


def _both_halves(permute: Any) -> Any:
    """One order for the whole row: the halves' ranks are not told apart."""

    def mutated(key: Any, tokens: Any, *args: Any, reuse: int, **options: Any) -> Any:
        permuted = permute(key, tokens, *args, reuse=reuse, **options)
        shift = jnp.where(jnp.arange(tokens.shape[0]) < reuse, 0, reuse + 1)
        return permuted._replace(key_rank=permuted.key_rank - shift)

    return mutated


GRADIENTS = (test_gradients_reach_what_the_order_shows_and_nothing_else,)
MEMORY = (test_memory_is_the_reused_tokens_and_has_no_gradient,)
ORDER = (test_tokens_that_are_no_targets_see_one_another_and_what_comes_before,)
COUNTS = (test_loss_is_the_mean_over_targets_and_nothing_without_any,)
MUTANTS = [
    (Mutant("memory is not carried", PermutationLM, "terms", _forgets), MEMORY),
    (Mutant("a prediction sees itself", module, "query_mask", _one_later), GRADIENTS),
    (Mutant("halves are one", noise, "permute_tokens", _both_halves), ORDER),
    (Mutant("rows are remembered whole", XLNet, "two_streams", _no_reuse), MEMORY),
    (Mutant("gradient into memory", jax.lax, "stop_gradient", lambda _: lambda x: x), MEMORY),
    (
        Mutant("no backward rows", PermutationLM, "corrupt", _changed(_no_direction)),
        (test_backward_rows_are_told_to_the_model,),
    ),
    (Mutant("empty slots count", PermutationLM, "corrupt", _changed(_all_slots)), COUNTS),
    (Mutant("shifted target", PermutationLM, "corrupt", _changed(_targets_shifted)), (test_targets_and_counts,)),
    (Mutant("the order reversed", PermutationLM, "corrupt", _changed(_reversed)), ORDER),
    (Mutant("content does not see itself", PermutationLM, "corrupt", _changed(_blind_to_itself)), ORDER),
]


@pytest.mark.parametrize(("mutant", "checks"), MUTANTS, ids=[str(mutant) for mutant, _ in MUTANTS])
def test_mutants_are_noticed(
    monkeypatch: pytest.MonkeyPatch, mutant: Mutant, checks: tuple[Callable[[], None], ...]
) -> None:
    assert_killed(monkeypatch, mutant, checks)
