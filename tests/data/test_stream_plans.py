"""Streams against the text they read: on and on without gap or repeat, forwards and backwards, and what A and B are."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lmobj.batch import RowSpec
from lmobj.data._plan import Fragments, PackedPlan, epoch_key, permutation
from lmobj.data._sentences import Sentences
from lmobj.data._stream_plan import StreamPairsPlan, StreamPlan, reads_backward
from lmobj.errors import UserError

documents_of = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=6)
"""Documents as the lengths of their sentences."""
KEY, ORDER = 0xFEED, 5


def render(at: Fragments, backward: np.ndarray, spec: RowSpec) -> list[list[object]]:
    """Rows as lists of (document, token index) or of specials "p0", "s1" ..., without the padding at the end."""
    table: list[dict[int, object]] = [{} for _ in backward]
    for fragment in zip(*map(np.ndarray.tolist, at), strict=True):
        row, column, document, offset, length, hf, hc, tf, tc, *_ = fragment
        cells: list[object] = [f"p{hf + i}" for i in range(hc)]
        cells += [(document, offset + i) for i in range(length)]
        cells += [f"s{tf + i}" for i in range(tc)]
        for i, cell in enumerate(reversed(cells) if backward[row] else cells):
            assert column + i not in table[row]
            table[row][column + i] = cell
    for row in table:
        assert sorted(row) == list(range(len(row))), "padding that is not at the end"
        assert len(row) <= spec.length
    return [[row[i] for i in range(len(row))] for row in table]


def text_of(documents: list[list[int]], spec: RowSpec) -> list[object]:
    """The documents of the epoch end to end, in its order."""
    text: list[object] = []
    for document in permutation(len(documents), ORDER).tolist():
        text += [f"p{i}" for i in range(len(spec.prefix))]
        text += [(document, i) for i in range(sum(documents[document]))]
        text += [f"s{i}" for i in range(len(spec.suffix))]
    return text


def lengths_of(documents: list[list[int]]) -> np.ndarray:
    return np.array([sum(document) for document in documents], np.int32)


def check_parts(streams: list[list[object]], text: list[object], bidirectional: bool) -> None:
    """The first half of the streams read the text, the others each the part of its partner from its end."""
    forward = streams[: len(streams) // 2] if bidirectional else streams
    assert list(itertools.chain.from_iterable(forward)) == text
    if bidirectional:
        assert [part[::-1] for part in forward] == streams[len(streams) // 2 :]


@given(documents_of, st.integers(1, 9), st.integers(1, 3), st.booleans(), st.sampled_from([(), (7, 8)]))
def test_streams_read_the_text_on_and_on(documents, length, parts, bidirectional, suffix):
    spec = RowSpec("stream", length, (6,), suffix, bidirectional=bidirectional)
    streams = parts * (2 if bidirectional else 1)
    plan = StreamPlan(PackedPlan(lengths_of(documents), spec, ORDER), spec, streams)
    rows = np.arange(plan.rows)
    backward = reads_backward(rows, spec, streams)
    assert backward.tolist() == [bidirectional and row % streams >= parts for row in rows.tolist()]
    at = plan.lookup(rows)
    table = render(at, backward, spec)
    read = [list(itertools.chain.from_iterable(table[b::streams])) for b in range(streams)]
    check_parts(read, text_of(documents, spec), bidirectional)
    assert plan.rows // streams == -(-len(text_of(documents, spec)) // (length * parts))
    for row in rows:  # segments count from 1 in reading order, each a document's; full rows come before others
        here = at.row == row
        assert at.segment[here].tolist() == list(range(1, here.sum() + 1))
        assert (np.diff(at.column[here]) > 0).all()
    for b in range(streams):
        sizes = [len(row) for row in table[b::streams]]
        assert all(one == length or not any(rest) for one, *rest in (sizes[i:] for i in range(len(sizes))))


def pairs_plan(documents: list[list[int]], spec: RowSpec, streams: int, key: int = KEY) -> StreamPairsPlan:
    ends = np.concatenate([np.cumsum(document) for document in documents]).astype(np.int32)
    sentences = Sentences(ends, np.array([len(document) for document in documents]))
    return StreamPairsPlan(lengths_of(documents), sentences, spec, streams, ORDER, key)


def sentence_borders(documents: list[list[int]], prefix: int) -> set[int]:
    """The places of the text after a sentence."""
    borders, start = set(), 0
    for document in permutation(len(documents), ORDER).tolist():
        start += prefix
        for sentence in documents[document]:
            start += sentence
            borders.add(start)
    return borders


@given(documents_of, st.integers(6, 24), st.data(), st.integers(1, 3), st.booleans(), st.sampled_from([(), (9,)]))
def test_rows_of_two_texts(documents, length, data, parts, bidirectional, prefix):
    reuse = data.draw(st.integers(1, length - 5), label="reuse")
    spec = RowSpec("stream_pairs", length, prefix, (5, 4), reuse=reuse, bidirectional=bidirectional)
    streams = parts * (2 if bidirectional else 1)
    plan = pairs_plan(documents, spec, streams)
    rows = np.arange(plan.rows)
    backward = reads_backward(rows, spec, streams)
    at = plan.lookup(rows)
    table = render(at, backward, spec)
    text = text_of(documents, dataclasses.replace(spec, suffix=()))
    borders = sentence_borders(documents, len(prefix))
    # The reuse parts of a stream's rows are its part of the text, whatever the rows hold besides.
    read = [list(itertools.chain.from_iterable(row[:reuse] for row in table[b::streams])) for b in range(streams)]
    check_parts(read, text, bidirectional)
    assert (at.segment == 1).all()
    np.testing.assert_array_equal(at.position, at.column)
    for row in rows.tolist():
        here = at.row == row
        # In the row's own direction: the text, the borders of sentences in it, and where its reuse part begins.
        way = text[::-1] if backward[row] else text
        ends = {len(text) - border for border in borders} | {len(text)} if backward[row] else borders
        stream, step = row % streams, row // streams
        part = len(read[stream])
        own = min(max(part - step * reuse, 0), reuse)
        before = sum(map(len, read[: stream % parts]))
        start = len(text) - before - part if backward[row] else before
        start += step * reuse
        left = len(text) - start - own
        if own < reuse or left < 2:
            assert table[row] == way[start : start + own]
            assert not at.token_type[here].any()
            assert not at.pair_label[here].any()
            continue
        size = min(left, length - reuse - 3)
        assert len(table[row]) == reuse + size + 3
        sep = table[row].index("s0")
        a, b = table[row][reuse:sep], table[row][sep + 1 : -2]
        assert table[row][-2:] == ["s0", "s1"]
        assert len(a) >= 1
        assert len(b) >= 1
        begin, border = start + reuse, start + sep
        assert a == way[begin:border]
        inside = [end for end in ends if begin < end < begin + size]
        assert border in inside or not inside
        label = set(at.pair_label[here].tolist())
        if label == {0}:
            assert b == way[border : border + len(b)]
        else:
            assert label == {1}
            starts = {0} | ends
            assert any(b == way[i : i + len(b)] for i in starts if i + len(b) <= len(text))
        columns = sorted(zip(at.column[here].tolist(), at.token_type[here].tolist(), strict=True))
        for column, token_type in columns:
            assert token_type == (column > sep) + (column == len(table[row]) - 1)


SENTENCES = [[4] * 25] * 20
"""2000 tokens in sentences of 4."""


@pytest.mark.parametrize("bidirectional", [False, True])
def test_borders_labels_and_places_are_drawn_evenly(bidirectional):
    # Rows of 4 reused tokens and 20 of A and B begin at sentence borders: A ends after 1 to 4 sentences, evenly, but
    # never after 5, which would leave no B.
    spec = RowSpec("stream_pairs", 27, (), (5, 4), reuse=4, bidirectional=bidirectional)
    streams = 2
    draws = []
    for epoch in range(110 if bidirectional else 220):
        plan = pairs_plan(SENTENCES, spec, streams, epoch_key("", 0, epoch, "pairs"))
        at = plan.lookup(np.arange(plan.rows))
        type_b = at.token_type == 1
        full = np.bincount(at.row, weights=at.length + at.tail_count) == 27
        sep = at.column[(at.tail_count == 1) & (at.token_type == 0)]
        label = np.zeros(plan.rows, int)
        label[at.row[type_b]] = at.pair_label[type_b]
        first_b = np.flatnonzero(type_b & (at.length > 0) & (np.append(0, np.diff(at.token_type)) == 1))
        begin = np.full(plan.rows, -1)
        order = permutation(len(SENTENCES), ORDER)
        at_document = np.argsort(order)[at.document[first_b]] * 100 + at.offset[first_b]
        backward = reads_backward(at.row[first_b], spec, streams)
        begin[at.row[first_b]] = np.where(backward, at_document + at.length[first_b], at_document)
        size_a = np.full(plan.rows, -1)
        size_a[at.row[(at.tail_count == 1) & (at.token_type == 0)]] = sep - 4
        draws.append(np.stack([size_a, label, begin, np.arange(plan.rows) % 2])[:, full])
    size_a, label, begin, stream = np.concatenate(draws, axis=1)
    assert len(label) > 100_000
    # Length of A and label: 4 x 2 cells, evenly and independently.
    cells = np.bincount((size_a // 4 - 1) * 2 + label, minlength=8)
    assert set(size_a.tolist()) == {4, 8, 12, 16}
    assert stats.chisquare(cells).pvalue > 1e-3
    # B elsewhere begins at the sentence of an even place that leaves room for it: of 20 - |A| = 16 tokens at 0, 4, ...,
    # 1984, the last from one place of 1985, the others from 4.
    here = (label == 1) & (size_a == 4) & (stream == 0)
    expected = np.append(np.full(496, 4), 1) / 1985
    counts = np.bincount(begin[here] // 4, minlength=497)
    assert not (begin[here] % 4).any()
    assert stats.chisquare(counts[:-1], expected[:-1] / expected[:-1].sum() * counts[:-1].sum()).pvalue > 1e-3
    if bidirectional:  # mirrored: 2000, 1996, ... 16
        back = (label == 1) & (size_a == 4) & (stream == 1)
        counts = np.bincount((2000 - begin[back]) // 4, minlength=497)
        assert not (begin[back] % 4).any()
        assert stats.chisquare(counts[:-1], expected[:-1] / expected[:-1].sum() * counts[:-1].sum()).pvalue > 1e-3


def test_any_row_can_be_read_first_and_the_key_decides_the_draws():
    spec = RowSpec("stream_pairs", 20, (9,), (5, 4), reuse=6, bidirectional=True)
    plan, other = pairs_plan(SENTENCES, spec, 4), pairs_plan(SENTENCES, spec, 4, KEY + 1)
    rows = np.arange(plan.rows)
    backward = reads_backward(rows, spec, 4)
    table, changed = render(plan.lookup(rows), backward, spec), render(other.lookup(rows), backward, spec)
    mixed = np.random.default_rng(0).permutation(plan.rows)[:40]
    assert render(plan.lookup(mixed), backward[mixed], spec) == [table[row] for row in mixed]
    assert [row[:6] for row in table] == [row[:6] for row in changed]
    assert np.mean([one != two for one, two in zip(table, changed, strict=True)]) > 0.5
    assert render(plan.lookup(np.array([plan.rows + 4])), backward[:1], spec) == [[]]


@pytest.mark.parametrize(
    ("changes", "streams", "message"),
    [
        ({"reuse": 0}, 2, "reuse is 0, and data.length gives rows of 12 tokens.* at most data.length - 5 = 7"),
        ({"reuse": 8}, 2, "reuse is 8, .* = 7"),
        ({"bidirectional": True}, 3, "gives 3 streams of text, of which half are read backwards; accepted: an even"),
        ({"bidirectional": True}, 1, "gives 1 stream of text"),
    ],
)
def test_rows_and_streams_that_cannot_be_are_refused(changes, streams, message):
    spec = RowSpec("stream_pairs", **{"length": 12, "suffix": (5, 4), "reuse": 4} | changes)
    with pytest.raises(UserError, match=message):
        pairs_plan(SENTENCES, spec, streams)


def test_a_row_of_two_texts_takes_two_special_tokens():
    with pytest.raises(ValueError, match="takes the ids"):
        pairs_plan(SENTENCES, RowSpec("stream_pairs", 12, (), (5,), reuse=4), 2)


def test_the_smallest_row_holds_a_token_of_each_text():
    spec = RowSpec("stream_pairs", 6, (), (5, 4), reuse=1)
    table = render(pairs_plan([[3]], spec, 1).lookup(np.arange(3)), np.zeros(3, bool), spec)
    assert table[0][0] == (0, 0)
    assert table[0][1:3] == [(0, 1), "s0"]
    assert table[0][4:] == ["s0", "s1"]
    assert table[1:] == [[(0, 1)], [(0, 2)]]
