"""What `lmobj plan` tells of a forecast and of a search."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lmobj._units import in_bytes

if TYPE_CHECKING:
    from lmobj.train.forecast import Forecast
    from lmobj.train.mesh_search import MeshSearchResult

__all__ = ["forecast_lines", "search_table", "search_verdict", "showing_progress"]

_FORMULA = (
    "The step time is an estimate: the longest of the three, as if they overlapped perfectly and everything ran at the "
    "makers' peak rates. Real steps take longer."
)


def forecast_lines(told: Forecast) -> Iterator[str]:
    """A forecast, line by line."""
    memory, times = told.memory, told.roofline
    yield f"{told.parameters:,} parameters on {told.devices} x {told.device} ({_mesh(told)})"
    yield (
        f"{told.tokens_per_step:,} tokens a step in {told.accumulate} microbatch{'es' * (told.accumulate > 1)}"
        f"{f', remat {told.remat}' if told.remat else ''}; compiled for {told.compiler} in {told.compile_seconds:.1f} s"
    )
    yield from _section(
        "Memory of a device",
        [
            ("weights", _bytes(memory.weights)),
            ("optimizer", _bytes(memory.optimizer)),
            ("gradients, activations, workspace", _bytes(memory.temporary)),
            ("batch and other", _bytes(memory.other)),
            (
                "peak",
                f"{_bytes(memory.peak)}  of {in_bytes(memory.available)}, {memory.peak / memory.available:.0%}",
            ),
        ],
    )
    counted = "not counted" if told.counted_flops is None else f"{told.counted_flops:.3e}"
    yield from _section(
        "FLOPs of a step, all devices",
        [("model, by formula", f"{told.model_flops:9.3e}"), ("matrix products in the program", counted)],
    )
    rows = [
        (c.kind + (" (network)" if c.across else ""), f"{_bytes(c.sent)}  in {c.count:,}") for c in told.collectives
    ]
    yield from _section("Sent by a device in a step", rows or [("nothing", "")])
    yield from _section(
        "Estimate",
        [
            ("compute", _seconds(times.compute)),
            ("memory bandwidth", _seconds(times.memory)),
            ("communication", _seconds(times.communication)),
            ("step", f"{_seconds(times.step)}  bound by {times.bound}"),
            ("tokens per second", f"{told.tokens_per_second:9,.0f}"),
            ("MFU", f"{told.mfu * 100:9.1f} %"),
        ],
    )
    yield ""
    yield _FORMULA
    yield from told.notes
    for line in told.replicated:
        yield f"Not divided: {line}."
    yield ""
    yield _verdict(told)


def _verdict(told: Forecast) -> str:
    memory = told.memory
    room = memory.available - memory.peak
    if told.fits:
        return f"Fits: {_bytes(room).strip()} of a device are left."
    bound = ", by this upper bound" if told.compiler == "CPU" else ""
    return (
        f"Does not fit{bound}: {_bytes(-room).strip()} too much. A larger train.mesh.fsdp or train.accumulate, or "
        "another model.remat, takes less; --search tries them."
    )


def search_table(result: MeshSearchResult) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    """What was compiled and fits, fastest first."""
    header = ("mesh", "remat", "accumulate", "memory", "step", "bound by", "tokens/s", "MFU")
    rows: list[tuple[str, ...]] = [
        (
            _mesh(told),
            told.remat or "",
            str(told.accumulate),
            _bytes(told.memory.peak).strip(),
            _seconds(told.roofline.step).strip(),
            told.roofline.bound,
            f"{told.tokens_per_second:,.0f}",
            f"{told.mfu:.1%}",
        )
        for _, told in result.found
    ]
    return header, rows


def search_verdict(result: MeshSearchResult, overrides: Sequence[str]) -> Iterator[str]:
    """What was tried, and the best."""
    left = result.tried - result.refused - result.too_large
    yield (
        f"{result.tried} settings tried: {result.refused} not allowed, {result.too_large} too large by estimate, "
        f"{left} possible; {result.compiled} compiled, of which {len(result.found)} fit."
    )
    if result.found:
        yield _FORMULA
        yield from result.found[0][1].notes
        yield ""
        yield f"Best: {' '.join(overrides) or 'the config as it is'}"
    else:
        yield "None fits: more devices, a smaller train.batch_size, or a smaller model; or --compile more of them."


@contextmanager
def showing_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, in a terminal."""
    columns = (TextColumn("{task.description:<9}"), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), disable=not sys.stderr.isatty()) as bars:
        tasks: dict[str, int] = {}

        def show(doing: str, done: int, of: int) -> None:
            if doing not in tasks:
                tasks[doing] = bars.add_task(doing, total=of)
            bars.update(tasks[doing], completed=done, total=of)  # type: ignore[arg-type]

        yield show


def _section(title: str, rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield ""
    yield title
    for name, value in rows:
        yield f"  {name:<34} {value}".rstrip()


def _mesh(told: Forecast) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in told.mesh.items() if size > 1) or "one device"


def _bytes(size: float) -> str:
    return in_bytes(size).rjust(13)


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:9,.1f} ms" if seconds >= 1e-3 or seconds == 0 else f"{seconds * 1e6:9,.1f} us"
