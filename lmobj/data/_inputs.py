"""Input files, local or behind a URL: found by pattern, named by content, opened as streams of bytes."""

from __future__ import annotations

import glob
import hashlib
import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec

from lmobj.errors import UserError

__all__ = ["InputFile", "Tally", "find_inputs", "hash_inputs", "open_bytes"]

_BUFFER = 1 << 20


@dataclass
class Tally:
    """What reading tells beside the documents."""

    read: int = 0
    """Bytes of input read, compressed ones as they lie."""
    skipped: int = 0
    """Input files or rows left out because they could not be read as what they are."""


@dataclass(frozen=True)
class InputFile:
    """A file whose content is known by digest.

    name: path or URL, as messages show it. digest: blake2b of its bytes. size: its bytes.
    """

    name: str
    digest: str
    size: int

    def open(self, tally: Tally) -> IO[bytes]:
        """Its bytes, compressed ones as they lie; adds to `tally.read` while they are read."""
        return io.BufferedReader(_Counted(open_bytes(self.name), tally), _BUFFER)


class _Counted(io.RawIOBase):
    """A stream of bytes that counts what is read from it."""

    def __init__(self, file: IO[bytes], tally: Tally):
        self._file, self._tally = file, tally

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._tally.read += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def open_bytes(name: str) -> IO[bytes]:
    """Opens a path or URL for reading."""
    if "://" not in name:
        return open(name, "rb")
    filesystem, path = _filesystem(name)
    return filesystem.open(path, "rb")


def find_inputs(key: str, patterns: Iterable[str], workers: int) -> list[InputFile]:
    """The files that patterns match, ordered by content, so that neither paths nor the order of patterns matter.

    A pattern is a path, a glob pattern (`**` crosses folders), or a URL that fsspec knows (`gs://bucket/*.jsonl`). A
    file matched twice counts once; equal files in two places count twice.

    Raises:
      UserError: a pattern without a match, a file that cannot be read, or files that are all empty; `key` names the
        setting.
    """
    names: dict[str, None] = {}
    for pattern in patterns:
        found = _matches(key, pattern)
        if not found:
            raise UserError(
                f"{key}: no file matches {pattern!r} (looked from {os.getcwd()}); accepted: a path, glob pattern or "
                "URL of existing files."
            )
        names.update((name, None) for name in found)
    inputs = sorted(hash_inputs(key, list(names), workers), key=lambda entry: (entry.digest, entry.name))
    if not any(entry.size for entry in inputs):
        raise UserError(f"{key}: all {len(inputs)} matched files are empty: {', '.join(patterns)}.")
    return inputs


def hash_inputs(key: str, names: list[str], workers: int) -> list[InputFile]:
    """Reads files in threads and gives them with digest and size, in the order of `names`."""

    def hashed(name: str) -> InputFile:
        digest, size = hashlib.blake2b(digest_size=16), 0
        try:
            with open_bytes(name) as file:
                while block := file.read(_BUFFER):
                    digest.update(block)
                    size += len(block)
        except OSError as error:
            raise UserError(f"{key}: the file {name} cannot be read ({error.strerror or error}).") from error
        return InputFile(name, digest.hexdigest(), size)

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(hashed, names))


def _matches(key: str, pattern: str) -> list[str]:
    if "://" in pattern:
        filesystem, path = _filesystem(pattern, key)
        try:
            found = [path] if filesystem.isfile(path) else sorted(filesystem.glob(path))
            return [filesystem.unstrip_protocol(name) for name in found if filesystem.isfile(name)]
        except Exception as error:  # of whatever kind the file system likes
            raise UserError(f"{key}: {pattern!r} cannot be listed ({type(error).__name__}: {error}).") from error
    name = os.path.expanduser(pattern)
    # A file whose name holds brackets is itself before it is a pattern.
    found = [name] if os.path.isfile(name) else glob.glob(name, recursive=True)
    return [str(Path(path).resolve()) for path in found if os.path.isfile(path)]


def _filesystem(url: str, key: str = "data.source") -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    try:
        if not url.partition("://")[2].strip("/"):
            raise ValueError("it names no file")
        filesystem, path = fsspec.core.url_to_fs(url)
    except Exception as error:  # a protocol without its package, none that fsspec knows, or not enough told
        raise UserError(
            f"{key}: {url!r} cannot be opened ({error}); accepted: a path, or a URL that fsspec knows."
        ) from error
    return filesystem, path
