"""How a model reads a probe's texts: in rows like those of its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmobj.batch import RowSpec
from lmobj.bench._labelled import Labelled
from lmobj.data import Tokenizer
from lmobj.errors import UserError
from lmobj.train.assemble import Assembly
from lmobj.train.batches import batch_shapes

__all__ = ["Reading", "TextRows", "text_rows"]

_CLS_TYPE = 2
"""Token type of the CLS that ends rows of `stream_pairs` (see `lmobj.batch`)."""
_MULTIPLE = 16
"""Rows are as long as the longest text, rounded up to this."""


@dataclass(frozen=True)
class Reading:
    """How a model reads texts: as it read documents in training."""

    tokenizer: Tokenizer
    rows: RowSpec
    """Which special tokens stand around a text, and by default the most tokens."""
    causal: bool
    """Whether tokens see earlier ones alone (`Objective.causal`)."""

    @classmethod
    def of(cls, run: Assembly) -> Reading:
        """That of a run's model."""
        return cls(run.dataset.tokenizer, run.spec, run.objective.causal)

    @property
    def typed(self) -> bool:
        """Whether the model was given token types. Objectives that are causal give none, whatever their rows."""
        return not self.causal and "token_types" in batch_shapes(self.rows, 1)


@dataclass(frozen=True)
class TextRows:
    """Texts as rows: tokens [N, L], segments [N, L] (1, 0 where padded), types [N, L] (1 in second texts, and 2 of the
    last token where rows are `stream_pairs`)."""

    tokens: NDArray[np.int32]
    segments: NDArray[np.int32]
    types: NDArray[np.int32]


def text_rows(texts: Sequence[Labelled], tokenizer: Tokenizer, rows: RowSpec, length: int) -> TextRows:
    """Texts with the special tokens of `rows` around them, cut to `length`: of a pair the longer text first.

    Raises:
      UserError: `length` leaves no room for text.
    """
    paired = any(row.pair is not None for row in texts)
    middle = rows.suffix[:1] if rows.layout == "stream_pairs" else rows.suffix  # A SEP B SEP CLS
    room = length - len(rows.prefix) - len(rows.suffix) - len(middle) * paired
    if room < 2:
        raise UserError(
            f"probe.length is {length}, which leaves {room} tokens for text; accepted: {length - room + 2} or more."
        )
    firsts = tokenizer.encode_batch([row.text for row in texts])
    seconds = tokenizer.encode_batch([row.pair or "" for row in texts])
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
