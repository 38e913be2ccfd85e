"""lmobj's own training step as a contender."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from lmobj.train import memory
from lmobj.train.assemble import Design
from lmobj.train.plan import make_plan

__all__ = ["Ours", "Pending", "Stepper"]


class Pending(NamedTuple):
    """A step that was started."""

    wait: Callable[[], Any]
    """Returns when the device has done it."""
    loss: Callable[[], float]


class Stepper(Protocol):
    """What takes training steps, one after the other."""

    attention: str
    """Which attention it takes."""
    compile_seconds: float | None
    planned_bytes: int | None
    """What the compiled program says it takes on a device: state, batch and temporaries."""

    queues: bool
    """Whether a step can be started before the one before it has ended."""

    def step(self) -> Pending:
        """Starts the next step, on the next batch."""
        ...

    def peak_bytes(self) -> int | None:
        """Most memory of a device that its allocator had in use for it; None where it does not tell."""
        ...


class Ours:
    """The step of a design as `train` takes it: compiled, with donated state, over its whole mesh."""

    queues = True

    def __init__(self, design: Design, batches: Sequence[Mapping[str, Any]]) -> None:
        self._design = design
        with memory.explained(design):
            plan = make_plan(design)
            self.compile_seconds: float | None = plan.compile_seconds
            self.planned_bytes: int | None = plan.total
            self._compiled = plan.compiled
            self._state = design.initial_state()
            self._batches = [design.on_devices(batch) for batch in batches]
        self.attention: str = getattr(design.builder, "attention_backend", "xla")
        self._done = 0

    def weights(self) -> dict[str, Any]:
        """The model's parameters on the host, in arrays that later steps leave alone."""
        params: dict[str, Any] = jax.tree.map(np.array, self._design.gathered(self._state))
        return params

    def step(self) -> Pending:
        """Starts the next step, on the next batch."""
        with memory.explained(self._design):
            batch = self._batches[self._done % len(self._batches)]
            self._state, metrics = self._design.run_compiled(self._compiled, self._state, batch)
        self._done += 1

        def wait() -> None:
            with memory.explained(self._design):
                jax.block_until_ready(metrics)

        def loss() -> float:
            total, weight = jax.device_get(metrics["loss"])
            return float(total / weight)

        return Pending(wait, loss)

    def peak_bytes(self) -> int | None:
        """Of the device that had most in use."""
        told = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in self._design.mesh.local_devices]
        known = [peak for peak in told if peak is not None]
        return max(known, default=None)
