"""results.jsonl and what is made of it: mean and standard deviation over the seeds of each arm, as tables."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmobj.bench._config import Budget
from lmobj.errors import UserError
from lmobj.train.storage import write_atomically

__all__ = ["Results", "Spread", "markdown_table", "spread", "table"]

Line = dict[str, Any]
"""One arm with one seed; see `_run.finished_line` for its keys."""


class Results:
    """The lines of a results.jsonl, written whole or not at all each time one is added.

    Args:
      path: the file, which need not exist.
      seeds: those whose lines count.
    """

    def __init__(self, path: Path, seeds: Sequence[int]) -> None:
        self.path, self._seeds = path, tuple(seeds)
        self.lines: list[Line] = _read(path)

    def find(self, arm: str, seed: int) -> Line | None:
        """The line of an arm with a seed, if it is finished."""
        return next((line for line in self.lines if (line["arm"], line["seed"]) == (arm, seed)), None)

    def add(self, line: Line) -> None:
        """Adds a line; JSON has no NaN and no infinity, which become null."""
        self.lines.append(_finite(line))
        write_atomically(self.path, "".join(json.dumps(each, allow_nan=False) + "\n" for each in self.lines))

    def of(self, arm: str) -> list[Line]:
        """The finished lines of an arm, in the order of the seeds."""
        found = (self.find(arm, seed) for seed in self._seeds)
        return [line for line in found if line is not None]


def _read(path: Path) -> list[Line]:
    if not path.is_file():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            line["arm"], line["seed"], line["metrics"], line["probe"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number} is damaged ({type(error).__name__}: {error}); remove the line, and its arm is "
                "measured again."
            ) from None
        lines.append(line)
    return lines


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1 in the denominator; None for a single value) of n finite values."""

    mean: float
    deviation: float | None
    n: int

    def show(self, percent: bool = False) -> str:
        """As `61.2 ± 0.5`, with as many digits as say something."""
        scale, digits = (100, 1) if percent else (1, 4)
        text = f"{self.mean * scale:.{digits}f}"
        return text if self.deviation is None else f"{text} ± {self.deviation * scale:.{digits}f}"


def spread(values: Iterable[float | None]) -> Spread | None:
    """The spread of the values that are numbers; None if none is."""
    numbers = [float(value) for value in values if value is not None]
    if not numbers:
        return None
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
    return Spread(statistics.fmean(numbers), deviation, len(numbers))


SCORES = {"accuracy": "probe accuracy %", "macro_f1": "probe macro F1 %"}


def table(
    results: Results, arms: Sequence[str], metrics: Sequence[str], budget: Budget
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per arm, in the order given, and one for the majority class where there is a probe.

    `untrained` is the probe's accuracy on each arm's model as it was before the first step.
    """
    probed = any(line["probe"] for line in results.lines)
    scores = SCORES if probed else {}
    untrained = ["untrained %"] * probed
    header = [
        "arm",
        "n",
        *scores.values(),
        *untrained,
        *metrics,
        "steps",
        "tokens",
        "FLOPs counted",
        "FLOPs 6ND",
        "seconds",
    ]
    rows = []
    for arm in arms:
        lines = results.of(arm)
        if not lines:
            continue
        row = [arm, str(len(lines))]
        for score in scores:
            row.append(_show(spread(line["probe"][score] for line in lines), percent=True))
        if probed:
            row.append(_show(spread(line["probe"]["untrained"]["accuracy"] for line in lines), percent=True))
        for metric in metrics:
            row.append(_show(spread(line["metrics"].get(metric) for line in lines)))
        first = lines[0]
        seconds = spread(line["seconds"] for line in lines)
        row += [f"{first['steps']:,}", _short(first["tokens"]), _short(first["flops"]), _short(first["flops_formula"])]
        rows.append([*row, "" if seconds is None else f"{seconds.mean:.0f}"])
    if probed:
        guess = next(line["probe"]["majority"] for line in results.lines if line["probe"])
        blank = [""] * (len(header) - 2 - len(scores))
        rows.append(["majority class", "", *(f"{100 * guess[score]:.1f}" for score in scores), *blank])
    return header, rows


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table in Markdown."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _show(value: Spread | None, percent: bool = False) -> str:
    return "" if value is None else value.show(percent)


def _short(value: float) -> str:
    """Three digits with a unit: 1.53 T."""
    value = float(f"{value:.3g}")
    for unit, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.3g}"
