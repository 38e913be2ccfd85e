"""The report of a run: one HTML page that needs nothing but itself, made from the files in the run folder.

Reads `metrics.jsonl` and, where they exist, `config.yaml`, `environment.json`, `baselines.json`, `samples.json` and
`eval/`, `generation.json`.
Everything that is shown is escaped: samples are a model's output and may hold any text.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import markupsafe
import matplotlib
import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lmobj.errors import UserError
from lmobj.train.generation import figure_rows
from lmobj.train.page import BLUE, GREEN, GREY, ORANGE, PINK, STYLE, render, svg
from lmobj.train.split_report import SplitReport, read_reports
from lmobj.train.storage import write_atomically
from lmobj.train.tracking import read_metrics

__all__ = ["plot_curves", "write_report"]

_DASHES: tuple[Any, ...] = ((0, (1, 1.6)), (0, (4, 2)), (0, (7, 2, 1.5, 2)), (0, (10, 3)), (0, (2, 4)))


class _Quantity(NamedTuple):
    """A figure that a run may be judged by: title, label of an axis, which way is better, and whether it is a share."""

    title: str
    label: str
    better: str
    share: bool = False

    def show(self, value: float) -> str:
        """A value as text."""
        return _percent(value) if self.share else f"{value:.3f}"


_QUANTITIES = {
    "entity_f1": _Quantity("F1 of entities", "held-out F1 of entities", "higher", share=True),
    "f1": _Quantity("F1 of answers", "held-out F1 of answers", "higher", share=True),
    "bits_per_byte": _Quantity("Bits per byte", "held-out bits per byte", "lower"),
    "top5_accuracy": _Quantity("Top-5 accuracy", "held-out top-5 accuracy", "higher", share=True),
    "micro_f1": _Quantity("Micro F1", "held-out micro F1", "higher", share=True),
    "mrr_at_10": _Quantity("MRR@10", "held-out MRR@10", "higher"),
    "accuracy": _Quantity("Accuracy", "held-out accuracy", "higher", share=True),
    "mse": _Quantity("Squared error", "held-out squared error", "lower"),
    "perplexity": _Quantity("Perplexity", "held-out perplexity", "lower"),
    "loss": _Quantity("Loss", "held-out loss (nats)", "lower"),
}
"""Evaluation metrics that a run may be judged by: the first that it has."""


Draw = Callable[[Axes, "Run"], None]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run folder holds, read. `metrics` are the lines of metrics.jsonl in order."""

    path: Path
    metrics: list[dict[str, Any]]
    config_text: str = ""
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    baselines: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    splits: list[SplitReport] = dataclasses.field(default_factory=list)
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one metric, finite values only."""
        points = [(line["step"], line[name]) for line in self.metrics if _is_number(line.get(name))]
        return np.array([p[0] for p in points], float), np.array([p[1] for p in points], float)

    def last(self, name: str) -> float | None:
        """The last value of one metric; None if it was never logged."""
        return next((float(m[name]) for m in reversed(self.metrics) if isinstance(m.get(name), int | float)), None)

    @property
    def judged_by(self) -> str:
        """The evaluation metric that says how good the model is."""
        return next((name for name in _QUANTITIES if self.last(f"eval/{name}") is not None), "loss")

    @property
    def quantity(self) -> _Quantity:
        """The metric that the run is judged by."""
        return _QUANTITIES[self.judged_by]

    def compared(self) -> list[tuple[str, float]]:
        """The baselines that are known by the metric that the run is judged by, and their values, largest first."""
        known = [
            (name, baseline[self.judged_by]) for name, baseline in self.baselines.items() if self.judged_by in baseline
        ]
        return sorted((pair for pair in known if _is_number(pair[1])), key=lambda pair: -pair[1])


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html` into a run folder and returns its path.

    Raises:
      UserError: the folder has no metrics.jsonl, or one of its files is damaged.
    """
    run = _read(Path(run_dir))
    page = render(
        "lmobj.train",
        "report.html.j2",
        title=str(run.config.get("name") or run.path.resolve().name),
        subtitle=" · ".join(_subtitle(run)),
        tiles=list(_tiles(run)),
        comparison=_comparison(run),
        quantity=run.quantity.title,
        better=run.quantity.better,
        charts=[_chart(run, draw) for draw in _charts(run)],
        splits=[_split(run, told) for told in run.splits],
        samples=list(_samples(run)),
        generation=_generation(run),
        metrics=_table(run),
        config=run.config_text,
        environment=list(_facts(run.environment)),
    )
    path = run.path / "report.html"
    write_atomically(path, page)
    return path


def plot_curves(run_dir: str | Path, path: str | Path) -> Path:
    """Draws a run's loss, and beside it the metric it is judged by with the baselines, as a picture.

    The file's suffix chooses the format: svg, png, pdf.
    """
    run = _read(Path(run_dir))
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "path"}):
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        for axes, draw in zip(figure.subplots(1, 2), (_draw_loss, _draw_judged), strict=True):
            draw(axes, run)
        figure.savefig(path, dpi=160, metadata=None if Path(path).suffix != ".svg" else {"Date": None})
    return Path(path)


def _read(path: Path) -> Run:
    """The run folder's files."""
    if not (path / "metrics.jsonl").is_file():
        raise UserError(f"{str(path)!r} has no metrics.jsonl; give a folder that `lmobj train` made.")
    config_text = (path / "config.yaml").read_text(encoding="utf-8") if (path / "config.yaml").is_file() else ""
    return Run(
        path,
        read_metrics(path / "metrics.jsonl"),
        config_text,
        yaml.safe_load(config_text) or {},
        _read_json(path / "environment.json", {}),
        _read_json(path / "baselines.json", {}),
        _read_json(path / "samples.json", []),
        read_reports(path),
        _read_json(path / "generation.json", {}),
    )


def _read_json(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno} is not JSON: {error.msg}.") from None


def _subtitle(run: Run) -> Iterator[str]:
    for section in ("objective", "model"):
        if isinstance(run.config.get(section), dict) and run.config[section].get("name"):
            yield str(run.config[section]["name"]).replace("_", " ")
    if run.metrics:
        yield f"{run.metrics[-1]['step']:,} steps"
    if run.environment.get("devices"):
        yield str(run.environment["devices"])


def _tiles(run: Run) -> Iterator[tuple[str, str, str]]:
    """(value, what it is, remark) of the headline figures."""
    for name in dict.fromkeys((run.judged_by, "perplexity", "loss")):
        value = run.last(f"eval/{name}")
        if value is not None:
            quantity = _QUANTITIES[name]
            shown = _percent(value) if quantity.share else _short(value)
            yield shown, quantity.title.lower(), quantity.label.split(" ", 1)[0]
    if (train_loss := run.last("train/loss")) is not None:
        yield _short(train_loss), "training loss", "last logged"
    _, speed = run.series("perf/tokens_per_second")
    if speed.size:
        yield f"{np.median(speed):,.0f}", "tokens per second", "median"
    if skipped := run.last("train/skipped"):
        yield f"{skipped:,.0f}", "updates passed over", "by train.guard"


def _comparison(run: Run) -> list[dict[str, Any]]:
    """The model and the baselines by the metric that the run is judged by, best first, with the width of their bars."""
    best = run.last(f"best/{run.judged_by}")
    model = run.last(f"eval/{run.judged_by}") if best is None else best
    if not run.compared() or model is None or not math.isfinite(model):
        return []
    rows = [*run.compared(), ("this model", model)]
    largest = max(value for _, value in rows) or 1.0
    return [
        {
            "name": name,
            "value": run.quantity.show(value),
            "width": round(100 * value / largest, 1),
            "model": name == "this model",
        }
        for name, value in sorted(rows, key=lambda row: row[1], reverse=run.quantity.better == "higher")
    ]


def _split(run: Run, told: SplitReport) -> dict[str, Any]:
    """What is told of a task on a split: its figures beside the baselines', a table of scores, and a picture."""
    picture = told.picture
    return {
        "name": told.split,
        "note": f"{told.examples:,} examples, after {told.step:,} steps",
        "baselines": list(told.baselines),
        "figures": [
            (name, _short(value), [_short(each[name]) if name in each else "" for each in told.baselines.values()])
            for name, value in sorted(told.figures.items())
        ],
        "header": told.header,
        "rows": told.lines(),
        "picture": picture and svg(picture.draw, picture.size)[1],
        "width": picture and round(min(max(360, 90 * picture.size[0]), 900)),
    }


def _samples(run: Run) -> Iterator[dict[str, Any]]:
    """Samples with what the model wrote told apart: after the prompt, or in place of its masks."""
    for sample in run.samples:
        prompt, text = str(sample.get("prompt", "")), str(sample.get("text", ""))
        continued = text.startswith(prompt)
        yield {
            "step": sample.get("step"),
            "given": prompt,
            "written": text.removeprefix(prompt) if continued else text,
            "continued": continued,
        }


def _generation(run: Run) -> dict[str, Any]:
    """Figures of what decodings write, a picture of them, and their first text after each prompt."""
    if not run.generation:
        return {}
    header, rows = figure_rows(run.generation)
    return {
        "header": header[1:],
        "rows": rows,
        "reference": run.generation["reference"] is not None,
        "chart": _chart(run, _draw_generation),
        "texts": [(prompt, list(_written(run, prompt))) for prompt in run.generation["prompts"]],
    }


def _written(run: Run, prompt: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each decoding's first text after a prompt."""
    for decoding in run.generation["decodings"]:
        yield decoding["name"], next(text["text"] for text in decoding["texts"] if text["prompt"] == prompt)


def _table(run: Run) -> list[tuple[str, str, str, str]]:
    """(metric, last, smallest, largest) of every metric, by name."""
    names = sorted({name for line in run.metrics for name in line if name != "step"})
    rows = []
    for name in names:
        _, values = run.series(name)
        if values.size:
            rows.append((name, _short(values[-1]), _short(values.min()), _short(values.max())))
    return rows


def _facts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, text) of what the environment holds; a mapping in it takes one line."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            value = [f"{name} {item}" for name, item in value.items()]
        if value not in (None, "", []):
            yield key, " · ".join(map(str, value)) if isinstance(value, list) else str(value)


def _charts(run: Run) -> list[Draw]:
    """The charts for which the run has points."""
    wanted: list[tuple[Draw, tuple[str, ...]]] = [
        (_draw_loss, ("train/loss", "eval/loss")),
        (_draw_judged, (f"eval/{run.judged_by}",) if run.judged_by != "loss" else ()),
        (_draw_speed, ("perf/tokens_per_second",)),
        (_draw_learning_rate, ("train/learning_rate",)),
    ]
    return [draw for draw, names in wanted if any(run.series(name)[0].size for name in names)]


def _chart(run: Run, draw: Draw) -> tuple[str, markupsafe.Markup]:
    return svg(lambda axes: draw(axes, run))


def _draw_loss(axes: Axes, run: Run) -> None:
    steps, losses = run.series("train/loss")
    if steps.size > 40:
        axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=1)
        axes.plot(steps, _smooth(losses), color=BLUE, linewidth=2, label="training (smoothed)")
    elif steps.size:
        axes.plot(steps, losses, color=BLUE, linewidth=2, label="training")
    steps, losses = run.series("eval/loss")
    if steps.size:
        axes.plot(steps, losses, color=ORANGE, linewidth=2, marker="o", markersize=4.5, label="held-out")
    _finish(axes, "Loss", "loss (nats)")
    if axes.lines:
        axes.legend(loc="upper right")


def _draw_judged(axes: Axes, run: Run) -> None:
    quantity = run.quantity
    steps, values = run.series(f"eval/{run.judged_by}")
    axes.plot(steps, values, color=ORANGE, linewidth=2, marker="o", markersize=4.5, zorder=3)
    lines = run.compared()
    for (_, value), dash in zip(lines, _DASHES, strict=False):
        axes.axhline(value, color=GREY, linewidth=1.3, linestyle=dash)
    _finish(axes, f"{quantity.title} ({quantity.better} is better)", quantity.label)
    if quantity.share:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f}%"))
    if values.size:
        ends = [(_clip(name), value, GREY) for name, value in lines] + [("this model", values[-1], ORANGE)]
        _label_ends(axes, [(f"{name} {quantity.show(value)}", value, color) for name, value, color in ends])


def _label_ends(axes: Axes, ends: Sequence[tuple[str, float, str]]) -> None:
    """Writes a label beside the right end of each line, moved up where it would run into the one below."""
    low, high = axes.get_ylim()
    gap, y = 0.065 * (high - low), -math.inf
    for text, value, color in sorted(ends, key=lambda end: end[1]):
        y = max(value, y + gap)
        weight = "bold" if color == ORANGE else "normal"
        axes.annotate(
            text,
            (1.02, y),
            xycoords=axes.get_yaxis_transform(),
            va="center",
            color=color,
            fontsize=9.5,
            fontweight=weight,
        )


def _draw_generation(axes: Axes, run: Run) -> None:
    """Each decoding's distinct pairs of tokens against its perplexity; dashed lines cross where held-out text is."""
    axes.set_title("Variety against probability")
    axes.set_xlabel("perplexity under the model")
    axes.set_ylabel("distinct-2")
    axes.set_xscale("log")
    if (reference := run.generation["reference"]) is not None:
        figures = reference["figures"]
        for line, figure in ((axes.axvline, "perplexity"), (axes.axhline, "distinct_2")):
            line(figures[figure], color=ORANGE, linewidth=1, linestyle=_DASHES[1], alpha=0.6)
    for number, one in enumerate([*([reference] if reference else []), *run.generation["decodings"]]):
        figures, is_text = one["figures"], one is reference
        color = ORANGE if is_text else (BLUE, GREEN, PINK, GREY)[number % 4]
        axes.plot(
            figures["perplexity"],
            figures["distinct_2"],
            marker="*" if is_text else "oDs^v"[number % 5],
            markersize=13 if is_text else 8,
            color=color,
            linestyle="",
            label=_clip(one["name"]),
        )
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.margins(x=0.12, y=0.12)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.4g}"))


def _draw_speed(axes: Axes, run: Run) -> None:
    steps, values = run.series("perf/tokens_per_second")
    axes.plot(steps, values, color=GREEN, linewidth=1.8)
    axes.set_ylim(0, 1.15 * values.max())
    _finish(axes, "Throughput", "tokens per second")


def _draw_learning_rate(axes: Axes, run: Run) -> None:
    steps, values = run.series("train/learning_rate")
    axes.plot(steps, values, color=PINK, linewidth=2)
    axes.set_ylim(bottom=0)
    _finish(axes, "Learning rate", "learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=False)


def _finish(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title)
    axes.set_ylabel(label)
    axes.set_xlabel("step")
    axes.grid(visible=False, axis="x")
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.02)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    if axes.get_ylim()[1] >= 1000:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of about 3% of the points around each, cut at the ends."""
    half = max(2, round(0.015 * values.size))
    window = np.ones(2 * half + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _clip(name: str) -> str:
    """A name cut to what fits beside a chart; the tables hold it whole."""
    return name if len(name) <= 24 else name[:23] + "…"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _short(value: float) -> str:
    """Four significant digits, thousands apart, without a bare exponent where it can be helped."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.3e}"
