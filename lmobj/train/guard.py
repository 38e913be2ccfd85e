"""What becomes of an update that would do harm: a loss or gradient that is not finite, a loss far above the others.

The verdict falls inside the jitted step, so the host is not asked. A bad update changes nothing of the state but the
count of such updates and the step: parameters, optimizer, averages, the objective's own state and the statistics stay
as they were, by selection and never by arithmetic, through which NaN would leak. What it was is in the step's metrics,
which the loop reads one step late: it halts the run there, or goes on.

A loss is a spike if it lies further above the mean of the losses before it than `threshold` standard deviations. Mean
and variance of accepted losses x_0, x_1, ... weigh older ones less,

    w = max(1 - decay, 1 / (n + 1)),  mean' = mean + w (x - mean),  variance' = (1 - w) (variance + w (x - mean)^2)

after n of them: for the first 1 / (1 - decay) exactly their mean and variance, then an exponential average of both
(Finch, "Incremental calculation of weighted mean and variance", 2009, equations 124 and 143). They are kept whether
spikes are looked for or not, so that a resumed run may begin to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmobj.errors import UserError
from lmobj.objectives import Metric

__all__ = ["GUARD", "Guard", "GuardState", "Verdict", "judge", "select"]

GUARD = "guard/"
"""Prefix of the metrics that hold the verdict on a step."""

_NARROWEST = 1e-3
"""The least standard deviation, as a share of the mean: losses that hardly differ have no spikes among them."""


@dataclass(frozen=True)
class Guard:
    """What to do about updates that would do harm. `resume` may change it."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "use_attribute_docstrings": True}

    nonfinite: Literal["halt", "skip"] = "halt"
    """A loss or gradient with NaN or infinity: end the run without saving, or pass over the batch and count it."""
    spike: Literal["off", "halt", "skip"] = "off"
    """A loss far above those before it: train on it as on any other, end the run, or pass over the batch."""
    threshold: float = 6.0
    """Standard deviations above the mean that make a loss a spike, above 0."""
    decay: float = 0.99
    """How slowly mean and variance forget, in [0, 1): they reach back over about 1 / (1 - decay) updates."""
    warmup: int = 100
    """Losses that mean and variance must hold before any can be a spike, at least 2."""
    dumps: int = 10
    """Offending batches that are written to `bad_batches/` in the run folder, 0 or more."""

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise UserError(f"train.guard.threshold is {self.threshold}; accepted: above 0.")
        if not 0 <= self.decay < 1:
            raise UserError(f"train.guard.decay is {self.decay}; accepted: 0 or more, and less than 1.")
        for name, least in {"warmup": 2, "dumps": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"train.guard.{name} is {getattr(self, name)}; accepted: {least} or more.")


class GuardState(NamedTuple):
    """Updates that were passed over; and of those that were not, their number, and mean and variance of the loss."""

    skipped: Int[Array, ""]
    seen: Int[Array, ""]
    mean: Float[Array, ""]
    variance: Float[Array, ""]

    @classmethod
    def init(cls) -> GuardState:
        """Before the first update."""
        count, number = jnp.zeros((), jnp.int32), jnp.zeros(())
        return cls(count, count, number, number)


REASONS = ("none", "nonfinite_loss", "nonfinite_gradient", "spike")


class Verdict(NamedTuple):
    """The verdict on an update: index into `REASONS`, and the figures that it rests on."""

    reason: Any
    loss: Any
    grad_norm: Any
    mean: Any
    deviation: Any

    @property
    def kind(self) -> Literal["nonfinite", "spike"] | None:
        """The setting that decides what follows; None for a good update. On the host."""
        name = REASONS[int(self.reason)]
        return None if name == "none" else "spike" if name == "spike" else "nonfinite"

    def first(self, other: Verdict) -> Verdict:
        """This one if it is bad, else the other."""
        return Verdict(*(jnp.where(self.reason > 0, a, b) for a, b in zip(self, other, strict=True)))

    def metrics(self) -> dict[str, Metric]:
        """As (sum, weight) pairs."""
        return {GUARD + name: (value, jnp.ones(())) for name, value in self._asdict().items()}

    @staticmethod
    def is_bad(metrics: Mapping[str, Any]) -> bool:
        """Whether there is something wrong with the step that had these metrics. Waits for the step."""
        return int(metrics[f"{GUARD}reason"][0]) > 0

    @classmethod
    def read(cls, metrics: Mapping[str, Any]) -> Verdict:
        """The verdict in a step's metrics, on the host."""
        return cls(**{name: jax.device_get(metrics[GUARD + name][0]).item() for name in cls._fields})

    def __str__(self) -> str:
        """What was wrong, in words. On the host."""
        match REASONS[int(self.reason)]:
            case "nonfinite_loss":
                return f"the loss is {self.loss}"
            case "nonfinite_gradient":
                return f"the gradient has the norm {self.grad_norm} (the loss is {self.loss:.6g})"
            case "spike":
                return (
                    f"the loss is {self.loss:.6g}, {(self.loss - self.mean) / self.deviation:.1f} standard deviations "
                    f"above the mean of those before it ({self.mean:.6g}, deviation {self.deviation:.2g})"
                )
            case _:
                return "nothing was wrong"


def judge(
    guard: Guard, state: GuardState, loss: Float[Array, ""], grad_norm: Float[Array, ""]
) -> tuple[Bool[Array, ""], GuardState, Verdict]:
    """Whether an update is good, the state after it, and the verdict. Pure, for jit.

    Args:
      guard: of its settings, those about spikes.
      state: before the update.
      loss: of the update's whole batch.
      grad_norm: of the whole gradient; it is finite only if all of the gradient is.
    """
    x = loss.astype(state.mean.dtype)
    deviation = jnp.maximum(jnp.sqrt(state.variance), _NARROWEST * jnp.abs(state.mean))
    spike = jnp.asarray(guard.spike != "off") & (state.seen >= guard.warmup)
    spike &= x - state.mean > guard.threshold * deviation
    reason = jnp.where(jnp.isfinite(loss), jnp.where(jnp.isfinite(grad_norm), jnp.where(spike, 3, 0), 2), 1)
    good = reason == 0

    weight = jnp.maximum(1 - guard.decay, 1 / (state.seen + 1).astype(x.dtype))
    delta = x - state.mean
    updated = GuardState(
        state.skipped,
        state.seen + 1,
        state.mean + weight * delta,
        (1 - weight) * (state.variance + weight * delta**2),
    )
    after = select(good, updated, state._replace(skipped=state.skipped + 1))
    return good, after, Verdict(reason, loss, grad_norm, state.mean, deviation)


def select(good: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The tree `new` where `good`, else `old`: no value of the one that is not taken reaches the result."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
