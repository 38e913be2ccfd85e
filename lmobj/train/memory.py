"""Out of memory: which parts of a run take how much of a device, and the cheapest setting that takes less.

A state that cannot fit whatever else the run takes is refused before anything is allocated: a machine that runs out of
memory may end the process without a word.
"""

from __future__ import annotations

import contextlib
import math
import pathlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

from lmobj._units import in_bytes
from lmobj.errors import UserError
from lmobj.objectives import TermKind
from lmobj.train.assemble import Design
from lmobj.train.plan import make_plan, shard_bytes
from lmobj.train.sharding import ways

__all__ = [
    "OutOfMemory",
    "Situation",
    "cheapest_change",
    "check_state",
    "contributors",
    "explained",
    "is_out_of_memory",
]

_MARK = "RESOURCE_EXHAUSTED"
_LISTED = 4
"""Contributors that the message names."""


class OutOfMemory(UserError):  # noqa: N818 - as `Halted`
    """A device's memory ran out."""


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
    zero: bool
    devices: int


def cheapest_change(now: Situation, *, activations: int | None, held: int) -> str:
    """The setting that costs least and takes less memory, as `key=value` with what it costs.

    Accumulation and rematerialisation shrink only activations: where what is held throughout is larger, parameters
    and optimizer state are shared out first.

    Args:
      now: the run.
      activations: bytes of a device that go with the rows, None if not known; 0: fewer rows would not help.
      held: bytes of a device for parameters, gradients, optimizer state and averages.
    """
    fewer_rows = [n for n in range(2, now.rows_per_device + 1) if now.rows_per_device % n == 0]
    accumulate = (
        f"train.accumulate={now.accumulate * fewer_rows[0]}, which takes each batch in smaller parts and changes no "
        "result"
        if fewer_rows and now.divisible
        else None
    )
    remat = (
        "model.remat=block, which computes activations again in the backward pass, about a third more work"
        if now.remat not in (None, "block")
        else None
    )
    fewer_activations = (accumulate, remat) if activations != 0 else ()
    divide = (
        "train.zero=true, which divides the optimizer state over train.mesh.data and changes no result"
        if now.data > 1 and not now.zero
        else None
    )
    ways = next((n for n in range(2, now.data + 1) if now.data % n == 0), None)
    share = (
        f"train.mesh.fsdp={now.fsdp * ways} (with train.mesh.data={now.data // ways}), which shares parameters and "
        "optimizer state between devices"
        if ways
        else None
    )
    fewer_held = (divide, share)
    held_first = activations is not None and held > activations
    for change in (*fewer_held, *fewer_activations) if held_first else (*fewer_activations, *fewer_held):
        if change is not None:
            return change
    if activations != 0 and now.batch_size > now.devices:
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
        "parameters": shard_bytes((state.params, state.frozen, state.objective.params)),
        "gradients": gradients,
        "optimizer state": shard_bytes(state.opt_state),
        "moving average": shard_bytes(state.ema),
        "carried memory": shard_bytes(state.objective.carried),
        "activations and temporaries": None if temporary is None else max(temporary - gradients, 0),
        "batch": shard_bytes(batch),
    }
    known = {name: size for name, size in parts.items() if size != 0}
    return dict(sorted(known.items(), key=lambda item: -math.inf if item[1] is None else -item[1]))


def check_state(run: Design) -> None:
    """Refuses a state that is larger than all memory of this process's devices; for CPU devices, of the machine.

    Raises:
      UserError: naming what takes how much, and the cheapest change.
    """
    devices = run.mesh.local_devices
    limits = [limit for device in devices if (limit := (device.memory_stats() or {}).get("bytes_limit"))]
    on_cpu = devices[0].platform == "cpu"
    room = _machine_memory() if on_cpu else sum(limits) if len(limits) == len(devices) else None
    needed = shard_bytes(run.abstract_state) * len(devices)
    if room is None or needed <= room:
        return
    parts = contributors(run.abstract_state, run.abstract_batch, None)
    change = cheapest_change(situation(run), activations=0, held=needed)
    raise UserError(
        f"The state of training takes {in_bytes(needed)} on {'this machine' if on_cpu else f'{len(devices)} devices'}, "
        f"which {'has' if on_cpu or len(devices) == 1 else 'have'} {in_bytes(room)}. The run needs, on each device: "
        f"{_listed(parts)}. The cheapest change is {change}."
    )


def _machine_memory() -> int | None:
    """Memory and swap of this machine, where the system tells them."""
    try:
        told = pathlib.Path("/proc/meminfo").read_text()
    except OSError:
        return None
    return 1024 * sum(map(int, re.findall(r"^(?:MemTotal|SwapTotal):\s+(\d+) kB$", told, re.MULTILINE))) or None


@contextlib.contextmanager
def explained(run: Design) -> Iterator[None]:
    """Turns XLA's complaint that memory ran out, in compiling or running, into a UserError that says what to do."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if _MARK not in str(error):
            raise
        raise OutOfMemory(_message(run, str(error))) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory ran out: one of ours, XLA's, or PyTorch's."""
    return isinstance(error, OutOfMemory) or _MARK in str(error) or type(error).__name__ == "OutOfMemoryError"


def _message(run: Design, complaint: str) -> str:
    parts = contributors(run.abstract_state, run.abstract_batch, _temporary(run))
    activations = parts.get("activations and temporaries")
    held = sum(parts.get(name) or 0 for name in ("parameters", "gradients", "optimizer state", "moving average"))
    device = run.mesh.local_devices[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    has = f", which has {in_bytes(limit)}" if limit else ""
    asked = re.search(r"allocat\w+ (\d+)\s?bytes", complaint)
    more = f" XLA asked for {in_bytes(int(asked[1]))} at once." if asked else ""
    change = cheapest_change(situation(run), activations=activations, held=held)
    return (
        f"Out of memory on a {device.device_kind} device{has}. The run needs, on each device: {_listed(parts)}.{more} "
        f"The cheapest change is {change}; start a new run with it."
    )


def _listed(parts: dict[str, int | None]) -> str:
    """The largest contributors in words."""
    largest = list(parts.items())[:_LISTED]
    return ", ".join(f"{name} {'not known' if size is None else in_bytes(size)}" for name, size in largest)


def situation(run: Design) -> Situation:
    """What of a run decides which setting to change."""
    settings, shape = run.config.train, run.mesh.shape
    shards = ways(run.mesh, run.rules, "batch")
    return Situation(
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        rows_per_device=settings.batch_size // (settings.accumulate * shards),
        divisible=TermKind.BATCH not in run.objective.term_kinds.values(),
        remat=getattr(run.config.model, "remat", None),
        data=shape["data"],
        fsdp=shape["fsdp"],
        zero=settings.zero,
        devices=shards,
    )


def _temporary(run: Design) -> int | None:
    """What the compiled step takes beside its arguments; None where memory does not suffice to compile it."""
    try:
        return make_plan(run).temporary
    except jax.errors.JaxRuntimeError as error:
        if _MARK not in str(error):
            raise
        return None
