"""Measurements for a person to read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lmobj.train.flops import FORMULA

__all__ = ["HEADER", "notes", "speed_rows"]

HEADER = (
    "experiment",
    "",
    "attention",
    "tokens/s",
    "step, ms (10-90%)",
    "lmobj over it",
    "TFLOP/s",
    "of ceiling",
    "MFU",
    "peak GiB",
    "planned GiB",
    "compile, s",
    "first loss",
)


def speed_rows(
    name: str, found: Mapping[str, Any], ceilings: Mapping[str, float] | None = None
) -> list[tuple[str, ...]]:
    """A row of cells for each contender.

    Args:
      name: of what was measured.
      found: what `measure` returned, or a mapping with `error` alone.
      ceilings: the fastest matrix product of a device in FLOP/s, by dtype.
    """
    if "contenders" not in found:
        return [_failed(name, "", found["error"])]
    mesh = "".join(f", {axis} {size}" for axis, size in found["mesh"].items())
    label = f"{name}, {_size(found['parameters'])}, {found['rows']} x {found['length']}, {found['dtype']}{mesh}"
    ceiling = None if ceilings is None else ceilings.get(found["dtype"])
    rows = []
    for row in found["contenders"]:
        if row["error"] is None:
            rows.append((label, row["contender"], *_cells(row, ceiling, found["devices"])))
        else:
            rows.append(_failed(label, row["contender"], row["error"]))
        label = ""
    return rows


def notes(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """What a person should know beside the rows: the devices, where memory is from, what is a ratio, the formula."""
    measured = [one for one in found if "contenders" in one]
    devices = sorted({f"{one['devices']} x {one['device']} ({one['platform']})" for one in measured})
    rows = [row for one in measured for row in one["contenders"]]
    told = any(row["peak_bytes"] is not None for row in rows)
    lines = [f"On {'; '.join(devices)}."] if devices else []
    if told:
        lines.append("peak GiB: the most that a device's allocator had in use.")
    elif measured:
        lines.append("These devices do not tell how much memory was in use.")
    lines.append("planned GiB: state, batch and temporaries of the compiled step on each device, as the compiler says.")
    if any("lmobj_over_it" in row for row in rows):
        lines.append(
            "lmobj over it: time of its step over that of lmobj's, median of the turns; above 1 lmobj is faster. "
            "eager, compiled: Transformers in PyTorch."
        )
    return [*lines, f"{FORMULA}."]


def _cells(row: Mapping[str, Any], ceiling: float | None, devices: int) -> tuple[str, ...]:
    low, high = row["step_seconds_10_90"]
    speed = row["model_flops_per_second"]
    return (
        row["attention"],
        f"{row['tokens_per_second']:,.0f}",
        f"{1e3 * row['median_step_seconds']:,.1f} ({1e3 * low:,.1f}-{1e3 * high:,.1f})",
        f"{row['lmobj_over_it']:.2f}" if "lmobj_over_it" in row else "",
        f"{speed / 1e12:,.3g}",
        "" if ceiling is None else f"{speed / devices / ceiling:.0%}",
        "" if row["utilisation"] is None else f"{row['utilisation']:.1%}",
        _gib(row["peak_bytes"]),
        _gib(row["planned_bytes"]),
        "" if row["compile_seconds"] is None else f"{row['compile_seconds']:.1f}",
        f"{row['first_loss']:.4f}",
    )


def _failed(label: str, contender: str, error: str) -> tuple[str, ...]:
    return (label, contender, f"failed: {error}", *[""] * (len(HEADER) - 3))


def _size(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f}M" if parameters < 1e9 else f"{parameters / 1e9:,.2f}B"


def _gib(x: int | None) -> str:
    return "" if x is None else f"{x / 2**30:.2f}"
