"""Pairs of texts: BERT's procedure step by step, and the laws that its draws follow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from batches import same
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lmobj.batch import RowSpec
from lmobj.data import Dataset, _pairs_plan
from lmobj.data._epochs import Epochs
from lmobj.data._pairs_plan import PairsPlan
from lmobj.data._plan import Fragments
from lmobj.data._sentences import Sentences
from lmobj.errors import UserError

PAIRINGS = ("next_sentence", "sentence_order")
UNLIKELY = 1e-4
"""Chi-square tests fail below this; keys are fixed, so they do not fail by chance."""


def spec_of(pairing: Any, room: int, short_rate: float = 0.0) -> RowSpec:
    """Rows with `room` tokens of text between [CLS] and two [SEP]."""
    return RowSpec("pairs", room + 3, (4,), (5,), pairing=pairing, short_rate=short_rate)


def sentences_of(documents: list[list[int]]) -> Sentences:
    """Sentences of these lengths, document by document."""
    ends = [np.cumsum(document, dtype=np.int32) for document in documents]
    return Sentences(np.concatenate(ends), np.array([len(document) for document in documents], np.int32))


def equal_documents(count: int, sentences: int, length: int = 1) -> Sentences:
    """`count` documents of as many sentences of one length."""
    ends = np.tile(np.arange(1, sentences + 1, dtype=np.int32) * length, count)
    return Sentences(ends, np.full(count, sentences, np.int32))


def halves(plan: PairsPlan) -> tuple[Fragments, Fragments]:
    """The fragments of A and of B in every row of the epoch."""
    at = plan.lookup(np.arange(plan.rows))
    assert np.array_equal(at.row[::2], at.row[1::2])
    return Fragments(*(x[::2] for x in at)), Fragments(*(x[1::2] for x in at))


def check_even(observed: Any, cells: int) -> None:
    """That values 0 ... cells - 1 are evenly distributed."""
    counts = np.bincount(np.asarray(observed), minlength=cells)
    assert len(counts) == cells
    assert stats.chisquare(counts).pvalue > UNLIKELY


Tokens = list[tuple[int, int]]
"""(document, place in it) of every token of a text."""


def bert(documents: list[list[int]], spec: RowSpec, draws: Any) -> list[tuple[Tokens, Tokens, int]]:
    """(A, B, label) of every pair, as BERT's and ALBERT's scripts make them: one sentence, one token at a time.

    The decisions are the plan's, found at the number of the sentence that begins the chunk.
    """
    room = spec.length - 3
    first = np.concatenate([[0], np.cumsum([len(document) for document in documents])])
    texts = []
    for index, lengths in enumerate(documents):
        places = iter([(index, i) for i in range(sum(lengths))])
        texts.append([[next(places) for _ in range(length)] for length in lengths])
    filled = [index for index, text in enumerate(texts) if text]

    def draw(kind: str, sentence: int, purpose: int, *given: Any) -> int:
        given = tuple(np.array([x]) if kind == "heads" else x for x in given)
        return int(getattr(draws, kind)(np.array([sentence]), purpose, *given)[0])

    def truncate(a: Tokens, b: Tokens, sentence: int) -> None:
        total = {id(a): _pairs_plan._CUT_A, id(b): _pairs_plan._CUT_B}
        cut = dict.fromkeys(total, 0)
        while len(a) + len(b) > room:
            longer = a if len(a) > len(b) else b
            before = draw("heads", sentence, total[id(longer)], cut[id(longer)])
            cut[id(longer)] += 1
            front = draw("heads", sentence, total[id(longer)], cut[id(longer)]) > before
            longer.pop(0 if front else -1)

    pairs = []
    for index, document in enumerate(texts):
        i, begin = 0, 0
        while i < len(document):
            here = int(first[index]) + begin
            target = room
            if draw("chance", here, _pairs_plan._SHORT, spec.short_rate):
                target = 2 + draw("below", here, _pairs_plan._LENGTH, room - 1)
            chunk = document[begin : i + 1]
            if i < len(document) - 1 and sum(map(len, chunk)) < target:
                i += 1
                continue
            a_end = 1 if len(chunk) == 1 else 1 + draw("below", here, _pairs_plan._DIVISION, len(chunk) - 1)
            a = [token for sentence in chunk[:a_end] for token in sentence]
            b = [token for sentence in chunk[a_end:] for token in sentence]
            coin, label = draw("chance", here, _pairs_plan._LABEL, 0.5), 0
            if len(chunk) == 1 or (coin and spec.pairing == "next_sentence"):
                b, label = [], 1
                for attempt in range(10):
                    other = filled[draw("below", here, _pairs_plan._DOCUMENT + attempt, len(filled))]
                    if other != index:
                        break
                start = draw("below", here, _pairs_plan._SENTENCE, len(texts[other]))
                for sentence in texts[other][start:]:
                    b += sentence
                    if len(b) >= target - len(a):
                        break
                i -= len(chunk) - a_end
            elif coin:
                a, b, label = b, a, 1
            truncate(a, b, here)
            pairs.append((a, b, label))
            i += 1
            begin = i
    return pairs


documents_of = st.lists(st.lists(st.integers(1, 15), min_size=0, max_size=9), min_size=2, max_size=6)


@given(
    documents_of.filter(lambda d: any(len(s) > 1 for s in d) and sum(map(bool, d)) > 1),
    st.sampled_from(PAIRINGS),
    st.integers(2, 40),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 2**64 - 1),
)
def test_a_plan_is_berts_procedure(documents, pairing, room, short_rate, key):
    spec = spec_of(pairing, room, short_rate)
    plan = PairsPlan(sentences_of(documents), spec, key)
    expected = bert(documents, spec, plan._draws)
    assert plan.rows == len(expected)
    at = plan.lookup(np.arange(plan.rows + 2))  # rows past the end are empty
    texts = [
        [(document, offset + i) for i in range(length)]
        for document, offset, length in zip(at.document.tolist(), at.offset.tolist(), at.length.tolist(), strict=True)
    ]
    labels = at.pair_label.tolist()
    assert labels[::2] == labels[1::2]
    assert list(zip(texts[::2], texts[1::2], labels[::2], strict=True)) == expected
    # [CLS] A [SEP] B [SEP]: the types of A are 0 and those of B are 1, positions go on.
    assert at.token_type.tolist() == [0, 1] * plan.rows
    assert at.segment.tolist() == [1, 1] * plan.rows
    assert at.column.tolist() == at.position.tolist()
    assert at.column[::2].tolist() == [0] * plan.rows
    assert at.column[1::2].tolist() == [len(a) + 2 for a, _, _ in expected]
    assert at.head_count.tolist() == [1, 0] * plan.rows
    assert at.tail_count.tolist() == [1, 1] * plan.rows
    # Any row alone is the same row.
    for row in range(0, plan.rows, 3):
        for one, all_of in zip(plan.lookup(np.array([row]))[1:], at[1:], strict=True):
            assert one.tolist() == all_of[2 * row : 2 * row + 2].tolist()


class Largest:
    """Draws that are as large as they can be, every chance taken, every coin heads."""

    def __init__(self, key: int):
        del key

    def below(self, index: Any, purpose: int, bound: Any) -> Any:
        return np.broadcast_to(np.asarray(bound) - 1, index.shape).astype(np.int64)

    def chance(self, index: Any, purpose: int, probability: float) -> Any:
        return np.full(index.shape, probability > 0)

    def heads(self, index: Any, purpose: int, coins: Any) -> Any:
        return coins


def stretches(plan: PairsPlan) -> list[Any]:
    """(document, offset, length) of A, of B, and the label, row by row."""
    a, b = halves(plan)
    rows = np.stack([a.document, a.offset, a.length, b.document, b.offset, b.length, a.pair_label], axis=1)
    return [(tuple(row[:3]), tuple(row[3:6]), row[6]) for row in rows.tolist()]


def test_the_sentences_that_a_random_pair_leaves_are_read_by_the_next(monkeypatch):
    # Rows of 9. Documents 0: sentences of 3, 4, 2, 5 tokens; 1: one of 6. Another document is drawn as the last, 1, and
    # read from its last sentence on; where the chunk is in document 1, ten tries find no other.
    monkeypatch.setattr(_pairs_plan, "_Draws", Largest)
    plan = PairsPlan(sentences_of([[3, 4, 2, 5], [6]]), spec_of("next_sentence", 9), 0)
    assert stretches(plan) == [
        # 3 + 4 + 2 = 9 tokens are enough; A is all sentences but the last, 7 tokens. B needs 2 and gets 6. Of 13 four
        # go: A (7 > 6), B (6 = 6), A (6 > 5), B (5 = 5), all at the front.
        ((0, 2, 5), (1, 2, 4), 1),
        # The sentence of 2 was not used. With the next the document ends: A is the one, B needs 7 and gets all 6.
        ((0, 7, 2), (1, 0, 6), 1),
        # The sentence of 5 is left: of 5 + 6 go B (6 > 5) and B (5 = 5).
        ((0, 9, 5), (1, 2, 4), 1),
        # The same document after all, and still label 1: of 6 + 6 go B, A, B.
        ((1, 1, 5), (1, 2, 4), 1),
    ]


def test_a_swapped_pair_and_a_sentence_alone(monkeypatch):
    monkeypatch.setattr(_pairs_plan, "_Draws", Largest)
    plan = PairsPlan(sentences_of([[3, 4, 3, 5], [2]]), spec_of("sentence_order", 9), 0)
    assert stretches(plan) == [
        # 3 + 4 + 3 = 10: the first two, 7 tokens, become B, which loses one at the front.
        ((0, 7, 3), (0, 1, 6), 1),
        # The next begins after the whole chunk: 5 alone, with document 1 for B.
        ((0, 10, 5), (1, 0, 2), 1),
        ((1, 0, 2), (1, 0, 2), 1),
    ]


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_labels_say_what_the_texts_are(pairing):
    # Label 0 is A and the B that follows it; label 1 is another document's B, or of order B and then A. Chunks of 8
    # sentences leave the ninth alone.
    plan = PairsPlan(equal_documents(60, 9), spec_of(pairing, 8), 3)
    seen = set()
    for a, b, label in stretches(plan):
        follows = a[0] == b[0] and a[1] + a[2] == b[1]
        precedes = a[0] == b[0] and b[1] + b[2] == a[1]
        alone = pairing == "next_sentence" or a[1] == 8
        assert (follows, precedes) == {0: (True, False), 1: (False, not alone)}[label]
        assert label == 0 or not alone or a[0] != b[0]
        seen.add((label, alone))
    assert seen >= ({(0, True), (1, True)} if pairing == "next_sentence" else {(0, False), (1, False), (1, True)})


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_every_sentence_is_read_once_as_a_or_as_what_follows(pairing):
    plan = PairsPlan(equal_documents(300, 40), spec_of(pairing, 12, 0.3), 8)
    a, b = halves(plan)
    own = (a.pair_label == 0) | (b.document == a.document)
    begin = np.where(own, np.minimum(a.offset, b.offset), a.offset)
    end = np.where(own, np.maximum(a.offset + a.length, b.offset + b.length), a.offset + a.length)
    last = np.append(a.document[1:] != a.document[:-1], True)
    assert (begin[1:] == np.where(last[:-1], 0, end[:-1])).all()
    assert (end[last] == 40).all()


def test_half_of_the_pairs_and_more_are_random():
    # Documents of n short sentences that no row can fill: a chunk is all that is left. With r sentences left, the pair
    # is random with probability 1/2 and leaves evenly 1 ... r - 1; one left makes a random pair. So of random pairs a
    # document has R(r) = (1 + mean R(1 .. r - 1)) / 2 = 1 for every r, and of others N(1) = 0,
    # N(r) = (1 + mean N(1 .. r - 1)) / 2: N(2) = 1/2, N(3) = 5/8, N(4) = 11/16. P(random) = 1 / (1 + 11/16) = 16/27.
    plan = PairsPlan(equal_documents(100_000, 4), spec_of("next_sentence", 20), 17)
    labels = plan.lookup(np.arange(plan.rows)).pair_label[::2]
    assert labels.mean() == pytest.approx(16 / 27, abs=4 * 0.5 / np.sqrt(len(labels)))
    assert plan.rows / 100_000 == pytest.approx(27 / 16, rel=0.005)


def test_half_of_the_chunks_of_several_sentences_are_swapped():
    plan = PairsPlan(equal_documents(120_000, 4), spec_of("sentence_order", 20), 17)
    assert plan.rows == 120_000
    labels = plan.lookup(np.arange(plan.rows)).pair_label[::2]
    assert labels.mean() == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(len(labels)))


def test_single_sentences_are_always_paired_with_other_documents():
    for pairing in PAIRINGS:
        plan = PairsPlan(sentences_of([[2]] * 400 + [[1, 1]]), spec_of(pairing, 30), 2)
        alone = [(a, b, label) for a, b, label in stretches(plan) if a[0] < 400]
        assert len(alone) == 400
        assert all(label == 1 and a[0] != b[0] for a, b, label in alone)


def long_documents(key: int, short_rate: float) -> tuple[Fragments, Fragments, int]:
    """A and B of the pairs of sentences of one token in rows of 20, without those near the end of a document."""
    room, sentences = 20, 500
    a, b = halves(PairsPlan(equal_documents(7_000, sentences), spec_of("next_sentence", room, short_rate), key))
    early = np.flatnonzero(a.offset <= sentences - room)  # any target can still be filled
    assert len(early) > 200_000
    return Fragments(*(x[early] for x in a)), Fragments(*(x[early] for x in b)), room


def test_a_takes_evenly_one_to_all_sentences_but_one():
    a, b, room = long_documents(5, 0.0)
    for label in (0, 1):
        sizes = a.length[a.pair_label == label]
        assert len(sizes) > 100_000
        check_even(sizes - 1, room - 1)
    assert (a.length + b.length)[a.pair_label == 0].min() == room


def test_short_pairs_have_even_lengths():
    # A pair that is not random has exactly its target: 20, or with probability 0.3 evenly one of 2 ... 20.
    a, b, room = long_documents(6, 0.3)
    lengths = (a.length + b.length)[a.pair_label == 0]
    assert len(lengths) > 100_000
    expected = np.full(room - 1, 0.3 / (room - 1))
    expected[-1] += 0.7
    counts = np.bincount(lengths, minlength=room + 1)[2:]
    assert counts.sum() == len(lengths)
    assert stats.chisquare(counts, expected * len(lengths)).pvalue > UNLIKELY


def test_other_documents_and_their_sentences_are_drawn_evenly():
    a, b = halves(PairsPlan(equal_documents(100, 5_000), spec_of("next_sentence", 3), 9))
    random = a.pair_label == 1
    assert random.sum() > 100_000
    assert not (a.document == b.document)[random].any()
    check_even(((b.document - a.document - 1) % 100)[random], 99)
    check_even(b.offset[random] // 500, 10)


@pytest.mark.parametrize(("length", "room", "cut_a", "cut_b"), [(40, 20, 30, 30), (15, 21, 4, 5), (200, 21, 189, 190)])
def test_what_does_not_fit_is_cut_from_front_and_back_alike(length, room, cut_a, cut_b):
    # Two sentences of one length, the longer one loses tokens: B first, since they are equal, then A and B in turn.
    a, b = halves(PairsPlan(equal_documents(100_001, 2, length), spec_of("sentence_order", room), 4))
    assert set(a.length.tolist()) == {length - cut_a}
    assert set(b.length.tolist()) == {length - cut_b}
    fronts = (a.offset % length, b.offset % length)
    for front, cut in zip(fronts, (cut_a, cut_b), strict=True):
        # Binomial(cut, 1/2), with the values that are too rare to count put together.
        law = stats.binom(cut, 0.5)
        low, high = int(law.ppf(1e-3)), int(law.ppf(1 - 1e-3))
        counts = np.bincount(np.clip(front, low, high) - low, minlength=high - low + 1)
        expected = law.pmf(np.arange(low, high + 1))
        expected[0], expected[-1] = law.cdf(low), law.sf(high - 1)
        assert stats.chisquare(counts, expected * counts.sum()).pvalue > UNLIKELY
    assert abs(np.corrcoef(*fronts)[0, 1]) < 4 / np.sqrt(len(a.row))


def test_one_long_text_is_cut_alone():
    # 5 + 30 tokens in 20: only the second loses, 15 of them.
    a, b = halves(PairsPlan(sentences_of([[5, 30]] * 300), spec_of("sentence_order", 20), 1))
    in_order = a.pair_label == 0
    assert set(a.length[in_order].tolist()) == set(b.length[~in_order].tolist()) == {5}
    assert set(b.length[in_order].tolist()) == set(a.length[~in_order].tolist()) == {15}
    # 12 + 30: 18 from the second until both have 12, and then B, A, B, A.
    a, b = halves(PairsPlan(sentences_of([[12, 30]] * 300), spec_of("sentence_order", 20), 1))
    assert set(a.length.tolist()) == set(b.length.tolist()) == {10}


def epochs_of(documents: list[list[int]], seed: int = 0) -> Epochs:
    sentences = sentences_of(documents)
    store: Any = SimpleNamespace(
        lengths=np.array([sum(document) for document in documents]),
        sentence_ends=sentences.ends,
        sentence_counts=np.diff(sentences.first),
    )
    spec = spec_of("next_sentence", 12)
    return Epochs(store, spec, fingerprint="f", seed=seed, streams=1, once=False)


def test_epochs_have_as_many_rows_as_the_first():
    epochs = epochs_of([[1, 2, 3, 2, 1, 4, 2, 3]] * 40)
    more = fewer = 0
    drawn = set()
    for epoch in range(8):
        plan = epochs._plan(epoch)
        at = epochs.lookup(np.arange(epoch * epochs.per_epoch, (epoch + 1) * epochs.per_epoch))
        assert len(at.row) == 2 * epochs.per_epoch
        whole, table = stretches(plan), plan.lookup(np.arange(plan.rows))
        drawn.add(tuple(whole))
        place = {begin: row for row, begin in enumerate(zip(table.document[::2], table.offset[::2], strict=True))}
        if len(place) < plan.rows:
            continue  # two pairs begin alike, A cut at the front
        counts = np.zeros(plan.rows, int)
        for begin in zip(at.document[::2], at.offset[::2], strict=True):
            counts[place[begin]] += 1
        assert counts.sum() == epochs.per_epoch
        assert (counts.min(), counts.max()) == (
            (1, 1) if plan.rows == epochs.per_epoch else (0, 1) if plan.rows > epochs.per_epoch else (1, 2)
        )
        more, fewer = more + (plan.rows > epochs.per_epoch), fewer + (plan.rows < epochs.per_epoch)
    assert more
    assert fewer
    assert len(drawn) == 8


def test_rows_of_an_epoch_are_found_alone():
    documents = [[1, 2, 3, 2, 1, 4, 2, 3]] * 20
    read, fresh = epochs_of(documents), epochs_of(documents)
    rows = np.arange(3 * read.per_epoch)
    whole = read.lookup(rows)
    for row in reversed(rows[:: read.per_epoch // 5 + 1].tolist()):
        for one, all_of in zip(fresh.lookup(np.array([row]))[1:], whole[1:], strict=True):
            assert one.tolist() == all_of[whole.row == row].tolist()
    assert not np.array_equal(epochs_of(documents, seed=1).lookup(rows).offset[:50], whole.offset[:50])


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_batches_hold_the_texts_and_their_labels(dataset: Dataset, pairing: Any):
    spec = RowSpec("pairs", 200, (4,), (5,), pairing=pairing, short_rate=0.1)
    texts = [document.tolist() for document in dataset.documents("train")]
    joined = ["," + ",".join(map(str, text)) + "," for text in texts]

    def inside(tokens: list[int]) -> bool:
        return any("," + ",".join(map(str, tokens)) + "," in text for text in joined)

    batches = list(dataset.batches(spec, seed=0, batch_size=16, steps=8))
    assert same(batches[5], dataset.rows(spec, seed=0, batch_size=16).batch(5))
    labels = []
    for batch in batches:
        assert batch["pair_labels"].dtype == np.int32
        for tokens, types, label in zip(batch["tokens"], batch["token_types"], batch["pair_labels"], strict=True):
            first, second = np.flatnonzero(tokens == 5)
            assert types.tolist() == [0] * (first + 1) + [1] * (second - first) + [0] * (199 - second)
            a, b = tokens[1:first].tolist(), tokens[first + 1 : second].tolist()
            assert inside(a)
            assert inside(b)
            if second < 199:  # nothing was cut
                assert inside(a + b) == (label == 0)
            labels.append(int(label))
    assert 0.35 < np.mean(labels) < 0.8
    last = list(dataset.batches(spec, split="validation", batch_size=64))[-1]
    assert (last["pair_labels"][last["segment_ids"][:, 0] == 0] == 0).all()


@pytest.mark.parametrize(
    ("documents", "pairing", "message"),
    [
        ([[5], [3]], "sentence_order", "of 2 documents none has two"),
        ([[5], [3]], "next_sentence", "of 2 documents none has two"),
        ([[5, 4, 3]], "next_sentence", "there is 1 document, of 3 sentences; accepted: two or more documents"),
        ([[], [5, 4, 3]], "next_sentence", "there is 1 document, of 3 sentences"),
    ],
)
def test_texts_without_pairs_are_refused(documents, pairing, message):
    with pytest.raises(UserError, match=message):
        PairsPlan(sentences_of(documents), spec_of(pairing, 16), 0)


def test_one_document_has_an_order():
    # A lone sentence at its end is paired with the document itself: there is no other.
    plan = PairsPlan(sentences_of([[], [5, 4, 8]]), spec_of("sentence_order", 9), 0)
    assert plan.rows == 2
    assert stretches(plan)[1][2] == 1
