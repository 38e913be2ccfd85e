"""Out of memory: which parts of a run take how much of a device, and the cheapest setting that takes less."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

from lmobj.errors import UserError
from lmobj.objectives import TermKind
from lmobj.train.assemble import Assembly
from lmobj.train.plan import make_plan, shard_bytes

__all__ = ["Situation", "cheapest_change", "contributors", "explained"]

_MARK = "RESOURCE_EXHAUSTED"
_LISTED = 4
"""Contributors that the message names."""


@dataclass(frozen=True)
class Situation:
    """What decides which setting to change.

    rows_per_device: rows of a microbatch that one device computes on.
    divisible: whether a microbatch can be taken in smaller parts at all (no term needs the whole batch).
    remat: the model's setting, None if it has none.
    """

    batch_size: int
    accumulate: int
    rows_per_device: int
    divisible: bool
    remat: str | None
    data: int
    fsdp: int
    devices: int


def cheapest_change(now: Situation, *, activations: int | None, held: int) -> str:
    """The setting that costs least and takes less memory, as `key=value` with what it costs.

    Accumulation and rematerialisation shrink only activations: where what is held throughout is larger, parameters
    and optimizer state are shared out first.

    Args:
      now: the run.
      activations: bytes of a device that go with the rows, None if not known.
      held: bytes of a device for parameters, gradients, optimizer state and averages.
    """
    fewer_rows = [n for n in range(2, now.rows_per_device + 1) if now.rows_per_device % n == 0]
    small = {
        "accumulate": (
            f"train.accumulate={now.accumulate * fewer_rows[0]}, which takes each batch in smaller parts and changes "
            "no result"
            if fewer_rows and now.divisible
            else None
        ),
        "remat": (
            "model.remat=full, which computes activations again in the backward pass, about a third more work"
            if now.remat not in (None, "full")
            else None
        ),
    }
    ways = next((n for n in range(2, now.data + 1) if now.data % n == 0), None)
    share = (
        f"train.mesh.fsdp={now.fsdp * ways} (with train.mesh.data={now.data // ways}), which shares parameters and "
        "optimizer state between devices"
        if ways
        else None
    )
    by_size = (share, *small.values()) if activations is not None and held > activations else (*small.values(), share)
    for change in by_size:
        if change is not None:
            return change
    if now.batch_size > now.devices:
        return f"train.batch_size below {now.batch_size}, which changes what is trained"
    return "a smaller model (model.layers, model.width), or more devices"


def contributors(state: Any, batch: Any, temporary: int | None) -> dict[str, int | None]:
    """Bytes on each device, largest first; None (not known) last.

    Args:
      state: shapes of a training state, with shardings.
      batch: shapes of a global batch, with shardings.
      temporary: what the compiled step takes beside its arguments, where the compiler could tell; gradients are in it.
    """
    gradients = shard_bytes(state.params)
    parts = {
        "parameters": shard_bytes((state.params, state.objective.params)),
        "gradients": gradients,
        "optimizer state": shard_bytes(state.opt_state),
        "moving average": shard_bytes(state.ema),
        "carried memory": shard_bytes(state.objective.carried),
        "activations and temporaries": None if temporary is None else max(temporary - gradients, 0),
        "batch": shard_bytes(batch),
    }
    known = {name: size for name, size in parts.items() if size != 0}
    return dict(sorted(known.items(), key=lambda item: -math.inf if item[1] is None else -item[1]))


@contextlib.contextmanager
def explained(run: Assembly) -> Iterator[None]:
    """Turns XLA's complaint that memory ran out, in compiling or running, into a UserError that says what to do."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if _MARK not in str(error):
            raise
        raise UserError(_message(run, str(error))) from error


def _message(run: Assembly, complaint: str) -> str:
    parts = contributors(run.abstract_state, run.abstract_batch, _temporary(run))
    activations = parts.get("activations and temporaries")
    held = sum(parts.get(name) or 0 for name in ("parameters", "gradients", "optimizer state", "moving average"))
    device = run.mesh.devices.flat[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    has = f", which has {_gib(limit)}" if limit else ""
    asked = re.search(r"allocat\w+ (\d+)\s?bytes", complaint)
    more = f" XLA asked for {_gib(int(asked[1]))} at once." if asked else ""
    listed = ", ".join(
        f"{name} {'not known' if size is None else _gib(size)}" for name, size in list(parts.items())[:_LISTED]
    )
    change = cheapest_change(situation(run), activations=activations, held=held)
    return (
        f"Out of memory on a {device.device_kind} device{has}. The run needs, on each device: {listed}.{more} The "
        f"cheapest change is {change}; start a new run with it."
    )


def situation(run: Assembly) -> Situation:
    """What of a run decides which setting to change."""
    settings, shape = run.config.train, run.mesh.shape
    shards = math.prod(shape[axis] for axis in run.rules["batch"])
    return Situation(
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        rows_per_device=settings.batch_size // (settings.accumulate * shards),
        divisible=TermKind.BATCH not in run.objective.term_kinds.values(),
        remat=getattr(run.config.model, "remat", None),
        data=shape["data"],
        fsdp=shape["fsdp"],
        devices=shards,
    )


def _temporary(run: Assembly) -> int | None:
    """What the compiled step takes beside its arguments; None where memory does not suffice to compile it."""
    try:
        return make_plan(run).temporary
    except jax.errors.JaxRuntimeError as error:
        if _MARK not in str(error):
            raise
        return None


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 / 100 else f"{size / 2**20:,.2f} MiB"
