"""The pictures of a search: values by trial, against each setting, learning curves, and what mattered."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import markupsafe
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lmobj.search._config import SearchExperiment
from lmobj.search._results import show
from lmobj.search._space import Parameter, short_names
from lmobj.search._study import Trial, best_of
from lmobj.train.page import BLUE, GREY, ORANGE, svg

__all__ = ["charts"]

_PRUNED = "#B8C1CB"
_LONGEST_NAME = 22


def charts(
    search: SearchExperiment, trials: Sequence[Trial], importances: Mapping[str, float]
) -> Iterator[tuple[str, markupsafe.Markup]]:
    """Title and SVG of each picture for which there is something to show."""
    names = short_names(list(search.search.space))
    draws: list[Callable[[Axes], None]] = []
    complete = [trial for trial in trials if trial.value is not None]
    if complete:
        draws.append(functools.partial(_draw_by_trial, search=search, trials=trials))
    if any(len(trial.evaluations) > 1 for trial in trials):
        draws.append(functools.partial(_draw_curves, search=search, trials=trials))
    if complete:
        for key, parameter in search.search.space.items():
            draws.append(
                functools.partial(_draw_setting, search=search, trials=trials, key=key, parameter=parameter,
                                  name=names[key])
            )  # fmt: skip
    if importances:
        shares = {names[key]: share for key, share in importances.items()}
        draws.append(functools.partial(_draw_importances, shares=shares))
    for draw in draws:
        yield svg(draw)


def _draw_by_trial(axes: Axes, search: SearchExperiment, trials: Sequence[Trial]) -> None:
    complete = [trial for trial in trials if trial.value is not None]
    best, sign = best_of(trials, search.mode), 1.0 if search.mode == "min" else -1.0
    assert best is not None
    values = np.array([trial.value for trial in complete], float)
    so_far = sign * np.minimum.accumulate(sign * values)
    numbers = [trial.number for trial in complete]
    axes.step([*numbers, len(trials) - 1], [*so_far, so_far[-1]], where="post", color=ORANGE, linewidth=1.6,
              label="best so far", zorder=1)  # fmt: skip
    _limit(axes, search, values)
    _points(axes, search, numbers, values, best=numbers.index(best.number))
    _ticks_below(axes, trials, {trial.number: trial.number for trial in trials})
    _finish(axes, "Value by trial", "trial", search)
    axes.set_xlim(-0.5, max(len(trials) - 0.5, 1))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _legend(axes)


def _draw_setting(
    axes: Axes, search: SearchExperiment, trials: Sequence[Trial], key: str, parameter: Parameter, name: str
) -> None:
    """Value against one setting. Choices are spread evenly, in their order."""

    def place(trial: Trial) -> float:
        value = trial.settings[key]
        return float(value) if parameter.choices is None else float(parameter.choices.index(value))

    known = [trial for trial in trials if key in trial.settings]
    complete = [trial for trial in known if trial.value is not None]
    best = best_of(trials, search.mode)
    values = np.array([trial.value for trial in complete], float)
    _limit(axes, search, values)
    _points(axes, search, [place(trial) for trial in complete], values, best=complete.index(best) if best else 0)
    _ticks_below(axes, known, {trial.number: place(trial) for trial in known})
    _finish(axes, f"By {name}", key, search)
    if parameter.choices is not None:
        labels = [show(choice) for choice in parameter.choices]
        labels = [label if len(label) <= _LONGEST_NAME else f"{label[: _LONGEST_NAME - 1]}…" for label in labels]
        slanted = sum(map(len, labels)) > 60
        axes.set_xticks(range(len(labels)), labels, rotation=20 if slanted else 0, ha="right" if slanted else "center")
        axes.set_xlim(-0.5, len(labels) - 0.5)
    else:
        _number_axis(axes, parameter)
    _legend(axes)


def _number_axis(axes: Axes, parameter: Parameter) -> None:
    """The whole range, with a little room at both sides."""
    low, high = float(parameter.low or 0), float(parameter.high or 0)
    if parameter.log:
        room = (high / low) ** 0.04
        axes.set_xscale("log")
        axes.set_xlim(low / room, high * room)
        decades = math.log10(high / low)
        subs = (1.0,) if decades > 4 else (1.0, 3.0) if decades > 1.5 else (1.0, 2.0, 5.0)
        axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        room = 0.04 * (high - low)
        axes.set_xlim(low - room, high + room)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=parameter.whole))
        if parameter.values is not None and len(parameter.values) <= 8:
            axes.xaxis.set_major_locator(FixedLocator([float(value) for value in parameter.values]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if parameter.whole else f"{x:g}"))


def _draw_curves(axes: Axes, search: SearchExperiment, trials: Sequence[Trial]) -> None:
    best = best_of(trials, search.mode)
    labelled: set[str] = set()
    looks: dict[str, dict[str, Any]] = {
        "pruned": {"color": _PRUNED, "linewidth": 1.2, "zorder": 1},
        "failed": {"color": _PRUNED, "linewidth": 1.2, "linestyle": (0, (2, 2)), "zorder": 1},
        "complete": {"color": BLUE, "linewidth": 1.2, "alpha": 0.55, "zorder": 2},
        "best": {"color": ORANGE, "linewidth": 2.4, "zorder": 3},
    }
    for trial in trials:
        steps = _comparable(search, trial)
        state = "best" if best is not None and trial.number == best.number else trial.state
        if not steps or state not in looks:
            continue
        label = state if state not in labelled else None
        labelled.add(state)
        values = [trial.evaluations[step] for step in steps]
        axes.plot(steps, values, marker="o", markersize=3, label=label, **looks[state])
    _limit(axes, search, np.array([trial.evaluations[step] for trial in trials for step in _comparable(search, trial)]))
    part = search.train.evaluate_batches
    _finish(axes, "Learning curves" if part is None else f"Learning curves, on {part} batches", "step", search)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    _legend(axes)


def _comparable(search: SearchExperiment, trial: Trial) -> list[int]:
    """The steps of the evaluations that a curve is drawn through: all on the same batches."""
    whole = search.train.evaluate_batches is not None and trial.state == "complete"  # is the last one, on all batches
    steps = [step for step in trial.evaluations if not (whole and step == trial.steps)]
    return [step for step in steps if math.isfinite(trial.evaluations[step])]


def _draw_importances(axes: Axes, shares: Mapping[str, float]) -> None:
    ordered = sorted(shares.items(), key=lambda pair: pair[1])
    bars = axes.barh([name for name, _ in ordered], [share for _, share in ordered], color=BLUE, height=0.6)
    axes.bar_label(bars, [f"{share:.0%}" for _, share in ordered], padding=5, color=GREY, fontsize=9.5)
    axes.set_title("Importance of the settings")
    axes.set_xlabel("share of the variance between trials")
    axes.set_xlim(0, 1.12 * max(shares.values()) or 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0%}"))
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    if len(ordered) < 4:
        axes.set_ylim(-1.2, len(ordered) + 0.2)


def _points(axes: Axes, search: SearchExperiment, x: Sequence[float], values: np.ndarray, best: int) -> None:
    """Complete trials, the best in colour; those beyond the axis as triangles at its edge."""
    places = np.asarray(x, float)
    low, high = axes.get_ylim()
    beyond = (values > high) | (values < low)
    axes.plot(places[~beyond], values[~beyond], "o", color=BLUE, markersize=6, alpha=0.75, label="complete", zorder=2)
    if beyond.any():
        up = search.mode == "min"
        edge = np.full(beyond.sum(), high - 0.03 * (high - low) if up else low + 0.03 * (high - low))
        axes.plot(places[beyond], edge, "^" if up else "v", color=BLUE, markersize=6, alpha=0.75, zorder=2,
                  label="further off")  # fmt: skip
    axes.plot(places[best], values[best], "o", color=ORANGE, markersize=9, label="best", zorder=3)


def _ticks_below(axes: Axes, trials: Sequence[Trial], places: Mapping[int, float]) -> None:
    """Trials without a value, as marks on the lower edge."""
    for state, mark in (("pruned", "|"), ("failed", "x")):
        x = [places[trial.number] for trial in trials if trial.state == state and trial.number in places]
        if x:
            x = _spread(x, 0.015 * (max(places.values()) - min(places.values())))
            axes.plot(x, [0.02] * len(x), mark, color=GREY, markersize=8 if mark == "|" else 5, label=state,
                      transform=axes.get_xaxis_transform(), zorder=2, clip_on=False)  # fmt: skip


def _spread(x: Sequence[float], gap: float) -> list[float]:
    """Places that are one and the same, moved apart so that each is seen. Places that differ stay."""
    seen: Counter[float] = Counter()
    total = Counter(x)
    moved = []
    for place in x:
        moved.append(place + gap * (seen[place] - (total[place] - 1) / 2))
        seen[place] += 1
    return moved


def _limit(axes: Axes, search: SearchExperiment, values: np.ndarray) -> None:
    """Sets the range of values to most of them: a few that are far worse would flatten all the others."""
    if not values.size:
        return
    sign = 1.0 if search.mode == "min" else -1.0
    cost = np.sort(sign * values)
    upper = np.quantile(cost, 0.75)
    worst = cost[cost <= upper + 2.0 * (upper - cost[0])][-1]
    room = 0.1 * (worst - cost[0]) or 0.05 * abs(worst) or 1.0
    axes.set_ylim(*sorted((sign * (cost[0] - 1.3 * room), sign * (worst + room))))


def _finish(axes: Axes, title: str, label: str, search: SearchExperiment) -> None:
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.set_ylabel(search.metric)
    axes.grid(visible=False, axis="x")
    axes.spines["left"].set_visible(False)


def _legend(axes: Axes) -> None:
    """Above the picture, on one line, where it covers nothing."""
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=5, fontsize=9, handlelength=1.2, columnspacing=1.2,
                borderpad=0.1)  # fmt: skip
