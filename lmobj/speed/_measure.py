"""Contenders take turns, so that other load on the machine falls on all of them, and a ratio is that of one turn."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lmobj.batch import RowSpec
from lmobj.config import Experiment
from lmobj.errors import UserError
from lmobj.speed._batches import synthetic_batch
from lmobj.speed._ours import Ours, Pending, Stepper
from lmobj.speed._theirs import Theirs, check_peer
from lmobj.train.assemble import Design, design
from lmobj.train.flops import model_flops
from lmobj.train.memory import is_out_of_memory
from lmobj.train.plan import planned_vocabulary
from lmobj.train.tracking import utilisation

__all__ = ["CONTENDERS", "TURNS", "TURN_SECONDS", "Contender", "measure"]

Contender = Literal["lmobj", "eager", "compiled"]
CONTENDERS: tuple[Contender, ...] = ("lmobj", "eager", "compiled")
"""lmobj, and Transformers in PyTorch: as it is, and under `torch.compile`."""

BATCHES = 4
"""Different batches, taken in turn."""
WARMUP = 3
TURNS = 9
TURN_SECONDS = 1.5
"""A turn is as many steps as fit in this time, at least two."""


@dataclass
class Seen:
    """What was seen of one contender; None where there is nothing to tell."""

    contender: Contender
    error: str | None = None
    out_of_memory: bool = False
    compile_seconds: float | None = None
    """lmobj: of the compiler alone; PyTorch: of the first step, which compiles."""
    first_loss: float | None = None
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    """From the end of the step before to the step's own; the first of a turn from its start."""
    turn_seconds: list[float] = dataclasses.field(default_factory=list)
    """Mean step of each turn."""
    peak_bytes: int | None = None
    """Most memory of a device that the allocator had in use for it; CPUs do not tell."""
    planned_bytes: int | None = None
    """What the compiled program says it takes on a device."""
    attention: str = ""


def measure(
    experiment: Experiment,
    contenders: Sequence[Contender] = ("lmobj",),
    *,
    turns: int = TURNS,
    seconds: float = TURN_SECONDS,
    steps: int | None = None,
) -> dict[str, Any]:
    """Measures training steps of an experiment, on synthetic rows over its `train.mesh`, as JSON values.

    Each contender compiles, takes steps to warm up, and then `turns` turns; while a step runs, the next is queued
    already, as in training. Times are of the steps in turns alone.

    Args:
      experiment: the data's length and vocabulary, the model, the objective and the training settings are read.
      contenders: who takes part; peers begin with lmobj's weights where it takes part and can write them.
      turns: of each contender.
      seconds: of a turn.
      steps: of each contender in all its turns, in place of `seconds`.

    A contender that fails, for want of memory or of a compiler, has an `error` in its row, and the others go on.

    Raises:
      UserError: settings that cannot be satisfied, or a peer that there is not.
    """
    peers = [name for name in contenders if name != "lmobj"]
    parts = design(experiment, planned_vocabulary(experiment.data.tokenizer))
    if peers:
        check_peer(experiment, devices=parts.mesh.size)
    batches = [_batch(parts, index) for index in range(BATCHES)]
    results: list[Seen] = []
    running: list[tuple[Seen, Stepper]] = []
    weights: dict[str, Any] | None = None
    for name in contenders:
        seen = Seen(name)
        results.append(seen)
        stepper = _attempt(seen, functools.partial(_begin, name, parts, batches, weights))
        if isinstance(stepper, Ours) and peers:
            weights = stepper.weights()
        if stepper is not None and _attempt(seen, functools.partial(_warm_up, stepper, seen)):
            running.append((seen, stepper))
    if steps is None:
        counts = [[_fitting(stepper, seconds)] * turns for _, stepper in running]
    else:
        counts = [_shared(steps, turns)] * len(running)
    for turn in range(max(map(len, counts), default=0)):
        order = range(len(running))
        for place in [*order[turn % len(running) :], *order[: turn % len(running)]]:
            seen, stepper = running[place]
            _attempt(seen, functools.partial(_turn, seen, stepper, counts[place][turn]))
    return _row(experiment, parts, results)


def _begin(
    name: Contender, parts: Design, batches: Sequence[dict[str, Any]], weights: dict[str, Any] | None
) -> Stepper:
    if name == "lmobj":
        return Ours(parts, batches)
    _use_all_cores()
    return Theirs(parts, batches, weights, compiled=name == "compiled")


def _batch(parts: Design, index: int) -> dict[str, Any]:
    if isinstance(parts.rows, RowSpec):
        return synthetic_batch(parts.rows, parts.batch_sizes[""], parts.vocab, index)
    return {
        name: synthetic_batch(spec, parts.batch_sizes[name], parts.vocab, index) for name, spec in parts.rows.items()
    }


def _attempt(seen: Seen, function: Callable[[], Any]) -> Any:
    """What the function returns; None where it fails, which the row then tells."""
    if seen.error is not None:
        return None
    try:
        return function()
    except Exception as error:  # out of memory, or a compiler that is absent or refuses the model: told in the row
        if isinstance(error, UserError) and not is_out_of_memory(error):
            raise
        seen.error = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:400]}"
        seen.out_of_memory = is_out_of_memory(error)
        print(f"{seen.contender} failed: {seen.error}", file=sys.stderr, flush=True)
        return None


def _warm_up(stepper: Stepper, seen: Seen) -> bool:
    started = time.perf_counter()
    first = stepper.step()
    first.wait()
    seen.compile_seconds = stepper.compile_seconds
    if seen.contender == "compiled":
        seen.compile_seconds = time.perf_counter() - started
    seen.first_loss = first.loss()
    for _ in range(WARMUP):
        stepper.step().wait()
    seen.peak_bytes, seen.planned_bytes = stepper.peak_bytes(), stepper.planned_bytes
    seen.attention = stepper.attention
    return True


def _fitting(stepper: Stepper, seconds: float) -> int:
    """Steps that fit in a time, at least two."""
    started = time.perf_counter()
    stepper.step().wait()
    return max(2, round(seconds / (time.perf_counter() - started)))


def _shared(steps: int, turns: int) -> list[int]:
    """Steps of each turn, at least two, or all in one turn."""
    turns = max(1, min(turns, steps // 2))
    return [steps // turns + (turn < steps % turns) for turn in range(turns)]


def _turn(seen: Seen, stepper: Stepper, count: int) -> None:
    """Steps without a break between them: where that is possible, each is queued while the one before runs."""
    ends = [time.perf_counter()]
    running: collections.deque[Pending] = collections.deque()
    for _ in range(count):
        running.append(stepper.step())
        if len(running) > stepper.queues:
            running.popleft().wait()
            ends.append(time.perf_counter())
    if running:
        running.popleft().wait()
        ends.append(time.perf_counter())
    times = np.diff(ends).tolist()
    seen.step_seconds += times
    seen.turn_seconds.append(statistics.fmean(times))


def _use_all_cores() -> None:
    import torch

    has_affinity = hasattr(os, "sched_getaffinity")
    torch.set_num_threads(len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)


def _row(experiment: Experiment, parts: Design, results: list[Seen]) -> dict[str, Any]:
    device = parts.mesh.devices.flat[0]
    flops, tokens = model_flops(parts), parts.tokens_per_step
    ours = next((seen for seen in results if seen.contender == "lmobj" and seen.error is None), None)
    rows = []
    for seen in results:
        row = dataclasses.asdict(seen)
        if seen.error is None:
            median = statistics.median(seen.step_seconds)
            row |= {
                "median_step_seconds": median,
                "step_seconds_10_90": [float(x) for x in np.percentile(seen.step_seconds, [10, 90])],
                "tokens_per_second": tokens / median,
                "model_flops_per_second": flops / median,
                "utilisation": utilisation(flops / median / parts.mesh.size, device) if _in_16_bits(parts) else None,
            }
            if ours is not None and seen is not ours:
                ratios = [b / a for a, b in zip(ours.turn_seconds, seen.turn_seconds, strict=True)]
                row |= {"turn_ratios": ratios, "lmobj_over_it": statistics.median(ratios)}
        rows.append(row)
    return {
        "name": experiment.name,
        "model": experiment.model.name,
        "objective": experiment.objective.name,
        "parameters": parts.parameter_count,
        "rows": sum(parts.batch_sizes.values()),
        "length": experiment.data.length,
        "tokens_per_step": tokens,
        "dtype": experiment.model.dtype,
        "mesh": {axis: size for axis, size in parts.mesh.shape.items() if size > 1},
        "devices": parts.mesh.size,
        "device": device.device_kind,
        "platform": device.platform,
        "model_flops": flops,
        "contenders": rows,
    }


def _in_16_bits(parts: Design) -> bool:
    """Whether the peaks of data sheets are those of the model's products."""
    experiment: Any = parts.config
    return bool(experiment.model.dtype in ("bfloat16", "float16"))
