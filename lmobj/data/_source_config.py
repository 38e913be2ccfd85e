"""Settings of where text comes from: the sources, and mixtures of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lmobj.errors import UserError

__all__ = [
    "JsonLines",
    "MixtureSource",
    "ParquetFiles",
    "ReplaySource",
    "SeparatedValues",
    "SingleSource",
    "StdlibSource",
    "TextFiles",
    "TfdsSource",
    "WeightedSource",
    "check_choice",
    "check_files",
]


@dataclass(frozen=True)
class StdlibSource:
    """The text that every CPython carries: its language reference (`pydoc_data.topics`) and the standard library's
    docstrings, about 2 MB of English. Nothing is downloaded and no module of the library is imported.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: Literal["stdlib"] = "stdlib"
    """Selects this source."""


@dataclass(frozen=True)
class TextFiles:
    """UTF-8 text files. A leading byte order mark is dropped, line ends are read as `open` reads them."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: Literal["text"] = "text"
    """Selects this source."""
    files: tuple[str, ...] = ()
    """Paths, glob patterns (`**` crosses folders) or fsspec URLs; each must match at least one file."""
    documents: Literal["file", "blocks"] = "file"
    """What one document is: a whole file, or a block between blank lines."""
    errors: Literal["strict", "replace"] = "strict"
    """Bytes that are not UTF-8: `strict` stops and names them, `replace` reads them as U+FFFD."""

    def __post_init__(self) -> None:
        check_files(self.files)
        check_choice("data.source.documents", self.documents, ("file", "blocks"))
        check_choice("data.source.errors", self.errors, ("strict", "replace"))


@dataclass(frozen=True)
class _Columns:
    """What the sources of records share: which columns are read, and what becomes of rows without them."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: str = ""
    """Selects this source."""
    text: str = "text"
    """Column that holds the text; every row is a document."""
    pair: str | None = None
    """Column that holds a second text, which belongs to the first; absent: documents are single texts."""
    label: str | None = None
    """Column that holds the document's label; absent: documents have none."""
    label_kind: Literal["class", "classes", "number"] = "class"
    """What labels are: names of classes (text, whole numbers, true or false), any number of them for each document, or
    numbers to predict."""
    label_separator: str = ","
    """Of classes: what stands between their names in a text. A list of names is taken as it is, and an empty text or
    list is no class."""
    errors: Literal["strict", "skip"] = "strict"
    """Rows without text (or pair, or label) in their columns: `strict` stops and names the first, `skip` leaves them
    out and counts them."""

    def __post_init__(self) -> None:
        check_choice("data.source.label_kind", self.label_kind, ("class", "classes", "number"))
        if not self.label_separator:
            raise UserError("data.source.label_separator is empty; accepted: one or more characters.")
        check_choice("data.source.errors", self.errors, ("strict", "skip"))

    @property
    def read(self) -> tuple[str, ...]:
        """The columns to read, the text first, each once."""
        return tuple(dict.fromkeys(name for name in (self.text, self.pair, self.label) if name is not None))


@dataclass(frozen=True)
class JsonLines(_Columns):
    """JSON objects, one per line, with the text in a named column. Files that end in .gz or .zst are decompressed."""

    name: Literal["jsonl"] = "jsonl"
    """Selects this source."""
    files: tuple[str, ...] = ()
    """Paths, glob patterns (`**` crosses folders) or fsspec URLs; each must match at least one file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_files(self.files)


@dataclass(frozen=True)
class ParquetFiles(_Columns):
    """Parquet files with the text in a named column of strings."""

    name: Literal["parquet"] = "parquet"
    """Selects this source."""
    files: tuple[str, ...] = ()
    """Paths, glob patterns (`**` crosses folders) or fsspec URLs; each must match at least one file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_files(self.files)


@dataclass(frozen=True)
class SeparatedValues(_Columns):
    """Tables in text: a record on each line, its cells apart by tabs or another character, without their outer spaces.

    Marks of quotation are text like any other unless `quotes` is set: GLUE's files hold single ones.
    """

    name: Literal["tsv"] = "tsv"
    """Selects this source."""
    files: tuple[str, ...] = ()
    """Paths, glob patterns (`**` crosses folders) or fsspec URLs; each must match at least one file."""
    columns: tuple[str, ...] | None = None
    """Names of the columns, of files that do not have them in their first line; absent: they are there."""
    separator: str = "\t"
    """The character between two cells."""
    quotes: bool = False
    """Whether cells may stand in double quotes, with separators, line ends and doubled quotes inside (CSV)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_files(self.files)
        if len(self.separator) != 1 or self.separator in '\r\n"':
            raise UserError(
                f"data.source.separator is {self.separator!r}; accepted: one character, a tab or a comma say."
            )
        if self.columns is not None and len(set(self.columns)) < max(1, len(self.columns)):
            raise UserError(f"data.source.columns is {list(self.columns)}; accepted: one or more names, each once.")


@dataclass(frozen=True)
class TfdsSource(_Columns):
    """A data set that TFDS has prepared with `file_format="array_record"`; TensorFlow is not needed."""

    name: Literal["tfds"] = "tfds"
    """Selects this source."""
    builder: str = ""
    """Name of the data set as `tfds.builder` takes it: `name`, `name/config` or `name/config:version`."""
    split: str = "train"
    """The split of the data set to read; lmobj divides it anew by its own shares."""
    data_dir: str | None = None
    """Folder of prepared data sets; if absent that of TFDS."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.builder:
            raise UserError("data.source.builder is empty; accepted: the name of a prepared TFDS data set.")


SingleSource = StdlibSource | TextFiles | JsonLines | ParquetFiles | SeparatedValues | TfdsSource


@dataclass(frozen=True)
class ReplaySource:
    """The text of the run in `init.run`, of which a share keeps a model from forgetting it (replay of earlier data).

    When a config is read, that run's `data.source` is put in place of this; the sources of a mixture under NAME-SOURCE,
    each with its share of the weight. `data.clean` and the shares that are held out are that run's where a config does
    not give them, so that what was held out still is.

    Ibrahim et al. 2024, "Simple and Scalable Strategies to Continually Pre-train Large Language Models".
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: Literal["replay"] = "replay"
    """Selects this source."""


@dataclass(frozen=True)
class WeightedSource:
    """One source of a mixture."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    weight: float = 1.0
    """Share of the rows that come from this source, relative to the other weights; above 0."""
    source: SingleSource | ReplaySource = field(default_factory=StdlibSource)
    """Where the text comes from."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise UserError(f"data.source.sources.weight is {self.weight}; accepted: a finite number above 0.")


@dataclass(frozen=True)
class MixtureSource:
    """Several sources, read in fixed proportions. Each is prepared on its own; all share one tokenizer."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: Literal["mixture"] = "mixture"
    """Selects this source."""
    sources: dict[str, WeightedSource] = field(default_factory=dict)
    """The sources by a name of your choice; at least one."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("data.source.sources is empty; accepted: one or more named sources, each with a weight.")


def check_choice(key: str, value: str | None, accepted: tuple[str | None, ...]) -> None:
    """Raises UserError if `value` is none of those accepted."""
    if value not in accepted:
        names = ("null" if name is None else name for name in accepted)
        raise UserError(f"{key} is {value!r}; accepted: {', '.join(names)}.")


def check_files(files: tuple[str, ...]) -> None:
    """Raises UserError if a source names no files."""
    if not files:
        raise UserError("data.source.files is empty; accepted: one or more paths, glob patterns or URLs of files.")
