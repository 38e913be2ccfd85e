"""Labelled texts: the quirks of files, and what is made from a run's own text."""

from __future__ import annotations

import json
import pathlib
import random
from collections import Counter
from typing import Any

import pytest
import tiny_runs

from lmobj.bench import (
    JsonLinesProbe,
    Labelled,
    SwappedWordsProbe,
    TsvProbe,
    WhichDocumentProbe,
    labelled_texts,
)
from lmobj.bench._labelled import read_labelled, swap_words
from lmobj.data import DataConfig, Dataset, SentencePieceConfig, TextFiles, prepare
from lmobj.errors import UserError


def _file(folder: pathlib.Path, content: bytes, name: str = "a.tsv") -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


def test_quotes_marks_and_blanks_of_tsv_files(tmp_path: pathlib.Path) -> None:
    # A byte order mark, raw quotes that are never closed, a blank before the tab (SST-2), Windows ends of lines, blank
    # lines, a form feed in a text, and no end of the last line.
    content = b'\xef\xbb\xbfso "good \t1\r\n\n"it\'s" bad\t0\r\n  \npage\x0cbreak\t1\ncaf\xc3\xa9 \t0'
    rows = list(read_labelled(TsvProbe(train=(_file(tmp_path, content),)), "train"))
    assert rows == [
        Labelled('so "good', None, "1"),
        Labelled('"it\'s" bad', None, "0"),
        Labelled("page\x0cbreak", None, "1"),
        Labelled("café", None, "0"),
    ]


def test_columns_by_name_and_pairs(tmp_path: pathlib.Path) -> None:
    content = b"id\tpremise\thypothesis\tgold\n1\tA man sleeps\tHe is awake\tno\n2\tx\ty\tyes\n"
    probe = TsvProbe(train=(_file(tmp_path, content),), header=True, text="premise", pair="hypothesis", label="gold")
    assert list(read_labelled(probe, "train")) == [
        Labelled("A man sleeps", "He is awake", "no"), Labelled("x", "y", "yes")
    ]  # fmt: skip
    by_number = TsvProbe(train=probe.train, header=True, text=1, label=3)
    assert [row.label for row in read_labelled(by_number, "train")] == ["no", "yes"]


def test_json_lines_with_labels_of_any_kind(tmp_path: pathlib.Path) -> None:
    rows = [{"s": " a ", "y": 1}, {"s": "b", "y": True}, {"s": "c", "y": "pos"}]
    name = _file(tmp_path, "\n".join(map(json.dumps, rows)).encode())
    probe = JsonLinesProbe(train=(name,), text="s", label="y")
    assert list(read_labelled(probe, "train")) == [
        Labelled("a", None, "1"), Labelled("b", None, "True"), Labelled("c", None, "pos")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "settings", "parts"),
    [
        (b"a\t1\nb\n", {}, ["a.tsv:2 has 1 columns", "probe.label is column 1"]),
        (b"\xff\t1\n", {}, ["not UTF-8 at byte 0"]),
        (b"x\ty\n", {"header": True, "text": "z"}, ['probe.text is "z"', "x, y"]),
        (b"", {}, ["probe.train has 0 texts"]),
        (b"a\t1\nb\t1\nc\t1\n", {}, ["probe.train", "two classes"]),
    ],
)
def test_damaged_tsv_files_are_refused(
    tmp_path: pathlib.Path, content: bytes, settings: dict[str, Any], parts: list[str]
) -> None:
    probe = TsvProbe(train=(_file(tmp_path, content),), **settings)
    with pytest.raises(UserError) as error:
        labelled_texts(probe, None)  # type: ignore[arg-type]
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b'{"text": "a", "label": 1}\n{"text"\n', [":2 is not JSON"]),
        (b'{"text": "a"}\n', [":1 has None under 'label'", "probe.label"]),
        (b'{"text": 3, "label": 1}\n', [":1 has 3 under 'text'", "accepted: text."]),
        (b'{"text": "a", "label": 1.5}\n', ["1.5 under 'label'"]),
        (b"[1]\n", [":1 has None under 'text'"]),
    ],
)
def test_damaged_json_lines_are_refused(tmp_path: pathlib.Path, content: bytes, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        list(read_labelled(JsonLinesProbe(train=(_file(tmp_path, content),)), "train"))
    for part in parts:
        assert part in str(error.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"probe.test has 'nowhere.tsv', which cannot be read"):
        list(read_labelled(TsvProbe(train=("a",), test=("nowhere.tsv",)), "test"))


def test_a_share_is_set_apart_once_and_for_all(tmp_path: pathlib.Path) -> None:
    name = _file(tmp_path, "".join(f"text {i}\t{i % 2}\n" for i in range(50)).encode())
    data = labelled_texts(TsvProbe(train=(name,), test_share=0.3), None)  # type: ignore[arg-type]
    assert (len(data.train), len(data.test)) == (35, 15)
    assert {row.text for row in data.train} | {row.text for row in data.test} == {f"text {i}" for i in range(50)}
    assert labelled_texts(TsvProbe(train=(name,), test_share=0.3), None) == data  # type: ignore[arg-type]
    assert labelled_texts(TsvProbe(train=(name,), test_share=0.3, seed=1), None) != data  # type: ignore[arg-type]


# --- made texts ---------------------------------------------------------------------------------------------------


def test_swapped_words_are_neighbours_and_none_moves_twice() -> None:
    sentence = "Return the first name (if any) of each of all open files."
    words = sentence.split(" ")
    for seed in range(50):
        for swaps in (1, 2):
            swapped = swap_words(sentence, swaps, random.Random(seed))
            assert swapped is not None
            moved = [i for i, (a, b) in enumerate(zip(words, swapped.split(" "), strict=True)) if a != b]
            assert len(moved) == 2 * swaps
            for left, right in zip(moved[::2], moved[1::2], strict=True):
                assert right == left + 1
                assert swapped.split(" ")[left : right + 1] == [words[right], words[left]]
            assert not {0, len(words) - 1} & set(moved), "first and last word stay"
            assert not {4, 5} & set(moved), "only words of letters move"
    assert swap_words("A b b b c.", 1, random.Random(0)) is None, "equal words cannot be seen to move"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("made")
    corpus = tiny_runs.write_corpus(folder / "words.txt", documents=200)
    # Sentences of that corpus begin in lower case and end in . or !: those of prose begin with a capital letter.
    text = corpus.read_text().replace("the ", "The ", 1)
    lines = [line[:1].upper() + line[1:] for line in text.replace(". the", ". The").split("\n")]
    corpus.write_text("\n".join(lines))
    return prepare(
        DataConfig(
            source=TextFiles(files=(str(corpus),), documents="blocks"),
            tokenizer=SentencePieceConfig(vocab_size=320),
            length=16,
            validation=0.3,
            test=0.3,
            cache=str(folder / "cache"),
        ),
        quiet=True,
    )


def test_half_of_the_held_out_sentences_have_words_swapped(dataset: Dataset) -> None:
    probe = SwappedWordsProbe(words=(5, 9))
    data = labelled_texts(probe, dataset)
    assert labelled_texts(probe, dataset) == data
    held_out = {
        split: " ".join(dataset.tokenizer.decode(document) for document in dataset.documents(split))
        for split in ("validation", "test")
    }
    for split, rows in (("validation", data.train), ("test", data.test)):
        counts = Counter(row.label for row in rows)
        assert abs(counts["whole"] - counts["swapped"]) <= 1
        for row in rows:
            assert (row.text in held_out[split]) == (row.label == "whole")


def test_sentences_are_labelled_with_the_document_that_holds_them(dataset: Dataset) -> None:
    data = labelled_texts(WhichDocumentProbe(documents=5, words=(3, 9)), dataset)
    documents = [dataset.tokenizer.decode(d) for split in ("validation", "test") for d in dataset.documents(split)]
    owners: dict[str, set[int]] = {}
    for row in (*data.train, *data.test):
        (owner,) = [index for index, document in enumerate(documents) if row.text in document]
        owners.setdefault(row.label, set()).add(owner)
    assert len(owners) == 5
    assert all(len(owner) == 1 for owner in owners.values())
    assert not {row.text for row in data.train} & {row.text for row in data.test}
    assert {row.label for row in data.test} == set(owners)


def test_more_documents_than_there_are_is_refused(dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"probe.documents is 500, and \d+ documents"):
        labelled_texts(WhichDocumentProbe(documents=500), dataset)
    with pytest.raises(UserError, match="the validation split has no sentences of 40 to 50 words"):
        labelled_texts(SwappedWordsProbe(words=(40, 50)), dataset)
