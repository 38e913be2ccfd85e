"""Several experiments, one after the other, each in a process of its own; what fails costs a row and no more."""

from __future__ import annotations

import concurrent.futures.process
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lmobj.config import Experiment
from lmobj.errors import UserError
from lmobj.speed._measure import TURN_SECONDS, TURNS, Contender, measure
from lmobj.speed._process import in_process

__all__ = ["measure_each"]

Child = Callable[[Callable[[], Any]], Any]


def measure_each(
    experiments: Mapping[str, Experiment],
    contenders: Sequence[Contender] = ("lmobj",),
    *,
    turns: int = TURNS,
    seconds: float = TURN_SECONDS,
    steps: int | None = None,
    fewer_rows: bool = False,
    child: Child = in_process,
) -> dict[str, dict[str, Any]]:
    """What `measure` tells of each experiment, by name; `error` alone of one that cannot be measured, or whose process
    died.

    Args:
      experiments: by name.
      contenders, turns, seconds, steps: as `measure` takes them.
      fewer_rows: where memory runs out for a contender, the experiment is measured again with half the rows, until it
        does not, each under a name of its own.
      child: calls a function in another process.

    Raises:
      UserError: settings that cannot be satisfied, or a peer that there is not, of the only experiment.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, experiment in experiments.items():
        tried, label = experiment, name
        while True:
            print(f"measuring {label}", file=sys.stderr, flush=True)
            call = functools.partial(measure, tried, tuple(contenders), turns=turns, seconds=seconds, steps=steps)
            try:
                found[label] = child(call)
            except concurrent.futures.process.BrokenProcessPool as error:
                found[label] = {"error": f"the process died: {error}"}
            except UserError as error:
                if len(experiments) == 1:
                    raise
                found[label] = {"error": str(error)}
            exhausted = any(row["out_of_memory"] for row in found[label].get("contenders", ()))
            smaller = _half(tried) if exhausted and fewer_rows else None
            if smaller is None:
                break
            tried, label = smaller, f"{name}, {smaller.train.batch_size} rows"
    return found


def _half(experiment: Experiment) -> Experiment | None:
    """The experiment with half the rows; None where they cannot be halved."""
    rows, rest = divmod(experiment.train.batch_size, 2)
    if rest or not rows:
        return None
    try:
        return dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, batch_size=rows))
    except UserError:  # train.accumulate does not divide them
        return None
