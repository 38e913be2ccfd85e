"""Relations between two marked entities of a text.

Source: Zhang et al. 2017, "Position-aware Attention and Supervised Data Improve Slot Filling" (TACRED); Baldini Soares
et al. 2019, "Matching the Blanks", section 3.1 (entity markers).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lmobj.errors import UserError
from lmobj.tasks._files import field, json_rows

__all__ = ["MarkedText", "Relation", "mark_entities", "read_relations"]

Stretch = tuple[int, int]


@dataclass(frozen=True)
class Relation:
    """What a text says of head and tail, each given by its first character and the one after its last.

    label is None where it is not told; line is where the example stands in its file, from 1.
    """

    text: str
    head: Stretch
    tail: Stretch
    label: str | None
    line: int = dataclasses.field(default=0, compare=False)


class MarkedText(NamedTuple):
    """A text with markers around its two entities, and where they are now."""

    text: str
    head: Stretch
    """From the first character of the opening marker to the one after the closing one."""
    tail: Stretch


def read_relations(path: str | Path, *, label: str | None = "label") -> Iterator[Relation]:
    """The examples of JSON Lines {"text": text, "head": [start, end], "tail": [start, end], "label": name}.

    Starts and ends count characters from 0, the end being the one after the last. Blank lines are none. Without
    `label`, or with null, it is None.

    Args:
      path: the file.
      label: the key of the label; without one labels are not read.

    Raises:
      UserError: a file that cannot be read, a line that is no such object, or an entity beyond the text or overlapping
        the other; it names the line.
    """
    for line, row in json_rows(path):
        where = f"{path}:{line}"
        text = field(where, row, "text", str, "text")
        head, tail = (_stretch(where, row, key, text) for key in ("head", "tail"))
        if head[0] < tail[1] and tail[0] < head[1]:
            raise UserError(f"{where} has head {head} and tail {tail}, which overlap; accepted: entities apart.")
        name = None
        if label is not None and row.get(label) is not None:
            name = field(where, row, label, str, "the name of a relation")
        yield Relation(text, head, tail, name, line)


def mark_entities(
    relation: Relation,
    head: tuple[str, str] = ("[E1]", "[/E1]"),
    tail: tuple[str, str] = ("[E2]", "[/E2]"),
) -> MarkedText:
    """The text with markers directly before and after each entity: "[E1]Ada[/E1] wrote to [E2]Babbage[/E2]".

    Args:
      relation: whose entities do not overlap.
      head, tail: the markers before and after. For a tokenizer that keeps spaces, markers may hold them.

    Source: Baldini Soares et al. 2019, section 3.1, "entity markers".
    """
    markers = {relation.head: head, relation.tail: tail}
    parts: list[str] = []
    places: dict[Stretch, Stretch] = {}
    reached = size = 0
    for stretch in sorted(markers):
        start, end = stretch
        before, after = markers[stretch]
        marked = before + relation.text[start:end] + after
        size += start - reached
        parts += [relation.text[reached:start], marked]
        places[stretch] = (size, size + len(marked))
        size, reached = size + len(marked), end
    return MarkedText("".join([*parts, relation.text[reached:]]), places[relation.head], places[relation.tail])


def _stretch(where: str, row: Mapping[str, Any], key: str, text: str) -> Stretch:
    ends = field(where, row, key, list, "[start, end]")
    whole = len(ends) == 2 and all(isinstance(end, int) and not isinstance(end, bool) for end in ends)
    if not whole or not 0 <= ends[0] < ends[1] <= len(text):
        raise UserError(
            f"{where} has {ends!r:.60} under {key!r}; accepted: [start, end] with 0 <= start < end <= {len(text)}."
        )
    return ends[0], ends[1]
