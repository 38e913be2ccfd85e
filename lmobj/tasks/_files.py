"""Lines of UTF-8 files, and what stands in their JSON, with complaints that name the place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmobj.data import open_bytes
from lmobj.errors import UserError

__all__ = ["field", "json_rows", "lines", "read_json"]

_MARK = b"\xef\xbb\xbf"
"""A byte order mark."""


def lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Number from 1 and text of each line, without what ends it.

    Lines end at \\n or \\r\\n alone: form feeds, U+0085, U+2028 and the like are part of the text. A byte order mark is
    dropped.

    Raises:
      UserError: a file that cannot be read, or bytes that are not UTF-8.
    """
    try:
        with open_bytes(str(path)) as file:
            for number, raw in enumerate(file, 1):
                yield number, _text(path, number, raw.removeprefix(_MARK) if number == 1 else raw)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{str(path)!r} cannot be read ({error}); accepted: the path of a file.") from None


def json_rows(path: str | Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number from 1 and object of each line of JSON Lines that is not blank.

    Raises:
      UserError: as for `lines`, or a line that is no JSON object.
    """
    for number, line in lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is no JSON ({error}); accepted: one object a line.") from None
        if not isinstance(row, dict):
            raise UserError(f"{where} is a {type(row).__name__}; accepted: one object a line.")
        yield number, row


def read_json(path: str | Path) -> Any:
    """The one JSON value in a file.

    Raises:
      UserError: as for `lines`, or what is no JSON; it names the line.
    """
    text = "\n".join(line for _, line in lines(path))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno} is no JSON ({error.msg}); accepted: a JSON file.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error}); accepted: a JSON file.") from None


def field(where: str, row: Any, key: str, kind: Any, wanted: str) -> Any:
    """row[key]. UserError, naming `where`, if the row is no object, has no such key, or something else under it.

    Text must be encodable: JSON can spell half of a surrogate pair, which no UTF-8 can hold.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is a {type(row).__name__}; accepted: an object with {key!r}.")
    if key not in row:
        found = ", ".join(row) or "none"
        raise UserError(f"{where} has no {key!r}; accepted: {wanted} there. Its keys: {found}.")
    value = row[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where} has {value!r:.60} under {key!r}; accepted: {wanted}.")
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError(f"{where} has half of a surrogate pair under {key!r}; accepted: whole characters.")
    return value


def _text(path: str | Path, number: int, raw: bytes) -> str:
    try:
        line = raw.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number} is not UTF-8 at byte {error.start} of the line; accepted: UTF-8.") from None
    return line.removesuffix("\n").removesuffix("\r")
