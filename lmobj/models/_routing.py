"""What the routers of a model did, handed past the model's callers to whoever asked for it.

    with recorded_routing() as calls:
        hidden = model.hidden(tokens, mask=mask)
    calls[0].counts                         pairs of token and choice that each expert of each layer was chosen for

An objective knows hidden states alone, and the losses of routers are of what happened on the way to them. The record is
made while a function is traced, so the calls must be read within the same trace: not across a `jit`, a `scan` or a
`checkpoint` of the caller's own.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

__all__ = ["RoutedModel", "RouterSums", "RoutingCall", "record_routing", "recorded_routing"]


class RouterSums(NamedTuple):
    """Sums over the routed tokens of a call, for each layer: additive over rows. Padding is no routed token.

    counts: pairs of token and choice, by expert, whether or not there was room for them.
    probabilities: of the router, by expert.
    squares: logsumexp(router logits)^2.
    dropped: pairs for which there was no room.
    """

    counts: Float[Array, "n E"]
    probabilities: Float[Array, "n E"]
    squares: Float[Array, " n"]
    dropped: Float[Array, " n"]


class RoutingCall(NamedTuple):
    """One call of a routed model: its sums, and which rows it read."""

    sums: RouterSums
    shape: tuple[int, ...]
    """Rows and tokens in each, (B, L)."""
    segment_ids: Int[Array, "B L"] | None
    """The very array of the call's mask, so that its rows can be told from others."""


@runtime_checkable
class RoutedModel(Protocol):
    """A model that may have routers, and records their calls if it does."""

    @property
    def routed(self) -> bool:
        """Whether it has routers."""
        ...


_CALLS: contextvars.ContextVar[list[RoutingCall] | None] = contextvars.ContextVar("lmobj_routing_calls", default=None)


@contextlib.contextmanager
def recorded_routing() -> Iterator[list[RoutingCall]]:
    """The calls of routed models that are traced inside the block, in order."""
    calls: list[RoutingCall] = []
    token = _CALLS.set(calls)
    try:
        yield calls
    finally:
        _CALLS.reset(token)


def record_routing(sums: RouterSums, shape: tuple[int, ...], segment_ids: Int[Array, "B L"] | None) -> None:
    """Adds a call to the innermost record, if there is one."""
    calls = _CALLS.get()
    if calls is not None:
        calls.append(RoutingCall(sums, shape, segment_ids))
