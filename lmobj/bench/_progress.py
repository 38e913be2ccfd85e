"""What a benchmark says as it goes: which runs are left, and how long they will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from lmobj.bench._config import Benchmark
from lmobj.bench._plan import ArmPlan
from lmobj.bench._results import Line, Results

__all__ = ["Progress"]


class Progress:
    """The runs that are left, arm by arm within each seed, and how long they will take, told as they begin.

    All arms are done with one seed before the next is begun, so that a benchmark that is stopped early compares them.
    """

    def __init__(
        self, benchmark: Benchmark, plans: Mapping[str, ArmPlan], results: Results, say: Callable[[str], None]
    ) -> None:
        self._plans, self._say = plans, say
        self._arms, self._runs = list(plans), [(arm, seed) for seed in benchmark.seeds for arm in plans]
        self._left = [(arm, seed) for arm, seed in self._runs if results.find(arm, seed) is None]
        if len(self._left) < len(self._runs):
            say(f"{len(self._runs) - len(self._left)} of {len(self._runs)} runs are finished already.")
        self._seconds = self._work = 0.0
        self._started = time.monotonic()

    def __iter__(self) -> Iterator[tuple[str, int]]:
        for index, (arm, seed) in enumerate(self._left):
            self._started = time.monotonic()
            left = sum(self._cost(a) for a, _ in self._left[index:])
            eta = f", about {_clock(self._seconds / self._work * left)} left for all" if self._work else ""
            self._say(
                f"Run {self._runs.index((arm, seed)) + 1} of {len(self._runs)}: arm {self._arms.index(arm) + 1} of "
                f"{len(self._arms)} ({arm}), seed {seed}, {self._plans[arm].steps:,} steps{eta}."
            )
            yield arm, seed

    def done(self, line: Line) -> None:
        """The run that began last is finished."""
        took = time.monotonic() - self._started
        found = [] if line["probe"] is None else [f"probe accuracy {line['probe']['accuracy']:.1%}"]
        if line["diverged"]:
            found = ["diverged, and is left out of the means"]
        else:  # one that ended early says nothing about how long the others take
            self._seconds += took
            self._work += self._cost(line["arm"])
        self._say("  " + ", ".join([*found, f"took {_clock(took)}"]) + ".")

    def _cost(self, arm: str) -> float:
        """What a run of this arm takes, in units that are the same for all."""
        plan = self._plans[arm]
        return plan.steps * (plan.seconds_per_step or plan.flops_per_step or 1)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
