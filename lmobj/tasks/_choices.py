"""Multiple choice: a context, and several endings or answers, of which one is right.

Source: Zellers et al. 2018, "SWAG", and Lai et al. 2017, "RACE", whose examples have this form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lmobj.errors import UserError
from lmobj.tasks._files import field, json_rows

__all__ = ["MultipleChoice", "read_multiple_choice"]


@dataclass(frozen=True)
class MultipleChoice:
    """One example.

    label is the place of the right choice, counted from 0, and None where it is not told; line is where the example
    stands in its file, from 1.
    """

    context: str
    choices: tuple[str, ...]
    label: int | None
    line: int = dataclasses.field(default=0, compare=False)


def read_multiple_choice(
    path: str | Path, *, context: str = "context", choices: str = "choices", label: str | None = "label"
) -> Iterator[MultipleChoice]:
    """The examples of JSON Lines {"context": text, "choices": [text, ...], "label": place from 0}.

    Blank lines are none. Without `label`, or with null, it is None: so are test files.

    Args:
      path: the file.
      context, choices, label: the keys, where they have other names; without a key of labels these are not read.

    Raises:
      UserError: a file that cannot be read, or a line that is no such object; it names the line.
    """
    for line, row in json_rows(path):
        where = f"{path}:{line}"
        text = field(where, row, context, str, "text")
        found = field(where, row, choices, list, "a list of texts")
        if len(found) < 2 or not all(isinstance(choice, str) for choice in found):
            raise UserError(f"{where} has {found!r:.60} under {choices!r}; accepted: a list of two texts or more.")
        place = None
        if label is not None and row.get(label) is not None:
            place = field(where, row, label, int, "a whole number")
            if not 0 <= place < len(found):
                raise UserError(f"{where} has the label {place}; accepted: 0 to {len(found) - 1}.")
        yield MultipleChoice(text, tuple(found), place, line)
