"""The one exception that means: the user asked for something that cannot be done, and here is what can."""

from __future__ import annotations

from typing import ClassVar

__all__ = ["UserError"]


class UserError(ValueError):
    """A user's mistake, told in one paragraph that names the key, its value and what would be accepted.

    The command line prints the message alone (no traceback) and exits with code 2. Anything that is not a
    `UserError` is a bug of ours and keeps its traceback.
    """

    exit_code: ClassVar[int] = 2
