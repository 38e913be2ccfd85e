"""Permutation language modelling: orders by the paper's sets, span sampling by its exact probabilities."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lmobj import masks, noise
from lmobj.errors import UserError

DRAWS = 100_000
SEP, CLS = 1, 2


@functools.cache
def keys_of(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def assert_fits(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Pearson's chi-square test at 0.1%; the seeds are fixed, so the outcome is too. Rare cells are one cell."""
    expected = counts.sum() * np.asarray(probabilities)
    rare = expected < 20
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    assert expected.min() > 5
    assert stats.chisquare(counts, expected).pvalue > 1e-3


# The order


def seen_by_the_rule(order: np.ndarray, is_masked: np.ndarray, functional: np.ndarray, reuse: int) -> np.ndarray:
    """[L, L] which tokens the query at i sees, from the sets of the paper and the special cases of its code.

    Visible tokens (not selected, no separator) are seen by every token of their half and see only one another. The
    others see, besides, those that come before them in the order; a separator sees itself too, a target does not.
    The second half sees the whole first half, the first nothing of the second.
    """
    seen = np.zeros((len(order), len(order)), bool)
    for i, j in itertools.product(range(len(order)), repeat=2):
        first_i, first_j = i < reuse, j < reuse
        if first_i != first_j:
            seen[i, j] = first_j
        elif not (is_masked[j] or functional[j]):
            seen[i, j] = True
        elif is_masked[i] or functional[i]:
            seen[i, j] = order[j] < order[i] or (i == j and functional[i])
    return seen


@functools.partial(jax.jit, static_argnames=("reuse", "perm_size"))
def ranks_of(keys, is_masked, functional, reuse, perm_size):
    ranks = functools.partial(noise.permutation_ranks, reuse=reuse, perm_size=perm_size)
    return jax.vmap(ranks)(keys, is_masked, functional)


def orders_of(keys: jax.Array, length: int, reuse: int, perm_size: int) -> np.ndarray:
    """The order within its half of every token: what the keys' ranks are where every token is selected."""
    every = jnp.ones((len(keys), length), bool)
    order = np.array(ranks_of(keys, every, ~every, reuse, perm_size).key_rank)
    order[:, reuse:] -= reuse + 1
    return order


@pytest.mark.parametrize(
    ("length", "reuse", "perm_size"), [(12, 6, 3), (12, 6, 6), (7, 0, 7), (9, 3, 3), (13, 6, 1), (5, 4, 1)]
)
def test_who_sees_whom_is_the_rule_of_the_paper(length: int, reuse: int, perm_size: int) -> None:
    rng = np.random.default_rng(length)
    rows = 40
    is_masked = rng.random((rows, length)) < rng.random((rows, 1))
    functional = rng.random((rows, length)) < 0.25
    keys = keys_of(rows)
    ranks = ranks_of(keys, jnp.asarray(is_masked), jnp.asarray(functional), reuse, perm_size)
    order = orders_of(keys, length, reuse, perm_size)
    expected = np.stack([seen_by_the_rule(*row, reuse) for row in zip(order, is_masked, functional, strict=True)])
    query = masks.permutation(ranks.query_rank, ranks.key_rank).dense(length, length)[:, 0]
    np.testing.assert_array_equal(query, expected)
    content = masks.permutation(ranks.query_rank, ranks.key_rank, sees_self=True).dense(length, length)[:, 0]
    np.testing.assert_array_equal(content, expected | np.eye(length, dtype=bool))
    np.testing.assert_array_equal(ranks.is_target, is_masked & ~functional)
    assert ranks.query_rank.dtype == ranks.key_rank.dtype == jnp.int32
    # What the objective rests on: no chain of looks leads from a target's query to its own token. The content of a
    # token that the query sees was computed from what that token saw, layer after layer.
    reach = np.asarray(content)
    for _ in range(length):
        reach = (reach.astype(int) @ reach) > 0
    leaks = (np.asarray(query).astype(int) @ reach) > 0
    assert not (leaks & np.eye(length, dtype=bool))[is_masked & ~functional].any()


def test_the_fixture_of_the_authors_code() -> None:
    # Order 2 3 0 1 4, tokens 1 and 2 selected, CLS at 4; one key in 5! = 120 draws this order.
    keys = keys_of(2000)
    order = orders_of(keys, 5, 0, 5)
    chosen = keys[np.flatnonzero((order == [2, 3, 0, 1, 4]).all(axis=1))[:1]]
    is_masked, functional = jnp.array([[0, 1, 1, 0, 0]], bool), jnp.array([[0, 0, 0, 0, 1]], bool)
    ranks = ranks_of(chosen, is_masked, functional, 0, 5)
    seen = masks.permutation(ranks.query_rank, ranks.key_rank).dense(5, 5)[0, 0]
    blocked = ["".join("01"[not one] for one in row) for row in np.asarray(seen)]
    assert blocked == ["01101", "01001", "01101", "01101", "00000"]
    assert ranks.is_target[0].tolist() == [False, True, True, False, False]


def test_every_order_of_a_block_is_equally_likely_and_all_blocks_share_it() -> None:
    order = orders_of(keys_of(DRAWS), 16, 8, 4)
    halves = order.reshape(DRAWS, 2, 2, 4)
    np.testing.assert_array_equal(halves[:, :, 1], halves[:, :, 0] + 4)  # the second block: 4 + the same offsets
    number = {pi: i for i, pi in enumerate(itertools.permutations(range(4)))}
    codes = np.array([number[tuple(pi)] for pi in halves[:, :, 0].reshape(-1, 4).tolist()]).reshape(DRAWS, 2)
    # All 24 x 24 pairs: each half's order is uniform, and independent of the other's.
    assert_fits(np.bincount(codes[:, 0] * 24 + codes[:, 1], minlength=576), np.full(576, 1 / 576))


# The targets


def exact_patterns(starts: tuple[bool, ...], goal: int, max_span: int, alpha: int, beta: int, whole_words: bool):
    """Probability of every set of selected tokens, by following every draw of the procedure."""
    total = len(starts)
    found: dict[tuple[int, ...], float] = defaultdict(float)
    sizes = {n: 1 / n / sum(1 / k for k in range(1, max_span + 1)) for n in range(1, max_span + 1)}

    def fill(selected: frozenset[int], chance: float) -> None:
        rest = [i for i in range(total) if i not in selected]
        subsets = list(itertools.combinations(rest, goal - len(selected)))
        for subset in subsets:
            found[tuple(sorted(selected | set(subset)))] += chance / len(subsets)

    def span(current: int, selected: frozenset[int], chance: float) -> None:
        if current >= total or len(selected) == goal:
            fill(selected, chance)
            return
        for size, probability in sizes.items():
            n = min(size, goal - len(selected))
            context = n * alpha // beta
            for before in range(context):
                here = chance * probability / context
                begin = current + before
                while begin < total and not starts[begin]:
                    begin += 1
                end, words = begin + (not whole_words) * n, 0
                while whole_words and end < total and (words < n or not starts[end]):
                    end += 1
                    words += end < total and starts[end]
                if begin >= total or end >= total:
                    fill(selected, here)
                elif end - begin > goal - len(selected):  # words alone: too many tokens
                    span(end + context - before, selected, here)
                else:
                    span(end + context - before, selected | set(range(begin, end)), here)

    span(0, frozenset(), 1.0)
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    return found


WORDS = (True, False, True, True, False, False, True, False, True, True)


@pytest.mark.parametrize(
    ("starts", "goal", "max_span", "alpha", "beta", "whole_words"),
    [
        ((True,) * 9, 4, 3, 2, 1, False),
        (WORDS, 4, 5, 3, 2, False),
        (WORDS, 4, 3, 1, 1, True),
        ((False, *WORDS[1:]), 3, 5, 2, 1, True),
    ],
    ids=["tokens", "tokens of words", "words", "words after a cut one"],
)
def test_targets_have_the_probabilities_of_the_procedure(starts, goal, max_span, alpha, beta, whole_words) -> None:
    sampler = functools.partial(
        noise.span_targets,
        word_starts=jnp.array(starts),
        length=len(starts),
        num_predictions=goal,
        max_span=max_span,
        mask_alpha=alpha,
        mask_beta=beta,
        whole_words=whole_words,
    )
    selected = np.asarray(jax.jit(jax.vmap(sampler))(keys_of(DRAWS)))
    np.testing.assert_array_equal(selected.sum(axis=1), goal)
    exact = exact_patterns(starts, goal, max_span, alpha, beta, whole_words)
    codes, counts = np.unique(selected @ (1 << np.arange(len(starts))), return_counts=True)
    drawn = dict(zip(codes.tolist(), counts.tolist(), strict=True))
    patterns = {sum(1 << i for i in pattern): chance for pattern, chance in exact.items()}
    assert drawn.keys() <= patterns.keys(), "a set of tokens that the procedure cannot select"
    assert_fits(np.array([drawn.get(code, 0) for code in patterns]), np.array(list(patterns.values())))


def test_lengths_of_spans_are_in_proportion_to_one_over_n() -> None:
    # 5 predictions and their contexts take 35 tokens, so in 40 nothing is left to fill; and a span's context keeps it
    # from the next. So the first run of selected tokens is the first span, whose length no remainder caps.
    sampler = functools.partial(noise.span_targets, word_starts=jnp.ones(40, bool), length=40, num_predictions=5)
    selected = np.asarray(jax.jit(jax.vmap(sampler))(keys_of(DRAWS)))
    begin = np.argmax(selected, axis=1)
    after = np.where(np.arange(40) > begin[:, None], ~selected, False)
    size = np.argmax(after, axis=1) - begin
    share = 1 / np.arange(1, 6)
    assert_fits(np.bincount(size, minlength=6)[1:], share / share.sum())
    assert size.mean() == pytest.approx(300 / 137, abs=0.02)  # 5 / (1 + 1/2 + ... + 1/5); standard error 0.004
    # Of its context of 6 n tokens, 0 .. 6 n - 1 come before it.
    for n in (1, 5):
        assert_fits(np.bincount(begin[size == n], minlength=6 * n), np.full(6 * n, 1 / (6 * n)))


def test_no_more_than_the_row_has_is_selected() -> None:
    sampler = functools.partial(noise.span_targets, word_starts=jnp.ones(40, bool), num_predictions=7)
    lengths = jnp.arange(41)
    selected = np.asarray(jax.jit(jax.vmap(lambda key, n: sampler(key, length=n)))(keys_of(41), lengths))
    np.testing.assert_array_equal(selected.sum(axis=1), np.minimum(7, np.arange(41)))
    for n, row in enumerate(selected):
        assert not row[n:].any()


# Both


def row_of(length: int, reuse: int) -> tuple[np.ndarray, np.ndarray]:
    """reuse | A SEP B SEP CLS of distinct tokens, and which are separators."""
    tokens = np.arange(10, 10 + length)
    tokens[[reuse + (length - reuse) // 2, -2, -1]] = SEP, SEP, CLS
    return tokens, tokens <= CLS


@functools.partial(jax.jit, static_argnames=("reuse", "count", "perm_size"))
def permuted(keys, tokens, functional, starts, length, reuse, count, perm_size):
    def one(key):
        settings = {"length": length, "num_predictions": count, "reuse": reuse, "perm_size": perm_size}
        return noise.permute_tokens(key, tokens, functional, starts, **settings)

    return jax.vmap(one)(keys)


def test_a_row_of_512_predicts_43_and_42() -> None:
    tokens, functional = row_of(512, 256)
    starts = np.random.default_rng(0).random(512) < 0.7
    rows = jax.device_get(permuted(keys_of(300), tokens, functional, starts, 512, 256, 85, 256))
    # Every selected token and separator has a place in the order: 43 in the first half, which has no separators.
    ordered = rows.key_rank >= np.where(np.arange(512) < 256, 0, 257)
    is_masked = ordered & ~functional
    np.testing.assert_array_equal(is_masked[:, :256].sum(axis=1), 43)
    second = is_masked[:, 256:].sum(axis=1)
    assert set(second.tolist()) == {39, 40, 41, 42}  # 42 less the separators among them
    for i in range(300):
        used = 43 + second[i]
        assert rows.weights[i].tolist() == [1.0] * used + [0.0] * (85 - used)
        np.testing.assert_array_equal(rows.positions[i, :used], np.flatnonzero(is_masked[i]))
        np.testing.assert_array_equal(rows.targets[i, :used], tokens[is_masked[i]])
        assert not rows.positions[i, used:].any()
        assert not rows.targets[i, used:].any()
        np.testing.assert_array_equal(rows.prediction_rank[i], rows.query_rank[i, rows.positions[i]])
        # A target sees what comes before its own place; every other token one more.
        np.testing.assert_array_equal(rows.query_rank[i], rows.key_rank[i] + ~is_masked[i])
    assert rows.weights.dtype == np.float32
    assert rows.positions.dtype == np.int32


def test_padding_and_batch_and_x64_change_nothing() -> None:
    tokens, functional = row_of(40, 20)
    padded = np.concatenate([tokens, np.zeros(20, int)]), np.concatenate([functional, np.zeros(20, bool)])
    keys = keys_of(20)
    starts = np.arange(60) % 3 != 1
    # The share of a half that is not full: floor(10 * 20 / 40) = 5 of 15, as 5 of 10 in the short row's second half.
    short = permuted(keys, tokens, functional, starts[:40], 40, 20, 10, 20)
    with jax.enable_x64(True):
        long = permuted(keys, padded[0].astype(np.int32), padded[1], starts, 40, 20, 15, 20)
    np.testing.assert_array_equal(long.weights[:, :10], short.weights)
    np.testing.assert_array_equal(long.positions[:, :10], short.positions)
    assert not np.asarray(long.weights[:, 10:]).any()
    np.testing.assert_array_equal(long.targets[:, :10], short.targets)
    np.testing.assert_array_equal(long.prediction_rank[:, :10], short.prediction_rank)
    np.testing.assert_array_equal(long.query_rank[:, :40], short.query_rank)
    np.testing.assert_array_equal(long.key_rank[:, :40], short.key_rank)
    np.testing.assert_array_equal(long.key_rank[:, 40:], 20)  # padding has the rank of a visible token
    turned = permuted(keys[::-1], tokens, functional, starts[:40], 40, 20, 10, 20)
    for one, other, x64 in zip(short, turned, long, strict=True):
        np.testing.assert_array_equal(one[::-1], other)
        assert one.dtype == x64.dtype


def test_a_half_that_is_not_full_predicts_in_proportion() -> None:
    tokens = np.arange(40)
    for length in (0, 3, 20, 29, 40):
        rows = permuted(keys_of(20), tokens, tokens < 0, tokens >= 0, length, 20, 10, 20)
        first, second = min(length, 20), max(length - 20, 0)
        used, positions = np.asarray(rows.weights) > 0, np.asarray(rows.positions)
        np.testing.assert_array_equal((used & (positions < 20)).sum(axis=1), 5 * first // 20)
        np.testing.assert_array_equal((used & (positions >= 20)).sum(axis=1), 5 * second // 20)
        assert (positions < max(length, 1)).all()


@pytest.mark.parametrize("whole_words", [False, True])
def test_rows_read_from_the_end_place_their_spans_in_reading_order(whole_words: bool) -> None:
    """As the same words in the order of the text; each half, up to where the row ends, is turned for itself."""
    tokens = jnp.arange(10, 50)
    permute = functools.partial(
        noise.permute_tokens, num_predictions=14, reuse=20, perm_size=20, mask_alpha=2, whole_words=whole_words
    )

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, None))
    def targets(key, starts, backward):
        drawn = permute(key, tokens, tokens < 0, starts, length=33, backward=backward)
        return jnp.zeros(40, bool).at[jnp.where(drawn.weights > 0, drawn.positions, 40)].set(True, mode="drop")

    turned = np.concatenate([np.arange(20)[::-1], np.arange(20, 33)[::-1], np.arange(33, 40)])
    starts = np.random.default_rng(0).random(40) < 0.5
    backward, forward = targets(keys_of(50), starts, True), targets(keys_of(50), starts[turned], False)
    np.testing.assert_array_equal(backward, forward[:, turned])
    assert (forward != targets(keys_of(50), starts, False)).any()


def test_halves_draw_for_themselves() -> None:
    tokens = np.arange(40)
    rows = permuted(keys_of(20), tokens, tokens < 0, tokens >= 0, 40, 20, 10, 20)
    first, second = np.split(np.asarray(rows.key_rank), 2, axis=1)
    selected = np.stack([first >= 0, second - 21 >= 0])
    np.testing.assert_array_equal(selected.sum(axis=2), 5)
    patterns = [set(map(bytes, half)) for half in selected]
    assert [len(half) for half in patterns] == [20, 20]
    assert (selected[0] != selected[1]).any(axis=1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((512, 85, 512, 256), "reuse is 512, and rows have 512 tokens; accepted: 0 .one half. to 511"),
        ((512, 85, -1, 256), "reuse is -1"),
        ((512, 85, 256, 100), "perm_size is 100, which does not divide the 256 tokens of the first half .* of 256"),
        ((500, 85, 200, 200), "perm_size is 200, .* 300 tokens of the second half .rows of 500, reuse 200.* of 100"),
        ((512, 85, 0, 100), "perm_size is 100, which does not divide the row of 512 tokens"),
        ((512, 85, 256, 0), "perm_size is 0"),
        ((16, 16, 8, 8), "num_predictions is 16, of which 8 would fall on the 8 tokens of the first .* at most 14"),
        ((16, 0, 8, 8), "num_predictions is 0"),
        ((16, 4, 8, 8, 0), "max_span is 0"),
        ((16, 4, 8, 8, 5, 1, 2), "mask_alpha is 1 and mask_beta is 2"),
        ((16, 4, 8, 8, 5, 1, 0), "mask_alpha is 1 and mask_beta is 0"),
    ],
)
def test_settings_that_no_row_can_have_are_refused(settings: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        noise.check_permutation(*settings)


def test_the_settings_of_the_paper_are_accepted() -> None:
    noise.check_permutation(512, 85, 256, 256)
    noise.check_permutation(16, 14, 8, 8)
