"""Where documents come from: a `Corpus` names its inputs by content and yields its documents in a fixed order.

The order of documents depends on what the inputs hold, never on where they lie or when they were written, so the
fingerprint (made of content and settings) decides every batch.
"""

from __future__ import annotations

import ast
import glob
import hashlib
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from lmobj.data._config import Source, StdlibSource, TextFiles
from lmobj.errors import UserError

__all__ = ["Corpus", "open_corpus"]

_BOM = b"\xef\xbb\xbf"
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__"},
)
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")
"""Fields of syntax nodes that hold statements: where classes and functions can stand."""
_TOPICS = "pydoc_data/topics.py"


class Corpus(Protocol):
    """Inputs with known content, and the documents in them."""

    @property
    def identity(self) -> dict[str, object]:
        """What the documents are made of, in JSON: settings and digests of the inputs."""
        ...

    @property
    def size(self) -> int:
        """Bytes of text in all documents together, or a little more."""
        ...

    @property
    def skipped(self) -> int:
        """Input files that could not be read as what they are; known once `documents` was exhausted."""
        ...

    def documents(self) -> Iterator[str]:
        """The documents, in an order fixed by their content. Blank documents are left out."""
        ...


def open_corpus(source: Source, workers: int) -> Corpus:
    """The corpus that `source` describes. Reads (and hashes) its files; raises UserError for one that is missing."""
    if isinstance(source, StdlibSource):
        return StdlibCorpus(Path(sysconfig.get_path("stdlib")), workers)
    return TextCorpus(source, workers)


@dataclass(frozen=True)
class _Input:
    path: Path
    digest: str
    size: int


def _hash_files(paths: list[Path], workers: int) -> list[_Input]:
    def hashed(path: Path) -> _Input:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
                return _Input(path, digest, file.tell())
        except OSError as error:
            raise UserError(f"data.source: the file {path} cannot be read ({error.strerror}).") from error

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(hashed, paths))


class TextCorpus:
    """Text files matched by patterns. A file matched twice counts once; equal files in two places count twice."""

    def __init__(self, source: TextFiles, workers: int):
        paths: dict[Path, None] = {}
        for pattern in source.files:
            name = os.path.expanduser(pattern)
            # A file whose name holds brackets is itself before it is a pattern.
            found = [name] if os.path.isfile(name) else glob.glob(name, recursive=True)
            found = [path for path in found if os.path.isfile(path)]
            if not found:
                raise UserError(
                    f"data.source.files: no file matches {pattern!r} (looked from {os.getcwd()}); accepted: a path or "
                    "glob pattern of existing text files."
                )
            paths.update((Path(path).resolve(), None) for path in found)
        self._source = source
        # Ordered by content, so that neither paths nor the order of patterns reach the batches.
        self._inputs = sorted(_hash_files(list(paths), workers), key=lambda entry: (entry.digest, entry.path))
        self.size = sum(entry.size for entry in self._inputs)
        self.skipped = 0
        if self.size == 0:
            raise UserError(f"data.source.files: all {len(self._inputs)} matched files are empty: {source.files}.")

    @property
    def identity(self) -> dict[str, object]:
        return {
            "name": self._source.name,
            "documents": self._source.documents,
            "errors": self._source.errors,
            "inputs": [entry.digest for entry in self._inputs],
        }

    def documents(self) -> Iterator[str]:
        for entry in self._inputs:
            chunks = _blocks(entry.path) if self._source.documents == "blocks" else _whole(entry.path)
            for offset, chunk in chunks:
                text = self._decode(entry.path, offset, chunk)
                text = text.replace("\r\n", "\n").replace("\r", "\n")
                if text.strip():
                    yield text

    def _decode(self, path: Path, offset: int, chunk: bytes) -> str:
        if offset == 0 and chunk.startswith(_BOM):
            offset, chunk = len(_BOM), chunk[len(_BOM) :]
        try:
            return chunk.decode("utf-8", self._source.errors)
        except UnicodeDecodeError as error:
            bad = chunk[error.start : error.start + 4].hex(" ")
            raise UserError(
                f"data.source.files: {path} is not UTF-8 at byte {offset + error.start} (bytes {bad}: {error.reason}); "
                "accepted: UTF-8 text, or data.source.errors: replace to read such bytes as U+FFFD."
            ) from error


def _whole(path: Path) -> Iterator[tuple[int, bytes]]:
    yield 0, path.read_bytes()


def _blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) of each run of lines that are not blank, without the last line's end.

    Works on bytes, line by line, so that a file of any size needs the memory of one block. Splitting at 0x0A is safe:
    it is never part of a longer UTF-8 sequence.
    """
    lines: list[bytes] = []
    start = position = 0
    with path.open("rb") as file:
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


class StdlibCorpus:
    """One document per topic of the language reference, and one per module: its docstrings, each text once.

    The `.py` files are parsed, not imported. Tests, idlelib and installed packages are left out. A file that does
    not parse is counted in `skipped`.
    """

    def __init__(self, root: Path, workers: int):
        self._root = root
        paths = sorted(_python_files(root), key=lambda path: path.relative_to(root).as_posix())
        if not paths or not (root / _TOPICS).is_file():
            raise UserError(
                f"data.source.name is 'stdlib', but {root} does not hold the standard library as .py files with "
                f"{_TOPICS}; accepted: a Python installed with its library sources, or the source 'text'."
            )
        self._inputs = _hash_files(paths, workers)
        self.skipped = 0

    @property
    def size(self) -> int:
        return sum(len(text.encode()) for text in self._documents)

    @property
    def identity(self) -> dict[str, object]:
        names = [entry.path.relative_to(self._root).as_posix() for entry in self._inputs]
        return {
            "name": "stdlib",
            "inputs": [f"{name}:{entry.digest}" for name, entry in zip(names, self._inputs, strict=True)],
        }

    def documents(self) -> Iterator[str]:
        yield from self._documents

    @cached_property
    def _documents(self) -> list[str]:
        """Parsing takes seconds, the text is small: kept for the second pass."""
        seen: set[str] = set()
        documents = []
        self.skipped = 0
        for text in _topics(self._root / _TOPICS):
            if text and text not in seen:
                seen.add(text)
                documents.append(text)
        for entry in self._inputs:
            try:
                texts = _docstrings(entry.path.read_bytes())
            except (SyntaxError, ValueError):
                self.skipped += 1
                continue
            new = [text for text in dict.fromkeys(texts) if text not in seen]
            seen.update(new)
            if new:
                documents.append("\n\n".join(new))
        return documents


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


def _topics(path: Path) -> list[str]:
    """The language reference by topic: the one dict literal in `pydoc_data/topics.py`."""
    for node in _parse(path.read_bytes()).body:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Dict):
            topics = ast.literal_eval(value)
            return [_clean(topics[name]) for name in sorted(topics)]
    raise UserError(f"data.source.name is 'stdlib', but {path} holds no dict of topics as CPython's does.")


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
