"""Span corruption: every row reassembles, lengths are those of T5's helper, and all placements are equally likely."""

from __future__ import annotations

import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lmobj import noise
from lmobj.errors import UserError
from lmobj.noise._span_corruption import span_counts

FIRST = 9_999
EOS = 1


def keys_of(rows: int, seed: int = 0) -> jax.Array:
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(rows))


def runs(values: np.ndarray) -> list[tuple[bool, int]]:
    return [(bool(value), len(list(run))) for value, run in itertools.groupby(values.tolist())]


def t5_lengths(length: int, density: float, mean: float) -> tuple[int, int]:
    """Inputs and targets of `random_spans_helper`, in Python."""
    noisy = int(round(length * density))  # noqa: RUF046
    spans = int(round(noisy / mean))  # noqa: RUF046
    return length - noisy + spans + 1, noisy + spans + 1


def t5_denoise(tokens: list[int], noisy: list[bool]) -> tuple[list[int], list[int]]:
    """Inputs and targets of a text, token by token: a sentinel where a run to leave out begins."""

    def collapse(hidden: list[bool]) -> list[int]:
        out, number = [], 0
        for i, token in enumerate(tokens):
            if not hidden[i]:
                out.append(token)
            elif i == 0 or not hidden[i - 1]:
                out.append(FIRST - number)
                number += 1
        return [*out, EOS]

    return collapse(noisy), collapse([not x for x in noisy])


@pytest.mark.parametrize(
    ("inputs", "density", "mean", "raw", "targets"),
    [
        # 568 * .15 = 85.2 -> 85 in 28.3 -> 28 spans: 483 + 28 + 1 = 512 and 85 + 28 + 1 = 114
        (512, 0.15, 3, 568, 114),
        # 284 * .15 = 42.6 -> 43, 14.3 -> 14: 241 + 15 = 256 and 43 + 15 = 58
        (256, 0.15, 3, 284, 58),
        # 141 * .15 = 21.15 -> 21, 7: 120 + 8 = 128 and 21 + 8 = 29
        (128, 0.15, 3, 141, 29),
        # 767 has 384 (half to even), 128: 383 + 129 = 512 and 513; one less has 383 and 127.7 -> 128: 512 and 512
        (512, 0.5, 3, 766, 512),
        # UL2's: 588 * .15 = 88.2 -> 88 in 11: 500 + 12 and 88 + 12; 600 * .15 = 90 in 1.4 -> 1: 510 + 2 and 90 + 2
        (512, 0.15, 8, 588, 100),
        (512, 0.15, 64, 600, 92),
    ],
)
def test_lengths_of_the_papers(inputs: int, density: float, mean: float, raw: int, targets: int) -> None:
    assert noise.raw_length_for(inputs, density, mean) == raw
    assert noise.span_corruption_lengths(raw, density, mean) == (inputs, targets)


def test_raw_lengths_are_those_of_t5s_search() -> None:
    compared = 0
    for inputs, density, mean in itertools.product(range(16, 600, 7), (0.15, 0.25, 0.5, 0.62), (2, 3, 4.5, 8, 64)):
        raw = inputs
        while t5_lengths(raw + 1, density, mean)[0] <= inputs:
            raw += 1
        seen, written = t5_lengths(raw, density, mean)
        raw -= density == 0.5 and written > seen
        noisy = round(raw * density)
        if round(noisy / mean) < 1 or round(noisy / mean) > raw - noisy:
            continue  # T5's helper counts no span, or more than can be placed
        assert noise.raw_length_for(inputs, density, mean) == raw
        compared += 1
    assert compared > 1_500


def test_counts_are_exact_and_the_same_traced_and_in_python() -> None:
    """Also where float32 misses a half: float32(0.15) * 190 is 28.500002, and 28.5 rounds to 28."""
    assert float(np.float32(0.15) * np.float32(190)) > 28.5
    lengths = np.arange(2, 4097)
    counts = jax.jit(jax.vmap(functools.partial(span_counts, xp=jnp), (0, None, None)))
    for density, mean in itertools.product((0.01, 0.1, 0.15, 0.25, 0.35, 0.5, 0.9), (1.0, 3.0, 6.0, 8.0, 64.0)):
        traced = counts(jnp.asarray(lengths), jnp.float32(density), jnp.float32(mean))
        noisy, spans = span_counts(lengths, density, mean, np)
        np.testing.assert_array_equal(traced, (noisy, spans))
        exact = Fraction(round(density * 100), 100)
        plain = [min(max(round(length * exact), 1), length - 1) for length in lengths.tolist()]
        np.testing.assert_array_equal(noisy, plain)
        most = np.minimum(noisy, lengths - noisy)
        np.testing.assert_array_equal(spans, np.clip([round(Fraction(n, int(mean))) for n in plain], 1, most))
    assert span_counts(190, 0.15, 3, np)[0] == 28


MAXIMA = ((16, 600), (128, 400), (4096, 24))
"""Longest rows, and how many are drawn; each has a length, a density and a mean span of its own."""
MORE = ((512, 4_000), (4096, 1_000))
every_maximum = pytest.mark.parametrize(
    ("max_length", "rows"), [*MAXIMA, *(pytest.param(*values, marks=pytest.mark.slow) for values in MORE)]
)


@functools.lru_cache
def drawn(max_length: int, kind: str, rows: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """(tokens, lengths, densities, means, noise, inputs, input lengths, targets, target lengths) of many rows."""
    rng = np.random.default_rng([max_length, seed])
    lengths = rng.integers(0, max_length + 1, rows).astype(np.int32)
    lengths[: min(17, rows)] = np.minimum(np.arange(min(17, rows)), max_length)
    densities = np.where(rng.random(rows) < 0.2, 0.9, rng.integers(1, 91, rows) / 100)
    means = np.where(rng.random(rows) < 0.2, 1.0, rng.integers(1, 65, rows))
    tokens = rng.integers(2, 5_000, (rows, max_length)).astype(np.int32)
    room = max_length + 2

    def one(key: jax.Array, row: jax.Array, length: jax.Array, density: jax.Array, mean: jax.Array) -> tuple:
        settings = {"max_length": max_length, "noise_density": density}
        if kind == "spans":
            mask = noise.noise_spans(key, length, mean_span=mean, **settings)
        else:
            mask = noise.noise_tokens_iid(key, length, **settings)
        return mask, *noise.sentinel_inputs_targets(
            row, mask, length, first_sentinel=FIRST, input_room=room, target_room=room, eos=EOS
        )

    args = (keys_of(rows, seed), tokens, lengths, densities.astype(np.float32), means.astype(np.float32))
    return tokens, lengths, densities, means, *(np.asarray(x) for x in jax.jit(jax.vmap(one))(*args))


@pytest.mark.parametrize("kind", ["spans", "iid"])
@every_maximum
def test_every_row_reassembles(max_length: int, rows: int, kind: str) -> None:
    """Over lengths from 0, densities .01 to .9, mean spans 1 to 64: inputs and targets are T5's, and join again."""
    for tokens, length, *_, mask, inputs, seen, targets, written in zip(*drawn(max_length, kind, rows), strict=True):
        assert not mask[length:].any()
        assert not inputs[seen:].any()
        assert not targets[written:].any()
        if length < 2:
            assert seen == written == 0
            continue
        expected = t5_denoise(tokens[:length].tolist(), mask[:length].tolist())
        assert (inputs[:seen].tolist(), targets[:written].tolist()) == expected
        joined = noise.join_spans(inputs[: seen - 1], targets[: written - 1], FIRST, 4_999)
        np.testing.assert_array_equal(joined, tokens[:length])


@every_maximum
def test_spans_are_as_many_and_as_long_as_t5s(max_length: int, rows: int) -> None:
    """Counts by Python's fractions; runs alternate from no noise to noise; lengths are those foretold."""
    for _, length, density, mean, mask, _, seen, _, written in zip(*drawn(max_length, "spans", rows), strict=True):
        if length < 2:
            assert not mask.any()
            continue
        noisy = min(max(round(length * Fraction(round(density * 100), 100)), 1), length - 1)
        spans = min(max(round(Fraction(noisy, int(mean))), 1), noisy, length - noisy)
        assert mask.sum() == noisy
        assert [value for value, _ in runs(mask[:length])] == [False, True] * spans
        assert (seen, written) == noise.span_corruption_lengths(int(length), float(density), float(mean))


def test_independent_noise_has_its_density_and_only_real_tokens() -> None:
    rows, density = 4_000, 0.3
    draw = functools.partial(noise.noise_tokens_iid, max_length=8, noise_density=density)
    mask = np.asarray(jax.jit(jax.vmap(draw, (0, None)))(keys_of(rows, 3), 5))
    assert not mask[:, 5:].any()
    counts = np.bincount(mask[:, :5] @ 2 ** np.arange(5), minlength=32)
    chance = [density ** bin(code).count("1") * (1 - density) ** (5 - bin(code).count("1")) for code in range(32)]
    assert rows * min(chance) > 5
    assert stats.chisquare(counts, rows * np.array(chance)).pvalue > 1e-3


@pytest.mark.parametrize(("length", "density", "mean"), [(9, 0.5, 1.5), (11, 0.45, 2.0), (8, 0.62, 2.5)])
def test_all_divisions_are_equally_likely(length: int, density: float, mean: float) -> None:
    """Against T5's rule by enumeration: the masks of s spans in n tokens that begin without noise and end in it."""
    noisy = round(length * density)
    spans = round(noisy / mean)

    def divisions(items: int) -> list[tuple[int, ...]]:
        cuts = itertools.combinations(range(1, items), spans - 1)
        return [tuple(np.diff([0, *cut, items]).tolist()) for cut in cuts]

    masks = [
        sum(2 ** i for i, value in enumerate(itertools.chain(*([0] * a + [1] * b for a, b in zip(c, n, strict=True))))
            if value)
        for c in divisions(length - noisy)
        for n in divisions(noisy)
    ]  # fmt: skip
    assert len(set(masks)) == len(masks) >= 8
    rows = 40_000
    draw = functools.partial(noise.noise_spans, max_length=12, noise_density=density, mean_span=mean)
    mask = np.asarray(jax.jit(jax.vmap(draw, (0, None)))(keys_of(rows, length), length))
    counts = np.bincount(mask @ 2 ** np.arange(12), minlength=4096)
    assert counts[masks].sum() == rows
    assert stats.chisquare(counts[masks]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("length", "density", "least"),
    # max(1, round((1 - 2 d) (L - 1))): 1; .5 * 8 = 4; .5 * 5 = 2.5 -> 2; -.6 * 4 -> 1; .98 * 1 -> 1
    [(9, 0.5, 1), (9, 0.25, 4), (6, 0.25, 2), (5, 0.8, 1), (2, 0.01, 1)],
)
def test_prefixes_are_uniform(length: int, density: float, least: int) -> None:
    draw = jax.jit(jax.vmap(lambda key, n, d: noise.split_prefix(key, n, noise_density=d), (0, None, None)))
    prefixes = np.asarray(draw(keys_of(8_000, 1), length, jnp.float32(density)))
    counts = np.bincount(prefixes, minlength=length)
    assert counts[:least].sum() == 0
    assert len(counts) == length
    assert length - least == 1 or stats.chisquare(counts[least:]).pvalue > 1e-3


@every_maximum
def test_prefixes_split_rows_in_two(max_length: int, rows: int) -> None:
    """Over lengths from 0 and densities .01 to .9: the prefix and the rest, joined, are the row; a rest without room
    leaves the row out."""
    rng = np.random.default_rng(max_length)
    tokens = rng.integers(2, 5_000, (rows, max_length)).astype(np.int32)
    lengths = rng.integers(0, max_length + 1, rows).astype(np.int32)
    lengths[: min(17, rows)] = np.minimum(np.arange(min(17, rows)), max_length)
    densities = (rng.integers(1, 91, rows) / 100).astype(np.float32)
    target_room = max_length // 2 + 2

    def one(key: jax.Array, row: jax.Array, length: jax.Array, density: jax.Array) -> tuple:
        prefix = noise.split_prefix(key, length, noise_density=density)
        rooms = {"input_room": max_length + 1, "target_room": target_room}
        return prefix, *noise.prefix_inputs_targets(row, prefix, length, eos=EOS, **rooms)

    out = [np.asarray(x) for x in jax.jit(jax.vmap(one))(keys_of(rows), tokens, lengths, densities)]
    left_out = 0
    for row, length, prefix, inputs, seen, targets, written in zip(tokens, lengths, *out, strict=True):
        rest = length - prefix + 1
        if length < 2 or rest > target_room:
            left_out += length >= 2
            assert (seen, written, prefix > 0) == (0, 0, length >= 2)
            continue
        assert 1 <= prefix < length
        assert inputs.tolist() == [*row[:prefix].tolist(), EOS] + [0] * (max_length - prefix)
        assert targets.tolist() == [*row[prefix:length].tolist(), EOS] + [0] * (target_room - rest)
        assert (seen, written) == (prefix + 1, rest)
    assert left_out > 0


def test_rows_that_do_not_fit_are_left_out_whole() -> None:
    # a b [c] d [e f]: inputs a b <0> d <1> are 5, targets <0> c <1> e f are 5, with 2 sentinels each
    tokens, mask = jnp.array([11, 12, 13, 14, 15, 16]), jnp.array([0, 0, 1, 0, 1, 1], bool)
    run = functools.partial(noise.sentinel_inputs_targets, tokens, mask, 6, first_sentinel=99)
    fits = run(input_room=5, target_room=5, eos=None, num_sentinels=2)
    assert fits.inputs.tolist() == [11, 12, 99, 14, 98]
    assert fits.targets.tolist() == [99, 13, 98, 15, 16]
    assert (int(fits.input_length), int(fits.target_length)) == (5, 5)
    for settings in (
        {"input_room": 4, "target_room": 5, "eos": None},
        {"input_room": 5, "target_room": 4, "eos": None},
        {"input_room": 5, "target_room": 6, "eos": EOS},
        {"input_room": 6, "target_room": 5, "eos": EOS},
        {"input_room": 5, "target_room": 5, "eos": None, "num_sentinels": 1},
    ):
        for part in run(**settings):
            assert not np.asarray(part).any()
    # Ending without noise, the targets have one sentinel more than the inputs: a [b] c has <0> b <1>
    last = functools.partial(run.func, tokens, jnp.array([0, 1, 0, 0, 0, 0], bool), 3, first_sentinel=99)
    rooms = {"input_room": 4, "target_room": 4, "eos": EOS}
    assert last(**rooms, num_sentinels=2).targets.tolist() == [99, 12, 98, EOS]
    assert int(last(**rooms, num_sentinels=1).target_length) == 0


def test_padding_batch_and_x64_change_nothing() -> None:
    lengths = jnp.asarray([0, 1, 2, 3, 9, 16, 16], jnp.int32)
    keys = keys_of(7, 5)

    def draw(max_length: int, key: jax.Array, length: jax.Array) -> tuple[jax.Array, ...]:
        spans = noise.noise_spans(key, length, max_length=max_length, noise_density=0.4, mean_span=2.0)
        iid = noise.noise_tokens_iid(key, length, max_length=max_length, noise_density=0.4)
        return spans, iid, noise.split_prefix(key, length)

    short = jax.vmap(functools.partial(draw, 16))(keys, lengths)
    long = jax.vmap(functools.partial(draw, 37))(keys, lengths)
    one = jax.jit(functools.partial(draw, 16))
    alone = [one(key, length) for key, length in zip(keys, lengths, strict=True)]
    with jax.enable_x64(True):
        wide = jax.vmap(functools.partial(draw, 16))(keys, lengths)
    for a, b, c, *single in zip(short, long, wide, *alone, strict=True):
        np.testing.assert_array_equal(a, b if b.ndim == 1 else b[:, :16])
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(a, np.stack(single))


def test_joining_refuses_what_does_not_belong_together() -> None:
    join = functools.partial(noise.join_spans, first_sentinel=99, count=10)
    assert join([1, 99, 2], [99, 7, 8, 98]).tolist() == [1, 7, 8, 2]
    assert join([99, 2], [7, 99]).tolist() == [7, 2]
    assert join([], []).tolist() == []
    with pytest.raises(UserError, match=r"sentinels of the inputs are \[98\]"):
        join([1, 98, 2], [99, 7, 98])
    for inputs, targets in (([1, 99, 2], [99, 7]), ([1, 99], [99, 7, 98, 8]), ([1, 99], [7, 99])):
        with pytest.raises(UserError, match="each run of one must have its sentinel"):
            join(inputs, targets)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise.span_corruption_lengths(1, 0.15, 3), "length is 1; .* at least 2"),
        (lambda: noise.span_corruption_lengths(9, 1.0, 3), r"noise_density is 1\.0"),
        (lambda: noise.raw_length_for(9, 0.0, 3), r"noise_density is 0\.0"),
        (lambda: noise.raw_length_for(9, 0.15, 0.5), r"mean_span is 0\.5"),
        (lambda: noise.raw_length_for(2, 0.15, 3), "length is 2; at least 3"),
        (lambda: noise.noise_spans(jax.random.key(0), 4, max_length=4, noise_density=2, mean_span=1), "density is 2"),
        (lambda: noise.noise_tokens_iid(jax.random.key(0), 4, max_length=4, noise_density=-1), "density is -1"),
        (
            lambda: noise.sentinel_inputs_targets(
                jnp.ones(4, jnp.int32), jnp.ones(4, bool), 4, first_sentinel=3, input_room=4, target_room=4, eos=None,
                num_sentinels=5,
            ),
            "num_sentinels is 5, .* accepted: 1 to 4",
        ),
    ],
    ids=["length", "density", "density_0", "mean", "inputs", "spans", "iid", "sentinels"],
)  # fmt: skip
def test_impossible_settings_are_refused(call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
