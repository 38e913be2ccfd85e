"""One malformed input for `tools/fuzz_inputs.py`: the command that reads it, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random

__all__ = ["Case", "Kind", "flipped"]


@dataclass(frozen=True)
class Case:
    """A command over an input that was made malformed in the working folder."""

    what: str
    """What was done to the input, on one line."""
    argv: tuple[str, ...]
    """Arguments of `lmobj`."""
    malformed: bool = True
    """The input must be refused. Otherwise it may have stayed valid: done properly is then an answer as good."""
    names: tuple[str, ...] = ()
    """What the refusal must name, such as the key."""
    own_words: bool = True
    """The refusal is lmobj's own, `lmobj: ...` on one line; otherwise the option parser's usage message may come."""
    repair: Callable[[], None] | None = None
    """Makes the input good again; the same command must then be done, so a refusal must leave nothing in its way."""
    within: Callable[[], AbstractContextManager[None]] = nullcontext
    """In which the command runs, where only its beginning is wanted; such a case has no process of its own."""
    may_leave: tuple[str, ...] = ()
    """First parts of the paths, relative to the working folder, that may differ after a refusal."""


@dataclass(frozen=True)
class Kind:
    """A kind of malformed input."""

    make: Callable[[Random, Path], Case]
    """A case in an empty folder, decided by the generator of random numbers alone."""
    share: int
    """Of 10,000 cases."""
    seconds: float
    """Longer than this counts as a hang."""


def flipped(draw: Random, content: bytes, low: int = 0, high: int | None = None) -> tuple[str, bytes]:
    """The content damaged at random: bytes changed, a stretch zeroed, removed or doubled, or the end cut off."""
    high = len(content) if high is None else high
    damaged = bytearray(content)
    at = draw.randrange(low, high)
    match draw.randrange(5):
        case 0:
            bits = draw.choice((1, 0x80, 0xFF, draw.randrange(1, 256)))
            damaged[at] ^= bits
            return f"byte {at} xor {bits:#04x}", bytes(damaged)
        case 1:
            for _ in range(count := draw.randrange(2, 40)):
                damaged[draw.randrange(low, high)] = draw.randrange(256)
            return f"{count} bytes at random places", bytes(damaged)
        case 2:
            count = min(draw.choice((1, 4, 64, 1024)), high - at)
            damaged[at : at + count] = bytes(count)
            return f"{count} zero bytes at {at}", bytes(damaged)
        case 3:
            count = min(draw.choice((1, 7, 100)), high - at)
            piece = damaged[at : at + count]
            twice = draw.random() < 0.5
            damaged[at : at + count] = piece + piece if twice else b""
            return f"{count} bytes at {at} {'doubled' if twice else 'removed'}", bytes(damaged)
        case _:
            return f"cut at {at} of {len(content)}", bytes(damaged[:at])
