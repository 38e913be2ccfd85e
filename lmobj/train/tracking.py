"""What a run tells: a live line in the terminal, `metrics.jsonl`, and TensorBoard event files.

`metrics.jsonl` has one JSON object a line: `step`, then names such as `train/loss`, `eval/bits_per_byte` and
`perf/tokens_per_second`. JSON has no NaN and no infinity: both are written as null and read back as NaN. Every line is
handed to the operating system before `log` returns, so that a killed process loses none.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lmobj.errors import UserError
from lmobj.train.devices import peak_flops
from lmobj.train.distributed import is_first
from lmobj.train.sinks import JsonLines, Sink, TensorBoard
from lmobj.train.storage import write_atomically

__all__ = ["ACTIVITIES", "Tracker", "last_metrics", "read_metrics", "truncate_metrics", "utilisation"]

ACTIVITIES = ("input_wait", "evaluation", "saving")
"""What the loop does beside training steps, and `Tracker.timed` times: waiting for a batch, evaluating, saving."""


_WORTH_TELLING = 0.05
"""Share of the time from which on the live line tells of waiting for input."""


def utilisation(flops_per_second: float, device: jax.Device) -> float | None:
    """Model FLOPs in a second on a device as a share of its peak; None on CPU, and where the peak is not known."""
    peak = None if device.platform == "cpu" else peak_flops(device.device_kind)
    return None if peak is None else flops_per_second / peak


class Tracker:
    """Writes the metrics of one run and shows how it goes.

    Lines and events of steps after `start` are dropped first: what a run did after the checkpoint that it resumes from
    has not happened. In a terminal there is one live line; elsewhere a plain line every `interval` seconds.

    Args:
      run_dir: the run's folder; `metrics.jsonl` and `tensorboard/` are put in it.
      start: step that the run starts or resumes from.
      total: last step.
      tokens_per_step: tokens in a global batch, for tokens per second.
      flops_per_step: one device's share of the model FLOPs of a step (`lmobj.train.flops`), for their utilisation. It
        is shown where `peak_flops` knows the device, never on CPU.
      quiet: print nothing; the files are written all the same.
      sinks: where metrics go beside `metrics.jsonl`; by default event files for TensorBoard. They are closed with it.
      interval: seconds between plain lines.

    Only the first process writes and prints.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        *,
        start: int = 0,
        total: int,
        tokens_per_step: float | None = None,
        flops_per_step: float | None = None,
        quiet: bool = False,
        sinks: Sequence[Sink] | None = None,
        interval: float = 10.0,
    ) -> None:
        self.run_dir = pathlib.Path(run_dir)
        self.total, self.tokens_per_step, self.flops_per_step = total, tokens_per_step, flops_per_step
        self._leader = is_first()
        self._quiet = quiet or not self._leader
        self._interval = interval
        self._clock = _Clock()
        self._printed = -math.inf
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._live: Progress | None = None
        self._sinks: list[Sink] = []
        if not self._leader:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "metrics.jsonl"
        truncate_metrics(path, start)
        self._sinks.append(JsonLines(path))
        self._sinks += [TensorBoard(self.run_dir / "tensorboard", start=start)] if sinks is None else sinks
        if not self._quiet and sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[line]}"))
            self._live = Progress(*columns, console=self._console)
            self._task = self._live.add_task("step", total=total, completed=start, line=f"{start}/{total}")
            self._live.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of `step` to all places.

        Where there are `train/` metrics among them, these are added, measured since the `train/` metrics before:
        `perf/steps_per_second` and, where known, `perf/tokens_per_second` and `perf/mfu`, without the time that went
        to evaluation and saving; and where each second went, in shares that add up to 1: `perf/input_wait`, waiting for
        batches, `perf/evaluation`, `perf/saving`, which is what the loop waits for while a checkpoint is written in the
        background, and `perf/step`, all the rest, which is the training steps themselves.
        """
        if not self._leader:
            return
        numbers = {name: float(value) for name, value in values.items()}
        training = any(name.startswith("train/") for name in numbers)
        if training:
            numbers |= self._performance(self._clock.lap(step))
        for sink in self._sinks:
            sink.write(step, numbers)
        if self._quiet:
            return
        if training:
            self._show(step, numbers)
        else:
            self.note(f"step {step}  " + "  ".join(f"{name} {_number(value)}" for name, value in numbers.items()))

    def last(self, name: str) -> float | None:
        """The last value of a metric of this run, earlier processes included; None if it was never logged."""
        return last_metrics(self.run_dir / "metrics.jsonl").get(name)

    def text(self, step: int, name: str, value: str) -> None:
        """Puts a text, such as a generated sample, where it can be shown beside the metrics."""
        for sink in self._sinks:
            sink.text(step, name, value)

    def note(self, message: str) -> None:
        """Prints a line for the person, above the live line."""
        if not self._quiet:
            self._console.print(message, markup=False)

    @contextlib.contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        """The time in this block is that of one of the `ACTIVITIES`. Blocks do not nest."""
        with self._clock.timed(activity):
            yield

    def close(self, *, failed: bool = False) -> None:
        """Ends the live line and closes the sinks. `failed`: an error or a signal ended the run."""
        if self._live is not None:
            self._live.stop()
        with contextlib.ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close, failed=failed)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def _performance(self, lap: _Lap | None) -> dict[str, float]:
        """`perf/...` metrics of a lap; none for the first one, which holds the compilation."""
        if lap is None:
            return {}
        speed = lap.steps_per_second
        values = {"perf/steps_per_second": speed, **{f"perf/{name}": share for name, share in lap.shares.items()}}
        if self.tokens_per_step is not None:
            values["perf/tokens_per_second"] = speed * self.tokens_per_step
        if self.flops_per_step is not None:
            used = utilisation(speed * self.flops_per_step, jax.devices()[0])
            if used is not None:
                values["perf/mfu"] = used
        return values

    def _show(self, step: int, numbers: Mapping[str, float]) -> None:
        parts = [f"{step}/{self.total}"]
        if "train/loss" in numbers:
            parts.append(f"loss {_number(numbers['train/loss'])}")
        if "perf/tokens_per_second" in numbers:
            parts.append(f"{numbers['perf/tokens_per_second']:,.0f} tokens/s")
        if "perf/mfu" in numbers:
            parts.append(f"MFU {numbers['perf/mfu']:.1%}")
        if numbers.get("perf/input_wait", 0) >= _WORTH_TELLING:
            parts.append(f"{numbers['perf/input_wait']:.0%} waiting for input")
        seconds = self._clock.seconds_per_step
        if seconds is not None:
            parts.append(f"ETA {_duration(seconds * (self.total - step))}")
        line = "  ".join(parts)
        if self._live is not None:
            self._live.update(self._task, completed=step, line=line)
        elif time.monotonic() - self._printed >= self._interval or step >= self.total:
            self._printed = time.monotonic()
            self.note(f"step {line}")


class _Lap(NamedTuple):
    """Steps per second of training alone, and the shares of `ACTIVITIES` and of `step`, which add up to 1."""

    steps_per_second: float
    shares: dict[str, float]


class _Clock:
    """Times laps without evaluation and saving, and seconds per step since the first lap with them."""

    def __init__(self) -> None:
        self._last: tuple[int, float] | None = None
        self._first: tuple[int, float] | None = None
        self._spent: dict[str, float] = defaultdict(float)
        self.seconds_per_step: float | None = None

    def lap(self, step: int) -> _Lap | None:
        now, lap = time.monotonic(), None
        if self._first is None or self._last is None:
            self._first = (step, now)
        elif step > self._last[0]:
            elapsed = max(now - self._last[1], 1e-9)
            training = max(elapsed - self._spent["evaluation"] - self._spent["saving"], 1e-9)
            shares = {name: self._spent[name] / elapsed for name in ACTIVITIES}
            shares["step"] = 1 - sum(shares.values())
            lap = _Lap((step - self._last[0]) / training, shares)
            self.seconds_per_step = (now - self._first[1]) / (step - self._first[0])
        self._last = (step, now)
        self._spent.clear()
        return lap

    @contextlib.contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._spent[activity] += time.monotonic() - started


def _number(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, second = divmod(max(0, round(seconds)), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


# --- metrics.jsonl ------------------------------------------------------------------------------------------------


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl` in order, null as NaN. A last line that was cut off while written is left out.

    Raises:
      UserError: there is no such file, or a line before the last is not a JSON object with a `step`.
    """
    return [
        {name: math.nan if value is None else value for name, value in line.items()}
        for line in _parse(pathlib.Path(path))
    ]


def last_metrics(path: str | os.PathLike[str]) -> dict[str, float]:
    """The last value of each metric in a `metrics.jsonl`."""
    return {name: value for line in read_metrics(path) for name, value in line.items() if name != "step"}


def truncate_metrics(path: str | os.PathLike[str], step: int) -> None:
    """Drops the lines of steps after `step`, and a last line that was cut off; in one replacement, or not at all.

    Raises:
      UserError: a line before the last is not a JSON object with a `step`.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return
    kept = "".join(json.dumps(line) + "\n" for line in _parse(path) if line["step"] <= step)
    if kept.encode() == path.read_bytes():
        return
    write_atomically(path, kept)


def _parse(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a file as they are, without a last one that does not end."""
    if not path.is_file():
        raise UserError(f"There is no {path}; give the metrics.jsonl of a run.")
    *complete, _ = path.read_bytes().split(b"\n")
    lines = []
    for number, content in enumerate(complete, 1):
        try:
            line = json.loads(content)
            if not isinstance(line["step"], int):
                raise TypeError("step is not an integer")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number} is damaged ({error}); every line must be a JSON object with a step. Remove the line "
                "to go on."
            ) from error
        lines.append(line)
    return lines
