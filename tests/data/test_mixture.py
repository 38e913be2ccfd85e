"""Mixtures: shares exact in every period and even in between, and every source read as if it were alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from batches import SHARES, check_shares, same
from data_corpus import generated_documents, small_config, write_blocks
from hypothesis import given
from hypothesis import strategies as st

from lmobj._shares import share_out
from lmobj.batch import RowSpec
from lmobj.data import Dataset, MixtureSource, TextFiles, WeightedSource, prepare
from lmobj.data._mixture import InOrder, Mixture
from lmobj.data._stream_plan import STREAM_LAYOUTS
from lmobj.errors import UserError

WEIGHTS = {"books": 1.0, "news": 2.5, "wiki": 4.0}
LAYOUTS = ("packed", "single", "stream", "pairs", "examples", "stream_pairs")
weights_of = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)


def spec_of(layout: str) -> RowSpec:
    suffix, reuse = ((5, 6), 4) if layout == "stream_pairs" else ((5,), 0)
    return RowSpec(layout, 16, (4,), suffix, ("word_starts", "token_bytes"), reuse=reuse)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three prepared sources of different sizes with one tokenizer."""
    folder = tmp_path_factory.mktemp("mixture")
    files = {
        name: write_blocks(folder / f"{name}.txt", generated_documents(count, seed))
        for seed, (name, count) in enumerate({"wiki": 40, "books": 90, "news": 60}.items())
    }
    sources = {
        name: WeightedSource(WEIGHTS[name], TextFiles(files=(str(path),), documents="blocks"))
        for name, path in files.items()
    }
    dataset = prepare(small_config(folder, folder, source=MixtureSource(sources=sources)), quiet=True)
    found = {name: source._folder for name, source in dataset._sources.items()}
    assert dataset.fingerprint == mixture_of(found).fingerprint
    return found


def mixture_of(folders: dict[str, Path]) -> Dataset:
    return Dataset(folders, {name: WEIGHTS[name] for name in folders})


@pytest.mark.parametrize(
    ("weights", "slots", "expected"),
    [
        ((3, 1), 8, [6, 2]),
        ((1, 1, 1), 4, [2, 1, 1]),  # 4/3 each; what is over goes to the first of equals
        ((5, 3, 2), 7, [4, 2, 1]),  # 3.5, 2.1, 1.4: the one that is over goes to the largest rest
        ((1e-9, 1, 1), 5, [1, 2, 2]),  # at least one, and the others share the remaining four
        ((1, 1, 18), 4, [1, 1, 2]),
        ((7,), 3, [3]),
    ],
)
def test_shares_by_hand(weights, slots, expected):
    assert share_out(weights, slots) == expected


@given(weights_of, st.integers(6, 300))
def test_shares_are_in_proportion(weights, slots):
    shares = share_out(weights, slots)
    exact = np.array(weights) / sum(weights) * slots
    assert sum(shares) == slots
    assert min(shares) >= 1
    if exact.min() >= 1:
        assert np.abs(shares - exact).max() < 1


@given(weights_of, st.integers(6, 300))
def test_sources_are_evenly_spread(weights, period):
    table = Mixture.of(weights, period)
    counts = np.array(share_out(weights, period))
    given_ = np.cumsum(table.source[:, None] == np.arange(len(weights)), axis=0)
    gap = given_ - np.arange(1, period + 1)[:, None] * counts / period
    # Tijdeman's bound; a window is the difference of two beginnings, so it is off by less than 2, however long.
    assert np.abs(gap).max() <= (1 - 1 / (2 * len(weights) - 2) if len(weights) > 1 else 0) + 1e-9
    # Random access is counting.
    rows = np.arange(2 * period + 5)
    seen = np.zeros(len(weights), int)
    expected = []
    for row in rows:
        source = table.source[row % period]
        expected.append((source, seen[source]))
        seen[source] += 1
    assert list(zip(*table.locate(rows), strict=True)) == expected
    assert np.concatenate([table.locate(rows[[row]]) for row in rows], axis=1).T.tolist() == [list(e) for e in expected]


def test_held_out_sources_come_one_after_the_other():
    source, row = InOrder([2, 3]).locate(np.arange(7))
    assert source.tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert row.tolist() == [0, 1, 0, 1, 2, 3, 4]  # past the end of the last: empty rows


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_mixture_of_one_is_the_source_alone(folders, layout, split):
    alone, one = Dataset(folders["wiki"]), mixture_of({"wiki": folders["wiki"]})
    assert one.fingerprint == alone.fingerprint
    steps = 2 * alone.rows(spec_of(layout), split=split, batch_size=8).steps_per_epoch + 2
    read = [list(data.batches(spec_of(layout), split=split, batch_size=8, steps=steps)) for data in (one, alone)]
    assert all(same(*pair) for pair in zip(*read, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_source_is_read_as_if_alone(folders, layout):
    """Row n of a source is the same in the mixture, epoch after epoch, and its noise is addressed by the source."""
    spec, size = spec_of(layout), 15
    counts = share_out([WEIGHTS[name] for name in sorted(folders)], size)
    assert counts == [2, 5, 8]
    steps = 2 * Dataset(folders["wiki"]).rows(spec, batch_size=8).per_epoch // 8 + 3
    batches = list(mixture_of(folders).batches(spec, seed=7, batch_size=size, steps=steps))
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    for number, name in enumerate(sorted(folders)):
        here = np.flatnonzero(whole["row_ids"][:, 0] == number)
        assert whole["row_ids"][here, 1].tolist() == list(range(len(here)))
        share = len(whole["tokens"]) * WEIGHTS[name] / sum(WEIGHTS.values())
        assert abs(len(here) - share) < (steps if layout in STREAM_LAYOUTS else 1.1)
        alone = Dataset(folders[name]).rows(spec, seed=7, batch_size=counts[number])
        for index in range(0, len(here), 11):
            row = alone.row(index)
            row["row_ids"] = np.array([[number, index]])
            assert same(row, {key: array[here[[index]]] for key, array in whole.items()})
    if layout in STREAM_LAYOUTS:
        places = whole["row_ids"][:, 0].reshape(steps, size)
        assert (places == places[0]).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_held_out_rows_are_those_of_every_source(folders, layout):
    spec = spec_of(layout)
    batches = list(mixture_of(folders).batches(spec, split="validation", batch_size=4))
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    at = 0
    for number, name in enumerate(sorted(folders)):
        alone = Dataset(folders[name]).rows(spec, split="validation", batch_size=4)
        for index in range(alone.per_epoch):
            row = alone.row(index) | {"row_ids": np.array([[number, index]])}
            assert same(row, {key: array[[at]] for key, array in whole.items()})
            at += 1
    assert len(whole["tokens"]) - at < 4
    assert not whole["segment_ids"][at:].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("shares", SHARES[1:])
def test_shares_of_a_mixed_batch_together_are_the_batch(folders, layout, split, shares):
    check_shares(mixture_of(folders), spec_of(layout), shares, split)


def test_a_mixture_is_named_by_its_sources_and_weights(folders):
    weights = dict(WEIGHTS)
    fingerprint = Dataset(folders, weights).fingerprint
    assert Dataset(dict(reversed(folders.items())), weights).fingerprint == fingerprint  # not by their order in a file
    assert Dataset(folders, weights | {"news": 2.0}).fingerprint != fingerprint
    swapped = folders | {"wiki": folders["news"], "news": folders["wiki"]}
    assert Dataset(swapped, weights).fingerprint != fingerprint


def test_the_summary_adds_up(folders):
    summary = mixture_of(folders).summary()
    assert list(summary["sources"]) == ["books", "news", "wiki"]
    for split in ("train", "validation", "test"):
        for count in ("documents", "tokens", "bytes"):
            alone = [Dataset(path).summary()["splits"][split][count] for path in folders.values()]
            assert summary["splits"][split][count] == sum(alone)
    assert sum(summary["splits"][split]["documents"] for split in summary["splits"]) == 40 + 90 + 60
    assert summary["sources"]["wiki"]["weight"] == 4.0
    assert len(list(mixture_of(folders).documents("train"))) == summary["splits"]["train"]["documents"]


def test_fewer_streams_than_sources_are_refused(folders):
    with pytest.raises(
        UserError, match=r"batch_size is 2, but data.source.sources has 3 sources \(books, news, wiki\)"
    ):
        mixture_of(folders).rows(spec_of("stream"), batch_size=2)


def test_labels_must_be_in_every_source(folders):
    spec = RowSpec("examples", 16, fields=("labels",))
    with pytest.raises(UserError, match=r"data.source.sources.books.source.label: COLUMN and .label_kind: class"):
        mixture_of(folders).rows(spec, batch_size=2)


def test_rows_outside_the_batch_are_refused(folders):
    with pytest.raises(ValueError, match="outside the batch of 4"):
        mixture_of(folders).batches(spec_of("packed"), batch_size=4, local=[3, 4])
