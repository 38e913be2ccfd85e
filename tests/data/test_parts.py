"""Parts: the same data whoever works on them, mistakes told as they are, and what records have beside the text."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from data_corpus import generated_documents, small_config, write_blocks

from lmobj.data import (
    CleaningConfig,
    DataConfig,
    JsonLines,
    MixtureSource,
    SegmentationConfig,
    SentencePieceConfig,
    TextFiles,
    WeightedSource,
    _corpus,
    _parts,
    _runner,
    prepare,
)
from lmobj.data._cleaning import Cleaner
from lmobj.data._corpus import Document, grouped
from lmobj.data._inputs import InputFile, Tally
from lmobj.data._parts import cut
from lmobj.data._sampling import thinned
from lmobj.data._segmentation import Segmenter
from lmobj.data._sources import open_corpus
from lmobj.data._work import Sample
from lmobj.errors import UserError


def prepared_folder(config: DataConfig) -> Path:
    (folder,) = (path for path in Path(str(config.cache)).glob("data/*") if path.is_dir())
    return folder


def contents(config: DataConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in prepared_folder(config).iterdir()}


def elsewhere(config: DataConfig, folder: Path, **changes: object) -> DataConfig:
    return dataclasses.replace(config, cache=str(folder), **changes)


class ListedGroup:
    """A group of documents in memory; each counts as one byte of input, and before each a row is skipped."""

    size = 100

    def __init__(self, texts: list[str]):
        self._texts = texts

    def documents(self, tally: Tally):
        for text in self._texts:
            tally.read += 1
            tally.skipped += 1
            yield Document(text)


def test_a_part_ends_with_the_document_that_fills_it(monkeypatch):
    monkeypatch.setattr(_parts, "PART_BYTES", 4)
    parts = list(cut(ListedGroup(["ab", "é", "abcde", "a"]), 7))
    assert [[document.text for document in part.documents] for part in parts] == [["ab", "é"], ["abcde"], ["a"]]
    assert [(part.group, part.index, part.last, part.size) for part in parts] == [
        (7, 0, False, 4),
        (7, 1, False, 5),
        (7, 2, True, 1),
    ]
    # A part is complete when the next document has been read, so what is read for it counts that one.
    assert [(part.read, part.skipped) for part in parts] == [(3, 3), (1, 1), (0, 0)]
    (empty,) = cut(ListedGroup([]), 0)
    assert (empty.documents, empty.last) == ([], True)


def test_files_are_grouped_in_order_up_to_a_size(monkeypatch):
    monkeypatch.setattr(_corpus, "GROUP_BYTES", 10)
    inputs = [InputFile(str(size), "", size) for size in (4, 6, 1, 50, 3, 3)]
    assert [[entry.size for entry in group] for group in grouped(inputs)] == [[4, 6], [1], [50], [3, 3]]


def test_a_sample_is_the_lines_of_least_draws_in_order():
    def sample(lines: list[str], draws: list[int]) -> Sample:
        sizes = np.array([len(line) for line in lines], np.int64)
        return Sample(1, 1, "\n".join(lines), sizes, np.array(draws, np.uint64))

    samples = [sample(["aa", "bb", "cc"], [5, 1, 9]), sample([], []), sample(["dd"], [2])]
    assert list(thinned(samples, 4)) == ["bb", "dd"]
    assert list(thinned(samples, 7)) == ["aa", "bb", "dd"]
    assert list(thinned(samples, 8)) == ["aa", "bb", "cc", "dd"]
    assert list(thinned(samples, 1)) == ["bb"]


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> DataConfig:
    """Three files, to be prepared as several groups of several parts."""
    folder = tmp_path_factory.mktemp("several")
    for number in range(3):
        write_blocks(folder / f"{number}.txt", generated_documents(60, number))
    source = TextFiles(files=(str(folder / "*.txt"),), documents="blocks")
    return small_config(folder, folder, source=source, workers=1)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(_parts, "PART_BYTES", 3000)
    monkeypatch.setattr(_corpus, "GROUP_BYTES", 20_000)
    monkeypatch.setattr(_runner, "_ALONE_BYTES", 0)


def test_processes_change_nothing(several, small_parts, tmp_path):
    alone = elsewhere(several, tmp_path / "alone")
    together = elsewhere(several, tmp_path / "together", workers=2)
    fingerprint = prepare(alone, quiet=True).fingerprint
    assert prepare(together, quiet=True).fingerprint == fingerprint
    assert len(json.loads(contents(alone)["manifest.json"])["splits"]["train"]["shards"]) > 6
    assert contents(together) == contents(alone)


def test_beam_prepares_the_same_bytes(several, small_parts, tmp_path):
    here, beam = elsewhere(several, tmp_path / "here"), elsewhere(several, tmp_path / "beam")
    prepare(here, quiet=True)
    prepare(beam, quiet=True, beam=["--runner=DirectRunner"])
    assert contents(beam) == contents(here)
    assert not list((tmp_path / "beam").glob("beam-*"))


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled(count: int) -> list[dict]:
    """Rows with two texts and a class; their texts are all different."""
    documents = generated_documents(2 * count, seed=5)
    names = ("yes", "no", "maybe")
    return [
        {"a": f"{number} {documents[2 * number]}", "b": documents[2 * number + 1], "y": names[number % 3]}
        for number in range(count)
    ]


def record_config(folder: Path, path: Path, **columns: str) -> DataConfig:
    return small_config(folder, path, source=JsonLines(files=(str(path),), **columns))


def test_pairs_and_classes_are_stored_beside_the_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(_parts, "PART_BYTES", 2000)  # parts meet the classes in different orders
    rows = labelled(80)
    config = record_config(tmp_path, write_rows(tmp_path / "rows.jsonl", rows), text="a", pair="b", label="y")
    dataset = prepare(config, quiet=True)
    folder = prepared_folder(config)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["classes"] == ["maybe", "no", "yes"]
    assert len(manifest["splits"]["train"]["shards"]) > 3
    found = []
    for split in ("train", "validation", "test"):
        starts, labels = (np.load(folder / f"{split}-{name}.npy") for name in ("pair_starts", "labels"))
        assert (starts.dtype, labels.dtype) == (np.int32, np.int32)
        for tokens, start, label in zip(dataset.documents(split), starts, labels, strict=True):
            first, second = (dataset.tokenizer.decode(part) for part in (tokens[:start], tokens[start:]))
            found.append({"a": first, "b": second, "y": manifest["classes"][label]})
    assert sorted(found, key=lambda row: row["a"]) == sorted(rows, key=lambda row: row["a"])
    # The end of the first text ends a sentence.
    names = ("lengths", "sentences", "sentence_ends", "pair_starts")
    index = {name: np.load(folder / f"train-{name}.npy") for name in names}
    ends = np.split(index["sentence_ends"], np.cumsum(index["sentences"])[:-1])
    for own, start, length in zip(ends, index["pair_starts"], index["lengths"], strict=True):
        assert start in own
        assert np.all(np.diff(own) > 0)
        assert own[-1] == length


def test_texts_that_share_the_first_of_a_pair_are_in_one_split(tmp_path):
    rows = [row | {"b": f"{row['b']} {copy}"} for row in labelled(60) for copy in range(3)]
    config = record_config(tmp_path, write_rows(tmp_path / "rows.jsonl", rows), text="a", pair="b")
    dataset = prepare(config, quiet=True)
    seen: dict[str, set[str]] = {}
    for split in ("train", "validation", "test"):
        starts = np.load(prepared_folder(config) / f"{split}-pair_starts.npy")
        for tokens, start in zip(dataset.documents(split), starts, strict=True):
            seen.setdefault(dataset.tokenizer.decode(tokens[:start]), set()).add(split)
    assert len(seen) == 60
    assert {len(splits) for splits in seen.values()} == {1}


def test_labels_that_are_numbers(tmp_path):
    rows = [{"text": document, "y": number / 4} for number, document in enumerate(generated_documents(60, 3))]
    rows.append({"text": rows[0]["text"] + " again", "y": 7})
    path = write_rows(tmp_path / "rows.jsonl", rows)
    config = record_config(tmp_path, path, label="y", label_kind="number")
    dataset = prepare(config, quiet=True)
    found = {}
    for split in ("train", "validation", "test"):
        labels = np.load(prepared_folder(config) / f"{split}-labels.npy")
        assert labels.dtype == np.float32
        decoded = (dataset.tokenizer.decode(tokens) for tokens in dataset.documents(split))
        found |= dict(zip(decoded, labels.tolist(), strict=True))
    assert found == {row["text"]: row["y"] for row in rows}


@pytest.mark.parametrize(
    ("columns", "row", "message"),
    [
        ({"pair": "b"}, {"b": 3}, "a int in the column 'b' instead of text"),
        ({"pair": "b"}, {}, "no column 'b', only text"),
        ({"label": "y"}, {"y": None}, "a null in the column 'y' instead of the name of a class"),
        ({"label": "y"}, {"y": 0.5}, "a float in the column 'y' instead of the name of a class"),
        ({"label": "y", "label_kind": "number"}, {"y": "3"}, "a str in the column 'y' instead of a number"),
        ({"label": "y", "label_kind": "number"}, {"y": True}, "a bool in the column 'y' instead of a number"),
        ({"label": "y", "label_kind": "number"}, {"y": float("nan")}, "nan in the column 'y' instead of a number"),
        ({"label": "y", "label_kind": "number"}, {"y": 10**400}, "a int in the column 'y' instead of a number"),
    ],
)
def test_a_row_with_a_wrong_pair_or_label_is_named_or_skipped(tmp_path, columns, row, message):
    good = {"text": "good", "b": "more", "y": 1}
    path = write_rows(tmp_path / "rows.jsonl", [good, {"text": "bad"} | row, good])
    with pytest.raises(UserError, match=f"row 2 of .*rows.jsonl has {message}"):
        list(open_corpus(JsonLines(files=(str(path),), **columns), 1).documents())
    tally = Tally()
    found = list(open_corpus(JsonLines(files=(str(path),), errors="skip", **columns), 1).documents(tally))
    assert (len(found), tally.skipped) == (2, 1)


def bad_rows(folder: Path, errors: str) -> DataConfig:
    """Three files of rows of which every tenth is bad."""
    for number in range(3):
        rows = [{"text": text if n % 10 else n} for n, text in enumerate(generated_documents(60, number))]
        write_rows(folder / f"{number}.jsonl", [{"text": f"first of {number}"}, *rows])
    source = JsonLines(files=(str(folder / "*.jsonl"),), errors=errors)
    return small_config(folder, folder, source=source)


def test_the_source_of_a_mixture_without_training_text_is_named(several, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("One document.")
    shares = {"validation": 0.0, "test": 0.999999}
    sources = {
        "many": WeightedSource(source=several.source),
        "one": WeightedSource(source=TextFiles(files=(str(path),))),
    }
    model = tmp_path / "some.model"
    prepare(elsewhere(several, tmp_path / "a"), quiet=True).tokenizer.save(model)
    config = small_config(tmp_path, tmp_path, source=MixtureSource(sources=sources), **shares)
    config = dataclasses.replace(config, tokenizer=SentencePieceConfig(path=str(model)), workers=1)
    with pytest.raises(UserError, match=r"^data\.source\.sources\.(one|many)\.source has \d+ documents, none of which"):
        prepare(config, quiet=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_skipped_in_any_part_add_up(tmp_path, small_parts, workers):
    config = dataclasses.replace(bad_rows(tmp_path, "skip"), workers=workers)
    assert prepare(config, quiet=True).summary()["skipped"] == 3 * 6


@pytest.mark.parametrize("beam", [None, ["--runner=DirectRunner"]])
def test_a_bad_row_is_the_same_mistake_wherever_it_is_read(tmp_path, small_parts, beam):
    config = dataclasses.replace(bad_rows(tmp_path, "strict"), workers=2)
    with pytest.raises(UserError, match=r"row 2 of .*\d\.jsonl has a int in the column 'text' instead of text"):
        prepare(config, quiet=True, beam=beam)
    assert not [path for path in Path(str(config.cache)).glob("data/*") if path.is_dir()]


def cleaned_config(folder: Path, **clean: object) -> tuple[DataConfig, list[str]]:
    """Three files in whose documents runs of blanks stand for something to clean; some documents come several times,
    twice within a file and in all of them."""
    texts = generated_documents(40, 9)
    for number in range(3):
        own = [f"{number}: {text}" for text in texts]
        write_rows(folder / f"{number}.jsonl", [{"text": f"{text}  \n"} for text in (*own, own[5], *texts[:10])])
    source = JsonLines(files=(str(folder / "*.jsonl"),))
    config = small_config(folder, folder, source=source, clean=CleaningConfig(whitespace=True, **clean))
    return config, texts


def test_documents_are_cleaned_deduplicated_and_counted_in_every_part(tmp_path, small_parts):
    config, texts = cleaned_config(tmp_path, exact_duplicates=True, min_characters=12)
    whole = elsewhere(config, tmp_path / "a", workers=2)
    dataset = prepare(whole, quiet=True)
    clean = Cleaner(CleaningConfig(whitespace=True, min_characters=12))
    expected: dict[str, None] = {}
    for text in [*(f"{number}: {text}" for number in range(3) for text in texts), *texts[:10]]:
        kept = clean(f"{text}  \n").text
        if kept is not None:
            expected[kept] = None
    splits = ("train", "validation", "test")
    found = [dataset.tokenizer.decode(tokens) for split in splits for tokens in dataset.documents(split)]
    assert sorted(found) == sorted(expected)
    counts = json.loads((prepared_folder(whole) / "manifest.json").read_text())["cleaning"]
    assert list(counts) == ["whitespace", "length", "exact_duplicates"]
    given = 3 * (40 + 1 + 10)
    assert given == len(found) + sum(count["dropped"] for count in counts.values())
    lines = [line for path in tmp_path.glob("*.jsonl") for line in path.read_bytes().splitlines()]
    size = sum(len(json.loads(line)["text"].encode()) for line in lines)
    assert size == sum(len(t.encode()) for t in found) + sum(count["bytes"] for count in counts.values())
    # Each of the 3 repeats within a file, and the second and third copies of what all files hold.
    short = sum(1 for text in texts[:10] if clean(text).text is None)
    assert counts["exact_duplicates"]["dropped"] == 3 + 2 * (10 - short)
    beam = elsewhere(config, tmp_path / "b")
    prepare(beam, quiet=True, beam=["--runner=DirectRunner"])
    assert contents(beam) == contents(whole)


def test_word_starts_of_parts_are_joined_bit_by_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(_parts, "PART_BYTES", 300)
    texts = [f"第{number}句：我们在北京大学学习自然语言处理。" for number in range(60)]  # noqa: RUF001
    path = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    segment = SegmentationConfig(words="jieba")
    config = dataclasses.replace(
        record_config(tmp_path, path), segment=segment, tokenizer=SentencePieceConfig(vocab_size=320)
    )
    dataset = prepare(config, quiet=True)
    segmenter = Segmenter(segment, dataset.tokenizer)
    for split in ("train", "validation", "test"):
        documents = list(dataset.documents(split))
        expected = [segmenter.word_starts(dataset.tokenizer.decode(tokens), tokens) for tokens in documents]
        stored = np.load(prepared_folder(config) / f"{split}-word_starts.npy")
        count = sum(map(len, documents))
        assert stored.dtype == np.uint8
        assert len(stored) == -(-count // 8)
        bits = np.unpackbits(stored, count=count, bitorder="little").astype(bool)
        assert np.array_equal(bits, np.concatenate(expected))
    assert len(json.loads((prepared_folder(config) / "manifest.json").read_text())["splits"]["train"]["shards"]) > 5
