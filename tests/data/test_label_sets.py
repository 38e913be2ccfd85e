"""Sets of classes: from texts and lists to an array for each row, in every split and mixture."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_corpus import generated_documents, small_config
from test_examples import read_back

from lmobj.batch import RowSpec
from lmobj.data import Dataset, HeldOut, JsonLines, ParquetFiles, SentencePieceConfig, SeparatedValues, prepare
from lmobj.data._label_sets import LabelSets, names_of_set, set_name
from lmobj.data._records import _decoded
from lmobj.errors import UserError

SETS = (["rain", "wind"], ["sun"], [], ["wind"])


def spec(classes: int) -> RowSpec:
    return RowSpec("examples", 900, (4,), (5,), ("label_sets",), classes=classes)


def rows(count: int = 40, sets: Any = SETS, seed: int = 5) -> list[dict[str, Any]]:
    texts = generated_documents(count, seed)
    return [{"text": f"{i} {text.replace(chr(10), ' ')}", "y": sets[i % len(sets)]} for i, text in enumerate(texts)]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def json_source(path: Path, **settings: Any) -> JsonLines:
    return JsonLines(files=(str(path),), label="y", label_kind="classes", **settings)


def labels_of(dataset: Dataset, split: str, classes: int) -> dict[str, list[str]]:
    """The names of the classes of each text of a split, from its rows."""
    table = dataset.rows(spec(classes), split=split, batch_size=7)
    found = {}
    for step in range(table.steps_per_epoch):
        batch = table.batch(step)
        assert batch["label_sets"].dtype == np.float32
        for (text, _), row in zip(read_back(dataset, batch), batch["label_sets"], strict=False):
            found[text] = [name for name, one in zip(dataset.classes, row, strict=True) if one == 1]
        assert not batch["label_sets"][~batch["segment_ids"].any(axis=1)].any()
    return found


def test_names_of_sets() -> None:
    assert set_name([" b", "a", "b ", ""]) == '["a", "b"]'
    assert set_name([True, 3]) == '["3", "True"]'
    assert set_name([]) == set_name([""]) == "[]"
    assert names_of_set(set_name(["x, y", '"z"'])) == ['"z"', "x, y"]
    sets = LabelSets(np.array([1, 0, 1], np.int32), ["[]", '["a", "c"]'], ["a", "b", "c"])
    np.testing.assert_array_equal(sets[np.array([2, 1])], [[1, 0, 1], [0, 0, 0]])


def test_every_source_has_the_same_sets(tmp_path: Path) -> None:
    """Lists of JSON and Parquet, and the cells of TSV, where an empty one is no class."""
    import pyarrow
    from pyarrow import parquet

    lines = rows()
    truth = {line["text"]: line["y"] for line in lines}
    parquet.write_table(pyarrow.Table.from_pylist(lines), tmp_path / "rows.parquet")
    table = "text\ty\n" + "".join(f"{line['text']}\t{' + '.join(line['y'])}\n" for line in lines)
    with gzip.open(tmp_path / "rows.tsv.gz", "wt") as file:
        file.write(table)
    settings: dict[str, Any] = {"label": "y", "label_kind": "classes"}
    for source in (
        json_source(write_lines(tmp_path / "rows.jsonl", lines)),
        ParquetFiles(files=(str(tmp_path / "rows.parquet"),), **settings),
        SeparatedValues(files=(str(tmp_path / "rows.tsv.gz"),), label_separator="+", **settings),
    ):
        dataset = prepare(small_config(tmp_path, tmp_path, source=source), quiet=True)
        assert dataset.classes == dataset.summary()["classes"] == ["rain", "sun", "wind"]
        found: dict[str, list[str]] = {}
        for split in ("train", "validation", "test"):
            found |= labels_of(dataset, split, 3)
        assert found == {text.strip(): sorted(names) for text, names in truth.items()}
        every = dataset.reference(spec(3), "train")
        assert every.shape == (dataset.summary()["splits"]["train"]["documents"], 3)


def test_a_cell_of_tfds_is_a_list() -> None:
    assert _decoded(np.array([b"a", b"b"], object)) == ["a", "b"]
    assert _decoded(np.array([3, 1], np.int64)) == [3, 1]
    assert _decoded(b"x") == "x"
    assert _decoded(np.int64(3)) == 3


def test_ids_of_a_mixture_are_those_of_all(tmp_path: Path) -> None:
    first = prepare(
        small_config(tmp_path, tmp_path, source=json_source(write_lines(tmp_path / "a", rows()))), quiet=True
    )
    first.tokenizer.save(tmp_path / "tokenizer.model")
    others = rows(sets=(["calm", "wind"], ["calm"]), seed=6)
    second = prepare(
        small_config(
            tmp_path,
            tmp_path,
            source=json_source(write_lines(tmp_path / "b", others)),
            tokenizer=SentencePieceConfig(path=str(tmp_path / "tokenizer.model")),
        ),
        quiet=True,
    )
    both = Dataset({"one": first._first._folder, "two": second._first._folder})
    assert both.classes == ["calm", "rain", "sun", "wind"]
    own = labels_of(first, "train", 3) | labels_of(second, "train", 2)
    found = labels_of(both, "train", 4)
    assert found == {text: own[text] for text in found}
    assert {name for names in found.values() for name in names} == set(both.classes)


def test_what_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows", rows())
    config = small_config(tmp_path, path, source=json_source(path))
    dataset = prepare(config, quiet=True)
    plain = RowSpec("examples", 900, (4,), (5,), ("labels",))
    with pytest.raises(UserError, match=r"reads labels of its examples.*label_kind: class\."):
        dataset.rows(plain, batch_size=2)
    one = prepare(
        small_config(tmp_path, path, source=JsonLines(files=(str(path),), label="text", label_kind="class")), quiet=True
    )
    with pytest.raises(UserError, match=r"reads label_sets of its examples.*label_kind: classes\."):
        one.rows(spec(3), batch_size=2)
    write_lines(tmp_path / "held", [{"text": "new", "y": ["wind", "snow"]}])
    held = small_config(
        tmp_path, path, source=json_source(path), validation=HeldOut(files=(str(tmp_path / "held"),)), test=0.0
    )
    with pytest.raises(
        UserError, match=r"data\.validation has the label 'snow', which no .* accepted: rain, sun, wind"
    ):
        prepare(held, quiet=True)
    write_lines(tmp_path / "odd", [{"text": "a", "y": ["x"]}, {"text": "b", "y": ["x", None]}])
    with pytest.raises(UserError, match=r"row 2 of .*odd has a null in the column 'y' instead of the name of a class"):
        prepare(small_config(tmp_path, path, source=json_source(tmp_path / "odd")), quiet=True)
    nowhere = small_config(tmp_path, path, source=JsonLines(files=(str(path),), label="z", label_kind="classes"))
    with pytest.raises(UserError, match=r"label is 'z', but .* has no such column; accepted: text, y"):
        prepare(nowhere, quiet=True)
    with pytest.raises(UserError, match="label_separator is empty"):
        json_source(path, label_separator="")
