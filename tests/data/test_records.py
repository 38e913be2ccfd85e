"""Documents out of records: JSON Lines, Parquet, TFDS, local and behind URLs."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from lmobj.data import (
    DataConfig,
    JsonLines,
    ParquetFiles,
    SentencePieceConfig,
    SeparatedValues,
    TextFiles,
    TfdsSource,
    prepare,
)
from lmobj.data._inputs import Tally
from lmobj.data._records import open_records
from lmobj.data._sources import open_corpus
from lmobj.errors import UserError

# TFDS reads its own descriptions by a name that newer protobufs discourage.
pytestmark = pytest.mark.filterwarnings(r"ignore:label\(\) is deprecated:DeprecationWarning")

_ROWS = [{"id": 1, "body": "one\r\nline"}, {"id": 2, "body": "  "}, {"id": 3, "body": "drei é 三"}]
_TEXTS = ["one\nline", "drei é 三"]


def json_lines(rows: Iterable[object]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def texts(source) -> list[str]:
    return [document.text for document in open_corpus(source, 2).documents()]


def jsonl(path: Path | str, **options: str) -> list[str]:
    return texts(JsonLines(files=(str(path),), text="body", **options))


def parquet(path: Path, **options: str) -> list[str]:
    return texts(ParquetFiles(files=(str(path),), text="body", **options))


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstd)])
def test_json_lines_plain_and_compressed(tmp_path, suffix, pack):
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(pack(json_lines(_ROWS) + b"\n"))
    assert jsonl(path) == _TEXTS


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_parquet_over_several_batches(tmp_path, compression):
    expected = [f"row {number}" for number in range(600)]
    table = pa.table({"id": range(600), "body": expected})
    pq.write_table(table, tmp_path / "rows.parquet", compression=compression)
    assert parquet(tmp_path / "rows.parquet") == expected


def test_a_missing_column_lists_those_found_even_when_rows_are_skipped(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(json_lines([{"id": 1, "content": "x"}]))
    pq.write_table(pa.table({"id": [1], "content": ["x"]}), tmp_path / "rows.parquet")
    for read, name in ((jsonl, "rows.jsonl"), (parquet, "rows.parquet")):
        with pytest.raises(UserError, match=rf"data\.source\.text is 'body', but .*{name} .*accepted: id, content"):
            read(tmp_path / name, errors="skip")


# A byte order mark, carriage returns, a lone quote, spaces before a tab, U+2028 and a form feed inside texts.
_TSV = '\ufefflabel\tbody\r\n1\tsaid "yes \r\n\r\n0 \t two\u2028lines\fhere\r\n'.encode()


def tsv(path: Path, **options) -> list[tuple[str, object]]:
    source = SeparatedValues(files=(str(path),), text="body", label="label", **options)
    return [(document.text, document.label) for document in open_corpus(source, 2).documents()]


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress)])
def test_tab_separated_values(tmp_path, suffix, pack):
    path = tmp_path / f"rows.tsv{suffix}"
    path.write_bytes(pack(_TSV))
    assert tsv(path) == [('said "yes', "1"), ("two\u2028lines\fhere", "0")]
    assert tsv(path, label_kind="number") == [('said "yes', 1.0), ("two\u2028lines\fhere", 0.0)]
    path.write_bytes(pack(_TSV.split(b"\r\n", 1)[1]))
    assert tsv(path, columns=("label", "body"))[0] == ('said "yes', "1")
    with pytest.raises(UserError, match=r"text is 'body', but .* no such column; accepted: 1, said"):
        tsv(path)


def test_comma_separated_values_in_quotes(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('body,label\n"a, ""b""\nc",x\nd,y\n')
    assert tsv(path, separator=",", quotes=True) == [('a, "b"\nc', "x"), ("d", "y")]
    path.write_text('body,label\nd,y\n"never closed,x\n')
    with pytest.raises(UserError, match=r"row 3 of .*rows\.csv has what is no CSV"):
        tsv(path, separator=",", quotes=True)


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        (b"1", {}, "1 cells instead of 2"),
        (b"1\tx\ty", {}, "3 cells instead of 2"),
        (b"1\t\xff", {}, "bytes that are not UTF-8"),
        (b"good\tx", {"label_kind": "number"}, "a str in the column 'label' instead of a number"),
        (b"nan\tx", {"label_kind": "number"}, "nan in the column 'label' instead of a number"),
    ],
)
def test_lines_of_tsv_that_are_no_rows(tmp_path, line, options, message):
    path = tmp_path / "rows.tsv"
    path.write_bytes(_TSV + line + b"\r\n")
    with pytest.raises(UserError, match=rf"row 5 of .*rows\.tsv has {message}"):
        tsv(path, **options)
    assert len(tsv(path, errors="skip", **options)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"separator": "||"}, r"data\.source\.separator is '\|\|'; accepted: one character"),
        ({"columns": ()}, r"data\.source\.columns is \[\]"),
        ({"columns": ("a", "a")}, r"each once"),
    ],
)
def test_tables_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        SeparatedValues(files=("x",), **options)


_BAD_ROWS = [
    (b'{"body": 7}', "a int in the column 'body'"),
    (b'{"body": null}', "a null in the column 'body'"),
    (b'{"id": 4}', "no column 'body', only id"),
    (b"[1, 2]", "a list instead of an object"),
    (b'{"body": "\\ud800"}', "half of a surrogate pair"),
    (b'{"body": "x"', "no JSON"),
    (b'{"body": "\xff"}', "not UTF-8"),
    (b"[" * 100_000, "no JSON"),
]


@pytest.mark.parametrize(("line", "message"), _BAD_ROWS)
def test_a_row_of_the_wrong_type_is_named_or_skipped_and_counted(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"body": "good"}\n\n' + line + b'\n{"body": "better"}\n')
    with pytest.raises(UserError, match=rf"row 3 of .*rows\.jsonl has .*{message}.*errors: skip"):
        jsonl(path)
    corpus, tally = open_records(JsonLines(files=(str(path),), text="body", errors="skip"), 1), Tally()
    assert [document.text for document in corpus.documents(tally)] == ["good", "better"]
    assert (tally.skipped, tally.read) == (1, path.stat().st_size)


def test_rows_of_the_wrong_type_in_parquet(tmp_path):
    pq.write_table(pa.table({"body": ["one", None, "two"]}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"row 2 of .*rows\.parquet has a null"):
        parquet(tmp_path / "rows.parquet")
    assert parquet(tmp_path / "rows.parquet", errors="skip") == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.jsonl.gz", gzip.compress(json_lines(_ROWS * 100))[:-20]),
        ("plain.jsonl.gz", json_lines(_ROWS)),
        ("cut.jsonl.zst", zstd(json_lines([{"body": str(n)} for n in range(5000)]))[:-2000]),
        ("plain.jsonl.zst", json_lines(_ROWS)),
        ("text.parquet", b"no parquet at all"),
        ("short.parquet", b"PAR1"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    read = parquet if name.endswith("parquet") else jsonl
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        read(tmp_path / name, errors="skip")


def test_files_behind_a_url():
    memory = fsspec.filesystem("memory")
    for number in range(2):
        memory.pipe(f"/corpus/{number}.jsonl", json_lines([{"body": f"text {number}"}]))
        memory.pipe(f"/corpus/{number}.txt", f"text {number}".encode())
    assert sorted(jsonl("memory://corpus/*.jsonl")) == ["text 0", "text 1"]
    assert jsonl("memory://corpus/1.jsonl") == ["text 1"]
    assert sorted(texts(TextFiles(files=("memory://corpus/*.txt",)))) == ["text 0", "text 1"]
    with pytest.raises(UserError, match=r"no file matches 'memory://corpus/\*\.csv'"):
        jsonl("memory://corpus/*.csv")
    with pytest.raises(UserError, match=r"'nowhere://corpus' cannot be opened .*nowhere"):
        jsonl("nowhere://corpus")


class TinyCorpus(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"body": tfds.features.Text(), "number": tfds.features.Scalar(np.int64)})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, _) -> dict[str, Iterator]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator:
        for number in range(300):
            yield number, {"body": f"Sentence {number} é of a small corpus, not much but enough.", "number": number}


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("tfds"))
    TinyCorpus(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds_without_tensorflow(tfds_folder, tmp_path):
    source = TfdsSource(builder="tiny_corpus:1.0.0", text="body", data_dir=tfds_folder)
    expected = {row["body"] for _, row in TinyCorpus._generate_examples(None)}
    found = texts(source)
    assert len(found) == 300
    assert set(found) == expected
    config = DataConfig(source, SentencePieceConfig(vocab_size=300), length=16, cache=str(tmp_path), workers=1)
    dataset = prepare(config, quiet=True)
    assert sum(split["documents"] for split in dataset.summary()["splits"].values()) == 300
    decoded = {dataset.tokenizer.decode(tokens) for split in ("train", "test") for tokens in dataset.documents(split)}
    assert decoded <= expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"builder": "not_there"}, r"data\.source\.builder is 'not_there', which TFDS does not find"),
        ({"split": "dev"}, r"data\.source\.split is 'dev'; the splits of tiny_corpus:1.0.0 are train"),
        ({"text": "txt"}, r"data\.source\.text is 'txt', but tiny_corpus:1.0.0 has no such column; accepted: .*body"),
        ({"text": "number"}, r"row 1 of tiny_corpus:1.0.0, split train has a int in the column 'number'"),
    ],
)
def test_mistakes_about_tfds(tfds_folder, options, message):
    given = {"builder": "tiny_corpus:1.0.0", "text": "body", "data_dir": tfds_folder, **options}
    with pytest.raises(UserError, match=message):
        texts(TfdsSource(**given))
