"""Multiple choice: a context, and several endings or answers, of which one is right.

Source: Zellers et al. 2018, "SWAG", and Lai et al. 2017, "RACE", whose examples have this form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lmobj.errors import UserError
from lmobj.tasks._files import field, json_rows

__all__ = ["MultipleChoice", "read_multiple_choice"]


@dataclass(frozen=True)
class MultipleChoice:
    """One example; `label` is the place of the right choice, counted from 0, and None where it is not told."""

    context: str
    choices: tuple[str, ...]
    label: int | None


def read_multiple_choice(path: str | Path) -> Iterator[MultipleChoice]:
    """The examples of JSON Lines {"context": text, "choices": [text, ...], "label": place from 0}.

    Blank lines are none. Without `label`, or with null, it is None: so are test files.

    Raises:
      UserError: a file that cannot be read, or a line that is no such object; it names the line.
    """
    for where, row in json_rows(path):
        context = field(where, row, "context", str, "text")
        choices = field(where, row, "choices", list, "a list of texts")
        if len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
            raise UserError(f"{where} has {choices!r:.60} under 'choices'; accepted: a list of two texts or more.")
        label = None
        if row.get("label") is not None:
            label = field(where, row, "label", int, "a whole number")
            if not 0 <= label < len(choices):
                raise UserError(f"{where} has the label {label}; accepted: 0 to {len(choices) - 1}.")
        yield MultipleChoice(context, tuple(choices), label)
