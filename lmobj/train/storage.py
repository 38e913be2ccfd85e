"""Folders on a disk or in an object store, with the few operations that both kinds have.

A place is a path or a URL. `file://` is the path that it names. `gs://`, `s3://`, `memory://` and whatever else fsspec
knows are stores: an object there appears whole or not at all, but nothing can be appended to and no folder renamed. So
nothing here appends or renames; whoever needs that works in the place's `working_copy` and sends the files.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from lmobj._cache import cache_root
from lmobj.errors import UserError

__all__ = ["Folder", "LocalFolder", "StoredFolder", "local_path", "open_folder", "working_copy", "write_atomically"]

Place = str | os.PathLike[str]
"""A path or a URL."""


def local_path(place: Place) -> Path | None:
    """The path of a place on this machine; None for a place in a store."""
    text = os.fspath(place)
    protocol, mark, rest = text.partition("://")
    if not mark:
        return Path(text)
    return Path(rest) if protocol in ("file", "local") else None


def working_copy(place: Place) -> Path:
    """A folder on this machine, named by the digest of a URL, for work on what is kept there."""
    return cache_root() / "runs" / hashlib.blake2b(os.fspath(place).rstrip("/").encode(), digest_size=16).hexdigest()


def open_folder(place: Place) -> Folder:
    """The folder of a path or URL, which need not exist.

    Raises:
      UserError: a URL of a protocol that fsspec does not know, or whose package is not installed.
    """
    path = local_path(place)
    return StoredFolder(os.fspath(place)) if path is None else LocalFolder(path)


class Folder(ABC):
    """A folder, which need not exist. `str` of it is how messages show it."""

    @abstractmethod
    def child(self, name: str) -> Folder:
        """A folder in this one."""

    @abstractmethod
    def make(self) -> None:
        """Makes it if need be; in a store, folders come with their files."""

    @abstractmethod
    def names(self) -> list[str]:
        """The names directly in it; none where there is no folder."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether a file of this name is in it."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises FileNotFoundError where there is none."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Writes a file durably: a reader, or a crash, sees the old content or the new one and nothing between."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Deletes a file durably, if it is there."""

    @abstractmethod
    def remove(self) -> None:
        """Removes the folder and everything in it, if it is there."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Size of every file in it, at any depth, by relative path."""

    @abstractmethod
    def checksum(self, name: str) -> int | str | None:
        """CRC-32 of a file's bytes; in a store, the checksum that the store keeps of it, with its kind, if any."""


class LocalFolder(Folder):
    """A folder on this machine's disks."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))

    def __str__(self) -> str:
        return str(self.path)

    def child(self, name: str) -> LocalFolder:
        return LocalFolder(self.path / name)

    def make(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        return [path.name for path in self.path.iterdir()] if self.path.is_dir() else []

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        write_atomically(self.path / name, content)
        _sync(self.path)

    def delete(self, name: str) -> None:
        if self.has(name):
            (self.path / name).unlink()
            _sync(self.path)

    def remove(self) -> None:
        if self.path.is_dir():
            shutil.rmtree(self.path)

    def sizes(self) -> dict[str, int]:
        files = sorted(path for path in self.path.rglob("*") if path.is_file())
        return {path.relative_to(self.path).as_posix(): path.stat().st_size for path in files}

    def checksum(self, name: str) -> int:
        checksum = 0
        with (self.path / name).open("rb") as file:
            while block := file.read(1 << 22):
                checksum = zlib.crc32(block, checksum)
        return checksum


class StoredFolder(Folder):
    """A folder in a store that fsspec knows. Whatever fails on the way there is a UserError."""

    def __init__(self, url: str) -> None:
        protocol, _, rest = url.partition("://")
        self.url = f"{'gs' if protocol == 'gcs' else protocol}://{rest.rstrip('/')}"
        try:
            if not rest.strip("/"):
                raise ValueError("it names no folder")
            self._store, self._root = fsspec.core.url_to_fs(self.url)
        except Exception as error:  # a protocol without its package, none that fsspec knows, or not enough told
            extra = {"gs": "gcs", "s3": "s3"}.get(self.url.partition("://")[0])
            missing = extra is not None and isinstance(error, ImportError)
            remedy = f"for it `pip install 'lmobj[{extra}]'`" if missing else "a path, or a URL that fsspec knows"
            raise UserError(f"run: {url!r} cannot be opened ({error}); accepted: {remedy}.") from error

    def __str__(self) -> str:
        return self.url

    def child(self, name: str) -> StoredFolder:
        return StoredFolder(f"{self.url}/{name}")

    def make(self) -> None:
        pass

    def names(self) -> list[str]:
        with self._reaching():
            try:
                found = self._store.ls(self._root, detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        names = (path.rstrip("/").removeprefix(self._root).strip("/") for path in found)
        return [name for name in names if name]  # some stores list the folder itself

    def has(self, name: str) -> bool:
        with self._reaching():
            return bool(self._store.isfile(self._at(name)))

    def read(self, name: str) -> bytes:
        with self._reaching():
            return bytes(self._store.cat_file(self._at(name)))

    def write(self, name: str, content: bytes) -> None:
        with self._reaching():
            self._store.makedirs(os.path.dirname(self._at(name)), exist_ok=True)
            self._store.pipe_file(self._at(name), content)

    def delete(self, name: str) -> None:
        with self._reaching(), contextlib.suppress(FileNotFoundError):
            self._store.rm_file(self._at(name))

    def remove(self) -> None:
        with self._reaching(), contextlib.suppress(FileNotFoundError):
            self._store.rm(self._root, recursive=True)

    def sizes(self) -> dict[str, int]:
        with self._reaching():
            found = self._store.find(self._root, detail=True)
        return {path.removeprefix(self._root).lstrip("/"): int(entry["size"]) for path, entry in found.items()}

    def checksum(self, name: str) -> str | None:
        with self._reaching():
            entry = self._store.info(self._at(name))
        kind = next((kind for kind in ("crc32c", "md5Hash", "ETag") if entry.get(kind)), None)
        return None if kind is None else f"{kind} {entry[kind]}"

    def send(self, source: Path, name: str) -> None:
        """Copies a local file to `name` in this folder."""
        with self._reaching():
            self._store.makedirs(os.path.dirname(self._at(name)), exist_ok=True)
            self._store.put_file(str(source), self._at(name))

    def fetch(self, name: str, target: Path) -> None:
        """Copies a file of this folder to a local path."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._reaching():
            self._store.get_file(self._at(name), str(target))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """Listings are read anew, since other machines write too; a store's own errors become the user's."""
        self._store.invalidate_cache()
        try:
            yield
        except (FileNotFoundError, UserError):
            raise
        except Exception as error:  # each store has exceptions of its own, credentials and network among them
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(
                f"{self.url} cannot be reached ({text[:500]}); check the address, the network and the credentials."
            ) from error


FULL: tuple[Any, ...] = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""How a system says that there is no room."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new one and nothing between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _sync(folder: Path) -> None:
    """Makes a folder's entries durable, so that they survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
