"""results.jsonl and what is made of it: mean and standard deviation over the seeds of each arm, as tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lmobj.bench._config import Budget
from lmobj.errors import UserError
from lmobj.evaluate import SeedSpread, seed_spread
from lmobj.train.sinks import finite
from lmobj.train.storage import write_atomically

__all__ = ["Results", "markdown_table", "spread", "table"]

Line = dict[str, Any]
"""One arm with one seed; see `_line` for its keys."""


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
        self.lines.append(finite(line))
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
            line["arm"], line["seed"], line["diverged"], line["metrics"], line["probe"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number} is damaged ({type(error).__name__}: {error}); remove the line, and its arm is "
                "measured again."
            ) from None
        lines.append(line)
    return lines


def value_at(line: Line, *keys: str) -> float | None:
    """A number under nested keys; None where there is none, as in all of a run that diverged."""
    found: Any = line
    for key in keys:
        found = None if found is None else found.get(key)
    return found


def is_probed(lines: Iterable[Line], metrics: Sequence[str]) -> bool:
    """Whether there is a probe: a benchmark has one if no metrics, even where no run lasted until it was probed."""
    return not metrics or any(line["probe"] for line in lines)


def spread(values: Iterable[float | None]) -> SeedSpread | None:
    """The spread of the values that are numbers; None if none is."""
    numbers = [float(value) for value in values if value is not None]
    return seed_spread(numbers) if numbers else None


def coverage(values: Sequence[float | None]) -> str:
    """`2 of 3` where some of the values are no numbers; nothing where all are."""
    count = sum(value is not None for value in values)
    return "" if count == len(values) else f"{count} of {len(values)}"


SCORES = {"accuracy": "probe accuracy %", "macro_f1": "probe macro F1 %"}


def table(
    results: Results, arms: Sequence[str], metrics: Sequence[str], budget: Budget
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one row per arm, in the order given, and one for the majority class where there is a probe.

    `untrained` is the probe's accuracy on each arm's model as it was before the first step. Means leave out the runs
    that have no such number, and say so: `1.05 ± 0.07 (2 of 3)`.
    """
    probed = is_probed(results.lines, metrics)
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
        diverged = sum(line["diverged"] for line in lines)
        row = [arm, f"{len(lines)}{f' ({diverged} diverged)' * bool(diverged)}"]
        for score in scores:
            row.append(_show([value_at(line, "probe", score) for line in lines], percent=True))
        if probed:
            row.append(_show([value_at(line, "probe", "untrained", "accuracy") for line in lines], percent=True))
        for metric in metrics:
            row.append(_show([value_at(line, "metrics", metric) for line in lines]))
        first = lines[0]
        seconds = spread(line["seconds"] for line in lines)
        row += [f"{first['steps']:,}", _short(first["tokens"]), _short(first["flops"]), _short(first["flops_formula"])]
        rows.append([*row, "" if seconds is None else f"{seconds.mean:.0f}"])
    guess = next((line["probe"]["majority"] for line in results.lines if line["probe"]), None)
    if guess is not None:
        blank = [""] * (len(header) - 2 - len(scores))
        rows.append(["majority class", "", *(f"{100 * guess[score]:.1f}" for score in scores), *blank])
    return header, rows


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table in Markdown."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _show(values: Sequence[float | None], percent: bool = False) -> str:
    """The spread of the numbers among the values, and of how many it is, if not of all."""
    found, share = spread(values), coverage(values)
    return " ".join([*([] if found is None else [found.show(percent)]), *([f"({share})"] if share else [])])


def _short(value: float) -> str:
    """Three digits with a unit: 1.53 T."""
    value = float(f"{value:.3g}")
    for unit, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.3g}"
