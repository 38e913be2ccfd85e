"""Devices that are not there: what a program is compiled for when there is no hardware to run it.

For a TPU whose compiler is installed (the package `libtpu`) its own compiler is used, and needs no TPU. For everything
else programs are compiled for as many pretended CPU devices.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from lmobj.errors import UserError
from lmobj.train.devices import DeviceKind
from lmobj.train.environment import CPU_DEVICES_FLAG

__all__ = ["Target", "make_target", "topology"]

_MOST = 16
"""Chips along a dimension of a two-dimensional slice."""
_CHIPS_OF_A_HOST = 4
_NO_TPU_HERE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8"}
"""For libtpu, which would look for the TPU machine that it runs on, and complain that there is none."""
_SMALL: dict[int, dict[int, Sequence[int]]] = {
    2: {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4)},
    3: {1: (1, 1, 1), 2: (1, 2, 1), 4: (2, 2, 1)},
}
"""Slices of less than a full cube or square, by dimensions and chips."""


@dataclass(frozen=True)
class Target:
    """Devices to compile for."""

    kind: DeviceKind
    devices: tuple[Any, ...]
    topology: str | None
    """The slice that libtpu compiles for; None: pretended CPU devices."""

    @property
    def compiler(self) -> str:
        """Which compiler it is, in words."""
        return f"TPU ({self.topology})" if self.topology else "CPU"


def make_target(kind: DeviceKind, count: int) -> Target:
    """`count` devices of a kind, to compile for.

    jax is kept to the CPU, so that no accelerator of this machine is taken. That and the number of CPU devices can only
    be set before jax has started; the command line does.

    Raises:
      UserError: a number of chips that no slice has, or jax has started with fewer CPU devices.
    """
    if count < 1:
        raise UserError(f"--devices is {count}; accepted: 1 or more.")
    slice_of = topology(kind, count) if kind.tpu else None
    if not _has_libtpu():
        slice_of = None
    _keep_to_cpu(count if slice_of is None else None)
    if slice_of is None:
        found = jax.devices("cpu")
        if len(found) < count:
            raise UserError(
                f"--devices is {count}, and jax has started with {len(found)} CPU devices to compile for; accepted: a "
                f"plan before anything else uses jax, or XLA_FLAGS={CPU_DEVICES_FLAG}={count}."
            )
        return Target(kind, tuple(found[:count]), None)
    for name, value in _NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    small = {"chips_per_host_bounds": (1, 1, 1)} if count < _CHIPS_OF_A_HOST else {}
    made = topologies.get_topology_desc(platform="tpu", topology_name=slice_of, **small)
    return Target(kind, tuple(made.devices), slice_of)


def topology(kind: DeviceKind, count: int) -> str:
    """The name of the most compact slice of `count` chips: `v5p:4x4x4`, `v5e:8x16`.

    Raises:
      UserError: there is none.
    """
    sizes = _slices(kind.torus)
    if count not in sizes:
        near = sorted(sizes, key=lambda n: (abs(math.log(n / count)), n))[:6]
        raise UserError(
            f"--devices is {count} and --device-kind {kind.name}, of which there are no slices of {count} chips; "
            f"accepted: {', '.join(map(str, sorted(near)))} and others."
        )
    return f"{kind.tpu}:{'x'.join(map(str, sizes[count]))}"


def _slices(dimensions: int) -> dict[int, Sequence[int]]:
    """Chips -> the most compact shape: powers of two up to 16 x 16, or multiples of 4 (or 2) in three dimensions."""
    found = dict(_SMALL[dimensions])
    if dimensions == 2:
        sides = [2**n for n in range(1, 5)]
        shapes = [shape for shape in itertools.product(sides, repeat=2) if shape[0] <= shape[1] <= _MOST]
    else:
        sides = [2, *range(4, 29, 4)]
        shapes = [shape for shape in itertools.product(sides, repeat=3) if shape[0] <= shape[1] <= shape[2]]
    for shape in sorted(shapes, key=lambda shape: (max(shape) / min(shape), shape)):
        if dimensions == 3 or max(shape) <= 2 * min(shape):
            found.setdefault(math.prod(shape), shape)
    return found


def _has_libtpu() -> bool:
    """Whether the package is there; a folder that happens to be called so is none."""
    found = importlib.util.find_spec("libtpu")
    return found is not None and found.origin is not None


def _keep_to_cpu(count: int | None) -> None:
    """Starts jax on the CPU, with so many devices unless XLA_FLAGS says how many. Changes nothing where it has started.

    None: as many as it would have.
    """
    asked = CPU_DEVICES_FLAG in os.environ.get("XLA_FLAGS", "")
    now: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    try:
        jax.config.update("jax_num_cpu_devices", now if count is None or asked else count)
    except RuntimeError:  # it has started
        return
    jax.config.update("jax_platforms", "cpu")
