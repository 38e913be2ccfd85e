"""Unmasking: the distribution of its texts against enumeration, and its rounds against a slow reference."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import enumeration
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import LENGTH, MASK, TEXTS, WORDS, Enumeration
from flax import nnx
from numpy.typing import NDArray

from lmobj import masks
from lmobj.errors import UserError
from lmobj.evaluate import UnmaskingConfig, _decoding, _unmasking, generate, output_logits, unmask
from tests.mutants import Mutant, assert_killed

FIRST = [0, 2]
"""What the prompts of single tests begin with."""


# --- the distribution ---------------------------------------------------------------------------------------------


def expected_texts(every: Enumeration, settings: UnmaskingConfig) -> NDArray[np.float64]:
    """[T] the probability of each text, by all that may be drawn in each round."""
    numbers = {tuple(text): number for number, text in enumerate(TEXTS.tolist())}

    @functools.cache
    def follows(words: tuple[int, ...], number: int) -> dict[tuple[int, ...], float]:
        if number == len(settings.counts):
            return {words: 1.0}
        hidden = [i for i, word in enumerate(words) if word == MASK]
        shown = sum(1 << i for i, word in enumerate(words) if word != MASK)
        log_q = every.log_q[shown, numbers[tuple(0 if word == MASK else word for word in words)]]
        tempered = np.exp(log_q / settings.temperature)
        tempered /= tempered.sum(-1, keepdims=True)
        found: dict[tuple[int, ...], float] = {}
        for drawn in itertools.product(range(WORDS), repeat=len(hidden)):
            sets = list(itertools.combinations(range(len(hidden)), settings.counts[number]))
            if settings.order == "confidence":
                ranks = sorted(range(len(hidden)), key=lambda j: -log_q[hidden[j], drawn[j]])
                sets = [tuple(ranks[: settings.counts[number]])]
            chance = np.prod([tempered[i, word] for i, word in zip(hidden, drawn, strict=True)]) / len(sets)
            for kept in sets:
                after = list(words)
                for j in kept:
                    after[hidden[j]] = drawn[j]
                for text, p in follows(tuple(after), number + 1).items():
                    found[text] = found.get(text, 0) + chance * p
        return found

    found = follows((MASK,) * LENGTH, 0)
    return np.array([found.get(tuple(text), 0) for text in TEXTS.tolist()])


def drawn_texts(model: nnx.Module, settings: UnmaskingConfig, rows: int = 8_000) -> NDArray[np.int64]:
    """[T] how often each text was written."""
    graph, state = nnx.split(model)
    keys = jax.random.split(jax.random.key(5, impl="threefry2x32"), rows)

    @jax.jit
    def write(state: nnx.State) -> Any:
        empty, none = jnp.zeros((rows, 0), jnp.int32), jnp.zeros(rows, jnp.int32)
        return unmask(nnx.merge(graph, state), empty, none, keys, settings=settings, mask_id=MASK)

    generated = write(state)
    assert generated.tokens.shape == (rows, LENGTH)
    assert np.all(generated.lengths == LENGTH)
    assert np.all(np.asarray(generated.tokens) < WORDS), "no [MASK] is left"
    return np.bincount(np.asarray(generated.tokens) @ WORDS ** np.arange(LENGTH - 1, -1, -1), minlength=len(TEXTS))


def check_distribution(found: NDArray[np.int64], expected: NDArray[np.float64]) -> None:
    """Pearson's statistic, of which texts expected fewer than 5 times are one class, is within 5 deviations."""
    counts = expected * found.sum()
    rare = counts < 5
    counts, found = (np.append(x[~rare], x[rare].sum()) for x in (counts, found))
    statistic = np.sum((found - counts) ** 2 / np.maximum(counts, 1e-9))
    freedom = len(counts) - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_a_token_at_a_time_at_random_draws_from_what_is_bounded() -> None:
    every = Enumeration.of(model := enumeration.random_model())
    settings = UnmaskingConfig(max_new_tokens=LENGTH, order="random")
    expected = expected_texts(every, settings)
    np.testing.assert_allclose(expected, every.probabilities(), rtol=1e-10)
    check_distribution(drawn_texts(model, settings), expected)


@pytest.mark.parametrize(
    "settings",
    [
        UnmaskingConfig(max_new_tokens=LENGTH, steps=3, order="random", temperature=1.5),
        UnmaskingConfig(max_new_tokens=LENGTH, steps=2, temperature=0.7),
    ],
    ids=["random", "confidence"],
)
def test_several_tokens_at_a_time_are_drawn_from_the_same_sight(settings: UnmaskingConfig) -> None:
    every = Enumeration.of(model := enumeration.random_model())
    expected = expected_texts(every, settings)
    assert expected.sum() == pytest.approx(1, rel=1e-10)
    check_distribution(drawn_texts(model, settings), expected)


# --- the rounds ---------------------------------------------------------------------------------------------------


def reference(model: Any, prompt: list[int], settings: UnmaskingConfig) -> tuple[list[int], list[float]]:
    """The likeliest tokens, most confident first, as LLaDA's `generate` goes about it: block by block."""
    new = settings.max_new_tokens
    row, log_probs = np.array([*prompt, *[MASK] * new]), np.zeros(new)
    block = new // settings.blocks
    for start in range(len(prompt), len(row), block):
        for count in settings.counts:
            ones = np.ones((1, len(row)), np.int32)
            hidden = model.hidden(jnp.asarray(row[None]), mask=masks.bidirectional().packed(jnp.asarray(ones)))
            logits = np.asarray(output_logits(model, hidden)[0], np.float64)[:, :MASK]
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            there = [i for i in range(start, start + block) if row[i] == MASK]
            for i in sorted(there, key=lambda i: -log_p[i].max())[:count]:
                row[i], log_probs[i - len(prompt)] = log_p[i].argmax(), log_p[i].max()
    return row[len(prompt) :].tolist(), log_probs.tolist()


@pytest.mark.parametrize(
    "settings",
    [
        UnmaskingConfig(max_new_tokens=6, temperature=0.0, steps=4),
        UnmaskingConfig(max_new_tokens=6, temperature=0.0, steps=4, block_length=3),
    ],
    ids=["all at once", "blocks"],
)
def test_rounds_are_those_of_a_slow_reference(settings: UnmaskingConfig) -> None:
    """Prompts of several lengths in one call, each as if it were alone."""
    model = enumeration.random_model()
    prompts = [FIRST, [1], [2, 1], [0]]
    generated = generate(model, prompts, settings, mask_id=MASK)
    for prompt, tokens, log_probs in zip(prompts, generated.tokens[:, 0], generated.log_probs[:, 0], strict=True):
        expected = reference(model, prompt, settings)
        assert tokens.tolist() == expected[0]
        np.testing.assert_allclose(log_probs, expected[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(generated.scores, generated.log_probs.sum(-1), rtol=1e-6)


def test_blocks_are_written_from_left_to_right() -> None:
    """A block of one token each: from left to right, whatever the order within them is."""
    model = enumeration.random_model()
    settings = [
        UnmaskingConfig(max_new_tokens=6, temperature=0.0, block_length=1, order=order)
        for order in ("confidence", "random")
    ]  # fmt: skip
    first, second = (generate(model, [FIRST], each, mask_id=MASK) for each in settings)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    assert first.tokens[0, 0].tolist() == reference(model, FIRST, settings[0])[0]


class Flat(nnx.Module):
    """A model that finds each of 5 tokens as probable as `logits` say, wherever it is."""

    def __init__(self, logits: list[float]) -> None:
        self.logits = nnx.Param(jnp.asarray(logits))

    def hidden(self, tokens: jax.Array, *, mask: masks.AttentionMask, **_: Any) -> jax.Array:
        assert not mask.causal
        return jnp.broadcast_to(self.logits[...], (*tokens.shape, 5))

    def head_hidden(self, hidden: jax.Array) -> jax.Array:
        return hidden

    def head_table(self) -> Any:
        from lmobj.models import OutputHead

        return OutputHead(jnp.eye(5))


@pytest.mark.parametrize("logits", [[0.0, 0.0, 0.0, 9.0, 0.0], [np.nan] * 5], ids=["likely mask", "not numbers"])
def test_no_mask_is_left_whatever_the_model_says(logits: list[float]) -> None:
    for order in ("confidence", "random"):
        settings = UnmaskingConfig(max_new_tokens=5, steps=2, order=order, num_samples=3)  # type: ignore[arg-type]
        generated = generate(Flat(logits), [[1], [1, 2]], settings, mask_id=MASK)
        assert generated.tokens.shape == (2, 3, 5)
        assert np.all(generated.tokens != MASK)
        assert np.all(generated.lengths == 5)


def test_a_text_ends_where_it_says() -> None:
    """Token 4 half of the time, so that most texts of 8 tokens have one."""
    model, settings = Flat([0.0, -50.0, -50.0, -50.0, 0.0]), UnmaskingConfig(max_new_tokens=8, num_samples=40)
    generated = generate(model, [[1]], settings, eos=4, mask_id=MASK)
    for tokens, log_probs, length in zip(*(x[0] for x in generated[:3]), strict=True):
        if 4 in tokens:
            assert tokens.tolist().index(4) == length - 1
        assert not tokens[length:].any()
        np.testing.assert_allclose(log_probs, np.where(np.arange(8) < length, np.log(0.5), 0), rtol=1e-5)
    assert np.std(generated.lengths) > 0
    whole = generate(model, [[1]], settings, mask_id=MASK)
    assert np.all(whole.lengths == 8)


def test_the_seed_decides_and_neighbours_do_not() -> None:
    model = enumeration.random_model()
    write = functools.partial(generate, model, mask_id=MASK)
    settings = UnmaskingConfig(max_new_tokens=6, num_samples=5)
    drawn = write([FIRST, [1]], settings).tokens
    np.testing.assert_array_equal(drawn, write([FIRST, [1]], settings).tokens)
    np.testing.assert_array_equal(drawn[:1], write([FIRST], settings).tokens)
    other = write([FIRST, [1]], UnmaskingConfig(max_new_tokens=6, num_samples=5, seed=1)).tokens
    assert np.any(drawn != other)
    assert len({tuple(text) for text in drawn[0].tolist()}) > 1


def test_another_seed_compiles_nothing() -> None:
    model = enumeration.random_model()
    generate(model, [FIRST], UnmaskingConfig(max_new_tokens=2), mask_id=MASK)
    compiled = _decoding._unmask._cache_size()  # type: ignore[attr-defined]
    generate(model, [FIRST], UnmaskingConfig(max_new_tokens=2, seed=7), mask_id=MASK)
    assert _decoding._unmask._cache_size() == compiled  # type: ignore[attr-defined]


# --- settings -----------------------------------------------------------------------------------------------------


def test_rounds_share_the_tokens() -> None:
    assert UnmaskingConfig(max_new_tokens=10, steps=4).counts == (3, 3, 2, 2)
    assert UnmaskingConfig(max_new_tokens=3).counts == (1, 1, 1)
    blocks = UnmaskingConfig(max_new_tokens=12, block_length=4, steps=9)
    assert (blocks.blocks, blocks.counts) == (3, (2, 1, 1))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 11}, "steps is 11; accepted: 1 to 10, the number of new tokens[.]"),
        ({"steps": 0}, "steps is 0"),
        ({"block_length": 3}, "block_length is 3; it must divide the 10 new tokens"),
        ({"block_length": 20}, "block_length is 20; it must divide"),
        ({"block_length": 5, "steps": 3}, "steps is 3; accepted: 1 to 10, .*blocks of 5 tokens, a multiple of 2"),
        ({"order": "left"}, "order is 'left'; accepted: confidence, random"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"num_samples": 0}, "num_samples is 0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        UnmaskingConfig(**{"max_new_tokens": 10, **settings})


def test_what_cannot_be_unmasked_is_refused() -> None:
    model = enumeration.random_model()
    with pytest.raises(UserError, match=r"needs a vocabulary with a \[MASK\]"):
        generate(model, [FIRST], UnmaskingConfig(max_new_tokens=2))
    with pytest.raises(UserError, match="max_length is 8 and rows have 9 tokens"):
        generate(model, [FIRST], UnmaskingConfig(max_new_tokens=7), mask_id=MASK)
    with pytest.raises(UserError, match="prompt 0 has ids in 7"):
        generate(model, [[7]], UnmaskingConfig(max_new_tokens=2), mask_id=MASK)


# --- mutants ------------------------------------------------------------------------------------------------------


def _all_at_once(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda values, hidden, count: f(values, hidden, values.shape[1])


MUTANTS = [
    Mutant("all at once", _unmasking, "_first", _all_at_once),
    Mutant("least confident first", _unmasking, "_first", lambda f: lambda values, *a: f(-values, *a)),
    Mutant(
        "shown ones are written again",
        _unmasking,
        "_first",
        lambda f: lambda values, hidden, count: f(values, jnp.ones_like(hidden), count),
    ),
    Mutant("the left side only", _unmasking.masks, "bidirectional", lambda _: masks.causal),
    Mutant("no temperature", _unmasking, "_draw", lambda f: lambda *a: f(*a[:3], 1.0)),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    every = Enumeration.of(model := enumeration.random_model())
    settings = UnmaskingConfig(max_new_tokens=LENGTH, steps=2, temperature=0.7)
    expected = expected_texts(every, settings)
    assert_killed(monkeypatch, mutant, [lambda: check_distribution(drawn_texts(model, settings), expected)])
