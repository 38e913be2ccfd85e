"""Examples: one document per row, one text or two, cut to fit, with labels; and words that were found beforehand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from batches import SHARES, check_shares
from data_corpus import generated_documents, small_config
from hypothesis import given
from hypothesis import strategies as st

from lmobj.batch import RowSpec
from lmobj.data import DataConfig, Dataset, JsonLines, SentencePieceConfig, prepare
from lmobj.data._plan import ExamplesPlan
from lmobj.data._shard_writer import pack_bits
from lmobj.errors import UserError


def longest_first(a: list, b: list, budget: int) -> tuple[list, list]:
    """As Hugging Face's tokenizers in Python and BERT's own code do it, a token at a time."""
    a, b = list(a), list(b)
    while len(a) + len(b) > budget:
        (a if len(a) > len(b) else b).pop()
    return a, b


def laid_out(plan: ExamplesPlan, rows: int, spec: RowSpec) -> list[list[tuple]]:
    """Per row the cells (what stands there, position, token type)."""
    table: list[list[tuple]] = [[] for _ in range(rows)]
    at = plan.lookup(np.arange(rows))
    for i in range(len(at.row)):
        begin, cells = int(at.column[i]), [f"p{j}" for j in range(int(at.head_count[i]))]
        cells += [(int(at.document[i]), int(at.offset[i]) + j) for j in range(int(at.length[i]))]
        cells += [f"s{j}" for j in range(int(at.tail_count[i]))]
        row = table[int(at.row[i])]
        assert begin == len(row)  # nothing between A and B
        assert at.segment[i] == 1
        row += [(cell, int(at.position[i]) + j, int(at.token_type[i])) for j, cell in enumerate(cells)]
    assert all(len(row) <= spec.length for row in table)
    return table


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((2, 2), "A0 A1 | B0 B1"),  # fits into 6
        ((9, 2), "A0 A1 A2 A3 | B0 B1"),  # only A is longer
        ((1, 9), "A0 | B0 B1 B2 B3 B4"),
        ((9, 9), "A0 A1 A2 | B0 B1 B2"),
        ((3, 4), "A0 A1 A2 | B0 B1 B2"),
    ],
)
def test_pairs_are_cut_by_hand(lengths, expected):
    spec = RowSpec("examples", 9, (4,), (5,))
    plan = ExamplesPlan(np.array([sum(lengths)]), np.array([lengths[0]]), spec)
    a, b = (part.split() for part in expected.split("|"))
    cells = ["p0", *[(0, int(x[1:])) for x in a], "s0", *[(0, lengths[0] + int(x[1:])) for x in b], "s0"]
    types = [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert laid_out(plan, 1, spec) == [list(zip(cells, range(len(cells)), types, strict=True))]


@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6),
    st.integers(2, 20),
    st.integers(0, 2),
    st.integers(0, 2),
)
def test_pairs_of_any_length(lengths, room, prefixes, suffixes):
    spec = RowSpec("examples", room + prefixes + 2 * suffixes, (7, 8)[:prefixes], (8, 9)[:suffixes])
    plan = ExamplesPlan(np.array([a + b for a, b in lengths]), np.array([a for a, _ in lengths]), spec)
    assert plan.rows == len(lengths)
    head, tail = [f"p{i}" for i in range(prefixes)], [f"s{i}" for i in range(suffixes)]
    expected = []
    for document, (one, two) in enumerate(lengths):
        texts = [(document, i) for i in range(one)], [(document, one + i) for i in range(two)]
        a, b = longest_first(*texts, room)
        cells = [*head, *a, *tail, *b, *tail]
        types = [0] * (prefixes + len(a) + suffixes) + [1] * (len(b) + suffixes)
        expected.append(list(zip(cells, range(len(cells)), types, strict=True)))
    assert laid_out(plan, len(lengths) + 1, spec) == [*expected, []]  # a row past the end is empty


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 20), st.integers(0, 2))
def test_single_texts_lose_their_end(lengths, room, specials):
    spec = RowSpec("examples", room + 2 * specials, (7, 8)[:specials], (8, 9)[:specials])
    head, tail = [f"p{i}" for i in range(specials)], [f"s{i}" for i in range(specials)]
    texts = [[*head, *[(d, i) for i in range(min(n, room))], *tail] for d, n in enumerate(lengths)]
    expected = [[(cell, i, 0) for i, cell in enumerate(cells)] for cells in texts]
    assert laid_out(ExamplesPlan(np.array(lengths), None, spec), len(lengths), spec) == expected


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6), st.integers(1, 9))
def test_texts_with_lengths_of_their_own_lose_their_ends_by_themselves(lengths, most):
    spec = RowSpec("examples", 7 + most + 1, suffix=(8,), two_texts=True, second_length=most + 1)
    plan = ExamplesPlan(np.array([a + b for a, b in lengths]), np.array([a for a, _ in lengths]), spec)
    expected = []
    for document, (one, two) in enumerate(lengths):
        a = [*((document, i) for i in range(min(one, 6))), "s0"]
        b = [*((document, one + i) for i in range(min(two, most))), "s0"]
        expected.append(list(zip(a + b, range(len(a + b)), [0] * len(a) + [1] * len(b), strict=True)))
    assert laid_out(plan, len(lengths), spec) == expected
    assert plan.cut() == (sum(a > 6 for a, _ in lengths), sum(b > most for _, b in lengths))


@pytest.mark.parametrize("second", [1, 8, 9])
def test_a_second_text_that_leaves_no_room_is_refused(second):
    spec = RowSpec("examples", 9, suffix=(8,), two_texts=True, second_length=second)
    with pytest.raises(UserError, match=rf"RowSpec.second_length is {second} in rows of 9 tokens"):
        ExamplesPlan(np.array([4]), np.array([2]), spec)


def test_a_row_without_room_for_two_texts_is_refused():
    with pytest.raises(UserError, match="rows of 4 tokens, of which special tokens take 3; accepted: at least 5"):
        ExamplesPlan(np.array([4]), np.array([2]), RowSpec("examples", 4, (4,), (5,)))


def labelled_config(folder: Path, names: tuple[object, ...], kind: str, **columns: str) -> tuple[DataConfig, dict]:
    """Rows of two texts and a label, and {texts: label}."""
    documents = generated_documents(120, seed=2)
    rows = [{"a": f"{i} {documents[2 * i]}", "b": documents[2 * i + 1], "y": names[i % len(names)]} for i in range(60)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = JsonLines(files=(str(path),), text="a", pair="b", label="y", label_kind=kind)
    config = small_config(folder, path, source=source, **columns)
    return config, {(row["a"], row["b"]): row["y"] for row in rows}


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, dict]:
    config, truth = labelled_config(tmp_path_factory.mktemp("classes"), ("yes", "no"), "class")
    return prepare(config, quiet=True), truth


def read_back(dataset: Dataset, batch: dict) -> list[tuple[str, str]]:
    """The two texts of every row that is not empty."""
    found = []
    for tokens, types, segments in zip(batch["tokens"], batch["token_types"], batch["segment_ids"], strict=True):
        if segments.any():
            inside = segments > 0
            found.append(tuple(dataset.tokenizer.decode(tokens[inside & (types == t)]) for t in (0, 1)))
    return found


def test_an_epoch_of_examples_holds_each_once_with_its_label(classes):
    dataset, truth = classes
    spec = RowSpec("examples", 900, (4,), (5,), ("labels", "word_starts"))
    seen = {}
    for split in ("train", "validation", "test"):
        rows = dataset.rows(spec, split=split, batch_size=7)
        whole = [rows.row(i) for i in range(rows.per_epoch)]
        texts = [read_back(dataset, row)[0] for row in whole]
        seen |= {text: dataset.classes[row["labels"][0]] for text, row in zip(texts, whole, strict=True)}
        assert rows.per_epoch == dataset.summary()["splits"][split]["documents"]
    assert seen == truth
    assert dataset.summary()["classes"] == ["no", "yes"]
    batch = rows.batch(rows.steps_per_epoch - 1)
    assert batch["labels"].dtype == np.int32
    assert not batch["labels"][~batch["segment_ids"].any(axis=1)].any()


@pytest.mark.parametrize("shares", SHARES[1:])
def test_shares_of_examples(classes, shares):
    check_shares(classes[0], RowSpec("examples", 24, (4,), (5,), ("labels",)), shares)


def test_pairs_are_whole_and_in_the_order_of_the_rows(classes):
    dataset, truth = classes
    spec = RowSpec("examples", 900, suffix=(3,), two_texts=True, second_length=450)
    rows = dataset.rows(spec, split="validation", batch_size=4)
    texts = [tuple(map(dataset.tokenizer.decode, pair)) for pair in dataset.pairs(spec, "validation")]
    assert texts == [text for step in range(rows.steps_per_epoch) for text in read_back(dataset, rows.batch(step))]
    assert set(texts) <= set(truth)
    assert dataset.notes(spec, "validation") == ()


def test_the_person_is_told_how_many_texts_are_cut(classes):
    dataset, _ = classes
    spec = RowSpec("examples", 70, suffix=(3,), two_texts=True, second_length=40)
    pairs = list(dataset.pairs(spec, "train"))
    cut = [sum(len(pair[i]) > room for pair in pairs) for i, room in enumerate((29, 39))]
    assert all(0 < count < len(pairs) for count in cut)
    assert dataset.notes(spec, "train") == (
        f"train: sources that are cut to 30 tokens, their end included (data.length): {cut[0]} of {len(pairs)}.",
        f"train: targets that are cut to 40 tokens, their end included (objective.target_length): {cut[1]} of "
        f"{len(pairs)}.",
    )


def test_classes_of_a_mixture_are_those_of_all(classes, tmp_path):
    first, truth = classes
    first._first.tokenizer.save(tmp_path / "tokenizer.model")
    config, others = labelled_config(
        tmp_path,
        ("maybe", "yes"),
        "class",
        tokenizer=SentencePieceConfig(path=str(tmp_path / "tokenizer.model")),
    )
    second = prepare(config, quiet=True)
    both = Dataset({"one": first._first._folder, "two": second._first._folder})
    assert both.classes == ["maybe", "no", "yes"]
    rows = both.rows(RowSpec("examples", 900, (4,), (5,), ("labels",)), batch_size=40)
    for step in range(2):
        batch = rows.batch(step)
        named = [both.classes[label] for label in batch["labels"]]
        sources = [(truth, others)[source] for source in batch["row_ids"][:, 0]]
        texts = read_back(both, batch)
        assert named == [source[text] for source, text in zip(sources, texts, strict=True)]
    assert {"maybe", "no", "yes"} == set(named)
    # Rows of one source have the classes of that source alone.
    assert both.classes_of("two") == ["maybe", "yes"]
    spec = RowSpec("examples", 900, (4,), (5,), ("labels",), source="two")
    batch = both.rows(spec, batch_size=40).batch(0)
    assert [["maybe", "yes"][label] for label in batch["labels"]] == [others[text] for text in read_back(both, batch)]


def test_numbers_are_scores(tmp_path):
    config, truth = labelled_config(tmp_path, (0.5, 2, -1.25), "number")
    dataset = prepare(config, quiet=True)
    batch = dataset.rows(RowSpec("examples", 900, (4,), (5,), ("scores",)), batch_size=30).batch(0)
    assert batch["scores"].dtype == np.float32
    assert batch["scores"].tolist() == [truth[text] for text in read_back(dataset, batch)]
    with pytest.raises(UserError, match=r"reads labels of its examples.*label_kind: class"):
        dataset.rows(RowSpec("examples", 900, fields=("labels",)), batch_size=2)


@pytest.fixture(scope="module")
def drawn(classes, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same data, with words drawn by lot as if they had been found when it was prepared."""
    folder = tmp_path_factory.mktemp("drawn") / "data"
    shutil.copytree(classes[0]._first._folder, folder)
    dataset = Dataset(folder)
    draw = np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        tokens = sum(len(document) for document in dataset.documents(split))
        np.save(folder / f"{split}-word_starts.npy", pack_bits(draw.random(tokens) < 0.3))
    return Dataset(folder)


@pytest.mark.parametrize("layout", ["packed", "single", "stream", "pairs", "examples"])
@pytest.mark.parametrize("specials", [((4,), (5,)), ((), ())])
def test_stored_words_follow_their_tokens(drawn, layout, specials):
    """Slow reference: each fragment's bits looked up one by one; specials and first tokens begin words, padding is by
    the tokenizer's rule."""
    spec = RowSpec(layout, 24, *specials, ("word_starts",))
    store = drawn._first.store("train")
    bits = np.unpackbits(np.load(store._folder / "train-word_starts.npy"), bitorder="little").astype(bool)
    first = [0, *np.cumsum(store.lengths).tolist()]
    rows = drawn.rows(spec, batch_size=10, seed=1)
    for step in (0, 3):
        batch = rows.batch(step)
        expected = drawn.tokenizer.word_starts(batch["tokens"], batch["segment_ids"])
        expected[:, 0] = True
        at = rows._sources[0].epochs.lookup(np.arange(step * 10, step * 10 + 10))
        for i in range(len(at.row)):
            column = int(at.column[i] + at.head_count[i])
            for j in range(int(at.length[i])):
                token = first[int(at.document[i])] + int(at.offset[i]) + j
                expected[int(at.row[i]), column + j] = j == 0 or bits[token]
        assert np.array_equal(batch["word_starts"], expected)
        special = np.isin(batch["tokens"], (4, 5)) & (batch["segment_ids"] > 0)
        assert batch["word_starts"][special].all()
        after = special[:, :-1] & (batch["segment_ids"][:, 1:] > 0)
        assert batch["word_starts"][:, 1:][after].all()
