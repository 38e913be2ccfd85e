"""What several commands print: tables, and whose weights they speak of."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmobj.config import Experiment

__all__ = ["print_table", "tell_weights"]


def tell_weights(experiment: Experiment) -> None:
    """Says on stderr, away from what is printed, that these are not the weights themselves, if so."""
    if experiment.train.ema is not None:
        print(experiment.train.ema.note, file=sys.stderr)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table as wide as the terminal; tab-separated lines where the output goes into a file or a pipe."""
    if not sys.stdout.isatty():
        for row in (header, *rows):
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=None, header_style="bold", padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
