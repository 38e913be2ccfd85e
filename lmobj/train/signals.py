"""SIGTERM and SIGINT: finish the step, save, say how to resume, and exit as a scheduler expects.

With several processes a signal to any of them stops all after the same step. They agree on it without their main
threads, which may be waiting for one another's devices: the thread that reads notices holds the main thread at its next
step, puts up the last step it has finished, and once everybody's is known lets it go on to one more than the largest.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmobj.train.distributed import Peers

__all__ = ["StopRequest", "Stopped", "listen"]


class Stopped(SystemExit):
    """Training was stopped by a signal after saving. The exit code is 128 + signal, so that a scheduler requeues."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)


@dataclass
class StopRequest:
    """Set by the first signal; the loop asks after every step."""

    signal_number: int | None = None

    def received(self, number: int) -> None:
        """Called by the signal's handler."""
        self.signal_number = number

    def after(self, step: int) -> int | None:
        """The signal that training stops for after `step`, if any."""
        return self.signal_number


class SharedStopRequest(StopRequest):
    """A request of one process to all of them."""

    def __init__(self, peers: Peers) -> None:
        super().__init__()
        self._peers = peers
        self._kind = f"stop-{peers.meetings}"  # its own for each training of this program
        self._turn = threading.Condition()
        self._step: int | None = None
        """The last step that the main thread has finished; None before it has told one."""
        self._held = False
        self._last: tuple[int, int] | None = None
        """The step to stop after, and the signal."""

    def received(self, number: int) -> None:
        """Called by the signal's handler."""
        super().received(number)
        self._peers.look()

    def after(self, step: int) -> int | None:
        """The signal that training stops for after `step`, if any: in every process the same."""
        with self._turn:
            self._turn.wait_for(lambda: not self._held)
            self._step = step
            return self._last[1] if self._last is not None and step >= self._last[0] else None

    def read(self, notices: Mapping[str, Mapping[int, Any]]) -> None:
        """Called by the thread that reads notices."""
        if self._last is not None or self._step is None:
            return
        if not self._held and (self.signal_number is not None or self._kind in notices):
            with self._turn:
                self._held = True
            self._peers.post(self._kind, [self._step, self.signal_number])
            self._peers.look()
        stops = notices.get(self._kind, {})
        if len(stops) == self._peers.count:
            number = next(stops[rank][1] for rank in sorted(stops) if stops[rank][1] is not None)
            with self._turn:
                self._last, self._held = (1 + max(step for step, _ in stops.values()), number), False
                self._turn.notify_all()


@contextlib.contextmanager
def listen(peers: Peers | None = None) -> Iterator[StopRequest]:
    """Turns the first SIGTERM or SIGINT into a request; a second one acts at once, as if nobody listened.

    With `peers` it is a request to all of them, and theirs are requests to this process.

    Only the main thread may handle signals; in another thread nothing is installed and no request ever comes.
    """
    with contextlib.ExitStack() as stack:
        request = StopRequest()
        if peers is not None:
            request = SharedStopRequest(peers)
            stack.enter_context(peers.reading(request.read))
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(_handled(request))
        yield request
        if peers is not None:
            peers.meet("the last step")  # until then another may want to know which step this process is at


@contextlib.contextmanager
def _handled(request: StopRequest) -> Iterator[None]:
    """The handlers of the signals, for the time of the block."""
    signals = (signal.SIGTERM, signal.SIGINT)
    # A handler that was not installed from Python reads as None and cannot be put back.
    previous = {number: signal.getsignal(number) or signal.SIG_DFL for number in signals}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, frame: FrameType | None) -> None:
        request.received(number)
        restore()

    for number in signals:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()
