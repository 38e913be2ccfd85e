"""Fill in the middle: both orders by hand, every document restored, cuts by enumeration, nothing cut off."""

from __future__ import annotations

import functools
import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lmobj import noise
from lmobj.errors import UserError

PRE, SUF, MID, BOS, EOS = 1, 2, 3, 4, 5
MARKERS = {"prefix_id": PRE, "suffix_id": SUF, "middle_id": MID}


def keys_of(rows: int, seed: int = 0) -> jax.Array:
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(rows))


def run(keys: jax.Array, tokens: np.ndarray, segments: np.ndarray, **settings) -> noise.FilledInMiddle:
    one = functools.partial(noise.fill_in_middle, **MARKERS, **settings)
    return jax.device_get(jax.jit(jax.vmap(one))(keys, jnp.asarray(tokens), jnp.asarray(segments)))


def packed(rows: int, length: int, seed: int, longest: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of documents of 1 token to `longest`, by default a quarter of the row, some with BOS, some with EOS, some
    with both alone; padded, or empty."""
    longest = longest or max(2, length // 4)
    rng = np.random.default_rng(seed)
    tokens, segments = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
        at, end, number = 0, 0 if row == 0 else int(rng.integers(1, length + 1)), 0
        while at < end:
            size, number = (
                min(int(rng.integers(1, longest or max(2, length // 4))), end - at),
                number + int(rng.integers(1, 3)),
            )
            document = rng.integers(6, 99, size)
            if rng.random() < 0.6:
                document[0] = BOS
            if rng.random() < 0.6:
                document[-1] = EOS
            tokens[row, at : at + size], segments[row, at : at + size] = document, number
            at += size
    return tokens, segments


def documents(tokens: np.ndarray, segments: np.ndarray) -> list[tuple[int, list[int]]]:
    parts = itertools.groupby(zip(segments.tolist(), tokens.tolist(), strict=True), key=lambda pair: pair[0])
    return [(segment, [token for _, token in part]) for segment, part in parts if segment]


@pytest.mark.parametrize(
    ("length", "most", "rows", "longest"),
    [
        (16, 1, 400, None),
        (16, 3, 400, None),
        (128, 7, 200, None),
        (4096, 4, 12, None),
        (4096, 8, 12, 6_000),
        pytest.param(4096, 8, 1_000, 6_000, marks=pytest.mark.slow),
        pytest.param(512, 9, 4_000, 300, marks=pytest.mark.slow),
    ],
)
def test_every_document_is_restored(length: int, most: int, rows: int, longest: int | None) -> None:
    tokens, segments = packed(rows, length, length, longest)
    settings = {"max_documents": most, "fim_rate": 0.7, "spm_rate": 0.4, "bos": BOS, "eos": EOS}
    out = run(keys_of(rows, most), tokens, segments, **settings)
    assert out.tokens.shape == (rows, length + 3 * most)
    kinds: Counter[str] = Counter()
    for row in range(rows):
        before, after = documents(tokens[row], segments[row]), documents(out.tokens[row], out.segment_ids[row])
        assert [segment for segment, _ in after] == [segment for segment, _ in before]
        used = sum(len(document) for _, document in after)
        assert (out.source[row][used:] == -1).all()
        for field in (out.tokens, out.segment_ids, out.is_moved, out.is_middle, out.positions):
            assert not field[row][used:].any()
        assert out.positions[row][:used].tolist() == [i for _, document in after for i in range(len(document))]
        # What is no marker says where it was, and everything is there once.
        source = out.source[row][:used]
        np.testing.assert_array_equal(source < 0, np.isin(out.tokens[row][:used], (PRE, SUF, MID)))
        kept = source >= 0
        np.testing.assert_array_equal(out.tokens[row][:used][kept], tokens[row][source[kept]])
        assert sorted(source[kept].tolist()) == np.flatnonzero(segments[row]).tolist()
        at, begin, moved = 0, 0, 0
        for (_, old), (_, new) in zip(before, after, strict=True):
            assert noise.join_middle(new, **MARKERS, eos=EOS).tolist() == old
            middle = out.is_middle[row][at : at + len(new)]
            assert (out.is_moved[row][at : at + len(new)] == (PRE in new)).all()
            if PRE in new:
                moved += 1
                assert new[0] == (BOS if old[0] == BOS else PRE)
                assert len(old) == 1 or (new[-1] == EOS) == (old[-1] == EOS)
                # The middle goes from some place after MID to the end, before EOS; its source is one run.
                body = np.flatnonzero(middle)
                end = len(new) - (new[-1] == EOS)
                assert body.tolist() == list(range(end - len(body), end))
                assert not len(body) or new.index(MID) < body[0]
                assert (np.diff(out.source[row][at : at + len(new)][body]) == 1).all()
                psm = new.index(SUF) > new.index(PRE) + 1
                between = end - len(body) - new.index(MID) - 1  # SPM's prefix
                kinds["psm" if psm else "spm" if between else "either"] += 1
                assert not (psm and between)
                prefix = source[at + new.index(PRE) + 1 : at + new.index(SUF)] if psm else source[
                    at + new.index(MID) + 1 : at + new.index(MID) + 1 + between]  # fmt: skip
                assert prefix.tolist() == list(range(begin + (old[0] == BOS), begin + (old[0] == BOS) + len(prefix)))
            else:
                assert new == old
                assert not middle.any()
            at, begin = at + len(new), begin + len(old)
        assert used == begin + 3 * moved
        assert moved <= most
        kinds["full"] += moved == most
    rare = 1 if length > 128 else kinds["either"] * kinds["full"]
    assert kinds["psm"] * kinds["spm"] * rare > 0


def test_orders_and_cuts_have_their_probabilities() -> None:
    """By enumeration, for a b c after BOS and before EOS: cuts are a pair of U{0 .. 3}, orders PSM 2/3 and SPM 1/3."""
    rows = 60_000
    tokens = np.tile(np.array([BOS, 11, 12, 13, EOS, 0], np.int32), (rows, 1))
    segments = np.tile(np.array([7] * 5 + [0], np.int32), (rows, 1))
    settings = {"max_documents": 1, "bos": BOS, "eos": EOS, "fim_rate": 0.75, "spm_rate": 1 / 3}
    out = run(keys_of(rows, 4), tokens, segments, **settings)
    expected: Counter[tuple] = Counter({((BOS, 11, 12, 13, EOS, 0, 0, 0, 0), (0,) * 9): 0.25})
    text = (11, 12, 13)
    for cuts in itertools.product(range(4), repeat=2):
        a, b = sorted(cuts)
        p, m, s = text[:a], text[a:b], text[b:]
        is_middle = (*[0] * (7 - len(m)), *[1] * len(m), 0, 0)
        expected[(BOS, PRE, *p, SUF, *s, MID, *m, EOS, 0), is_middle] += 0.75 * 2 / 3 / 16
        expected[(BOS, PRE, SUF, *s, MID, *p, *m, EOS, 0), is_middle] += 0.75 * 1 / 3 / 16
    assert sum(expected.values()) == pytest.approx(1)
    seen = Counter(
        (tuple(row), tuple(middle))
        for row, middle in zip(out.tokens.tolist(), out.is_middle.astype(int).tolist(), strict=True)
    )
    assert set(seen) == set(expected)
    assert rows * min(expected.values()) > 5
    counts = np.array([seen[outcome] for outcome in expected])
    assert stats.chisquare(counts, rows * np.array(list(expected.values()))).pvalue > 1e-3


def test_documents_of_a_row_are_drawn_each_on_its_own() -> None:
    rows = 20_000
    tokens, segments = np.full((rows, 4), 9, np.int32), np.tile(np.array([1, 1, 2, 2], np.int32), (rows, 1))
    out = run(keys_of(rows, 5), tokens, segments, max_documents=2, fim_rate=0.5, spm_rate=0.5)
    # By document: left alone (1/2), or one of 3 x 3 pairs of cuts; told apart by where SUF and the middle are.
    codes = np.zeros((rows, 2), int)
    for segment in (1, 2):
        inside = out.segment_ids == segment
        moved = ((out.tokens == PRE) & inside).any(1)
        middle = (out.is_middle & inside).sum(1)
        codes[:, segment - 1] = np.where(moved, 1 + middle, 0)
    # The middle of 2 tokens has 0, 1, 2 tokens with 3, 4 and 2 of 9 pairs of cuts.
    share = np.array([1 / 2, 3 / 18, 4 / 18, 2 / 18])
    counts = np.bincount(codes @ [4, 1], minlength=16)
    assert stats.chisquare(counts, rows * np.outer(share, share).ravel()).pvalue > 1e-3


def test_what_is_too_many_stays_and_the_first_come_first() -> None:
    tokens = np.arange(10, 22, dtype=np.int32)[None]
    segments = np.repeat([1, 2, 3, 4], 3).astype(np.int32)[None]
    for most in range(6):
        moved = min(most, 4)
        out = run(keys_of(1, 2), tokens, segments, max_documents=most, fim_rate=1.0)
        found = [PRE in document for _, document in documents(out.tokens[0], out.segment_ids[0])]
        assert found == [True] * moved + [False] * (4 - moved)
    none = run(keys_of(1, 2), tokens, segments, max_documents=4, fim_rate=0.0)
    np.testing.assert_array_equal(none.tokens[0][:12], tokens[0])


def test_padding_batch_traced_rates_and_x64_change_nothing() -> None:
    tokens, segments = packed(12, 20, 9)
    wide_tokens, wide_segments = (np.pad(x, ((0, 0), (0, 9))) for x in (tokens, segments))
    short = run(keys_of(12), tokens, segments, max_documents=3, bos=BOS)
    long = run(keys_of(12), wide_tokens, wide_segments, max_documents=3, bos=BOS)
    one = jax.jit(functools.partial(noise.fill_in_middle, **MARKERS, max_documents=3, bos=BOS))
    half = jnp.float32(0.5)
    alone = [one(k, t, s, fim_rate=half, spm_rate=half) for k, t, s in zip(keys_of(12), tokens, segments, strict=True)]
    with jax.enable_x64(True):
        wide = run(keys_of(12), tokens, segments, max_documents=3, bos=BOS)
    for name, a, b, c, *single in zip(short._fields, short, long, wide, *alone, strict=True):
        np.testing.assert_array_equal(np.pad(a, ((0, 0), (0, 9)), constant_values=-(name == "source")), b)
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(a, np.stack(single))
        assert a.dtype == c.dtype


def test_impossible_settings_are_refused() -> None:
    ones = np.ones((1, 4), np.int32)
    for settings, message in (
        ({"max_documents": -1}, "max_documents is -1; accepted: 0 or more"),
        ({"max_documents": 1, "fim_rate": 1.5}, r"fim_rate is 1\.5"),
        ({"max_documents": 1, "spm_rate": -0.5}, r"spm_rate is -0\.5"),
    ):
        with pytest.raises(UserError, match=message):
            run(keys_of(1), ones, ones, **settings)
    with pytest.raises(UserError, match="three different tokens"):
        noise.fill_in_middle(
            jax.random.key(0), ones[0], ones[0], max_documents=1, prefix_id=1, suffix_id=1, middle_id=2
        )
    with pytest.raises(UserError, match=r"markers of the document are \[1, 3\]"):
        noise.join_middle([PRE, 9, MID], **MARKERS)
