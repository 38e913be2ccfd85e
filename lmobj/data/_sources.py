"""Documents out of plain text files and out of the standard library."""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lmobj.data._corpus import Corpus, Document, grouped, unix_lines
from lmobj.data._inputs import InputFile, Tally, find_inputs, hash_inputs
from lmobj.data._records import open_records
from lmobj.data._source_config import SingleSource, StdlibSource, TextFiles
from lmobj.errors import UserError

__all__ = ["StdlibGroup", "TextGroup", "open_corpus", "open_stdlib"]

_BOM = b"\xef\xbb\xbf"
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__"},
)
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")
"""Fields of syntax nodes that hold statements: where classes and functions can stand."""
_TOPICS = "pydoc_data/topics.py"


def open_corpus(source: SingleSource, workers: int, key: str = "data.source") -> Corpus:
    """The corpus that `source` describes. Reads (and hashes) its files; raises UserError for one that is missing.

    Args:
      source: where the text comes from.
      workers: threads that hash.
      key: the setting that holds `source`, for messages.
    """
    if isinstance(source, StdlibSource):
        return open_stdlib(Path(sysconfig.get_path("stdlib")), workers, key)
    if isinstance(source, TextFiles):
        return _open_text(source, workers, key)
    return open_records(source, workers, key)


def _open_text(source: TextFiles, workers: int, key: str) -> Corpus:
    inputs = find_inputs(f"{key}.files", source.files, workers)
    identity: dict[str, object] = {
        "name": source.name,
        "documents": source.documents,
        "errors": source.errors,
        "inputs": [entry.digest for entry in inputs],
    }
    return Corpus(identity, tuple(TextGroup(source, key, group) for group in grouped(inputs)), key)


@dataclass(frozen=True)
class TextGroup:
    """Text files."""

    source: TextFiles
    key: str
    inputs: tuple[InputFile, ...]

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.inputs)

    def documents(self, tally: Tally) -> Iterator[Document]:
        chunks = _blocks if self.source.documents == "blocks" else _whole
        for entry in self.inputs:
            for offset, chunk in chunks(entry, tally):
                text = self._decode(entry.name, offset, chunk)
                del chunk  # a huge document is held once
                text = unix_lines(text)
                if text.strip():
                    yield Document(text)

    def _decode(self, name: str, offset: int, chunk: bytes) -> str:
        if offset == 0 and chunk.startswith(_BOM):
            offset, chunk = len(_BOM), chunk[len(_BOM) :]
        try:
            return chunk.decode("utf-8", self.source.errors)
        except UnicodeDecodeError as error:
            bad = chunk[error.start : error.start + 4].hex(" ")
            raise UserError(
                f"{self.key}.files: {name} is not UTF-8 at byte {offset + error.start} (bytes {bad}: {error.reason}); "
                f"accepted: UTF-8 text, or {self.key}.errors: replace to read such bytes as U+FFFD."
            ) from error


def _whole(entry: InputFile, tally: Tally) -> Iterator[tuple[int, bytes]]:
    with entry.open(tally) as file:
        yield 0, file.read()


def _blocks(entry: InputFile, tally: Tally) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) of each run of lines that are not blank, without the last line's end.

    Works on bytes, line by line, so that a file of any size needs the memory of one block. Splitting at 0x0A is safe:
    it is never part of a longer UTF-8 sequence.
    """
    lines: list[bytes] = []
    start = position = 0
    with entry.open(tally) as file:
        for line in file:
            if line.strip(b" \t\r\n\x0b\x0c"):
                if not lines:
                    start = position
                lines.append(line)
            elif lines:
                yield start, b"".join(lines).rstrip(b"\r\n")
                lines = []
            position += len(line)
    if lines:
        yield start, b"".join(lines).rstrip(b"\r\n")


def open_stdlib(root: Path, workers: int, key: str = "data.source") -> Corpus:
    """The corpus of a folder that holds a standard library as sources."""
    paths = sorted(_python_files(root), key=lambda path: path.relative_to(root).as_posix())
    if not paths or not (root / _TOPICS).is_file():
        raise UserError(
            f"{key}.name is 'stdlib', but {root} does not hold the standard library as .py files with {_TOPICS}; "
            "accepted: a Python installed with its library sources, or the source 'text'."
        )
    inputs = hash_inputs(key, [str(path) for path in paths], workers)
    names = [path.relative_to(root).as_posix() for path in paths]
    identity: dict[str, object] = {
        "name": "stdlib",
        "inputs": [f"{name}:{entry.digest}" for name, entry in zip(names, inputs, strict=True)],
    }
    return Corpus(identity, (StdlibGroup(root, key, tuple(inputs)),), key)


@dataclass(frozen=True)
class StdlibGroup:
    """One document per topic of the language reference, and one per module: its docstrings, each text once.

    The `.py` files are parsed, not imported. Tests, idlelib and installed packages are left out. A file that does
    not parse is counted as skipped.
    """

    root: Path
    key: str
    inputs: tuple[InputFile, ...]

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.inputs)

    def documents(self, tally: Tally) -> Iterator[Document]:
        texts, skipped = _library(self)
        tally.skipped += skipped
        tally.read += self.size
        return map(Document, texts)


@lru_cache(maxsize=1)
def _library(group: StdlibGroup) -> tuple[list[str], int]:
    """The texts of a library, and the number of files that do not parse. Parsing takes seconds, the text is small:
    kept for the second pass."""
    seen: set[str] = set()
    documents = []
    skipped = 0
    for text in _topics(group.root / _TOPICS, group.key):
        if text and text not in seen:
            seen.add(text)
            documents.append(text)
    for entry in group.inputs:
        try:
            texts = _docstrings(Path(entry.name).read_bytes())
        except (SyntaxError, ValueError):
            skipped += 1
            continue
        new = [text for text in dict.fromkeys(texts) if text not in seen]
        seen.update(new)
        if new:
            documents.append("\n\n".join(new))
    return documents, skipped


def _python_files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            if path.name not in _SKIPPED_FOLDERS and not path.is_symlink():
                yield from _python_files(path)
        elif path.suffix == ".py":
            yield path


def _parse(source: bytes) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in somebody else's strings are not ours to report
        return ast.parse(source)


def _topics(path: Path, key: str) -> list[str]:
    """The language reference by topic: the one dict literal in `pydoc_data/topics.py`."""
    for node in _parse(path.read_bytes()).body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Dict):
            topics = ast.literal_eval(value)
            return [_clean(topics[name]) for name in sorted(topics)]
    raise UserError(f"{key}.name is 'stdlib', but {path} holds no dict of topics as CPython's does.")


def _docstrings(source: bytes) -> list[str]:
    """The cleaned docstrings of a module, its classes and its functions, in the order they stand in the file."""
    texts = []
    stack: list[ast.AST] = [_parse(source)]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text and (cleaned := _clean(text)):
                texts.append(cleaned)
        for name in reversed(_BLOCKS):
            stack.extend(reversed(getattr(node, name, ())))
    return texts


def _clean(text: str) -> str:
    """Indentation and blank edges removed, no blanks at line ends."""
    return re.sub(r"[ \t]+$", "", inspect.cleandoc(text), flags=re.MULTILINE).strip("\n")
