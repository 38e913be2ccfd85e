"""Queries and texts: what files say, the rows that they become, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmobj.batch import RowSpec
from lmobj.data import DataConfig, HeldOut, RetrievalFiles, SentencePieceConfig
from lmobj.errors import UserError
from lmobj.tasks import ExampleDataset, MatchedTexts, RetrievalExamples, prepare_any

ROWS = [
    {"query": "one cat", "positive": "a cat", "negatives": ["a dog", " ", "a hen"]},
    {"query": "one dog", "positive": "a dog", "negatives": "a cat"},
    {"query": "two hens", "positive": "some hens and a cat and a dog and a hen", "other": 1},
    {"query": "one cat", "positive": "the cat", "negatives": None},
]


def write(path: Path, *rows: Any) -> RetrievalFiles:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return RetrievalFiles(files=(str(path),))


def read(source: RetrievalFiles) -> list[Any]:
    return list(RetrievalExamples(source).read(source.files[0]))


def test_json_lines(tmp_path: Path) -> None:
    assert read(write(tmp_path / "f", *ROWS, "")) == [
        MatchedTexts("one cat", "a cat", ("a dog", "a hen")),
        MatchedTexts("one dog", "a dog", ("a cat",)),
        MatchedTexts("two hens", ROWS[2]["positive"], ()),
        MatchedTexts("one cat", "the cat", ()),
    ]


def test_separated_values(tmp_path: Path) -> None:
    source = dataclasses.replace(
        write(tmp_path / "f", "id\tq\tp\tn", "1\tone cat\t a cat\ta dog", "2\tx\ty\t"),
        lines="tsv", query="q", positive="p", negatives="n",
    )  # fmt: skip
    expected = [MatchedTexts("one cat", "a cat", ("a dog",)), MatchedTexts("x", "y", ())]
    assert read(source) == expected
    write(tmp_path / "f", "1,one cat,a cat,a dog", "2,x,y,")
    assert read(dataclasses.replace(source, columns=("id", "q", "p", "n"), separator=",")) == expected
    write(tmp_path / "f", "id\tq\tp\tn")
    with pytest.raises(UserError, match=r"data\.source\.positive is 'text', but .*such column; accepted: id, q, p, n"):
        read(dataclasses.replace(source, positive="text"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q"}, "f:2 has no 'positive'"),
        ({"query": 1, "positive": "p"}, "f:2 has 1 under 'query'; accepted: text"),
        ({"query": " ", "positive": "p"}, "f:2 has a blank text under 'query'"),
        ({"query": "q", "positive": "p", "negatives": 3}, "f:2 has 3 under 'negatives'; accepted: a text or a list"),
        ({"query": "q", "positive": "p", "negatives": ["n", 3]}, "f:2 has more than texts under 'negatives'"),
        ("[1]", "f:2 is a list; accepted: one object"),
        ("{", "f:2 is no JSON"),
    ],
)
def test_rows_without_texts_are_refused_or_left_out(tmp_path: Path, row: Any, message: str) -> None:
    source = write(tmp_path / "f", ROWS[1], row)
    with pytest.raises(UserError, match=rf"{message}.*data\.source\.errors=skip"):
        read(source)
    assert read(dataclasses.replace(source, errors="skip"))[1:] == [None]


def test_settings_that_cannot_be_are_refused() -> None:
    for settings, message in (
        ({"files": ()}, "files is empty"),
        ({"max_query": 0}, "max_query is 0; accepted: 1 or more"),
        ({"lines": "csv"}, "lines is 'csv'; accepted: jsonl, tsv"),
        ({"query": "positive"}, "accepted: three columns"),
        ({"columns": ("query", "positive")}, "lines is 'jsonl'.*accepted: data.source.lines=tsv"),
        ({"lines": "tsv", "columns": ("query", "text")}, "'query' and 'positive' among them"),
        ({"separator": "::"}, "separator is '::'; accepted: one character"),
    ):
        with pytest.raises(UserError, match=message):
            RetrievalFiles(**{"files": ("f",), **settings})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ExampleDataset[MatchedTexts]:
    folder = tmp_path_factory.mktemp("retrieval")
    source = dataclasses.replace(write(folder / "train", *ROWS), max_query=3)
    write(folder / "held", {"query": "a hen", "positive": "one hen"})
    held = HeldOut(files=(str(folder / "held"),))
    tokenizer = SentencePieceConfig(vocab_size=300, model="char")
    found = prepare_any(DataConfig(source=source, tokenizer=tokenizer, validation=held, test=0), quiet=True)
    assert isinstance(found, ExampleDataset)
    return found


def spec(data: ExampleDataset[Any], length: int = 25, texts: int = 3) -> RowSpec:
    vocab = data.vocab
    assert vocab.cls is not None
    assert vocab.sep is not None
    return RowSpec("texts", length, (vocab.cls,), (vocab.sep,), ("text_ids",), texts=texts)


def test_rows_are_segments(data: ExampleDataset[MatchedTexts]) -> None:
    # 25 tokens: a query of up to 3 and two special ones, which leaves 10 for each of two texts, 8 without special ones.
    rows = data.rows(spec(data), split="train", batch_size=4)
    order = np.argsort(rows.batch(0)["row_ids"][:, 1])
    batch = {name: x[order] for name, x in rows.batch(0).items()}
    reference = data.reference(spec(data), "train")
    seen = {}
    for tokens, segments, positions, ids in zip(
        *(batch[name] for name in ("tokens", "segment_ids", "positions", "text_ids")), strict=True
    ):
        for place, text in enumerate(ids):
            own = np.flatnonzero(segments == place + 1)
            assert (text == -1) == (len(own) == 0)
            if text == -1:
                continue
            whole = data.tokenizer.encode(reference.texts[text]).tolist()
            cut = whole[: 8 if place else 3]
            assert tokens[own].tolist() == [data.vocab.cls, *cut, data.vocab.sep]
            assert positions[own].tolist() == list(range(len(cut) + 2))
            assert np.all(np.diff(own) == 1)
        assert np.all(tokens[segments == 0] == data.vocab.pad)
        named = tuple(None if i < 0 else reference.texts[i] for i in ids)
        seen[named] = True
    assert set(seen) == {
        ("one cat", "a cat", "a dog"),
        ("one dog", "a dog", "a cat"),
        ("two hens", ROWS[2]["positive"], None),
        ("one cat", "the cat", None),
    }
    assert len(set(reference.texts)) == len(reference.texts)


def test_held_out_files_may_have_no_negatives(data: ExampleDataset[MatchedTexts]) -> None:
    batch = data.rows(spec(data), split="validation", batch_size=2).batch(0)
    assert batch["text_ids"].tolist() == [[0, 1, -1], [0, 0, 0]]
    assert not batch["segment_ids"][1].any()


def test_rows_that_cannot_be_are_refused(data: ExampleDataset[MatchedTexts], tmp_path: Path) -> None:
    # A query of 3 and two texts of 1, each with 2 special tokens, are 11.
    data.rows(spec(data, 11), batch_size=1)
    with pytest.raises(UserError, match=r"data\.length is 10, which leaves no room for 2 texts .*accepted: 11 or more"):
        data.rows(spec(data, 10), batch_size=1)
    with pytest.raises(
        UserError, match=r"source\.name is 'retrieval', which has queries and texts that belong to them"
    ):
        data.rows(RowSpec("packed", 16), batch_size=1)
    source = write(tmp_path / "f", *ROWS[2:])
    settings = DataConfig(
        source=source, tokenizer=SentencePieceConfig(vocab_size=300, model="char"), validation=0, test=0
    )
    bare = prepare_any(settings, quiet=True)
    with pytest.raises(UserError, match=r"objective\.negatives is 1, and no row of data\.source has any"):
        bare.rows(spec(data, 64), batch_size=1)
