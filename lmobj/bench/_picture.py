"""The picture of a benchmark: each arm's mean and spread over its seeds, by the probe and by every metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from lmobj.bench._config import Budget, BudgetKind
from lmobj.bench._results import Line, Results, coverage, is_probed, spread, value_at
from lmobj.train.page import BLUE, GREEN, GREY, ORANGE, PINK, STYLE
from lmobj.train.tracking import read_metrics

__all__ = ["UNITS", "draw_results"]

_COLOURS = (BLUE, ORANGE, GREEN, PINK, "#56B4E9", "#E69F00", "#000000")
_ARM_INCHES = 0.85
"""Of a panel's width, what the name of an arm takes at least."""
UNITS: Mapping[BudgetKind, str] = {"tokens": "tokens", "flops": "counted FLOPs", "seconds": "seconds of training"}


def draw_results(
    results: Results, folder: Path, arms: Sequence[str], metrics: Sequence[str], budget: Budget, paths: Sequence[Path]
) -> None:
    """Draws the results so far into files, whose suffixes choose the format: svg, png, pdf.

    Args:
      results: the finished lines.
      folder: of the benchmark; metrics that were evaluated during training are drawn as curves against the budget
        from the metrics of its runs.
      arms, metrics: what is shown, in this order.
      budget: what each run could spend.
      paths: the files.
    """
    colours = {arm: _COLOURS[index % len(_COLOURS)] for index, arm in enumerate(arms)}
    lines = {arm: results.of(arm) for arm in arms if results.of(arm)}
    panels = ["probe"] * is_probed(results.lines, metrics) + list(metrics)
    # Text as paths, so that a picture in a README looks alike everywhere; no dates, so that equal results give equal
    # files.
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "path"}):
        width = max(4.6, _ARM_INCHES * len(lines))  # names of many arms stand side by side
        figure = Figure(figsize=(1.2 + width * len(panels), 4.2), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            if panel == "probe":
                _draw_probe(axes, lines, colours)
            else:
                _draw_metric(axes, folder, lines, panel, budget.kind, colours)
        runs = max((len(each) for each in lines.values()), default=0)
        figure.suptitle(
            f"{budget.amount:.3g} {UNITS[budget.kind]} per run; mean and standard deviation over {runs} "
            f"seed{'s' * (runs != 1)}",
            fontsize=10,
            color=GREY,
        )
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once: doing it again for each file would move things a little
        for path in paths:
            figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_probe(axes: Axes, lines: Mapping[str, Sequence[Line]], colours: Mapping[str, str]) -> None:
    """Accuracy on the probe's test texts, beside that of the models before training and that of the majority class."""
    axes.set_title("Frozen-feature probe, accuracy")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.1f}%"))
    accuracies = {arm: [value_at(line, "probe", "accuracy") for line in each] for arm, each in lines.items()}
    _draw_points(axes, lines, accuracies, colours)
    before = [spread(value_at(line, "probe", "untrained", "accuracy") for line in each) for each in lines.values()]
    marks = [(place + 0.2, untrained.mean) for place, untrained in enumerate(before) if untrained is not None]
    if not marks:  # all runs diverged
        return
    axes.plot(*zip(*marks, strict=True), "_", color=GREY, markersize=14, markeredgewidth=2, label="untrained")
    axes.legend(loc="best")
    majority = next(line["probe"]["majority"]["accuracy"] for each in lines.values() for line in each if line["probe"])
    axes.axhline(majority, color=GREY, linewidth=1.3, linestyle=(0, (4, 2)))
    axes.annotate("majority class", (0.01, majority), xycoords=axes.get_yaxis_transform(), xytext=(0, 3),
                  textcoords="offset points", color=GREY, fontsize=9)  # fmt: skip


def _draw_metric(
    axes: Axes,
    folder: Path,
    lines: Mapping[str, Sequence[Line]],
    metric: str,
    kind: BudgetKind,
    colours: Mapping[str, str],
) -> None:
    """A metric against what was spent of the budget, where it was measured on the way; else at the end."""
    axes.set_title(metric)
    curves = {arm: _curve(folder, each, metric, kind) for arm, each in lines.items()}
    finals = {arm: [value_at(line, "metrics", metric) for line in each] for arm, each in lines.items()}
    if all(len(curve) < 2 for curve in curves.values()):
        _draw_points(axes, lines, finals, colours)
        return
    for arm, curve in curves.items():
        found = [(x, s) for x, values in curve.items() if (s := spread(values)) is not None]
        axes.errorbar(
            [x for x, _ in found],
            [s.mean for _, s in found],
            yerr=[s.deviation or 0.0 for _, s in found],
            color=colours[arm],
            linewidth=2,
            elinewidth=1.2,
            capsize=3,
            marker="o",
            markersize=4,
            label=f"{arm} ({share})" if (share := coverage(finals[arm])) else arm,
        )
    axes.set_xlim(left=0)
    axes.set_xlabel(UNITS[kind])
    axes.legend()


def _curve(folder: Path, lines: Sequence[Line], metric: str, kind: BudgetKind) -> dict[float, list[float]]:
    """What was spent until each evaluation -> the metric then with each seed that did not diverge later on."""
    points: dict[float, list[float]] = {}
    for line in lines:
        if line["diverged"]:
            continue
        spent = line["seconds"] if kind == "seconds" else line[kind]
        for entry in read_metrics(folder / line["run"] / "metrics.jsonl"):
            if metric in entry and spent is not None:
                points.setdefault(spent * entry["step"] / line["steps"], []).append(entry[metric])
    return points


def _draw_points(
    axes: Axes,
    lines: Mapping[str, Sequence[Line]],
    values: Mapping[str, Sequence[float | None]],
    colours: Mapping[str, str],
) -> None:
    """One column per arm: the seeds as small dots, beside them the mean with a bar of one standard deviation.

    Below stands of how many runs it is, if not of all.
    """
    for place, (arm, each) in enumerate(values.items()):
        found, shown = spread(each), [value for value in each if value is not None]
        if found is None:
            continue
        axes.plot([place - 0.12] * len(shown), shown, "o", color=colours[arm], alpha=0.4, markersize=4)
        axes.errorbar(
            place, found.mean, yerr=found.deviation or 0.0, color=colours[arm], marker="o", markersize=8, capsize=6,
            linewidth=2,
        )  # fmt: skip
    shares = [f"\n{share}" if (share := coverage(values[arm])) else "" for arm in lines]
    names = [f"{arm}\n{each[0]['steps']:,} steps" for arm, each in lines.items()]
    axes.set_xticks(range(len(lines)), [name + share for name, share in zip(names, shares, strict=True)])
    axes.set_xlim(-0.6, len(lines) - 0.4)
    axes.margins(y=0.15)
    axes.grid(visible=False, axis="x")
