"""The entry point, and what becomes of errors.

    0    done
    1    `doctor` found something that stops training
    2    the user's mistake, told in one paragraph on stderr
    3    `train.guard` halted training, told in the same way: a loss or gradient that is not finite, or a loss spike
    128 + signal    training was stopped and saved; 130 is Ctrl-C anywhere else

Any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lmobj.cli._commands import app
from lmobj.errors import UserError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
      argv: the arguments after the program's name; by default those of the process.
    """
    try:
        app(args=None if argv is None else list(argv), prog_name="lmobj")
    except UserError as error:
        print(f"lmobj: {_printable(str(error))}", file=sys.stderr)
        return error.exit_code
    except SystemExit as stop:  # how Typer ends every command (Ctrl-C with 130), and `train` one that a signal stopped
        return stop.code if isinstance(stop.code, int) else 0
    return 0


def _printable(text: str) -> str:
    """The text on one line. What a terminal would not show, or would obey, is spelled out."""
    line = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
