"""Row plans against slow references: every token once, in the right place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmobj.batch import RowSpec
from lmobj.data._pairs_plan import PairsPlan
from lmobj.data._plan import (
    Fragments,
    PackedPlan,
    SinglePlan,
    epoch_key,
    permutation,
    shuffle_rows,
)
from lmobj.data._sentences import Sentences
from lmobj.data._stream_plan import StreamPlan
from lmobj.errors import UserError

lengths_of = st.lists(st.integers(1, 40), min_size=1, max_size=12)
specials = st.sampled_from([(), (7,), (7, 8)])


def render(fragments: Fragments, rows: int, spec: RowSpec) -> list[list[object]]:
    """Rows as lists of (document, token index) or of specials "p0", "s1" ...; None where nothing stands."""
    table: list[list[object]] = [[None] * spec.length for _ in range(rows)]
    for row, column, document, offset, length, hf, hc, tf, tc, *_ in zip(
        *map(np.ndarray.tolist, fragments), strict=True
    ):
        cells = [f"p{hf + i}" for i in range(hc)]
        cells += [(document, offset + i) for i in range(length)]
        cells += [f"s{tf + i}" for i in range(tc)]
        for i, cell in enumerate(cells):
            assert table[row][column + i] is None
            table[row][column + i] = cell
    return table


def end_to_end(order: list[int], lengths: list[int], spec: RowSpec) -> list[object]:
    """The documents in this order with their special tokens, as one list."""
    stream: list[object] = []
    for document in order:
        stream += [f"p{i}" for i in range(len(spec.prefix))]
        stream += [(document, i) for i in range(lengths[document])]
        stream += [f"s{i}" for i in range(len(spec.suffix))]
    return stream


@given(lengths_of, st.integers(1, 17), specials, specials, st.none() | st.integers(0, 2**64 - 1))
def test_packed_rows_are_the_documents_end_to_end(lengths, length, prefix, suffix, key):
    spec = RowSpec("packed", length, prefix, suffix)
    plan = PackedPlan(np.array(lengths, np.int32), spec, key)
    order = list(range(len(lengths))) if key is None else permutation(len(lengths), key).tolist()
    stream = end_to_end(order, lengths, spec)
    assert plan.rows == -(-len(stream) // length)
    fragments = plan.lookup(np.arange(plan.rows + 1))  # a row past the end is empty
    table = render(fragments, plan.rows + 1, spec)
    assert [cell for row in table for cell in row] == stream + [None] * ((plan.rows + 1) * length - len(stream))
    # Segments count the documents of a row from 1, and positions restart in each.
    for row in range(plan.rows):
        assert fragments.segment[fragments.row == row].tolist() == list(range(1, 1 + (fragments.row == row).sum()))
    assert not fragments.position.any()
    assert not fragments.token_type.any()


@given(lengths_of, st.integers(1, 9), st.integers(1, 5), specials)
def test_streams_continue_from_step_to_step(lengths, length, streams, suffix):
    spec = RowSpec("stream", length, (), suffix)
    packed = PackedPlan(np.array(lengths, np.int32), spec, 3)
    plan = StreamPlan(packed, spec, streams)
    stream = end_to_end(permutation(len(lengths), 3).tolist(), lengths, spec)
    table = render(plan.lookup(np.arange(plan.rows)), plan.rows, spec)
    assert plan.rows % streams == 0
    read = [cell for b in range(streams) for row in table[b::streams] for cell in row]
    assert [cell for cell in read if cell is not None] == stream
    assert plan.rows * length - len(stream) < streams * length + length


@given(lengths_of, st.integers(5, 17), specials, specials)
def test_single_rows_are_pieces_of_one_document(lengths, length, prefix, suffix):
    spec = RowSpec("single", length, prefix, suffix)
    room = length - len(prefix) - len(suffix)
    expected = []
    for document, tokens in enumerate(lengths):
        for start in range(0, tokens, room):
            piece = [(document, i) for i in range(start, min(start + room, tokens))]
            row = [f"p{i}" for i in range(len(prefix))] + piece + [f"s{i}" for i in range(len(suffix))]
            expected.append(row + [None] * (length - len(row)))
    plan = SinglePlan(np.array(lengths, np.int32), spec)
    assert plan.rows == len(expected)
    assert render(plan.lookup(np.arange(plan.rows + 2)), plan.rows, spec) == expected


@pytest.mark.parametrize("layout", ["single", "pairs"])
def test_rows_without_room_for_text_are_refused(layout):
    spec = RowSpec(layout, 3, (4, 4), (5,))
    sentences = Sentences(np.array([1, 2]), np.array([2]))
    with pytest.raises(UserError, match="rows of 3 tokens"):
        SinglePlan(np.array([5]), spec) if layout == "single" else PairsPlan(sentences, spec, 0)


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 70_000])
def test_permutations_are_permutations_and_differ_by_key(count):
    first, again, other = permutation(count, 11), permutation(count, 11), permutation(count, 12)
    assert first.dtype == np.int32
    assert np.array_equal(first, again)
    assert np.array_equal(np.sort(first), np.arange(count))
    assert count < 1000 or (first != other).mean() > 0.99


def test_a_permutation_is_the_order_of_splitmix64_hashes():
    # The published generator, in Python integers: the sequence of gamma steps, finalised.
    def splitmix(value: int) -> int:
        mask = 2**64 - 1
        value = (value + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    assert splitmix(0) == 0xE220A8397B1DCDAF  # first output of splitmix64 from state 0
    key, count, bits = 0xDEADBEEF12345678, 300, 9
    hashes = [((splitmix(index ^ key) << bits) % 2**64, index) for index in range(count)]
    assert permutation(count, key).tolist() == [index for _, index in sorted(hashes)]


def test_shuffled_rows_are_a_permutation():
    shuffled = shuffle_rows(np.arange(101), 101, 5)
    assert np.array_equal(np.sort(shuffled), np.arange(101))
    assert not np.array_equal(shuffled, np.arange(101))
    assert np.array_equal(shuffle_rows(np.array([7, 3]), 101, 5), shuffled[[7, 3]])


def test_keys_differ_by_everything_that_is_in_them():
    keys = {
        epoch_key(fingerprint, seed, epoch, purpose)
        for fingerprint in "ab"
        for seed in (0, 1)
        for epoch in (0, 1)
        for purpose in ("rows", "documents")
    }
    assert len(keys) == 16


@pytest.mark.slow
def test_ten_million_documents_fit_in_the_promised_memory():
    lengths = np.random.default_rng(0).integers(10, 500, size=10**7, dtype=np.int32)
    plan = PackedPlan(lengths, RowSpec("packed", 128, (), (3,)), 1)
    held = plan.starts.nbytes + plan.order.nbytes
    assert held <= 153 * 2**20  # 8 bytes of offset and 4 of permutation per document: 114 MiB
    at = plan.lookup(np.array([0, plan.rows - 1]))
    assert plan.rows == -(-(int(lengths.sum(dtype=np.int64)) + 10**7) // 128)
    assert at.document[0] == plan.order[0]
    assert at.document[-1] == plan.order[-1]
