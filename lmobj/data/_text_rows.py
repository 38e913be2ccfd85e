"""Texts in memory as rows that a model reads: what a few texts need that are no data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmobj.batch import RowSpec
from lmobj.data._tokenizer import Tokenizer
from lmobj.errors import UserError

__all__ = ["TextRows", "text_rows"]

_CLS_TYPE = 2
"""Token type of the CLS that ends rows of `stream_pairs` (see `lmobj.batch`)."""
_MULTIPLE = 16
"""Rows are as long as the longest text, rounded up to this."""


@dataclass(frozen=True)
class TextRows:
    """Texts as rows: tokens [N, L], segments [N, L] (1, 0 where padded), types [N, L] (1 in second texts, and 2 of the
    last token where rows are `stream_pairs`)."""

    tokens: NDArray[np.int32]
    segments: NDArray[np.int32]
    types: NDArray[np.int32]


def text_rows(
    texts: Sequence[tuple[str, str | None]], tokenizer: Tokenizer, rows: RowSpec, length: int, *, key: str
) -> TextRows:
    """Texts with the special tokens of `rows` around them, cut to `length`: of a pair the longer text first.

    Args:
      texts: each with the second text of a pair, or None.
      tokenizer: makes tokens of them.
      rows: which special tokens stand around a text; `examples` gives the rows that the same documents have there.
      length: most tokens in a row.
      key: the setting that says so, for messages.

    Raises:
      UserError: `length` leaves no room for text.
    """
    paired = any(pair is not None for _, pair in texts)
    middle = rows.suffix[:1] if rows.layout == "stream_pairs" else rows.suffix  # A SEP B SEP CLS
    room = length - len(rows.prefix) - len(rows.suffix) - len(middle) * paired
    if room < 2:
        raise UserError(
            f"{key} is {length}, which leaves {room} tokens for text; accepted: {length - room + 2} or more."
        )
    firsts = tokenizer.encode_batch([text for text, _ in texts])
    seconds = tokenizer.encode_batch([pair or "" for _, pair in texts])
    lines, types = [], []
    for first, second in zip(firsts, seconds, strict=True):
        longest = max(room - len(second), room // 2)  # of the first, where both are too long
        first = first[: longest if paired else room]
        second = second[: room - len(first)]
        opening = [*rows.prefix, *first, *(middle if paired else ())]
        closing = [*(second if paired else ()), *rows.suffix]
        lines.append([*opening, *closing])
        types.append([0] * len(opening) + [int(paired)] * len(closing))
        if rows.layout == "stream_pairs":
            types[-1][-1] = _CLS_TYPE
    width = max(len(line) for line in lines)
    width = min(length, -(-width // _MULTIPLE) * _MULTIPLE)
    shape = (len(lines), width)
    found = TextRows(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32))
    for index, (line, kind) in enumerate(zip(lines, types, strict=True)):
        found.tokens[index, : len(line)] = line
        found.segments[index, : len(line)] = 1
        found.types[index, : len(line)] = kind
    return found
