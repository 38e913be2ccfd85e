"""Runs the work on a corpus's parts on this machine: in this process while the corpus is small, else in several.

The parent reads and cuts, the workers do the rest. They are started by loky: never forked, which jax's threads would
not survive, and without running the user's script again. The result does not depend on their number.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

from lmobj.data._corpus import Corpus
from lmobj.data._parts import Done, Part, Work, pending
from lmobj.errors import UserError

__all__ = ["Runner", "WorkerEndedError", "run_here"]

R = TypeVar("R")

_ALONE_BYTES = 8 * 1024 * 1024
"""Inputs up to this size are worked on in this process: starting others would take longer."""

_EXIT_CODE = re.compile(r"\w+\(-?\d+\)")
"""How loky tells how its workers ended, as SIGKILL(-9)."""


class WorkerEndedError(UserError):
    """A process was killed. What is finished can be used again."""


Runner = Callable[[Corpus, Work[Any]], Generator[Done[Any]]]
"""Does the work on all parts and yields what became of them, in order."""


def run_here(workers: int) -> Runner:
    """A runner for this machine with up to `workers` processes."""

    def run(corpus: Corpus, work: Work[R]) -> Generator[Done[R]]:
        if workers == 1 or corpus.size <= _ALONE_BYTES:
            return _run_alone(corpus, work)
        return _run_in_processes(corpus, work, workers)

    return run


def _run_alone(corpus: Corpus, work: Work[R]) -> Generator[Done[R]]:
    for part in pending(corpus, work):
        yield Done(work(part), part.read) if isinstance(part, Part) else part


def _run_in_processes(corpus: Corpus, work: Work[R], workers: int) -> Generator[Done[R]]:
    """Keeps one part more in flight than there are workers, so that none waits for the reading."""
    from loky import ProcessPoolExecutor
    from loky.process_executor import TerminatedWorkerError

    executor = ProcessPoolExecutor(workers, initializer=_end_with, initargs=(os.getpid(),))
    flight: deque[Done[R] | tuple[Future[R], int]] = deque()
    complete = False
    try:
        for part in pending(corpus, work):
            flight.append((executor.submit(work, part), part.read) if isinstance(part, Part) else part)
            del part
            while len(flight) > workers + 1:
                yield _landed(flight.popleft())
        while flight:
            yield _landed(flight.popleft())
        complete = True
    except TerminatedWorkerError as error:
        raise WorkerEndedError(
            f"data.workers is {workers}, and one of these processes was ended from outside "
            f"({', '.join(_EXIT_CODE.findall(str(error)))}), most often for want of memory; accepted: fewer workers. "
            "What is finished will be used again."
        ) from error
    finally:
        executor.shutdown(kill_workers=not complete)


def _landed(entry: Done[R] | tuple[Future[R], int]) -> Done[R]:
    if isinstance(entry, Done):
        return entry
    future, read = entry
    return Done(future.result(), read)


def _end_with(parent: int) -> None:
    """Ends this process when its parent has ended, however it did."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
