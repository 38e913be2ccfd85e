"""Preparation with cleaning, duplicates and segmentation, from pages to the prepared folder."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from lmobj.data import (
    CleaningConfig,
    DataConfig,
    Dataset,
    JsonLines,
    LanguageFilter,
    NearDuplicates,
    SegmentationConfig,
    SentencePieceConfig,
    Tokenizer,
    prepare,
)
from lmobj.data import _parts as parts
from lmobj.errors import UserError

CHINESE = ["我来到北京清华大学。", "今天天气很好。"]
CHINESE_WORDS = ["我", "来到", "北京", "清华大学", "今天天气", "很", "好"]
"""What jieba makes of them: 我 来到 北京 清华大学, and 今天天气 很 好 (looked up by hand)."""


def page_sentences(seed: int) -> list[str]:
    """Sentences of a page, two with an abbreviation in them; joined by nothing they are its text."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("aeioklmnrst", k=draw.randint(3, 7))) for _ in range(80)]
    first = f"Dr. {words[0].title()} {' '.join(words[1:20])}."
    return [first, f" Then Mr. Lee {' '.join(words[20:])}.", f" {CHINESE[0]}", CHINESE[1]]


@dataclasses.dataclass
class Pages:
    rows: list[str]
    kept: list[list[str]]
    """The sentences of each document that must stay."""


@pytest.fixture(scope="module")
def pages() -> Pages:
    kept = [page_sentences(seed) for seed in range(40)]
    texts = ["".join(sentences) for sentences in kept]
    near = [text.replace("Then", "So", 1) for text in texts[:3]]
    rows = [f"<p>{text}</p>" for text in texts[:30]]
    rows += [f"<div>{text.replace(' Then', '&nbsp; Then')}</div>" for text in texts[30:]]
    rows += ["<script>no()</script>"] * 2 + ["<b>ok</b>"] * 3
    rows += [f"<i>{text}</i>" for text in texts[:5]] + near
    rows += ["Das Wetter in den Bergen war kalt, und die Reisenden blieben bis zum Morgen im Haus, um zu warten."]
    return Pages(rows, kept)


CLEAN = CleaningConfig(html=True, whitespace=True, min_words=2, exact_duplicates=True, near_duplicates=NearDuplicates())


def config(folder: Path, pages: Pages, **changes: object) -> DataConfig:
    file = folder / "pages.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in pages.rows), encoding="utf-8")
    settings: dict = {
        "source": JsonLines(files=(str(file),)),
        "tokenizer": SentencePieceConfig(vocab_size=320),
        "length": 16,
        "validation": 0.0,
        "test": 0.0,
        "cache": str(folder / "cache"),
        "clean": CLEAN,
        "segment": SegmentationConfig(sentences="sentencex", words="jieba", language="zh"),
        "workers": 1,
    }
    return DataConfig(**(settings | changes))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, pages: Pages) -> tuple[Path, Dataset]:
    folder = tmp_path_factory.mktemp("cleaned")
    return folder, prepare(config(folder, pages), quiet=True)


def index(folder: Path, name: str) -> np.ndarray:
    (path,) = folder.glob(f"cache/data/*/train-{name}.npy")
    return np.load(path)


def byte_starts(tokenizer: Tokenizer, tokens: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(tokenizer.piece_bytes[tokens])])


def test_the_documents_that_stay_are_clean_and_the_first_of_their_kind(prepared, pages):
    dataset = prepared[1]
    texts = [dataset.tokenizer.decode(tokens) for tokens in dataset.documents("train")]
    german = pages.rows[-1]
    assert texts == [*("".join(sentences) for sentences in pages.kept), german]


def test_the_summary_counts_every_document_and_byte(prepared, pages):
    summary = prepared[1].summary()
    cleaning = summary["cleaning"]
    kept = [*("".join(sentences) for sentences in pages.kept), pages.rows[-1]]
    assert list(cleaning) == ["html", "whitespace", "length", "exact_duplicates", "near_duplicates"]
    # html: all but the 2 blank pages (dropped), and the 3 near duplicates and the German text, which have no tags
    assert cleaning["html"]["changed"] == len(pages.rows) - 6
    assert cleaning["html"]["dropped"] == 2
    assert cleaning["whitespace"] == {"changed": 10, "dropped": 0, "bytes": 20}  # a no-break space of two bytes each
    assert cleaning["length"] == {"changed": 0, "dropped": 3, "bytes": 6}
    sizes = [len(text.encode()) for text in kept]
    assert cleaning["exact_duplicates"] == {"changed": 0, "dropped": 5, "bytes": sum(sizes[:5])}
    # "So" for "Then" is two bytes less
    assert cleaning["near_duplicates"] == {"changed": 0, "dropped": 3, "bytes": sum(sizes[:3]) - 6}
    counts = summary["splits"]["train"]
    assert counts["documents"] == len(pages.rows) - sum(step["dropped"] for step in cleaning.values())
    assert counts["bytes"] == sum(sizes)
    assert counts["bytes"] == sum(len(row.encode()) for row in pages.rows) - sum(
        step["bytes"] for step in cleaning.values()
    )


def test_sentences_end_at_the_tokens_that_hold_their_last_bytes(prepared, pages):
    folder, dataset = prepared
    counts, ends = index(folder, "sentences"), index(folder, "sentence_ends")
    stored = np.split(ends, np.cumsum(counts)[:-1])
    for tokens, sentences, found in zip(dataset.documents("train"), pages.kept, stored, strict=False):
        offsets = byte_starts(dataset.tokenizer, tokens)
        expected = set()
        for end in itertools.accumulate(len(sentence.encode()) for sentence in sentences):
            expected.add(next(count for count, offset in enumerate(offsets) if offset >= end))
        assert found.tolist() == sorted(expected)


def test_words_begin_where_jieba_and_the_basic_rule_say(prepared, pages):
    folder, dataset = prepared
    documents = list(dataset.documents("train"))
    bits = np.unpackbits(index(folder, "word_starts"), bitorder="little")
    stored = np.split(bits, np.cumsum([len(tokens) for tokens in documents]))
    inside = begun = 0
    for tokens, sentences, found in zip(documents, pages.kept, stored, strict=False):
        text = "".join(sentences).encode()
        begins, within = set(), set()
        for word in CHINESE_WORDS:
            place = text.index(word.encode(), text.index("我".encode()))
            begins.add(place)
            within |= set(range(place + 1, place + len(word.encode())))
        offsets = byte_starts(dataset.tokenizer, tokens)
        for start, end, starts in zip(offsets, offsets[1:], found, strict=False):
            if any(begin in begins for begin in range(start, end)):
                assert starts
                begun += 1
            elif start in within:
                assert not starts
                inside += 1
            elif text[start : start + 1].isspace():
                assert starts
            elif start > 0 and text[start : start + 1].isalpha() and text[start - 1 : start].isalpha():
                assert not starts
    assert begun > 100
    assert inside > 100


def test_parts_change_nothing(prepared, pages, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 2000)
    again = prepare(config(tmp_path, pages), quiet=True)
    assert again.fingerprint == prepared[1].fingerprint
    assert again.summary()["cleaning"] == prepared[1].summary()["cleaning"]
    for one, other in zip(again.documents("train"), prepared[1].documents("train"), strict=True):
        np.testing.assert_array_equal(one, other)
    for name in ("sentence_ends", "word_starts"):
        np.testing.assert_array_equal(index(tmp_path, name), index(prepared[0], name))


def test_the_language_filter_drops_the_german_page(pages, tmp_path):
    english = "Page {} says that the weather in the mountains was cold, and that the travellers stayed inside."
    rows = [english.format(number) for number in range(30)]
    clean = CleaningConfig(language=LanguageFilter(accepted=("en", "zh")))
    few = Pages([*rows, pages.rows[-1]], [])
    dataset = prepare(config(tmp_path, few, clean=clean, segment=SegmentationConfig()), quiet=True)
    assert [dataset.tokenizer.decode(tokens) for tokens in dataset.documents("train")] == rows
    size = len(pages.rows[-1].encode())
    assert dataset.summary()["cleaning"] == {"language": {"changed": 0, "dropped": 1, "bytes": size}}


def test_another_version_of_a_package_that_cleans_or_segments_is_another_data_set(pages, tmp_path, monkeypatch):
    few = Pages(pages.rows[:30], [])
    installed = importlib.metadata.version

    def fingerprint(**changes: object) -> str:
        return prepare(config(tmp_path, few, **changes), quiet=True).fingerprint

    plain = {"clean": CleaningConfig(whitespace=True), "segment": SegmentationConfig()}
    html = {"clean": CleaningConfig(html=True), "segment": SegmentationConfig()}
    jieba = {"clean": CleaningConfig(), "segment": SegmentationConfig(words="jieba")}
    before = [fingerprint(**settings) for settings in (plain, html, jieba)]
    newer = {"selectolax": "99", "rjieba": "99"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: newer.get(name) or installed(name))
    after = [fingerprint(**settings) for settings in (plain, html, jieba)]
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, False]


def test_cleaning_that_leaves_nothing_is_told(pages, tmp_path):
    with pytest.raises(UserError, match=r"data\.clean"):
        prepare(config(tmp_path, pages, clean=CleaningConfig(min_characters=10**6)), quiet=True)
