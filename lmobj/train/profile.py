"""Profiles: what the devices did, kernel by kernel, in a few whole steps of a run, as a trace for XProf."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax

from lmobj.errors import UserError
from lmobj.train.distributed import is_first

__all__ = ["Profile", "Profiler"]

T = TypeVar("T")


@dataclass(frozen=True)
class Profile:
    """Which steps are traced. Take a few, after the first ones, which compile: a trace of many is slow to look at."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "use_attribute_docstrings": True}

    steps: tuple[int, int] = (11, 15)
    """First and last step that the trace holds, counted from 1; at most train.steps."""

    def __post_init__(self) -> None:
        first, last = self.steps
        if not 1 <= first <= last:
            raise UserError(f"train.profile.steps is {[first, last]}; accepted: [a, b] with 1 <= a <= b.")


class Profiler:
    """Traces the training steps of a run that `train.profile` names; without it, none.

    Of several processes the first traces its own devices: all do the same work. A trace that cannot be taken is told,
    and the run goes on without.

    Args:
      settings: the steps, or None.
      folder: what the trace is written into.
      start: the step that the run begins after.
      note: tells the person.
    """

    def __init__(self, settings: Profile | None, folder: Path, start: int, note: Callable[[str], None]) -> None:
        self._folder, self._note = folder, note
        self._first, self._last = (0, 0) if settings is None else settings.steps
        self._running = False
        if settings is None:
            return
        if self._last <= start:
            note(f"No profile: train.profile.steps is {list(settings.steps)}, and the run goes on after step {start}.")
        elif self._first <= start:
            note(f"The profile begins at step {start + 1}, where the run goes on, not {self._first}.")
            self._first = start + 1

    @contextlib.contextmanager
    def closing(self) -> Iterator[Profiler]:
        """Ends a trace that is under way when the run ends before its last step, which is then told."""
        try:
            yield self
        finally:
            if self._running:
                self._stop("It is not whole: the run ended before its last step.")

    def run(self, step: int, train_step: Callable[[Any, Any], T], state: Any, batch: Any) -> T:
        """`train_step(state, batch)`, which is step number `step`, traced if it is among those of the profile."""
        if step == self._first and is_first():
            jax.block_until_ready(state)  # what came before is not in the trace
            self._start()
        if not self._running:
            return train_step(state, batch)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            results = train_step(state, batch)
        if step == self._last:
            jax.block_until_ready(results)  # and the last step is in it to its end
            self._stop()
        return results

    def _start(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder))
        except (RuntimeError, OSError, ValueError) as error:
            self._note(f"No profile: it could not be started ({_line(error)}).")
            return
        self._running = True

    def _stop(self, more: str = "") -> None:
        self._running = False
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, OSError, ValueError) as error:
            self._note(f"No profile: it could not be written ({_line(error)}).")
            return
        self._note(
            f"Profile of steps {self._first} to {self._last} in {self._folder}. {more}{' ' if more else ''}To look at "
            f"it: pip install xprof; xprof --logdir {self._folder}"
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
