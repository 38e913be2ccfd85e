"""Masked diffusion by hand: chances, weights and denominators of both papers; the bound is unbiased; and it learns."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmobj import noise
from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.objectives import Context, Example, MaskedDiffusion, _masked_diffusion, denominators, step_keys, total_loss
from tests.mutants import Mutant, assert_killed
from tests.objectives.learning import DECODER, ENCODER, Twins, learn
from tests.objectives.uniform import Uniform

VOCAB = Vocabulary(size=16, pad=0, eos=3, cls=4, sep=5, mask=6)
KEY = jax.random.key(0, impl="threefry2x32")


def make_rows(rows: int = 64) -> dict[str, Any]:
    """[CLS] 6 words EOS, 3 words EOS and padding: 11 of 14 tokens may be masked."""
    tokens = jnp.tile(jnp.asarray([4, 7, 8, 9, 10, 11, 12, 3, 13, 14, 15, 3, 0, 0]), (rows, 1))
    segments = jnp.tile(jnp.asarray([1] * 8 + [2] * 4 + [0] * 2), (rows, 1))
    ids = jnp.stack([jnp.zeros(rows, jnp.int32), jnp.arange(rows, dtype=jnp.int32)], 1)
    types = jnp.tile(jnp.asarray([0] * 8 + [1] * 4 + [0] * 2), (rows, 1))
    return {"tokens": tokens, "segment_ids": segments, "positions": 0 * tokens, "row_ids": ids, "token_types": types}


def corrupted(objective: MaskedDiffusion, batch: dict[str, Any], step: int = 0) -> tuple[Example, Context]:
    keys, model = step_keys(KEY, batch["row_ids"], step)
    ctx = Context(model, 0, VOCAB, train=False)
    return objective.corrupt(keys, batch, ctx), ctx


def loss_of(objective: MaskedDiffusion, example: Example, ctx: Context) -> float:
    terms = objective.terms({"model": Uniform(VOCAB.size)}, example, (), ctx)
    return float(total_loss(terms, denominators(objective, example), objective.coefficients))


def test_weights_and_denominator_of_llada() -> None:
    """Sum of log 16 / t over masked tokens, over the 11 tokens of each row; a document has one t, from eps to 1."""
    objective, batch = MaskedDiffusion(), make_rows()
    example, ctx = corrupted(objective, batch)
    masked = np.asarray(example.inputs) == VOCAB.mask
    np.testing.assert_array_equal(np.asarray(example.weights) > 0, masked)
    assert not masked[:, [0, 12, 13]].any()
    assert masked[:, [7, 11]].any(axis=0).all(), "what ends a document is predicted"
    np.testing.assert_array_equal(np.asarray(example.targets)[masked], np.asarray(batch["tokens"])[masked])
    times: list[set[float]] = []
    for row in np.asarray(example.weights):
        times += [{float(w) for w in part if w} for part in (row[:8], row[8:12])]
    assert all(len(t) <= 1 for t in times)
    assert len(set().union(*times)) > 90, "documents of a row have times of their own"
    assert all(1 <= w <= 1000 for t in times for w in t)
    assert float(objective.weights(example)["nll"]) == 64 * 11
    expected = math.log(16) * float(np.sum(np.asarray(example.weights, np.float64))) / (64 * 11)
    np.testing.assert_allclose(loss_of(objective, example, ctx), expected, rtol=1e-6)


def test_mdlm_spreads_times_over_the_batch_and_never_predicts_the_mask() -> None:
    """Row i of n has u in [i / n, (i + 1) / n), so 1 / weight = (1 - eps) u + eps is in an interval of its own; with 15
    tokens left to predict a masked one costs log 15."""
    objective = MaskedDiffusion(variant="mdlm")
    example, ctx = corrupted(objective, make_rows())
    weights = np.asarray(example.weights, np.float64)
    for row, found in enumerate(weights):
        u = (1 / found[found > 0] - 1e-3) / (1 - 1e-3)
        assert np.all((row / 64 - 1e-6 <= u) & (u <= (row + 1) / 64 + 1e-6))
    expected = math.log(15) * weights.sum() / (64 * 11)
    np.testing.assert_allclose(loss_of(objective, example, ctx), expected, rtol=1e-6)


def test_a_mask_in_the_text_is_no_infinity() -> None:
    objective, batch = MaskedDiffusion(variant="mdlm"), make_rows()
    batch["tokens"] = batch["tokens"].at[:, 2].set(VOCAB.mask)
    example, ctx = corrupted(objective, batch)
    assert np.isfinite(loss_of(objective, example, ctx))
    assert float(objective.weights(example)["nll"]) == 64 * 10


def test_parts_of_a_batch_have_the_places_that_they_have_in_it() -> None:
    """The second half of the batch by itself, told so, is noised as it is in the batch."""
    objective, batch = MaskedDiffusion(variant="mdlm"), make_rows(8)
    whole, ctx = corrupted(objective, batch)
    keys, _ = step_keys(KEY, batch["row_ids"], 0)
    half = jax.tree.map(lambda x: x[4:], batch)
    part = objective.corrupt(keys[4:], half, dataclasses.replace(ctx, parts=2, part=1))
    np.testing.assert_array_equal(part.inputs, whole.inputs[4:])
    np.testing.assert_array_equal(part.weights, whole.weights[4:])


def test_completions_are_divided_by_their_length_and_the_number_of_examples() -> None:
    """Of 3 words and EOS at a time t: log 16 / (4 t) for each that is masked; over 63 examples, since one is empty."""
    objective, batch = MaskedDiffusion(loss_on="completion"), make_rows()
    batch["segment_ids"] = (batch["segment_ids"] > 0).astype(jnp.int32).at[5].set(0)
    example, ctx = corrupted(objective, batch)
    masked = np.asarray(example.inputs) == VOCAB.mask
    assert not masked[:, :8].any(), "the prompt is never noised"
    assert masked[:, 8:12].any(axis=0).all()
    assert not masked[5].any()
    weights = np.asarray(example.weights, np.float64)[masked]
    assert np.all((weights >= 1 / 4) & (weights <= 1000 / 4))
    assert float(objective.weights(example)["nll"]) == 63
    np.testing.assert_allclose(loss_of(objective, example, ctx), math.log(16) * weights.sum() / 63, rtol=1e-6)


def test_rows_are_cut_to_lengths_from_one_to_their_own() -> None:
    example, _ = corrupted(MaskedDiffusion(truncate_rate=0.5), make_rows(512))
    assert example.mask.segment_ids is not None
    lengths = np.asarray(jnp.sum(example.mask.segment_ids > 0, axis=1))
    assert set(lengths) == set(range(1, 13))
    # A row stays whole with probability 1/2 + 1/2 * 1/12 = .542; the standard deviation of the share is .022.
    assert 0.45 < np.mean(lengths == 12) < 0.63


@pytest.mark.parametrize(("chance", "factor"), [(1.0, 1.0), (1 - 1e-3, 1 - 1e-3)], ids=["llada", "mdlm"])
def test_the_mean_over_noise_is_the_bound_by_enumeration(chance: float, factor: float) -> None:
    """The estimate of sum_i [masked] / t f(mask) has the mean of the sum over all masks S of P(S) / t, integrated.

    A token alone has E[masked / t] = chance. Of a row of L = 3 with f = 1 where all are masked at once: the integral
    of 3 t^3 / t over t from eps to 1, 3 * (1 - eps^3) / 3 / (1 - eps), times chance^3. By k = |S|, L / k [k = L] has
    mean 1 / L * L / L * L = 1: LLaDA's two forms of the bound, eqs. 3 and 6, agree up to eps.
    """
    rows = 40_000
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(rows))
    tokens, ones = jnp.asarray([7, 8, 9]), jnp.ones(3, bool)
    found = jax.jit(
        jax.vmap(
            lambda key: noise.diffuse_tokens(
                key, tokens, ones, jnp.ones(3, jnp.int32), mask_id=6, epsilon=1e-3, chance=chance
            )
        )
    )(keys)
    weights = np.asarray(found.weights, np.float64)
    every = np.all(weights > 0, axis=1)
    sums = weights.sum(1) * every  # 3 / t where all are masked
    expected = factor**3 * (1 - 1e-9) / (1 - 1e-3)
    # E[(3 / t)^2 t^3] = 9 / 2: the standard deviation of the mean is sqrt(3.5 / 40000) = .0094.
    assert abs(sums.mean() - expected) < 4 * 0.0094
    # Each subset S of size k < L is as likely as others of its size.
    for k in (1, 2):
        counts = [np.sum(np.all((weights > 0) == s, axis=1)) for s in _subsets(k)]
        assert max(counts) - min(counts) < 5 * math.sqrt(2 * max(counts))
    # P(k masked) = int C(3, k) t^k (1 - t)^(3 - k) dt = 1 / 4 for each k.
    sizes = np.bincount((weights > 0).sum(1), minlength=4) / rows
    np.testing.assert_allclose(sizes, 0.25, atol=5 * math.sqrt(0.25 * 0.75 / rows) + 1e-3)


def _subsets(k: int) -> list[Any]:
    return [np.isin(np.arange(3), chosen) for chosen in itertools.combinations(range(3), k)]


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"variant": "d3pm"}, "variant"),
        ({"epsilon_time": 0.0}, "epsilon_time"),
        ({"truncate_rate": 1.0}, "truncate_rate"),
        ({"truncate_rate": 0.1, "loss_on": "completion"}, "truncate_rate"),
    ],
    ids=["variant", "epsilon", "rate", "cut completions"],
)
def test_settings_that_cannot_be(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=f"objective.{key} is"):
        MaskedDiffusion(**settings)


def test_rows_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"needs \[MASK\]"):
        MaskedDiffusion().rows(Vocabulary(size=9, eos=3), 8)
    with pytest.raises(UserError, match=r"objective.loss_on is completion"):
        MaskedDiffusion(loss_on="completion").rows(Vocabulary(size=9, mask=3), 8)
    assert MaskedDiffusion().rows(VOCAB, 8).suffix == (3,)
    assert MaskedDiffusion().rows(dataclasses.replace(VOCAB, eos=None), 8).suffix == (5,)


MUTANTS = [
    Mutant(
        "divided by the masked tokens",
        MaskedDiffusion,
        "weights",
        lambda _: lambda self, example: {"nll": jnp.sum(example.weights > 0)},
    ),
    Mutant(
        "ends are never predicted",
        _masked_diffusion,
        "_may_be_masked",
        lambda f: lambda tokens, vocab: f(tokens, vocab) & (tokens != 3),
    ),
    Mutant(
        "no weights",
        noise,
        "diffuse_tokens",
        lambda f: lambda *a, **k: (lambda x: x._replace(weights=jnp.sign(x.weights)))(f(*a, **k)),
    ),
]
CHECKS = [test_weights_and_denominator_of_llada, lambda: test_the_mean_over_noise_is_the_bound_by_enumeration(1.0, 1.0)]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    assert_killed(monkeypatch, mutant, CHECKS)


@pytest.mark.parametrize(
    ("variant", "model", "steps"),
    [
        pytest.param("llada", DECODER, 400, id="llada-decoder"),
        pytest.param("mdlm", DECODER, 400, id="mdlm-decoder", marks=pytest.mark.slow),
        # This encoder learns the language more slowly, under either variant.
        pytest.param("mdlm", ENCODER, 800, id="mdlm-encoder", marks=pytest.mark.slow),
    ],
)
def test_it_learns_twins(variant: Any, model: Any, steps: int) -> None:
    """A masked token is known while its twin is seen. Of the masked tokens, with t even, the share is weighted by t:
    the twin is seen with probability int t (1 - t) / int t = 1/3; the others are a guess of 1/8: accuracy 5/12."""
    language = Twins()
    objective = MaskedDiffusion(variant=variant)
    metrics = learn(objective, model, language.vocab, *language.batches(steps=steps, held_out=64), lr=1e-2)
    assert abs(metrics["accuracy"] - 5 / 12) < 0.04
    # 16 tokens are worth 8 log 8 nats: log 8 / 2 per token. The bound of the best model is tight here: the first of
    # two twins costs log 8 whenever it is unmasked, the second nothing.
    assert math.log(8) / 2 - 0.05 < metrics["nll"] < math.log(8) / 2 + 0.2
