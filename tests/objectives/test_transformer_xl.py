"""Transformer-XL: rows that go on in the text, what they remember, and what they learn from it."""

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
from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.models import DecoderConfig, XLNetConfig
from lmobj.objectives import CausalLM, Context, TransformerXL, _causal_lm, denominators, step_keys, total_loss
from tests.mutants import Mutant, assert_killed
from tests.objectives.learning import Repeats, learn

VOCAB = Vocabulary(size=40, pad=0, eos=3)
ROWS, LENGTH = 2, 6
XL = XLNetConfig(
    layers=2,
    width=16,
    heads=2,
    memory_length=LENGTH,
    direction="backward",
    segments=False,
    query_stream=False,
    untie_biases=False,
    vocab_multiple=1,
    init_std=0.3,
    dropout=0.0,
    attention_dropout=0.0,
    remat="none",
)


def make_batch(tokens: Any, segments: Any) -> dict[str, Any]:
    rows = {"tokens": tokens, "segment_ids": segments, "positions": np.zeros((ROWS, np.shape(tokens)[1]))}
    arrays = {name: jnp.asarray(x, jnp.int32) for name, x in rows.items()}
    return arrays | {"row_ids": jnp.asarray([[0, 0], [0, 1]]), "token_bytes": 2 * arrays["segment_ids"]}


BATCH = make_batch([[7, 8, 3, 9, 10, 3], [11, 12, 13, 3, 0, 0]], [[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]])


def context() -> tuple[Any, Context]:
    noise, model = step_keys(jax.random.key(0, impl="threefry2x32"), BATCH["row_ids"], 0)
    return noise, Context(model, 0, VOCAB, train=False)


def test_targets_run_on_from_document_to_document_and_end_with_the_row() -> None:
    keys, ctx = context()
    example = TransformerXL().corrupt(keys, BATCH, ctx)
    np.testing.assert_array_equal(example.targets[:, :-1], BATCH["tokens"][:, 1:])
    np.testing.assert_array_equal(example.weights, [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(example.extra["target_bytes"][0], [2, 2, 4, 4, 4, 0])
    dense = np.asarray(example.mask.dense(LENGTH, LENGTH))[:, 0]
    np.testing.assert_array_equal(dense[0], np.tri(LENGTH, dtype=bool))
    np.testing.assert_array_equal(dense[1, :4, :], np.tri(4, 6, dtype=bool))
    separate = CausalLM().corrupt(keys, BATCH, ctx)
    assert separate.weights[0].tolist() == [1, 1, 0, 1, 1, 0]


def test_a_text_cut_into_rows_is_the_text() -> None:
    """With a memory as long as the text, the losses of two rows are those of one row of twice the length.

    But for the first row's last token, which predicts nothing.
    """
    with jax.enable_x64(True):
        config = XLNetConfig(**{**vars(XL), "dtype": "float64", "param_dtype": "float64"})
        model = nnx.jit(lambda: config.build(VOCAB, nnx.Rngs(0)))()
        keys, ctx = context()
        objective = TransformerXL(label_smoothing=0.1, z_loss=0.01)
        text = jnp.asarray(np.random.default_rng(0).integers(4, VOCAB.size, (ROWS, 2 * LENGTH)), jnp.int32)

        @jax.jit
        def nll(tokens: Any, memory: Any, weights: Any) -> Any:
            batch = make_batch(tokens, jnp.ones_like(tokens)) | {"loss_mask": weights}
            terms = objective.terms({"model": model}, objective.corrupt(keys, batch, ctx), memory, ctx)
            return terms.sums["nll"], terms.carried

        ones = jnp.ones((ROWS, LENGTH))
        start = objective.init({"model": model}, jax.random.key(0), ROWS).carried
        first, memory = nll(text[:, :LENGTH], start, ones)
        second, after = nll(text[:, LENGTH:], memory, ones)
        assert memory.valid.all()
        assert not start.valid.any()
        whole, _ = nll(text, None, jnp.ones((ROWS, 2 * LENGTH)).at[:, LENGTH].set(0))
        np.testing.assert_allclose(first + second, whole, rtol=1e-12)
        forgotten, _ = nll(text[:, LENGTH:], start, ones)
        assert abs(float(second - forgotten)) > 1e-3
        assert after.states.shape == memory.states.shape


def test_loss_is_a_mean_over_targets_and_nothing_without_any() -> None:
    keys, ctx = context()
    objective = TransformerXL()
    config = XLNetConfig(**{**vars(XL), "layers": 1, "init_std": 1e-30})  # all logits are 0
    model = nnx.jit(lambda: config.build(VOCAB, nnx.Rngs(0)))()

    @jax.jit
    def loss(batch: Any) -> Any:
        example = objective.corrupt(keys, batch, ctx)
        terms = objective.terms({"model": model}, example, model.init_memory(ROWS), ctx)
        bits, size = terms.metrics["bits_per_byte"]
        return total_loss(terms, denominators(objective, example), objective.coefficients), bits, size

    mean, bits, size = loss(BATCH)
    np.testing.assert_allclose(mean, math.log(VOCAB.size), rtol=1e-6)
    # 8 targets. A token of segment s has 2 s bytes here: 2 + 2 + 4 + 4 + 4 in row 0, and 3 times 2 in row 1.
    np.testing.assert_allclose(bits, 8 * math.log2(VOCAB.size), rtol=1e-6)
    assert size == 22
    assert loss(make_batch(jnp.zeros((ROWS, LENGTH)), jnp.zeros((ROWS, LENGTH))))[0] == 0


def test_refuses_what_cannot_be_done() -> None:
    with pytest.raises(UserError, match=r"data\.length is 1"):
        TransformerXL().rows(VOCAB, 1)
    with pytest.raises(UserError, match=r"label_smoothing is 1\.0"):
        TransformerXL(label_smoothing=1.0)
    decoder = nnx.eval_shape(lambda: DecoderConfig(layers=1, width=8, heads=2).build(VOCAB, nnx.Rngs(0)))
    with pytest.raises(UserError, match="needs a model with a memory and Decoder has none"):
        TransformerXL().init({"model": decoder}, jax.random.key(0), 2)


def test_rows_asked_for() -> None:
    rows = TransformerXL().rows(VOCAB, 16)
    assert (rows.layout, rows.length, rows.suffix, rows.bidirectional) == ("stream", 16, (3,), False)
    assert TransformerXL().judged_by == "loss"  # n-gram models are scored on documents, not on streams


def test_learns_repeats_from_memory() -> None:
    """0.5625 with the row before in memory; 1/8 without, or with another's."""
    language = Repeats(length=8)
    config = XLNetConfig(**{**vars(XL), "layers": 1, "width": 32, "memory_length": 8})
    batches = language.batches(steps=240)
    metrics = learn(TransformerXL(), config, language.vocab, *batches, lr=1e-2)
    assert abs(metrics["accuracy"] - language.ceiling) < 0.04


def _forgets(terms: Any) -> Any:
    return lambda self, models, example, carried, ctx: terms(self, models, example, carried, ctx)._replace(
        carried=carried
    )


def _by_document(corrupt: Any) -> Any:
    return lambda self, keys, batch, ctx: CausalLM().corrupt(keys, batch, ctx)


def _every_position_counts(corrupt: Any) -> Any:
    def mutated(*given: Any) -> Any:
        example = corrupt(*given)
        return dataclasses.replace(example, weights=jnp.ones_like(example.weights))

    return mutated


TARGETS = (test_targets_run_on_from_document_to_document_and_end_with_the_row,)
CUT = (test_a_text_cut_into_rows_is_the_text,)
MUTANTS = [
    (Mutant("memory is not carried", TransformerXL, "terms", _forgets), CUT),
    (Mutant("documents by themselves", TransformerXL, "corrupt", _by_document), TARGETS),
    (Mutant("a mask of both sides", masks, "causal", lambda _: masks.bidirectional), TARGETS),
    (Mutant("target two ahead", _causal_lm, "ahead", lambda f: lambda x, places=1: f(x, 2 * places)), TARGETS),
    (Mutant("every position counts", TransformerXL, "corrupt", _every_position_counts), TARGETS),
    (Mutant("memory is invisible", masks.AttentionMask, "with_memory", lambda f: lambda m, v: f(m, v & False)), CUT),
]


@pytest.mark.parametrize(("mutant", "checks"), MUTANTS, ids=[str(mutant) for mutant, _ in MUTANTS])
def test_mutants_are_noticed(
    monkeypatch: pytest.MonkeyPatch, mutant: Mutant, checks: tuple[Callable[[], None], ...]
) -> None:
    assert_killed(monkeypatch, mutant, checks)
