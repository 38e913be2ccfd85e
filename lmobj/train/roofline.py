"""How fast a step could be: three times that a device needs at its makers' peak rates, of which the longest counts.

    step >= max(FLOPs / peak, bytes to and from memory / bandwidth, bytes sent / speed of the links)

Williams et al. 2009, "Roofline: An Insightful Visual Performance Model", with the links as a third roof. It takes all
three as overlapping perfectly, so no step is faster, and real ones are slower.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lmobj.train.collectives import Collective
from lmobj.train.devices import DeviceKind

__all__ = ["Roofline", "memory_traffic", "roofline"]


@dataclass(frozen=True)
class Roofline:
    """Seconds of one step, on each device."""

    compute: float
    memory: float
    communication: float

    @property
    def step(self) -> float:
        """The longest of the three."""
        return max(self.compute, self.memory, self.communication)

    @property
    def bound(self) -> str:
        """Which is the longest: `compute`, `memory` or `communication`."""
        return max(("compute", "memory", "communication"), key=lambda name: getattr(self, name))


def roofline(kind: DeviceKind, *, flops: float, traffic: float, exchanged: Iterable[Collective]) -> Roofline:
    """The three times of a device.

    Args:
      kind: the device.
      flops: 16-bit matrix operations of one device in a step.
      traffic: bytes that it reads from its memory and writes there.
      exchanged: what it sends; beyond a domain of fast links by its share of the network.
    """
    sent = {True: 0.0, False: 0.0}
    for collective in exchanged:
        sent[collective.across] += collective.sent
    beyond = sent[True] / kind.network if kind.network else 0.0
    return Roofline(flops / kind.peak_flops, traffic / kind.bandwidth, sent[False] / kind.link + beyond)


def memory_traffic(*, weights: int, optimizer: int, multiplied: int, temporary: int, accumulate: int) -> int:
    """Bytes to and from a device's memory in a step, reckoned roughly.

    Weights and optimizer state are read and written once, 2 (weights + optimizer). Each microbatch reads the weights
    that it multiplies with forwards and backwards, adds its gradients to the sum, and writes and reads what is
    temporary: accumulate * 2 (multiplied + weights + temporary).

    Args:
      weights, optimizer: bytes of a device's shards.
      multiplied: bytes of the weights as it multiplies with them, gathered from devices that share them.
      temporary: bytes of gradients, kept activations and workspace.
      accumulate: microbatches.
    """
    return 2 * (weights + optimizer) + accumulate * 2 * (multiplied + weights + temporary)
