"""Batches: addressed by step, the same however they are read, and exact in every array."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
from batches import SHARES, check_shares, same

from lmobj.batch import RowSpec
from lmobj.data import Dataset
from lmobj.errors import UserError

LAYOUTS = ("packed", "single", "stream", "pairs", "stream_pairs")


def spec_of(layout: str, length: int = 16, **changes: bool) -> RowSpec:
    prefix, suffix, reuse = ((), (5, 4), 5) if layout == "stream_pairs" else ((4,), (5,), 0)
    return RowSpec(
        layout, length, prefix, suffix, ("word_starts", "sentence_ends", "token_bytes"), reuse=reuse, **changes
    )


def check_arrays(dataset: Dataset, batch: dict, spec: RowSpec) -> None:
    """What holds of every batch: types, segments in order, restarting positions, padding, and the asked fields."""
    rows = len(batch["tokens"])
    for name in ("tokens", "segment_ids", "positions", "token_bytes"):
        assert batch[name].shape == (rows, spec.length)
        assert batch[name].dtype == np.int32
    assert batch["row_ids"].shape == (rows, 2)
    assert batch["row_ids"].dtype == np.int32
    for tokens, segments, positions in zip(batch["tokens"], batch["segment_ids"], batch["positions"], strict=True):
        filled = int((segments > 0).sum())
        assert (segments[filled:] == 0).all()  # padding is at the end
        assert (tokens[filled:] == dataset.vocab.pad).all()
        assert (positions[filled:] == 0).all()
        for segment in range(1, segments.max(initial=0) + 1):
            inside = np.flatnonzero(segments == segment)
            assert len(inside) > 0
            assert positions[inside].tolist() == list(range(len(inside)))
    expected = np.where(batch["segment_ids"] > 0, dataset.tokenizer.piece_bytes[batch["tokens"]], 0)
    assert np.array_equal(batch["token_bytes"], expected)
    for name in ("word_starts", "sentence_ends"):
        assert batch[name].shape == (rows, spec.length)
        assert batch[name].dtype == np.bool_


def text_of(dataset: Dataset, batch: dict) -> list[list[int]]:
    """Raw tokens of each segment, special ids taken out, row by row."""
    found = []
    for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
        for segment in range(1, segments.max(initial=0) + 1):
            found.append([t for t in tokens[segments == segment].tolist() if t not in (4, 5)])
    return found


@pytest.mark.parametrize("layout", ["packed", "stream"])
def test_an_epoch_holds_every_token_once(dataset, layout):
    spec = spec_of(layout)
    rows = dataset.rows(spec, seed=3, batch_size=7)
    documents = sorted(document.tolist() for document in dataset.documents("train"))
    for epoch in (0, 1):
        parts = [rows.row(epoch * rows.per_epoch + row) for row in range(rows.per_epoch)]
        for part in parts:
            check_arrays(dataset, part, spec)
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        assert sorted(whole["row_ids"][:, 1]) == list(range(epoch * rows.per_epoch, (epoch + 1) * rows.per_epoch))
        tokens = whole["tokens"][whole["segment_ids"] > 0]
        assert len(tokens) == sum(len(document) + 2 for document in documents)
        counts = np.bincount(tokens, minlength=dataset.vocab.size)
        expected = np.bincount(np.concatenate(documents), minlength=dataset.vocab.size)
        expected[[4, 5]] += len(documents)
        assert np.array_equal(counts, expected)


def test_an_epoch_of_streams_is_the_documents_in_order(dataset):
    rows = dataset.rows(RowSpec("stream", 16, (), (3,)), seed=0, batch_size=4)
    batches = [rows.batch(step) for step in range(rows.per_epoch // 4)]
    stream = [
        t for b in range(4) for batch in batches for t in batch["tokens"][b][batch["segment_ids"][b] > 0].tolist()
    ]
    read: list[list[int]] = [[]]
    for token in stream:  # no document holds the special id 3
        if token == 3:
            read.append([])
        else:
            read[-1].append(token)
    assert read.pop() == []
    assert sorted(read) == sorted(document.tolist() for document in dataset.documents("train"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_depends_on_its_step_alone(dataset, layout):
    spec = spec_of(layout)
    rows = dataset.rows(spec, seed=1, batch_size=6)
    steps = 2 * rows.per_epoch // 6 + 3  # over two borders between epochs
    read = list(dataset.batches(spec, seed=1, batch_size=6, steps=steps))
    assert len(read) == steps
    for step in (0, 1, steps // 2, steps - 1):
        check_arrays(dataset, read[step], spec)
        assert same(read[step], dataset.rows(spec, seed=1, batch_size=6).batch(step))
        assert read[step]["row_ids"].tolist() == [[0, step * 6 + i] for i in range(6)]
    resumed = list(dataset.batches(spec, seed=1, batch_size=6, start=steps - 2, steps=2))
    assert same(resumed[0], read[-2])
    assert same(resumed[1], read[-1])
    border = rows.per_epoch // 6  # this batch takes rows of two epochs, or is the first of an epoch
    for step in (1, border, 2 * rows.per_epoch // 6):
        single = [rows.row(row) for row in range(step * 6, step * 6 + 6)]
        assert same(read[step], {name: np.concatenate([row[name] for row in single]) for name in single[0]})


@pytest.mark.parametrize("layout", ["packed", "single", "pairs"])
def test_seed_and_epoch_change_the_order(dataset, layout):
    spec = spec_of(layout)
    rows, other = (dataset.rows(spec, seed=seed, batch_size=8) for seed in (0, 1))
    first = [rows.row(row)["tokens"] for row in range(20)]
    assert not np.array_equal(first, [other.row(row)["tokens"] for row in range(20)])
    assert not np.array_equal(first, [rows.row(rows.per_epoch + row)["tokens"] for row in range(20)])


def test_neighbours_in_a_batch_are_not_neighbours_in_the_text(dataset):
    rows = dataset.rows(RowSpec("packed", 16), seed=0, batch_size=8)
    texts = ["".join(map(chr, document)) for document in dataset.documents("train")]
    # A row that holds one document is a stretch of it; two such rows in a batch are rarely of the same document.
    owners = []
    for row in range(60):
        batch = rows.row(row)
        if batch["segment_ids"].max() == 1:
            piece = "".join(map(chr, batch["tokens"][0]))
            owners.append(next(index for index, text in enumerate(texts) if piece in text))
    assert len(owners) > 20
    assert np.mean(np.diff(owners) == 0) < 0.2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shares", SHARES)
def test_shares_of_a_batch_together_are_the_batch(dataset, layout, shares):
    check_shares(dataset, spec_of(layout), shares)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_size", [1, 5])
def test_held_out_rows_are_read_once_in_order(dataset, layout, batch_size):
    spec = spec_of(layout)
    rows = dataset.rows(spec, split="validation", batch_size=batch_size)
    batches = list(dataset.batches(spec, split="validation", seed=9, batch_size=batch_size))
    assert len(batches) == rows.steps_per_epoch
    assert all(len(batch["tokens"]) == batch_size for batch in batches)
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    check_arrays(dataset, whole, spec)
    assert whole["row_ids"][:, 1].tolist() == list(range(len(batches) * batch_size))
    assert (whole["segment_ids"][rows.per_epoch :] == 0).all()
    assert len(whole["tokens"]) - rows.per_epoch < batch_size
    if layout in ("packed", "single"):
        pieces = [token for piece in text_of(dataset, whole) for token in piece]
        assert pieces == np.concatenate(list(dataset.documents("validation"))).tolist()
    again = list(dataset.batches(spec, split="validation", seed=0, batch_size=batch_size, steps=10**6))
    assert len(again) == len(batches)
    assert all(same(one, two) for one, two in zip(again, batches, strict=True))
    assert list(dataset.batches(spec, split="validation", batch_size=batch_size, start=len(batches))) == []


def test_pairs_carry_types_and_labels(dataset):
    batch = dataset.rows(spec_of("pairs", 24), seed=0, batch_size=9).batch(2)
    assert set(batch["pair_labels"].tolist()) == {0, 1}
    assert batch["pair_labels"].dtype == batch["token_types"].dtype == np.int32
    for tokens, types, segments in zip(batch["tokens"], batch["token_types"], batch["segment_ids"], strict=True):
        first, second = np.flatnonzero(tokens == 5)
        assert tokens[0] == 4
        assert second == (segments > 0).sum() - 1
        assert types.tolist() == [0] * (first + 1) + [1] * (second - first) + [0] * (len(types) - second - 1)


def test_two_texts_of_a_stream_carry_types_and_labels(dataset):
    rows = dataset.rows(spec_of("stream_pairs", 24, bidirectional=True), seed=0, batch_size=4)
    batches = [rows.batch(step) for step in range(rows.per_epoch // 4)]
    labels = np.concatenate([batch["pair_labels"] for batch in batches])
    assert 0.4 < labels.mean() < 0.6
    for batch in batches[:-8]:  # full rows: 8 steps before the end there are 40 tokens of each stream left
        assert batch["backward"].tolist() == [False, False, True, True]
        assert batch["backward"].dtype == np.bool_
        assert (batch["segment_ids"] == 1).all()
        for tokens, types in zip(batch["tokens"], batch["token_types"], strict=True):
            first, second = np.flatnonzero(tokens == 5)
            assert second == 22
            assert tokens[23] == 4
            assert 6 <= first <= 20
            assert types.tolist() == [0] * (first + 1) + [1] * (22 - first) + [2]
    for batch, following in itertools.pairwise(batches[:-8]):  # A of a row begins as the next row does
        first = (batch["tokens"] == 5).argmax(axis=1)
        for row in range(4):
            common = min(first[row], 10) - 5
            assert batch["tokens"][row, 5 : 5 + common].tolist() == following["tokens"][row, :common].tolist()


@pytest.mark.parametrize("layout", ["stream", "stream_pairs"])
def test_streams_of_both_directions_are_addressed_by_step(dataset, layout):
    spec = spec_of(layout, bidirectional=True)
    check_shares(dataset, spec, SHARES[1])
    for split in ("train", "validation"):
        rows = dataset.rows(spec, split=split, batch_size=6)
        batch = rows.batch(3)
        check_arrays(dataset, batch, spec)
        assert batch["backward"].tolist() == [False] * 3 + [True] * 3
        single = [rows.row(row) for row in range(18, 24)]
        assert same(batch, {name: np.concatenate([row[name] for row in single]) for name in single[0]})
    with pytest.raises(UserError, match=r"gives 5 streams of text, of which half are read backwards"):
        dataset.rows(spec, batch_size=5)


@pytest.mark.parametrize("stored", [False, True])
def test_backward_rows_are_the_text_from_its_end(dataset, monkeypatch, stored):
    # One stream of each direction: the whole text, with the specials between documents.
    spec = RowSpec("stream", 16, (4, 6), (5,), ("word_starts", "token_bytes"), bidirectional=True)
    rows = dataset.rows(spec, seed=2, batch_size=2)
    if stored:  # words found when the text was prepared, here at random
        store = rows._sources[0].epochs.store
        bits = np.random.default_rng(0).integers(0, 256, -(-int(store.lengths.sum()) // 8), np.uint8)
        monkeypatch.setitem(store.__dict__, "_word_bits", bits)
    batches = [rows.batch(step) for step in range(rows.per_epoch // 2)]
    forward, backward = (
        {name: np.concatenate([batch[name][b] for batch in batches]) for name in ("tokens", "segment_ids")}
        | {"word_starts": np.stack([batch["word_starts"][b] for batch in batches])}
        for b in (0, 1)
    )
    total = int((forward["segment_ids"] > 0).sum())
    np.testing.assert_array_equal(backward["tokens"][:total][::-1], forward["tokens"][:total])
    assert not backward["segment_ids"][total:].any()
    # What begins a word of the text does so in either direction, but where a row begins in its text.
    starts, back = forward["word_starts"].reshape(-1)[:total], backward["word_starts"].reshape(-1)[:total][::-1]
    inside = (np.arange(total) % 16 > 0) & ((total - 1 - np.arange(total)) % 16 < 15)
    np.testing.assert_array_equal(back[inside], starts[inside])
    checked = back[inside]
    assert len(checked) > 500
    assert 0.1 < np.mean(checked) < 0.9


@pytest.mark.parametrize("layout", [*LAYOUTS, "examples"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_sentence_ends_follow_their_tokens(dataset, layout, split):
    """Slow reference: each token of each fragment looked up among the sentences of its document."""
    backward = "stream" in layout
    spec = spec_of(layout, 24, bidirectional=backward)
    rows = dataset.rows(spec, split=split, seed=1, batch_size=10)
    store = rows._sources[0].epochs.store
    ends = np.split(store.sentence_ends, np.cumsum(store.sentence_counts)[:-1])
    marked = 0
    for step in (0, 2):
        batch = rows.batch(step)
        at = rows._sources[0].epochs.lookup(np.arange(step * 10, step * 10 + 10))
        expected = np.zeros_like(batch["sentence_ends"])
        for i in range(len(at.row)):
            size = int(at.head_count[i] + at.length[i] + at.tail_count[i])
            columns = list(range(int(at.column[i]), int(at.column[i]) + size))
            if backward and batch["backward"][at.row[i]]:
                columns.reverse()
            for j in range(int(at.length[i])):
                column = columns[int(at.head_count[i]) + j]
                expected[at.row[i], column] = int(at.offset[i]) + j + 1 in ends[int(at.document[i])]
        np.testing.assert_array_equal(batch["sentence_ends"], expected)
        marked += expected.sum()
    assert marked > 10


def test_specials_are_cut_at_row_ends_like_text(dataset):
    # Prefix and suffix of several tokens, rows so short that they are cut: read back, nothing is missing or moved.
    spec = RowSpec("packed", 3, (4, 6), (5, 6, 5))
    rows = dataset.rows(spec, split="validation", batch_size=1)
    stream = [t for row in range(rows.per_epoch) for t in rows.row(row)["tokens"][0].tolist()]
    expected = [t for doc in dataset.documents("validation") for t in (4, 6, *doc.tolist(), 5, 6, 5)]
    assert stream == expected + [0] * (-len(expected) % 3)


def test_closing_an_endless_iterator_stops_its_threads(dataset):
    before = threading.active_count()
    batches = dataset.batches(spec_of("packed"), seed=0, batch_size=2)
    next(batches)
    assert threading.active_count() > before
    batches.close()
    for thread in threading.enumerate():
        if thread.name.startswith("grain"):
            thread.join(10)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch size is 0"),
        (
            {"batch_size": 2, "spec": RowSpec("packed", 8, fields=("labels",))},
            "layout is 'packed'; accepted: the layout",
        ),
        ({"batch_size": 2, "spec": RowSpec("examples", 8, fields=("labels",))}, "the data of data.source do not have"),
        ({"batch_size": 2, "split": "dev"}, "split is 'dev'; accepted: train, validation, test"),
        (
            {"batch_size": 2, "spec": RowSpec("packed", 8, fields=("pos",))},
            "'pos'; accepted: word_starts, sentence_ends, token_bytes, labels",
        ),
        ({"batch_size": 2, "spec": RowSpec("single", 2, (4,), (5,))}, "rows of 2 tokens"),
    ],
)
def test_what_cannot_be_read_is_refused_at_once(dataset, options, message):
    with pytest.raises(UserError, match=message):
        dataset.batches(**{"spec": RowSpec("packed", 8), "seed": 0, **options})
