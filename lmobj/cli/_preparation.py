"""What `lmobj prepare` tells of a data set, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["cleaning_table", "split_table"]

Table = tuple[Sequence[str], list[tuple[str, ...]]]
_COUNTS = ("documents", "tokens", "bytes")


def split_table(sources: dict[str, Any]) -> Table:
    """Per source and split: documents, tokens and bytes of text; what was skipped, and copies of training documents."""
    rows = [
        (name, split, *(str(counts[count]) for count in _COUNTS))
        for name, source in sources.items()
        for split, counts in source["splits"].items()
    ]
    rows += [(name, "skipped", str(source["skipped"]), "", "") for name, source in sources.items() if source["skipped"]]
    rows += [
        (name, f"in other words, by {kind}", str(count), "", "")
        for name, source in sources.items()
        for kind, count in source.get("augmented", {}).items()
    ]
    return _named(("source", "split", *_COUNTS), rows)


def cleaning_table(sources: dict[str, Any]) -> Table:
    """Per source and cleaning step: documents changed and dropped, and bytes removed."""
    rows = [
        (name, step, *(str(counts[count]) for count in ("changed", "dropped", "bytes")))
        for name, source in sources.items()
        for step, counts in source["cleaning"].items()
    ]
    return _named(("source", "cleaning", "changed", "dropped", "bytes removed"), rows)


def _named(header: Sequence[str], rows: list[tuple[str, ...]]) -> Table:
    """Without the column of names where there is but one source, which has none."""
    return (header, rows) if any(row[0] for row in rows) else (header[1:], [row[1:] for row in rows])
