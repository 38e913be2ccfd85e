"""Records with named columns: JSON Lines and TSV (plain, gzip or zstd), Parquet, and TFDS data sets in array_record.

Each reader yields (place, row) in the order of its files; what is common to them takes the documents out of the rows
and answers rows of the wrong type. A column that the first row of a file lacks is a mistake in the settings, whatever
`errors` says.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, Any

from lmobj.data._corpus import GROUP_BYTES, Corpus, Document, grouped, unix_lines
from lmobj.data._inputs import InputFile, Tally, find_inputs, hash_inputs
from lmobj.data._label_sets import set_name
from lmobj.data._source_config import JsonLines, ParquetFiles, SeparatedValues, TfdsSource
from lmobj.errors import UserError

__all__ = ["FileRecords", "TfdsRecords", "open_records"]

_PARQUET_ROWS = 256
"""Rows decoded at once: a few megabytes even where documents are long."""
_FLOAT32_MAX = (2 - 2**-23) * 2.0**127
"""Labels are stored as float32."""

FileSource = JsonLines | ParquetFiles | SeparatedValues
RecordSource = FileSource | TfdsSource


def open_records(source: RecordSource, workers: int, key: str = "data.source") -> Corpus:
    """The corpus of a source of records. Raises UserError for files, columns or data sets that are not there."""
    if isinstance(source, TfdsSource):
        return _open_tfds(source, workers, key)
    inputs = find_inputs(f"{key}.files", source.files, workers)
    return Corpus(
        _identity(source, [entry.digest for entry in inputs]),
        tuple(FileRecords(source, key, group) for group in grouped(inputs)),
        key,
    )


def _identity(source: RecordSource, inputs: list[str]) -> dict[str, object]:
    columns = {"text": source.text, "pair": source.pair, "label": source.label and _label_identity(source)}
    named: dict[str, object] = {name: column for name, column in columns.items() if column is not None}
    if isinstance(source, SeparatedValues):
        named |= {"columns": source.columns, "separator": source.separator, "quotes": source.quotes}
    return {"name": source.name, **named, "errors": source.errors, "inputs": inputs}


def _label_identity(source: RecordSource) -> list[str | None]:
    separator = [source.label_separator] if source.label_kind == "classes" else []
    return [source.label, source.label_kind, *separator]


@dataclass(frozen=True)
class FileRecords:
    """Files of JSON Lines, TSV or Parquet."""

    source: FileSource
    key: str
    inputs: tuple[InputFile, ...]

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.inputs)

    def documents(self, tally: Tally) -> Iterator[Document]:
        read = _READERS[type(self.source)]
        for entry in self.inputs:
            columns = _Columns(self.source, self.key, entry.name)
            yield from columns.documents(read(entry, columns, tally), tally)


@dataclass(frozen=True)
class _Columns:
    """Takes documents out of the rows of one file; rows of the wrong type stop the reading or are counted."""

    source: RecordSource
    key: str
    where: str

    def documents(self, rows: Iterator[tuple[int, Any]], tally: Tally) -> Iterator[Document]:
        first = True
        for number, row in rows:
            if first and isinstance(row, Mapping):
                self.check(list(row))
            first = False
            fault = self.fault(row)
            if fault is not None:
                self.refuse(number, fault)
                tally.skipped += 1
            elif (document := self.document(row)) is not None:
                yield document

    def check(self, found: list[str]) -> None:
        """Raises UserError if a column is not among those found."""
        for setting in ("text", "pair", "label"):
            column = getattr(self.source, setting)
            if column is not None and column not in found:
                raise UserError(
                    f"{self.key}.{setting} is {column!r}, but {self.where} has no such column; accepted: "
                    f"{_listed(found)}."
                )

    def fault(self, row: Any) -> str | None:
        """What is wrong with a row; None if nothing is."""
        if not isinstance(row, Mapping):
            return row.message if isinstance(row, _Unreadable) else f"a {_kind(row)} instead of an object"
        for column in self.source.read:
            if column not in row:
                return f"no column {column!r}, only {_listed(list(row))}"
        source = self.source
        for text in (source.text, source.pair):
            if text is not None and (fault := _text_fault(row[text], text)):
                return fault
        if source.label is None:
            return None
        label = row[source.label]
        if source.label_kind == "number":
            return None if _is_number(label) else f"{_shown(label)} in the column {source.label!r} instead of a number"
        names = label if source.label_kind == "classes" and isinstance(label, list) else [label]
        return next(filter(None, (_class_fault(name, source) for name in names)), None)

    def document(self, row: Mapping[str, Any]) -> Document | None:
        """The document of a row without fault; None if it is blank."""
        source = self.source
        text = row[source.text]
        pair = None if source.pair is None else row[source.pair]
        label = None if source.label is None else row[source.label]
        if not text.strip() or (pair is not None and not pair.strip()):
            return None
        if label is not None:
            label = self.label(label)
        return Document(unix_lines(text), None if pair is None else unix_lines(pair), label)

    def label(self, value: Any) -> str | float:
        """A label without fault as documents have it: a number, or the name of a class or of a set of classes."""
        source = self.source
        if source.label_kind == "number":
            return float(value)
        if source.label_kind == "class":
            return str(value)
        return set_name(value if isinstance(value, list) else str(value).split(source.label_separator))

    def refuse(self, number: int, fault: str) -> None:
        if self.source.errors == "strict":
            raise UserError(
                f"{self.key}: row {number} of {self.where} has {fault}; accepted: rows with "
                f"{_wanted(self.source)} there, or {self.key}.errors: skip to leave such rows out and count them."
            )


class _Unreadable:
    """Stands for a row that is no row at all."""

    def __init__(self, message: str):
        self.message = message


def _read_json_lines(entry: InputFile, columns: _Columns, tally: Tally) -> Iterator[tuple[int, Any]]:
    """(line number from 1, parsed row) of each line that is not blank."""
    with _damage_named(columns.key, entry.name), entry.open(tally) as raw, _decompressed(entry.name, raw) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except UnicodeDecodeError as error:
                yield number, _no_utf8(error)
            except (ValueError, RecursionError) as error:
                yield number, _Unreadable(f"what is no JSON ({error})")


def _decompressed(name: str, raw: IO[bytes]) -> AbstractContextManager[IO[bytes]]:
    """The bytes inside a file, by the ending of its name."""
    if name.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if name.endswith((".zst", ".zstd")):
        return io.BufferedReader(_pyarrow(name).CompressedInputStream(raw, "zstd"))
    return nullcontext(raw)


@contextmanager
def _damage_named(key: str, name: str) -> Iterator[None]:
    """Turns what decompressors say of a damaged file into a UserError that names it."""
    try:
        yield
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{key}.files: {name} cannot be read to its end ({error}).") from error


def _read_parquet(entry: InputFile, columns: _Columns, tally: Tally) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row with the columns asked for) of each row."""
    arrow = _pyarrow(entry.name)
    import pyarrow.parquet

    try:
        with entry.open(tally) as raw, pyarrow.parquet.ParquetFile(raw) as file:
            columns.check(file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(_PARQUET_ROWS, columns=list(columns.source.read)):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{columns.key}.files: {entry.name} is no readable Parquet file ({error}).") from error


def _read_separated(entry: InputFile, columns: _Columns, tally: Tally) -> Iterator[tuple[int, Any]]:
    """(line number from 1, cells by the names of their columns) of each line that is not blank."""
    source = columns.source
    assert isinstance(source, SeparatedValues)
    with _damage_named(columns.key, entry.name), entry.open(tally) as raw, _decompressed(entry.name, raw) as lines:
        rows = _quoted(source, lines) if source.quotes else _unquoted(source, lines)
        names = source.columns
        for number, cells in rows:
            if isinstance(cells, _Unreadable):
                yield number, cells
            elif names is None:
                names = tuple(cells)
                columns.check(list(names))
            elif len(cells) != len(names):
                yield number, _Unreadable(f"{len(cells)} cells instead of {len(names)}")
            else:
                yield number, _numbered(source, dict(zip(names, cells, strict=True)))


def _unquoted(source: SeparatedValues, lines: IO[bytes]) -> Iterator[tuple[int, list[str] | _Unreadable]]:
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield number, _no_utf8(error)
            continue
        if text.strip():
            yield number, [cell.strip() for cell in text.split(source.separator)]


def _quoted(source: SeparatedValues, lines: IO[bytes]) -> Iterator[tuple[int, list[str] | _Unreadable]]:
    """By Python's csv; what it cannot read ends the file, since a quote that is never closed takes all that follows."""
    text = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(lines))
    rows = csv.reader(text, delimiter=source.separator, strict=True)
    try:
        for cells in rows:
            if any(cell.strip() for cell in cells):
                yield rows.line_num, [cell.strip() for cell in cells]
    except UnicodeDecodeError as error:
        yield rows.line_num + 1, _no_utf8(error)
    except csv.Error as error:
        yield rows.line_num, _Unreadable(f"what is no CSV ({error})")


def _numbered(source: SeparatedValues, row: dict[str, Any]) -> dict[str, Any]:
    """The row with its label as a number, where it should be one and is."""
    if source.label is not None and source.label_kind == "number":
        with suppress(ValueError):  # what is no number is told like any other row of the wrong type
            row[source.label] = float(row[source.label])
    return row


def _open_tfds(source: TfdsSource, workers: int, key: str) -> Corpus:
    """A data set that TFDS has prepared in array_record, read without TensorFlow."""
    import tensorflow_datasets as tfds

    try:
        with redirect_stdout(io.StringIO()):  # where TFDS tells at length that it misses TensorFlow
            builder = tfds.builder(source.builder, data_dir=source.data_dir)
    except Exception as error:  # TFDS has a dozen kinds, for names as for files that are damaged or missing
        raise UserError(
            f"{key}.builder is {source.builder!r}, which TFDS does not find in {source.data_dir or 'its folder'} "
            f"({_first_line(error)}); accepted: the name of a prepared data set, such as my_corpus:1.0.0."
        ) from error
    splits = builder.info.splits
    if source.split not in splits:
        found = _listed(list(splits)) if splits else "none; prepare it first, with file_format='array_record'"
        raise UserError(f"{key}.split is {source.split!r}; the splits of {source.builder} are {found}.")
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"{key}.builder: {source.builder} is stored as {builder.info.file_format.value}; accepted: a data set "
            "prepared with file_format='array_record', which is read at random and without TensorFlow."
        )
    _Columns(source, key, source.builder).check(list(builder.info.features))
    inputs = hash_inputs(f"{key}.builder", [str(path) for path in splits[source.split].filepaths], workers)
    # The shards of a split are one list of rows: they are one input, of which each group reads a range.
    digest = ":".join(entry.digest for entry in inputs)
    rows, size = splits[source.split].num_examples, sum(entry.size for entry in inputs)
    count = max(1, -(-size // GROUP_BYTES))
    bounds = [rows * group // count for group in range(count + 1)]
    groups = tuple(TfdsRecords(source, key, digest, bounds[i], bounds[i + 1], size // count) for i in range(count))
    return Corpus(_identity(source, [digest]), groups, key)


@dataclass(frozen=True)
class TfdsRecords:
    """A range of the rows of a TFDS split."""

    source: TfdsSource
    key: str
    digest: str
    start: int
    stop: int
    size: int

    def documents(self, tally: Tally) -> Iterator[Document]:
        columns = _Columns(self.source, self.key, f"{self.source.builder}, split {self.source.split}")
        yield from columns.documents(self._rows(), tally)
        tally.read += self.size

    def _rows(self) -> Iterator[tuple[int, Any]]:
        for number in range(self.start, self.stop):
            row = self._row(number)
            try:
                yield number + 1, {column: _decoded(row[column]) for column in self.source.read}
            except UnicodeDecodeError as error:
                yield number + 1, _no_utf8(error)

    def _row(self, number: int) -> Any:
        try:
            return _tfds_rows(self.source, self.digest)[number]
        except Exception as error:  # array_record, protobuf and the file system have kinds of their own
            raise UserError(
                f"{self.key}.builder: row {number + 1} of {self.source.builder}, split {self.source.split}, cannot be "
                f"read ({_first_line(error)}); accepted: a data set as TFDS wrote it. Prepare it anew."
            ) from error


@lru_cache(maxsize=1)
def _tfds_rows(source: TfdsSource, digest: str) -> Any:
    """The rows of a split, kept open while its files have this digest."""
    import tensorflow_datasets as tfds

    return tfds.builder(source.builder, data_dir=source.data_dir).as_data_source(source.split)


def _no_utf8(error: UnicodeDecodeError) -> _Unreadable:
    return _Unreadable(f"bytes that are not UTF-8 ({error.reason} at byte {error.start})")


def _decoded(value: Any) -> Any:
    """A value as TFDS gives it (bytes, a NumPy scalar or array) as Python has it."""
    if isinstance(value, bytes):
        return value.decode()
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [_decoded(one) for one in value] if isinstance(value, list) else value


_READERS = {JsonLines: _read_json_lines, SeparatedValues: _read_separated, ParquetFiles: _read_parquet}


def _pyarrow(name: str) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(
            f"data.source.files: reading {name} needs pyarrow, which is not installed; pip install 'lmobj[arrow]'."
        ) from error
    return pyarrow


def _text_fault(value: Any, column: str) -> str | None:
    if not isinstance(value, str):
        return _kind_fault(value, column, "text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
            return f"text in {column!r} with half of a surrogate pair, which no UTF-8 can hold"
    return None


def _class_fault(value: Any, source: RecordSource) -> str | None:
    """What is wrong with the name of a class."""
    assert source.label is not None
    if isinstance(value, str):
        return _text_fault(value, source.label)
    return None if isinstance(value, bool | int) else _kind_fault(value, source.label, "the name of a class")


def _kind_fault(value: Any, column: str, wanted: str) -> str:
    return f"a {_kind(value)} in the column {column!r} instead of {wanted}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _FLOAT32_MAX


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, float) else f"a {_kind(value)}"


def _wanted(source: RecordSource) -> str:
    wanted = "text" if source.pair is None else "two texts"
    if source.label is None:
        return wanted
    return f"{wanted} and {_LABELS[source.label_kind]}"


_LABELS = {"class": "the name of a class", "classes": "names of classes", "number": "a number"}


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") if names else "none at all"
