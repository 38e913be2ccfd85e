"""BART's noise against fairseq's procedure: draw by draw where it loops, by exact probabilities where it draws."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lmobj import noise
from lmobj.errors import UserError
from lmobj.noise import _row_noise
from lmobj.noise._counts import ceil_share
from lmobj.noise._masking import selection_scores

BOS, EOS, MASK, STOP = 1, 2, 3, 4
VOCAB = 2**30


def keys_of(rows: int, seed: int = 0) -> jax.Array:
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(rows))


def texts(rows: int, length: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """(tokens, lengths, word starts): BOS, words of 1 to 4 tokens with full stops among them, EOS, padding."""
    rng = np.random.default_rng([length, seed])
    tokens = np.where(rng.random((rows, length)) < 0.15, STOP, rng.integers(5, 999, (rows, length))).astype(np.int32)
    lengths = rng.integers(0, length + 1, rows).astype(np.int32)
    short = [*range(6), length][: rows - 2]
    lengths[: len(short)] = short
    at = np.arange(length)
    tokens[:, 0] = BOS
    tokens = np.where(at == lengths[:, None] - 1, np.where(at == 0, BOS, EOS), tokens)
    tokens = np.where(at < lengths[:, None], tokens, 0).astype(np.int32)
    return tokens, lengths, rng.random((rows, length)) < np.linspace(0.2, 1.0, rows)[:, None]


def run(
    step, keys: jax.Array, tokens: np.ndarray, lengths: np.ndarray, *marks: np.ndarray, room: int
) -> noise.NoisedRow:
    """`step(key, row, *marks)` over rows that begin as whole texts."""

    def one(key: jax.Array, row: jax.Array, length: jax.Array, *marks: jax.Array) -> noise.NoisedRow:
        return step(key, noise.whole_row(row, length, room=room), *marks)

    return jax.device_get(jax.jit(jax.vmap(one))(keys, tokens, lengths, *marks))


def check_rows(out: noise.NoisedRow, tokens: np.ndarray) -> None:
    """Lengths, padding, and that what has a source is the token from there, which is there once."""
    for row, length, source, text in zip(*out, tokens, strict=True):
        assert not row[length:].any()
        assert (source[length:] == -1).all()
        kept = source[source >= 0]
        assert len(set(kept.tolist())) == len(kept)
        np.testing.assert_array_equal(row[source >= 0], text[kept])
        assert length < 1 or row[0] == BOS
        assert length < 2 or row[length - 1] == EOS


def sentences(text: list[int]) -> tuple[list[list[int]], list[int]]:
    """The places of each sentence by fairseq's rule, and those that it leaves at the end."""
    places = list(range(1, len(text) - 1))
    stops = {i for i in places if text[i] == STOP} | set(places[-1:])
    ends = [i for i in places if i in stops and i - 1 not in stops]
    cuts = [1, *(end + 1 for end in ends)]
    return [list(range(a, b)) for a, b in itertools.pairwise(cuts)], list(range(cuts[-1], len(text) - 1))


@pytest.mark.parametrize(("length", "rows"), [(16, 300), (128, 100), (4096, 8)])
def test_sentences_move_whole(length: int, rows: int) -> None:
    tokens, lengths, _ = texts(rows, length)
    step = functools.partial(noise.permute_sentences, rate=0.6)
    out = run(step, keys_of(rows), tokens, lengths, tokens == STOP, room=length)
    check_rows(out, tokens)
    moved, stayed_at_end = 0, 0
    for row in range(rows):
        text = tokens[row][: lengths[row]].tolist()
        source = out.source[row][: lengths[row]].tolist()
        assert out.length[row] == len(text)
        if len(text) < 3:
            assert source == list(range(len(text)))
            continue
        parts, rest = sentences(text)
        by_start = {part[0]: part for part in parts}
        order, at = [], 1
        while at < len(text) - 1 - len(rest):
            order.append(by_start[source[at]])
            assert source[at : at + len(order[-1])] == order[-1]
            at += len(order[-1])
        assert sorted(order) == parts
        assert source[at:] == [*rest, len(text) - 1]
        changed = sum(a != b for a, b in zip(order, parts, strict=True))
        assert changed <= math.ceil(len(parts) * 6 / 10)
        moved += changed
        stayed_at_end += len(rest) > 0
    assert moved * stayed_at_end > 0


@pytest.mark.parametrize(("rate", "chosen"), [(1.0, 4), (0.5, 2), (0.6, 3)])
def test_orders_of_sentences_have_their_probabilities(rate: float, chosen: int) -> None:
    """4 sentences: a subset of ceil(4 rate), uniformly, in an order, uniformly."""
    rows = 40_000
    text = jnp.array([BOS, 11, STOP, 12, 12, STOP, 13, STOP, 14, EOS], np.int32)
    firsts = np.array([1, 3, 6, 8])
    expected: Counter[tuple[int, ...]] = Counter()
    for subset in itertools.combinations(range(4), chosen):
        for order in itertools.permutations(subset):
            full = list(range(4))
            for place, sentence in zip(subset, order, strict=True):
                full[place] = sentence
            expected[tuple(full)] += 1 / math.comb(4, chosen) / math.factorial(chosen)
    row = noise.whole_row(text, 11, room=11)
    draw = jax.jit(jax.vmap(lambda key: noise.permute_sentences(key, row, text == STOP, rate=rate).source))
    source = np.asarray(draw(keys_of(rows, 1)))
    order = np.searchsorted(firsts, source[np.isin(source, firsts)].reshape(rows, 4))
    seen = Counter(map(tuple, order.tolist()))
    assert set(seen) == set(expected)
    counts = np.array([seen[key] for key in expected])
    assert stats.chisquare(counts, rows * np.array(list(expected.values()))).pvalue > 1e-3


def fairseq_masks(
    text: list[int], starts: list[bool], begins: list[int], sizes: list[int], replace: str
) -> tuple[list[int], list[int]]:
    """What fairseq's loop makes of spans with these first tokens and numbers of words, and the sources: all spans
    grow by a token at a time, the end being the start of a word of endless length."""
    source, out, keep = list(range(len(text))), list(text), [True] * len(text)
    starts = [*starts[:-1], 10**6]

    def hide(i: int, first: bool) -> None:
        if replace == "token" or (first and replace == "span"):
            out[i], source[i] = MASK, -1
        else:
            keep[i] = False

    for i in begins:
        hide(i, True)
    spans = [(i, size - 1) for i, size in zip(begins, sizes, strict=True)]
    while spans:
        spans = [(i, left - int(starts[i + 1])) for i, left in spans]
        spans = [(i + 1, left) for i, left in spans if left >= 0]
        for i, _ in spans:
            hide(i, False)
    return [t for t, k in zip(out, keep, strict=True) if k], [s for s, k in zip(source, keep, strict=True) if k]


def fairseq_inserts(row: list[int], places: list[int]) -> list[int]:
    left = iter(row)
    return [-1 if i in places else next(left) for i in range(len(row) + len(places))]


@pytest.mark.parametrize("replace", ["span", "token", "delete"])
@pytest.mark.parametrize(("length", "rows", "mean"), [(16, 300, 3.0), (128, 60, 0.8), (128, 60, None), (4096, 6, 3.5)])
def test_equals_fairseqs_loop_with_the_same_draws(length: int, rows: int, mean: float | None, replace: str) -> None:
    tokens, lengths, starts = texts(rows, length, 1)
    keys, room, rate = keys_of(rows, 2), 2 * length, 0.3
    settings = {"mask_id": MASK, "vocab_size": VOCAB, "mask_rate": rate, "mean_span": mean, "replace": replace}
    step = functools.partial(noise.infill_spans, **settings)
    out = run(step, keys, tokens, lengths, starts, room=room)
    check_rows(out, tokens)

    @jax.jit
    @jax.vmap
    def draws(key: jax.Array, length: jax.Array, starts: jax.Array, budget: jax.Array, longer: jax.Array) -> tuple:
        start_key, size_key, zero_key, _, _, insert_key = jax.random.split(key, 6)
        at = jnp.arange(room)
        inner = jnp.pad(starts, (0, room - starts.shape[0])) & (at >= 1) & (at < length - 1)
        order = jnp.argsort(selection_scores(start_key, inner))
        place = selection_scores(jax.random.split(insert_key)[0], (at >= 1) & (at < longer - 1))
        sizes = _row_noise._poisson_sizes(size_key, zero_key, budget, mean or 1.0, room)
        return order, *sizes, jnp.argsort(place)

    words = np.array([int(s[1 : max(n - 1, 1)].sum()) for s, n in zip(starts, lengths, strict=True)])
    budgets = np.array([math.ceil(w * 3 / 10) for w in words.tolist()])
    order, sizes, counts, zeros, places = jax.device_get(draws(keys, lengths, starts, budgets, out.length))
    overlaps = 0
    for row in range(rows):
        text, budget = tokens[row][: lengths[row]].tolist(), int(budgets[row])
        count, inserts = (budget, 0) if mean is None else (int(counts[row]), int(zeros[row]))
        own = [1] * count if mean is None else sizes[row][:count].tolist()
        assert sum(own) == budget
        assert budget == 0 or min(own) > 0
        begins = order[row][:count].tolist()
        inner = [0 < i < len(text) - 1 and bool(s) for i, s in enumerate(starts[row][: len(text)])]
        assert all(inner[i] for i in begins)
        assert len(set(begins)) == count
        expected, source = fairseq_masks(text, inner, begins, own, replace) if text else ([], [])
        hidden = {i for i in range(len(text)) if i not in source}
        word = np.cumsum(inner).tolist()
        hidden_words = {word[i] for i in hidden}
        assert len(hidden_words) <= budget
        # Whole words, and all that the spans name, are hidden, and nothing else.
        assert hidden_words == {w for i, size in zip(begins, own, strict=True)
                                for w in range(word[i], min(word[i] + size, sum(inner) + 1))}  # fmt: skip
        assert hidden == {i for i in range(1, len(text) - 1) if word[i] in hidden_words}
        overlaps += len(hidden_words) < budget
        at = places[row][:inserts].tolist()
        assert out.length[row] == len(expected) + inserts
        got = out.source[row][: out.length[row]].tolist()
        assert got == fairseq_inserts(source, at)
        masked = [MASK if i < 0 else i for i in fairseq_inserts(expected, at)]
        assert out.tokens[row][: out.length[row]].tolist() == masked
    assert mean is None or overlaps > 0


SPANS = ((1.0, "span"), (3.0, "delete"), (16.0, "token"), (None, "span"))


@pytest.mark.parametrize(("mean", "replace"), SPANS)
@pytest.mark.parametrize(("length", "rows"), [(16, 400), (128, 100), pytest.param(4096, 400, marks=pytest.mark.slow)])
def test_every_text_can_be_put_together_again(length: int, rows: int, mean: float | None, replace: str) -> None:
    """Over rates .01 to .9: what is seen is the text's, once, and what is not are whole words, at most the budget."""
    tokens, lengths, starts = texts(rows, length, 5)
    percents = np.random.default_rng(length).integers(1, 91, rows)
    rates = (percents / 100).astype(np.float32)

    def one(key: jax.Array, row: noise.NoisedRow, starts: jax.Array, rate: jax.Array) -> noise.NoisedRow:
        settings = {"mask_id": MASK, "vocab_size": VOCAB, "mean_span": mean, "replace": replace}
        infill_key, rotate_key = jax.random.split(key)
        return noise.rotate_row(rotate_key, noise.infill_spans(infill_key, row, starts, mask_rate=rate, **settings))

    out = run(one, keys_of(rows, 9), tokens, lengths, starts, rates, room=length + 8)
    check_rows(out, tokens)
    exact = 0
    for row in range(rows):
        inner = np.arange(1, max(lengths[row] - 1, 1))
        word, seen = np.cumsum(starts[row][inner]), np.isin(inner, out.source[row])
        hidden = set(word[~seen].tolist())
        assert not hidden & {*word[seen].tolist(), 0}
        budget = -(-int(starts[row][inner].sum()) * int(percents[row]) // 100)
        assert min(budget, 1) <= len(hidden) <= budget
        exact += len(hidden) == budget
        filled = out.tokens[row][: out.length[row]][out.source[row][: out.length[row]] < 0]
        assert (filled == MASK).all()
    assert exact == rows if mean is None else exact > 0


def test_lengths_are_those_of_drawing_until_the_budget_is_met() -> None:
    """By enumeration of Poisson(1.2) lengths one after another: what is above 0, cut at 3, and how many are 0."""
    mean, budget, rows = 1.2, 3, 60_000
    chances = [math.exp(-mean) * mean**k / math.factorial(k) for k in range(40)]
    listed = _row_noise._poisson_chances(mean)
    np.testing.assert_allclose(listed, chances[: len(listed)])
    assert chances[len(listed) - 1] < 1e-7 <= chances[len(listed) - 2]
    expected: Counter[tuple[tuple[int, ...], int]] = Counter()
    left = [((), 0, 1.0)]
    while left:
        sizes, zeros, chance = left.pop()
        room = budget - sum(sizes)
        if room == 0 or chance < 1e-9:
            expected[sizes, min(zeros, 6)] += chance
            continue
        left.append((sizes, zeros + 1, chance * chances[0]))
        left += [((*sizes, k), zeros, chance * chances[k]) for k in range(1, room)]
        left.append(((*sizes, room), zeros, chance * (1 - sum(chances[:room]))))
    draw = functools.partial(_row_noise._poisson_sizes, budget=jnp.int32(budget), mean=mean, room=8)
    sizes, counts, zeros = jax.device_get(jax.jit(jax.vmap(lambda key: draw(*jax.random.split(key))))(keys_of(rows, 6)))
    seen = Counter((tuple(s[:c].tolist()), min(int(z), 6)) for s, c, z in zip(sizes, counts, zeros, strict=True))
    likely = [outcome for outcome, chance in expected.items() if rows * chance > 5]
    assert len(likely) > 20
    observed = [seen[outcome] for outcome in likely]
    shares = [expected[outcome] for outcome in likely]
    assert rows - sum(observed) < 40  # the rest
    assert stats.chisquare(observed, np.array(shares) * sum(observed) / sum(shares)).pvalue > 1e-3


def test_spans_have_random_tokens_at_their_share() -> None:
    # Each token a word, spans of one word, all masked: each is random by itself with chance .3, from 1 .. 6.
    rows, text = 20_000, jnp.array([BOS, 9, 9, EOS], jnp.int32)
    step = functools.partial(
        noise.infill_spans, word_starts=jnp.ones(4, bool), mask_id=99, vocab_size=7, mask_rate=1.0, mean_span=None,
        random_share=0.3,
    )  # fmt: skip
    draw = jax.jit(jax.vmap(lambda key: step(key, noise.whole_row(text, 4, room=4)).tokens))
    inner = np.asarray(draw(keys_of(rows, 7)))[:, 1:3]
    values = np.array([99, 1, 2, 3, 4, 5, 6])
    codes = np.searchsorted(np.array([1, 2, 3, 4, 5, 6, 99]), inner)
    assert np.isin(inner, values).all()
    share = np.array([0.05] * 6 + [0.7])
    counts = np.bincount(codes @ [7, 1], minlength=49)
    assert stats.chisquare(counts, rows * np.outer(share, share).ravel()).pvalue > 1e-3
    # With "token", the tokens of a span are random together, each another.
    whole = functools.partial(
        noise.infill_spans, word_starts=jnp.array([0, 1, 0, 0], bool), mask_id=99, vocab_size=VOCAB, mask_rate=1.0,
        mean_span=None, random_share=0.3, replace="token",
    )  # fmt: skip
    draw = jax.jit(jax.vmap(lambda key: whole(key, noise.whole_row(text, 4, room=4)).tokens))
    inner = np.asarray(draw(keys_of(rows, 8)))[:, 1:3]
    random = inner != 99
    assert (random[:, 0] == random[:, 1]).all()
    assert abs(random[:, 0].mean() - 0.3) < 4 * math.sqrt(0.21 / rows)
    assert (inner[random[:, 0], 0] == inner[random[:, 0], 1]).mean() < 1e-3


def test_insertions_are_anywhere_inside_and_some_are_random() -> None:
    """2 masks and 1 random token (ceil(.3 * 3) = 1) among 2 tokens: C(5, 3) sets of places, any of the 3 random."""
    rows, text = 30_000, jnp.array([BOS, 11, 12, EOS], jnp.int32)
    step = functools.partial(noise.insert_tokens, mask_id=99, vocab_size=7, random_share=0.3)
    draw = jax.jit(jax.vmap(lambda key, room_count: step(key, noise.whole_row(text, 4, room=8), room_count), (0, None)))
    out = jax.device_get(draw(keys_of(rows, 3), 3))
    assert (out.length == 7).all()
    np.testing.assert_array_equal(out.tokens[:, [0, 6, 7]], np.tile([BOS, EOS, 0], (rows, 1)))
    kind = np.where(out.source[:, 1:6] >= 0, 0, np.where(out.tokens[:, 1:6] == 99, 1, 2))
    kept = out.tokens[:, 1:6][kind == 0].reshape(rows, 2)
    np.testing.assert_array_equal(kept, np.tile([11, 12], (rows, 1)))
    codes = kind @ 3 ** np.arange(5)
    values, counts = np.unique(codes, return_counts=True)
    assert len(values) == 30
    assert stats.chisquare(counts).pvalue > 1e-3
    random = out.tokens[:, 1:6][kind == 2]
    assert len(random) == rows
    assert stats.chisquare(np.bincount(random, minlength=7)[1:]).pvalue > 1e-3
    assert (jax.device_get(draw(keys_of(4), 9)).length == 8).all()  # no room for more


def test_rotations_are_uniform() -> None:
    """BOS t[k:-1] t[1:k] EOS for k = 1 .. n - 1; at rate .4 a row stays at .6 more."""
    rows, text = 20_000, jnp.array([BOS, 11, 12, 13, 14, EOS, 0], jnp.int32)

    def one(key: jax.Array, length: jax.Array, rate: jax.Array) -> noise.NoisedRow:
        return noise.rotate_row(key, noise.whole_row(text, length, room=7), rate=rate)

    draw = jax.jit(jax.vmap(one, (0, None, None)))
    for rate in (1.0, 0.4):
        out = jax.device_get(draw(keys_of(rows, 4), 6, jnp.float32(rate)))
        expected: Counter[tuple[int, ...]] = Counter({(0, 1, 2, 3, 4, 5): 1 - rate})
        for k in range(1, 6):
            expected[0, *range(k, 5), *range(1, k), 5] += rate / 5
        seen = Counter(map(tuple, out.source[:, :6].tolist()))
        assert set(seen) == set(expected)
        counts = np.array([seen[key] for key in expected])
        assert stats.chisquare(counts, rows * np.array(list(expected.values()))).pvalue > 1e-3
        check_rows(out, np.tile(np.asarray(text), (rows, 1)))
    for short in range(4):
        source = jax.device_get(draw(keys_of(3), short, jnp.float32(1))).source
        np.testing.assert_array_equal(source[:, :short], np.tile(np.arange(short), (3, 1)))


def all_steps(key: jax.Array, row: noise.NoisedRow, ends: jax.Array, starts: jax.Array) -> noise.NoisedRow:
    keys = jax.random.split(key, 3)
    row = noise.permute_sentences(keys[0], row, ends)
    row = noise.infill_spans(keys[1], row, starts, mask_id=MASK, vocab_size=VOCAB, random_share=0.1)
    return noise.rotate_row(keys[2], row, rate=jnp.float32(0.5))


def test_padding_room_batch_and_x64_change_nothing() -> None:
    tokens, lengths, starts = texts(24, 20, 3)
    marks = (tokens == STOP, starts)
    plain = run(all_steps, keys_of(24), tokens, lengths, *marks, room=30)
    check_rows(plain, tokens)
    wide_tokens, *wide_marks = (np.pad(x, ((0, 0), (0, 7))) for x in (tokens, *marks))
    padded = run(all_steps, keys_of(24), wide_tokens, lengths, *wide_marks, room=41)
    with jax.enable_x64(True):
        x64 = run(all_steps, keys_of(24), tokens, lengths, *marks, room=30)
    one = jax.jit(lambda key, t, n, e, s: all_steps(key, noise.whole_row(t, n, room=30), e, s))
    alone = [one(*args) for args in zip(keys_of(24), tokens, lengths, *marks, strict=True)]
    for a, b, c, *single in zip(plain, padded, x64, *alone, strict=True):
        np.testing.assert_array_equal(a, b[:, :30] if b.ndim > 1 else b)
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(a, np.stack(single))
        assert a.dtype == c.dtype


@pytest.mark.parametrize(
    ("count", "rate", "share"),
    [(10, 0.3, 3), (30, 0.1, 3), (7, 0.3, 3), (0, 0.3, 0), (9, 1e-5, 1), (100, 0.15, 15), (4, 1.0, 4), (5, 0.0, 0)],
)
def test_budgets_are_exact(count: int, rate: float, share: int) -> None:
    # float32(.3) * 10 and float32(.1) * 30 are at or just above 3; 2.1 -> 3
    assert int(ceil_share(jnp.int32(count), rate)) == share
    assert int(ceil_share(jnp.int32(count), jnp.float32(rate))) == share


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_rate": 1.5}, r"mask_rate is 1\.5"),
        ({"random_share": -0.1}, r"random_share is -0\.1"),
        ({"mean_span": 0.0}, r"mean_span is 0\.0"),
        ({"mean_span": 17.0}, r"mean_span is 17\.0; .* at most 16"),
        ({"vocab_size": 1}, "vocab_size is 1"),
        ({"replace": "word"}, "replace is 'word'"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, message: str) -> None:
    row = noise.whole_row(jnp.ones(4, jnp.int32), 4, room=4)
    with pytest.raises(UserError, match=message):
        noise.infill_spans(
            jax.random.key(0), row, jnp.ones(4, bool), **{"mask_id": MASK, "vocab_size": VOCAB, **settings}
        )


def test_other_impossible_settings_are_refused() -> None:
    row, key = noise.whole_row(jnp.ones(4, jnp.int32), 4, room=4), jax.random.key(0)
    with pytest.raises(UserError, match="room is 3, and rows have 4"):
        noise.whole_row(jnp.ones(4, jnp.int32), 4, room=3)
    for step in (noise.rotate_row, functools.partial(noise.permute_sentences, sentence_ends=jnp.ones(4, bool))):
        with pytest.raises(UserError, match="rate is 2"):
            step(key, row, rate=2)
