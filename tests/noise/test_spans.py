"""Span masking against SpanBERT's sequential procedure: by exact probabilities, draw by draw, and its borders."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lmobj import noise
from lmobj.errors import UserError
from lmobj.noise import _spans
from lmobj.noise._masking import selection_scores
from tests.noise.sequential import span, span_probabilities

MASK = 3
SETTINGS = {"mask_id": MASK, "vocab_size": 100}
ROWS = 100_000


def draw(rows: int, tokens: np.ndarray, starts: np.ndarray, seed: int = 0, **settings) -> noise.MaskedSpans:
    """`rows` copies of a row of one text without special tokens, each with its own key."""
    mask = functools.partial(noise.mask_spans, **{**SETTINGS, **settings})
    every = jnp.ones(len(tokens), bool)
    ones = jnp.ones(len(tokens), jnp.int32)
    run = jax.jit(jax.vmap(lambda key: mask(key, jnp.asarray(tokens), every, jnp.asarray(starts), ones)))
    return jax.device_get(run(jax.random.split(jax.random.key(seed), rows)))


def test_lengths_are_those_of_the_paper() -> None:
    # .2 * .8^(l - 1) / (1 - .8^10), l = 1 .. 10: .2 / .89263 = .2241, then .8 times the one before; mean 3.797.
    shares = np.array([0.2241, 0.1792, 0.1434, 0.1147, 0.0918, 0.0734, 0.0587, 0.0470, 0.0376, 0.0301])
    exact = 0.2 * 0.8 ** np.arange(10) / (1 - 0.8**10)
    np.testing.assert_allclose(exact, shares, atol=5e-5)
    sizes = np.asarray(_spans._draw_sizes(jax.random.uniform(jax.random.key(4), (200_000,)), 0.2, 10))
    counts = np.bincount(sizes, minlength=11)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:], 200_000 * exact).pvalue > 1e-3
    assert abs(sizes.mean() - 3.797) < 4 * 2.6 / np.sqrt(200_000)


def test_every_set_of_tokens_has_its_probability() -> None:
    """Anchors, word starts, retries, overlaps and the cut at the end included: 8 tokens in words of 2, 1, 3, 1, 1."""
    starts = np.array([1, 0, 1, 1, 0, 0, 1, 1], bool)
    masked = draw(ROWS, np.arange(10, 18), starts, num_predictions=4, mask_rate=0.5, span_probability=0.5, max_span=2)
    np.testing.assert_array_equal(masked.weights, 1)
    expected = span_probabilities(starts.tolist(), 4, 0.5, 2)
    assert sum(expected.values()) == pytest.approx(1)
    assert len(expected) > 10
    table = {sum(2**token for token in chosen): chance for chosen, chance in expected.items()}
    counts = np.bincount((2**masked.positions).sum(1), minlength=256)
    assert set(np.flatnonzero(counts).tolist()) <= set(table)
    assert ROWS * min(table.values()) > 5
    assert stats.chisquare(counts[list(table)], ROWS * np.array(list(table.values()))).pvalue > 1e-3


def packed_rows(rows: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(segments, candidates, word starts): two texts that touch, the first with a special token inside; padding."""
    rng = np.random.default_rng(0)
    at = np.arange(length)
    ends = rng.integers(length // 2, length + 1, rows)[:, None]
    cut = rng.integers(4, length // 2, rows)[:, None]
    segments = np.where(at < ends, np.where(at < cut, 1, 2), 0).astype(np.int32)
    candidates = (segments > 0) & (at != cut // 2)
    return segments, candidates, rng.random((rows, length)) < np.linspace(0.1, 1.0, rows)[:, None]


def stretches(segments: np.ndarray, candidates: np.ndarray) -> list[list[int]]:
    """The runs of candidates of one segment."""
    parts = itertools.groupby(range(len(segments)), key=lambda i: (bool(candidates[i]), int(segments[i])))
    return [list(part) for (kept, _), part in parts if kept]


def test_equals_the_procedure_with_the_same_draws_and_borders_those_of_its_runs() -> None:
    """Every field, over rows of two texts: a span stays in its text, and spans of two texts that touch do not merge."""
    rows, L, slots = 80, 48, 20
    segments, candidates, starts = packed_rows(rows, L)
    keys = jax.random.split(jax.random.key(7), rows)
    mask = functools.partial(
        noise.mask_spans, num_predictions=slots, mask_rate=0.4, span_probability=0.1, max_targets=4, **SETTINGS
    )
    tokens = np.arange(100, 100 + L)
    masked = jax.device_get(
        jax.jit(jax.vmap(lambda k, c, s, g: mask(k, jnp.asarray(tokens), c, s, g)))(keys, candidates, starts, segments)
    )
    cut, touching, bounded = 0, 0, 0
    for row in range(rows):
        texts = stretches(segments[row], candidates[row])
        text_of = {token: i for i, text in enumerate(texts) for token in text}
        select_key, size_key, _ = jax.random.split(keys[row], 3)
        scores = np.asarray(selection_scores(select_key, jnp.asarray(candidates[row])))
        sizes = np.asarray(_spans._draw_sizes(jax.random.uniform(size_key, (L,), jnp.float32), 0.1, 10))
        budget = min(slots, int(np.ceil(candidates[row].sum() * 0.4)))
        chosen: set[int] = set()
        for anchor in np.argsort(scores)[: candidates[row].sum()].tolist():
            text = texts[text_of[anchor]]
            held = [i for i, token in enumerate(text) if token in chosen]
            if anchor not in chosen and len(chosen) < budget:
                # In the text alone, with what is chosen there already, until the whole row's budget is spent.
                room = len(held) + budget - len(chosen)
                begins = [True, *starts[row][text[1:]].tolist()]
                own = span(begins, text.index(anchor), int(sizes[anchor]), frozenset(held), room)
                chosen |= {text[i] for i in own}
        used = int(masked.weights[row].sum())
        positions = masked.positions[row][:used].tolist()
        assert positions == sorted(chosen)
        assert used == budget
        for slot, token in enumerate(positions):
            text = texts[text_of[token]]
            first = last = text.index(token)
            while first > 0 and text[first - 1] in chosen:
                first -= 1
            while last + 1 < len(text) and text[last + 1] in chosen:
                last += 1
            offset = text.index(token) - first
            inside = first > 0 and last + 1 < len(text)
            counts = inside and offset < 4
            fields = (masked.left, masked.right, masked.offset, masked.boundary_weights)
            want = (text[first - 1], text[last + 1], offset, 1) if counts else (0, 0, 0, 0)
            assert tuple(int(field[row][slot]) for field in fields) == want
            bounded += counts
            cut += inside and not counts
            touching += token + 1 in chosen and text_of[token + 1] != text_of[token]
        for field in (masked.left, masked.right, masked.offset, masked.boundary_weights):
            np.testing.assert_array_equal(field[row][used:], 0)
    assert min(cut, touching, bounded) > 3  # the rows do exercise these


def test_a_span_is_masked_replaced_or_kept_as_one() -> None:
    # One word of three tokens among single ones: it is masked whole if the anchor is on it (the count is 3). The
    # vocabulary is huge, so that a random token hardly ever is the original or [MASK].
    starts = np.array([1, 1, 1, 0, 0, 1, 1])
    masked = draw(
        260_000, np.full(7, 7), starts, num_predictions=3, mask_rate=0.4, max_span=1, vocab_size=2**30, seed=1
    )
    whole = (masked.positions == [2, 3, 4]).all(1)
    assert whole.sum() > ROWS  # 3 of 7 anchors
    drawn = masked.tokens[whole][:, 2:5]
    kind = np.where(drawn == MASK, 0, np.where(drawn == 7, 1, 2))
    assert (kind == kind[:, :1]).all()
    assert stats.chisquare(np.bincount(kind[:, 0]), len(drawn) * np.array([0.8, 0.1, 0.1])).pvalue > 1e-3
    random = drawn[kind[:, 0] == 2]
    assert (random[:, 0] == random[:, 1]).mean() < 1e-3  # each drawn on its own
    # Two spans of a row are drawn each on its own: tokens 0 and 6 with others between them.
    apart = (masked.positions[:, 0] == 0) & (masked.positions[:, 2] == 6) & (np.abs(masked.positions[:, 1] - 3) < 2)
    ends = masked.tokens[apart][:, [0, 6]]
    kind = np.where(ends == MASK, 0, np.where(ends == 7, 1, 2))
    shares = np.array([0.8, 0.1, 0.1])
    counts = np.bincount(kind @ [3, 1], minlength=9)
    assert stats.chisquare(counts, counts.sum() * np.outer(shares, shares).ravel()).pvalue > 1e-3


def test_random_tokens_of_a_span_are_uniform_and_independent() -> None:
    tokens, starts = np.full(4, 7), np.array([1, 0, 1, 1])
    masked = draw(
        210_000, tokens, starts, num_predictions=2, mask_rate=0.5, max_span=1, vocab_size=8, mask_share=0.0,
        random_share=1.0,
    )  # fmt: skip
    pair = masked.tokens[masked.positions[:, 0] == 0][:, :2]
    pair = pair[(masked.positions[masked.positions[:, 0] == 0][:, 1] == 1)]
    assert len(pair) > 1e5  # half of the anchors
    counts = np.bincount(pair @ [8, 1], minlength=64)
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(
    ("words", "count"),
    # ceil(.15 n): .15 -> 1, .9 -> 1, 1.05 -> 2, 3.0 -> 3, 18.9 -> 19, 19.05 -> 20
    [(1, 1), (6, 1), (7, 2), (20, 3), (126, 19), (127, 20)],
)
def test_the_count_is_the_share_of_ordinary_tokens_rounded_up(words: int, count: int) -> None:
    assert noise.span_budget(words) == count
    mask = functools.partial(noise.mask_spans, num_predictions=20, **SETTINGS)
    candidates = (jnp.arange(130) > 0) & (jnp.arange(130) <= words)
    ones = jnp.ones(130, jnp.int32)
    run = jax.jit(jax.vmap(lambda key, c: mask(key, ones, c, jnp.ones(130, bool), ones).weights.sum(), (0, None)))
    np.testing.assert_array_equal(run(jax.random.split(jax.random.key(0), 4), candidates), count)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"span_probability": 0.0}, r"span_probability is 0\.0"),
        ({"span_probability": 1.0}, r"span_probability is 1\.0"),
        ({"max_span": 0}, "max_span is 0"),
        ({"max_targets": 0}, "max_targets is 0"),
    ],
)
def test_impossible_spans_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        draw(1, np.arange(4), np.ones(4, bool), num_predictions=1, **settings)
