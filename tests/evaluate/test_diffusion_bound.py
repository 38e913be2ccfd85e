"""The bound of masked diffusion against every probability of a language that is small enough to write them down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import enumeration
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import LENGTH, MASK, TEXTS, VOCAB, WORDS, Enumeration
from flax import nnx

from lmobj import losses, noise
from lmobj.errors import UserError
from lmobj.evaluate import ScoredText, _diffusion_bound, diffusion_bounds
from lmobj.objectives import MaskedDiffusion, loss_fn
from tests.mutants import Mutant, assert_killed

LANGUAGE = enumeration.language()
ENTROPY = -np.sum(LANGUAGE * np.log(LANGUAGE))


@pytest.fixture(scope="module")
def stages() -> list[Enumeration]:
    """A model before training, after 60 steps, and after 600."""
    model = enumeration.random_model()
    return [Enumeration.of(each) for each in (model, *enumeration.train(model, 600))]


def rows(prompt: int = 0) -> list[ScoredText]:
    return [ScoredText(text.astype(np.int32), prompt) for text in TEXTS]


def test_probabilities_are_those_of_a_distribution(stages: list[Enumeration]) -> None:
    assert LANGUAGE.sum() == pytest.approx(1, rel=1e-12)
    for each in stages:
        for prompt in range(LENGTH):
            # Texts are in the order of their words, so that those with one prompt stand together.
            together = each.probabilities(prompt).reshape(WORDS**prompt, -1).sum(axis=1)
            np.testing.assert_allclose(together, 1, rtol=1e-12)


def test_the_bound_is_above_the_likelihood_and_tightens_with_training(stages: list[Enumeration]) -> None:
    for prompt in (0, 2):
        for each in stages:
            assert np.all(each.bounds(prompt) > -np.log(each.probabilities(prompt)))
    one = stages[0]
    np.testing.assert_allclose(one.bounds(LENGTH - 1), -np.log(one.probabilities(LENGTH - 1)), rtol=1e-12)
    nll = [float(-LANGUAGE @ np.log(each.probabilities())) for each in stages]
    bound = [float(LANGUAGE @ each.bounds()) for each in stages]
    gap = [high - low for high, low in zip(bound, nll, strict=True)]
    assert ENTROPY < nll[2] < nll[1] < nll[0]
    assert bound[2] < bound[1] < bound[0]
    assert gap[2] < gap[1] < gap[0]
    # The entropy is 2.93 nats. All that is left is a fiftieth of it, and of the gap a tenth.
    assert bound[2] < ENTROPY * 1.02 + 0.02
    assert gap[2] < gap[0] / 10


def test_the_mean_over_time_is_the_mean_over_counts(stages: list[Enumeration]) -> None:
    """int t^(k - 1) (1 - t)^(n - k) dt = (k - 1)! (n - k)! / n! = 1 / (k C(n, k)), of each set: LLaDA, eqs. 4 and 6."""
    for prompt in range(LENGTH):
        expected = stages[0].bounds(prompt)
        np.testing.assert_allclose(stages[0].bounds_over_time(prompt), expected, rtol=1e-12)


@pytest.mark.parametrize("prompt", [0, 2, 3])
def test_estimates_have_the_bound_for_their_mean(prompt: int) -> None:
    """Each of 81 estimates is within 5 of its standard deviations, and their mean error within 4 of its own."""
    model = enumeration.random_model()
    expected = Enumeration.of(model).bounds(prompt)
    found = diffusion_bounds(model, rows(prompt), mask_id=MASK, samples=60)
    if prompt == LENGTH - 1:  # one hidden word: nothing is left to chance
        np.testing.assert_allclose(found.nats, expected, rtol=1e-5)
        np.testing.assert_array_equal(found.errors, 0)
        return
    assert np.all(found.errors > 0)
    z = (found.nats - expected) / found.errors
    assert np.max(np.abs(z)) < 5
    assert abs(np.mean(z)) < 4 / np.sqrt(len(TEXTS))
    # Spread over the copies, counts cost nothing: what is left is less than if they were drawn by themselves.
    assert 0.5 < np.std(z) < 1.1


def test_training_estimates_the_same_bound() -> None:
    """The loss of 400 batches of all texts, for MDLM, which never predicts [MASK] either; low by eps = 0.001."""
    model = enumeration.random_model()
    graph, state = nnx.split(model)
    loss = loss_fn(MaskedDiffusion(variant="mdlm"), {"model": graph}, VOCAB, train=False)
    tokens = jnp.asarray(TEXTS, jnp.int32)
    ones = jnp.ones_like(tokens)
    ids = jnp.stack([ones[:, 0], jnp.arange(len(TEXTS))], 1)
    batch = {"tokens": tokens, "segment_ids": ones, "positions": jnp.cumsum(ones, 1) - 1, "row_ids": ids}
    base = jax.random.key(1, impl="threefry2x32")
    params = {"model": nnx.to_pure_dict(state)}
    each = jax.lax.map(lambda i: loss(params, batch, jax.random.fold_in(base, i))[0], jnp.arange(400))
    found, error = float(np.mean(each)) * LENGTH, float(np.std(each)) * LENGTH / 20
    expected = float(np.mean(Enumeration.of(model).bounds()))
    assert error < 0.01 * expected
    assert abs(found - expected) < 4 * error + 1e-3 * expected


def test_a_row_is_estimated_by_itself_and_the_seed_decides() -> None:
    model = enumeration.random_model()
    draw = np.random.default_rng(0)
    mixed = [
        ScoredText(draw.integers(0, WORDS, n).astype(np.int32), int(draw.integers(0, n))) for n in (4, 7, 2, 8, 1, 5)
    ]
    told: list[int] = []
    found = diffusion_bounds(model, mixed, mask_id=MASK, samples=8, seed=3, done=told.append)
    again = diffusion_bounds(model, mixed[:2], mask_id=MASK, samples=8, seed=3)
    np.testing.assert_allclose(found.nats[:2], again.nats, rtol=1e-5)
    assert told == sorted(told)
    assert told[-1] == len(mixed)
    other = diffusion_bounds(model, mixed[:2], mask_id=MASK, samples=8, seed=4)
    assert np.all(other.nats != again.nats)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_count_of_tokens_is_masked_and_weighs_their_share(count: int) -> None:
    """Of 5 candidates; each of them in count / 5 of the copies."""
    tokens, candidates = jnp.arange(10, 18), jnp.asarray([0, 1, 1, 0, 1, 1, 1, 0], bool)
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), 2000)
    found = jax.vmap(lambda key: noise.diffuse_count(key, tokens, candidates, count, mask_id=3))(keys)
    masked = np.asarray(found.tokens) == 3
    np.testing.assert_array_equal(np.where(masked, 3, tokens), found.tokens)
    np.testing.assert_array_equal(masked.sum(1), count)
    np.testing.assert_array_equal(found.weights, np.where(masked, np.float32(5 / count), 0))
    share = masked.mean(0)
    assert not share[~np.asarray(candidates)].any()
    assert np.max(np.abs(share[np.asarray(candidates)] - count / 5)) <= 5 * np.sqrt(count * (5 - count) / 25 / 2000)


def test_what_cannot_be_estimated_is_refused() -> None:
    model = enumeration.random_model()
    for start in (-1, LENGTH):
        with pytest.raises(UserError, match=f"row 1 has 4 tokens, scored from {start}"):
            diffusion_bounds(model, [rows()[0], ScoredText(TEXTS[0], start)], mask_id=MASK)
    with pytest.raises(UserError, match="samples is 1; accepted: 2 to"):
        diffusion_bounds(model, rows(), mask_id=MASK, samples=1)
    with pytest.raises(UserError, match="max_length is 8 and rows have 9 tokens"):
        diffusion_bounds(model, [ScoredText(np.zeros(9, np.int32), 0)], mask_id=MASK, samples=2)
    with pytest.raises(UserError, match=r"texts without \[MASK\]"):
        diffusion_bounds(model, [ScoredText(np.array([MASK]), 0)], mask_id=MASK)


def _without_exclusion(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *a, **k: original(*a, **{**k, "vocab_mask": None})


MUTANTS = [
    Mutant(
        "weights of one",
        noise,
        "diffuse_count",
        lambda f: lambda *a, **k: (lambda x: x._replace(weights=jnp.sign(x.weights)))(f(*a, **k)),
    ),
    Mutant(
        "a token too many is masked",
        noise,
        "diffuse_count",
        lambda f: lambda key, tokens, ok, count, **k: f(key, tokens, ok, count + 1, **k),
    ),
    Mutant(
        "the prompt is hidden too",
        noise,
        "diffuse_count",
        lambda f: (
            lambda key, tokens, ok, count, **k: f(key, jnp.where(jnp.cumsum(ok) == 0, MASK, tokens), ok, count, **k)
        ),
    ),
    Mutant("[MASK] may be predicted", losses, "linear_token_nll", _without_exclusion),
    Mutant(
        "the right side is hidden",
        _diffusion_bound.masks,
        "bidirectional",
        lambda _: _diffusion_bound.masks.causal,
    ),
    Mutant(
        "all copies have one count",
        _diffusion_bound,
        "_batch",
        lambda f: lambda *a: (lambda x: (*x[:3], 0 * x[3]))(f(*a)),
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    original: Any = _diffusion_bound._estimates
    # A function of its own, so that it is compiled anew: a cached program would not hold the mutant.
    anew = jax.jit(lambda *arguments: original.__wrapped__(*arguments), static_argnums=(0, 7, 8))
    monkeypatch.setattr(_diffusion_bound, "_estimates", anew)
    assert_killed(monkeypatch, mutant, [lambda: test_estimates_have_the_bound_for_their_mean(2)])
