"""Preparation: cached by content and settings, safe to interrupt, and clear about what is wrong."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from data_corpus import generated_documents, small_config, write_blocks

from lmobj.batch import RowSpec
from lmobj.data import (
    DataConfig,
    Dataset,
    SentencePieceConfig,
    StdlibSource,
    TextFiles,
    _parts,
    _prepared,
    _sampling,
    _shard_writer,
    _shards,
    _sources,
    _work,
    prepare,
)
from lmobj.data import _prepare as module
from lmobj.errors import UserError


@pytest.fixture
def corpus(tmp_path: Path, documents: list[str]) -> Path:
    return write_blocks(tmp_path / "corpus.txt", documents)


def folders(config: DataConfig) -> list[Path]:
    return [path for path in Path(str(config.cache)).glob("data/*") if path.is_dir()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_document_is_in_one_split_and_comes_back(dataset, documents):
    found = {
        split: [dataset.tokenizer.decode(tokens) for tokens in dataset.documents(split)]
        for split in ("train", "validation", "test")
    }
    assert sorted(text for texts in found.values() for text in texts) == sorted(documents)
    for split, texts in found.items():
        counts = dataset.summary()["splits"][split]
        assert counts["documents"] == len(texts)
        assert counts["bytes"] == sum(len(text.encode()) for text in texts)
        assert counts["tokens"] == sum(len(tokens) for tokens in dataset.documents(split))
    # 10% each of 150 documents, by hash: within 4 standard deviations (3.7) of 15
    assert 1 <= len(found["validation"]) <= 30
    assert 1 <= len(found["test"]) <= 30


def test_the_split_of_a_document_depends_on_its_text_alone(tmp_path, corpus, documents):
    few = prepare(small_config(tmp_path, write_blocks(tmp_path / "few.txt", documents[::-2])), quiet=True)
    all_ = prepare(small_config(tmp_path, corpus), quiet=True)
    for split in ("train", "validation", "test"):
        of_few, of_all = ({d.tokenizer.decode(t) for t in d.documents(split)} for d in (few, all_))
        assert of_few == of_all & set(documents[::-2])


def test_what_is_prepared_is_found_again(tmp_path, corpus, monkeypatch):
    config = small_config(tmp_path, corpus)
    first = prepare(config, quiet=True)
    monkeypatch.setattr(module._Preparation, "_build", None)  # would fail if called
    for same in (config, dataclasses.replace(config, length=8), dataclasses.replace(config, workers=1)):
        assert prepare(same, quiet=True).fingerprint == first.fingerprint
    assert [path.suffix for path in folders(config)] == [""]


def test_the_fingerprint_follows_content_and_settings_not_places_or_times(tmp_path, corpus, documents):
    config = small_config(tmp_path, corpus)
    fingerprint = prepare(config, quiet=True).fingerprint
    moved = tmp_path / "elsewhere" / "other name"
    moved.parent.mkdir()
    shutil.copy(corpus, moved)
    os.utime(moved, (1, 1))
    fresh = small_config(tmp_path / "elsewhere", moved)
    assert prepare(fresh, quiet=True).fingerprint == fingerprint

    changes: list[DataConfig] = [
        dataclasses.replace(config, validation=0.2),
        dataclasses.replace(config, test=0.2),
        dataclasses.replace(config, tokenizer=SentencePieceConfig(vocab_size=401)),
        dataclasses.replace(config, tokenizer=SentencePieceConfig(vocab_size=400, model="unigram")),
        dataclasses.replace(config, tokenizer=SentencePieceConfig(vocab_size=400, character_coverage=0.99)),
        dataclasses.replace(config, source=TextFiles(files=(str(corpus),), documents="blocks", errors="replace")),
        small_config(tmp_path, write_blocks(tmp_path / "longer.txt", [*documents, "one more."])),
    ]
    assert len({fingerprint, *(prepare(change, quiet=True).fingerprint for change in changes)}) == len(changes) + 1


def test_the_order_of_files_and_patterns_does_not_matter(tmp_path):
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        write_blocks(tmp_path / f"{name}.txt", generated_documents(40, seed))
    fingerprints = set()
    for number, names in enumerate(("abc", "cab")):
        source = TextFiles(files=tuple(str(tmp_path / f"{name}.txt") for name in names), documents="blocks")
        config = small_config(tmp_path / str(number), tmp_path, source=source)
        fingerprints.add(prepare(config, quiet=True).fingerprint)
    assert len(fingerprints) == 1


class Killed(BaseException):
    """Stands for a signal: nothing in the package catches it."""


@pytest.mark.parametrize("shortened", ["train-00000-001.arrayrecord", "part-00000-001.json"])
def test_an_interrupted_preparation_is_not_taken_for_done_and_continues(tmp_path, corpus, monkeypatch, shortened):
    config = small_config(tmp_path, corpus)
    whole = prepare(dataclasses.replace(config, cache=str(tmp_path / "whole")), quiet=True)
    monkeypatch.setattr(_parts, "PART_BYTES", 2000)
    written = []
    write = _work.WriteShards.__call__

    def killed_at_third(work, part):
        if len(written) == 2:
            raise Killed
        written.append(part.index)
        return write(work, part)

    monkeypatch.setattr(_work.WriteShards, "__call__", killed_at_third)
    with pytest.raises(Killed):
        prepare(config, quiet=True)
    assert [path.suffix for path in folders(config)] == [".partial"]

    # The third part is begun again, and so is the second, of which a file is made shorter as after a power cut.
    damaged = folders(config)[0] / shortened
    damaged.write_bytes(damaged.read_bytes()[:-10])
    monkeypatch.setattr(
        _work.WriteShards, "__call__", lambda work, part: written.append(part.index) or write(work, part)
    )
    monkeypatch.setattr(_sampling, "train_tokenizer", None)  # the tokenizer was finished
    dataset = prepare(config, quiet=True)
    assert written[:4] == [0, 1, 1, 2]
    assert written == [0, 1, *range(1, written[-1] + 1)]
    assert [path.suffix for path in folders(config)] == [""]
    assert dataset.fingerprint == whole.fingerprint
    for split in ("train", "validation", "test"):
        pairs = zip(dataset.documents(split), whole.documents(split), strict=True)
        assert all(np.array_equal(one, two) for one, two in pairs)
    left = {path.name for path in folders(config)[0].iterdir()}
    assert left == {"manifest.json", *json.loads((folders(config)[0] / "manifest.json").read_text())["files"]}


def test_many_parts_and_long_documents_read_back_whole(tmp_path, corpus, documents, monkeypatch):
    # Shards of a few documents and records of 8 tokens: every document spans records, every split several shards.
    monkeypatch.setattr(_parts, "PART_BYTES", 3000)
    monkeypatch.setattr(_work, "_ENCODE_BYTES", 500)
    monkeypatch.setattr(_shard_writer, "RECORD_TOKENS", 8)
    monkeypatch.setattr(_shards, "_RECORD_TOKENS", 8)
    dataset = prepare(small_config(tmp_path, corpus), quiet=True)
    assert len(dataset._first.manifest["splits"]["train"]["shards"]) > 3
    found = [dataset.tokenizer.decode(t) for s in ("train", "validation", "test") for t in dataset.documents(s)]
    assert sorted(found) == sorted(documents)
    store = dataset._first.store("train")
    whole = list(store.documents())
    draw = np.random.default_rng(0)
    for _ in range(20):
        chosen = draw.integers(0, len(whole), 5)
        low = np.array([draw.integers(0, len(whole[d])) for d in chosen])
        high = np.array([draw.integers(o, len(whole[d]) + 1) for d, o in zip(chosen, low, strict=True)])
        expected = np.concatenate([whole[d][a:b] for d, a, b in zip(chosen, low, high, strict=True)])
        assert np.array_equal(store.gather(chosen, low, high - low), expected)


def _prepare_in_process(config: DataConfig, queue: multiprocessing.Queue) -> None:
    queue.put(prepare(config, quiet=True).fingerprint)


def test_two_processes_prepare_the_same_data_once(tmp_path, corpus):
    config = small_config(tmp_path, corpus)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_prepare_in_process, args=(config, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    fingerprints = {queue.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert fingerprints == {prepare(config, quiet=True).fingerprint}
    assert [path.suffix for path in folders(config)] == [""]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-00000-000.arrayrecord", lambda data: data[:-100], "bytes instead of"),
        ("train-00000-000.arrayrecord", lambda data: data[:300] + bytes([data[300] ^ 1]) + data[301:], "checksum"),
        ("validation-lengths.npy", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "checksum"),
        ("tokenizer.model", lambda data: b"", "0 bytes instead of"),
        ("manifest.json", lambda data: data[: len(data) // 2], "cannot be read"),
        ("test-bytes.npy", None, "is missing"),
    ],
)
def test_damaged_data_is_found_and_named(tmp_path, corpus, name, change, message):
    config = small_config(tmp_path, corpus)
    prepare(config, quiet=True)
    path = folders(config)[0] / name
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    with pytest.raises(UserError, match=message) as error:
        prepare(config, quiet=True)
    assert name in str(error.value)
    assert str(path.parent) in str(error.value)
    assert "delete that folder" in str(error.value)


def test_damage_in_a_shard_too_large_to_check_first_is_found_on_reading(tmp_path, corpus, monkeypatch):
    config = small_config(tmp_path, corpus)
    third = list(prepare(config, quiet=True).documents("train"))[3]
    path = folders(config)[0] / "train-00000-000.arrayrecord"
    data = bytearray(path.read_bytes())
    data[data.index(third.astype("<u2").tobytes())] ^= 1
    path.write_bytes(data)
    monkeypatch.setattr(_prepared, "_ALWAYS_CHECKED_BYTES", 0)
    with pytest.raises(UserError, match=r"train-00000-000\.arrayrecord, record 3: .*hash mismatch"):
        list(prepare(config, quiet=True).documents("train"))


TEXT = "Ba ko ri. " * 30
WHOLE = {"validation": 0.0, "test": 0.0}


def write(folder: Path, text: str) -> Path:
    path = folder / "text.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (" \n \n", {}, "no text but blanks"),
        (TEXT, {"tokenizer": SentencePieceConfig(vocab_size=9000), **WHOLE}, r"vocab_size is 9000.*at most \d+"),
        (TEXT, {"tokenizer": SentencePieceConfig(vocab_size=20), **WHOLE}, r"vocab_size is 20, .*alone need \d+"),
        (TEXT, {"test": 0.999999999, "validation": 0.0}, "1 documents, none of which fell into the training split"),
    ],
)
def test_a_corpus_that_cannot_be_prepared_leaves_nothing_behind(tmp_path, text, changes, message):
    config = small_config(tmp_path, write(tmp_path, text), **changes)
    with pytest.raises(UserError, match=message):
        prepare(config, quiet=True)
    assert folders(config) == []


def test_bad_bytes_found_late_leave_nothing_behind(tmp_path, corpus, monkeypatch, dataset):
    monkeypatch.setattr(_parts, "PART_BYTES", 1000)
    dataset.tokenizer.save(tmp_path / "a.model")
    corpus.write_bytes(corpus.read_bytes() + b"\n\nbad \xff\n")
    config = small_config(tmp_path, corpus, tokenizer=SentencePieceConfig(path=str(tmp_path / "a.model")))
    with pytest.raises(UserError, match=r"not UTF-8 at byte \d+"):
        prepare(config, quiet=True)
    assert folders(config) == []


def test_a_corpus_shorter_than_a_row_names_tokens_and_length(tmp_path):
    config = small_config(tmp_path, write(tmp_path, TEXT), tokenizer=SentencePieceConfig(vocab_size=272))
    config = dataclasses.replace(config, length=5000, validation=0.0, test=0.0)
    with pytest.raises(UserError, match=r"data\.length is 5000, but the training split has \d+ tokens in 1 documents"):
        prepare(config, quiet=True)


def test_an_empty_validation_split_is_refused_unless_asked_for(tmp_path):
    config = small_config(tmp_path, write(tmp_path, TEXT), tokenizer=SentencePieceConfig(vocab_size=272))
    config = dataclasses.replace(config, validation=1e-9, test=0.0)
    with pytest.raises(UserError, match=r"data\.validation is 1e-09, but none of the 1 documents"):
        prepare(config, quiet=True)
    dataset = prepare(dataclasses.replace(config, validation=0.0), quiet=True)
    assert dataset.summary()["splits"]["validation"] == {"documents": 0, "tokens": 0, "bytes": 0}
    assert list(dataset.documents("validation")) == []
    with pytest.raises(UserError, match="validation split holds no documents"):
        dataset.batches(RowSpec("packed", 8), split="validation", batch_size=2)


def test_a_tokenizer_can_be_loaded(tmp_path, corpus, dataset):
    path = tmp_path / "some.model"
    dataset.tokenizer.save(path)
    config = small_config(tmp_path, corpus, tokenizer=SentencePieceConfig(path=str(path)))
    loaded = prepare(config, quiet=True)
    assert loaded.tokenizer.fingerprint == dataset.tokenizer.fingerprint
    assert all(np.array_equal(one, two) for one, two in zip(loaded.documents(), dataset.documents(), strict=True))
    wrong = dataclasses.replace(config, tokenizer=SentencePieceConfig(path=str(path), vocab_size=500))
    with pytest.raises(UserError, match=r"vocab_size is 500, but the model .* has 400 pieces"):
        prepare(wrong, quiet=True)


def test_documents_that_a_loaded_tokenizer_takes_for_nothing_are_counted(tmp_path, documents):
    model = io.BytesIO()
    lines = [line for document in documents for line in document.splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=120, minloglevel=2
    )
    (tmp_path / "lossy.model").write_bytes(model.getvalue())
    # A zero-width space is three bytes and no blank, but the model's normalisation makes it nothing.
    corpus = write_blocks(tmp_path / "corpus.txt", [*documents, "\u200b", "\u200b\u200b"])
    config = small_config(tmp_path, corpus, tokenizer=SentencePieceConfig(path=str(tmp_path / "lossy.model")))
    summary = prepare(config, quiet=True).summary()
    assert sum(split["documents"] for split in summary["splits"].values()) == len(documents)
    assert summary["cleaning"] == {"tokenizer": {"changed": 0, "dropped": 2, "bytes": 9}}


def test_the_cache_is_where_the_environment_says(tmp_path, corpus, monkeypatch):
    monkeypatch.setenv("LMOBJ_CACHE", str(tmp_path / "there"))
    prepare(small_config(tmp_path, corpus, cache=None), quiet=True)
    assert len(list((tmp_path / "there" / "data").glob("*/manifest.json"))) == 1


def test_the_progress_bar_goes_to_the_error_stream(tmp_path, corpus, capsys):
    prepare(small_config(tmp_path, corpus))
    assert capsys.readouterr().out == ""


def test_files_of_the_library_that_do_not_parse_are_counted(tmp_path, documents, monkeypatch):
    (tmp_path / "lib" / "pydoc_data").mkdir(parents=True)
    (tmp_path / "lib" / "pydoc_data" / "topics.py").write_text(f"topics = {dict(enumerate(documents))!r}\n")
    (tmp_path / "lib" / "broken.py").write_text("def (:\n")
    monkeypatch.setattr(_sources.sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    dataset = prepare(small_config(tmp_path, tmp_path, source=StdlibSource()), quiet=True)
    assert dataset.summary()["skipped"] == 1
    assert sum(split["documents"] for split in dataset.summary()["splits"].values()) == len(documents)


def test_the_manifest_is_json_and_names_no_path(tmp_path, corpus):
    config = small_config(tmp_path, corpus)
    prepare(config, quiet=True)
    text = (folders(config)[0] / "manifest.json").read_text()
    assert json.loads(text)["format"] == module._FORMAT
    assert str(tmp_path) not in text


def test_a_data_set_can_be_opened_by_its_folder(tmp_path, corpus):
    config = small_config(tmp_path, corpus)
    prepared = prepare(config, quiet=True)
    assert Dataset(folders(config)[0]).summary() == prepared.summary()
