"""What a search has found, as lines of results.jsonl, as a table, and as the config of the best trial.

A line of results.jsonl has
    trial, state, reason      its number; complete, pruned or failed; and why it failed
    metric, value             the figure that decides, of the model that the run leaves; null unless complete
    settings                  dotted key -> value
    steps, seconds            step of the last evaluation, and time with compiling and evaluating
    evaluations               pairs of step and figure
    run                       its run folder, from the search's
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Sequence
from typing import Any

from lmobj import _yaml, config
from lmobj.search._config import SearchExperiment, experiment
from lmobj.search._folder import SearchFolder
from lmobj.search._space import Settings, short_names
from lmobj.search._study import Trial, best_of
from lmobj.train.storage import write_atomically

__all__ = ["clock", "in_short", "overrides", "show", "show_settings", "table", "write_results"]

_LONGEST_REASON = 160


def write_results(folder: SearchFolder, search: SearchExperiment, trials: Sequence[Trial]) -> None:
    """Writes results.jsonl, and best.yaml where a trial is complete."""
    lines = [_line(folder, search, trial) for trial in trials if trial.state != "running"]
    write_atomically(folder.results, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
    best = best_of(trials, search.mode)
    if best is not None:
        found = experiment(search, best.settings, name=f"{search.name}-best", run=None)
        write_atomically(folder.best, config.dump(found))


def _line(folder: SearchFolder, search: SearchExperiment, trial: Trial) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "state": trial.state,
        "reason": trial.reason,
        "metric": search.metric,
        "value": trial.value,
        "settings": dict(trial.settings),
        "steps": trial.steps,
        "seconds": trial.seconds,
        "evaluations": [[step, value if math.isfinite(value) else None] for step, value in trial.evaluations.items()],
        "run": str(folder.trial(trial.number).relative_to(folder.path)),
    }


def table(
    search: SearchExperiment, trials: Sequence[Trial], *, whole_reasons: bool = False
) -> tuple[list[str], list[list[str]]]:
    """A row for each finished trial: the complete ones from the best on, those that were pruned, those that failed.

    Of a reason its first sentence is shown, or all of it.
    """
    names = short_names(list(search.search.space))
    sign = 1.0 if search.mode == "min" else -1.0
    order = {"complete": 0, "pruned": 1, "failed": 2}
    finished = [trial for trial in trials if trial.state != "running"]
    finished.sort(key=lambda t: (order[t.state], 0.0 if t.value is None else sign * t.value, -t.steps, t.number))
    failed = any(trial.reason for trial in finished)
    header = ["trial", search.metric, *names.values(), "steps", "time", "state", *["reason"] * failed]
    rows = [
        [
            f"{trial.number}",
            "" if trial.value is None else show(trial.value),
            *("" if key not in trial.settings else show(trial.settings[key]) for key in names),
            f"{trial.steps:,}",
            clock(trial.seconds),
            trial.state,
            *[(trial.reason or "") if whole_reasons else in_short(trial.reason)] * failed,
        ]
        for trial in finished
    ]
    return header, rows


def overrides(settings: Settings) -> str:
    """The settings as arguments for a shell."""
    return " ".join(shlex.quote(f"{key}={_yaml.show(value, limit=10**6)}") for key, value in settings.items())


def in_short(reason: str | None) -> str:
    """The first sentence of a reason, without its full stop, in few enough characters for a line."""
    first = re.split(r"\.\s|\.$", reason or "", maxsplit=1)[0]
    return first if len(first) <= _LONGEST_REASON else f"{first[: _LONGEST_REASON - 1]}…"


def show_settings(settings: Settings, names: dict[str, str]) -> str:
    """The settings on one line, for people."""
    return " ".join(f"{names[key]}={show(value)}" for key, value in settings.items())


def show(value: Any) -> str:
    """A value in few characters; numbers with four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else _yaml.show(value, limit=40)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
