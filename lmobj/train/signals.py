"""SIGTERM and SIGINT: finish the step, save, say how to resume, and exit as a scheduler expects."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

__all__ = ["StopRequest", "Stopped", "listen"]


class Stopped(SystemExit):
    """Training was stopped by a signal after saving. The exit code is 128 + signal, so that a scheduler requeues."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)


@dataclass
class StopRequest:
    """Set by the first signal; the loop looks at it between steps."""

    signal_number: int | None = None


@contextlib.contextmanager
def listen() -> Iterator[StopRequest]:
    """Turns the first SIGTERM or SIGINT into a request; a second one acts at once, as if nobody listened.

    Only the main thread may handle signals; in another thread nothing is installed and no request ever comes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    signals = (signal.SIGTERM, signal.SIGINT)
    # A handler that was not installed from Python reads as None and cannot be put back.
    previous = {number: signal.getsignal(number) or signal.SIG_DFL for number in signals}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        request.signal_number = number
        restore()

    for number in signals:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        restore()
