"""Schedules over steps: learning rates, and coefficients of an objective's terms.

A schedule maps the number of finished updates (0 for the first update) to a value. With a warm-up of w steps the
first update therefore has the value 0 and update w the first full one, as in BERT, Transformers and optax.

How warm-up and decay meet differs between papers, so `linear` and `cosine` have the option `warmup`. With d the
decay from 1 to `final_fraction`, T the total steps and w the warm-up steps:

    before    peak * (s / w if s < w else d((s - w) / (T - w)))    the decay starts when the warm-up ends (GPT-2, T5X)
    replace   peak * (s / w if s < w else d(s / T))                BERT: the value drops at w to where the decay is
    multiply  peak * min(1, s / w) * d(s / T)                      ELECTRA
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from pydantic import Field

from lmobj.errors import UserError

__all__ = [
    "ConstantSchedule",
    "CosineSchedule",
    "InverseSqrtSchedule",
    "LinearSchedule",
    "Schedule",
    "ScheduleFn",
    "WarmupStableDecaySchedule",
    "make_schedule",
    "warmup_length",
]

ScheduleFn = Callable[[ArrayLike], jax.Array]
"""Number of finished updates -> value."""

Warmup = Literal["before", "replace", "multiply"]
DecayShape = Literal["linear", "cosine", "sqrt"]

_CONFIG = {"extra": "forbid", "use_attribute_docstrings": True}


@dataclass(frozen=True)
class ConstantSchedule:
    """`peak` at every step, after an optional linear warm-up."""

    __pydantic_config__: ClassVar[Any] = _CONFIG

    name: Literal["constant"] = "constant"
    """Constant after the warm-up."""
    peak: float = 1e-3
    """The value, finite."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0, 0 to total steps."""
    warmup_fraction: float = 0.0
    """Warm-up as a fraction of the total steps, [0, 1]; instead of warmup_steps."""

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class LinearSchedule:
    """Straight line from `peak` to `final_fraction * peak` at the last step."""

    __pydantic_config__: ClassVar[Any] = _CONFIG

    name: Literal["linear"] = "linear"
    """Linear decay."""
    peak: float = 1e-3
    """The highest value, finite."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0, 0 to total steps."""
    warmup_fraction: float = 0.0
    """Warm-up as a fraction of the total steps, [0, 1]; instead of warmup_steps."""
    final_fraction: float = 0.0
    """Final value as a fraction of the peak, >= 0."""
    warmup: Warmup = "before"
    """How warm-up meets decay: before (decay starts after it), replace (BERT), multiply (ELECTRA)."""

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class CosineSchedule:
    """Half a cosine from `peak` to `final_fraction * peak` at the last step (Loshchilov and Hutter 2017, eq. 5)."""

    __pydantic_config__: ClassVar[Any] = _CONFIG

    name: Literal["cosine"] = "cosine"
    """Cosine decay."""
    peak: float = 1e-3
    """The highest value, finite."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0, 0 to total steps."""
    warmup_fraction: float = 0.0
    """Warm-up as a fraction of the total steps, [0, 1]; instead of warmup_steps."""
    final_fraction: float = 0.0
    """Final value as a fraction of the peak, >= 0."""
    warmup: Warmup = "before"
    """How warm-up meets decay: before (decay starts after it), replace (BERT), multiply (ELECTRA)."""

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class WarmupStableDecaySchedule:
    """Warm-up, then `peak`, then a decay over the last steps (Hu et al. 2024, section 4; shapes: Hägele et al. 2024).

    The decay is 1 - x (`linear`), (1 + cos(pi x)) / 2 (`cosine`) or 1 - sqrt(x) (`sqrt`), x in [0, 1]. MiniCPM's
    own decay is exponential; Hägele et al. found `sqrt` the best of those compared.
    """

    __pydantic_config__: ClassVar[Any] = _CONFIG

    name: Literal["wsd"] = "wsd"
    """Warm-up, stable, decay."""
    peak: float = 1e-3
    """The highest value, finite."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0, 0 to total steps."""
    warmup_fraction: float = 0.0
    """Warm-up as a fraction of the total steps, [0, 1]; instead of warmup_steps."""
    decay_fraction: float = 0.1
    """Part of the total steps at the end that decays, (0, 1]."""
    decay_shape: DecayShape = "sqrt"
    """Shape of the decay: linear, cosine or sqrt."""
    final_fraction: float = 0.0
    """Final value as a fraction of the peak, >= 0."""

    def __post_init__(self) -> None:
        _check(self)
        if not 0.0 < self.decay_fraction <= 1.0:
            raise UserError(f"wsd: decay_fraction is {self.decay_fraction}; accepted: above 0, at most 1.")


@dataclass(frozen=True)
class InverseSqrtSchedule:
    """`peak * min(1, s / w) * sqrt(k / max(s, k))`, with k = `timescale` (Vaswani et al. 2017, eq. 3, where k = w).

    T5 has no warm-up and k = 10,000: constant for k steps, then falling, with peak = 1 / sqrt(k) = 0.01.
    """

    __pydantic_config__: ClassVar[Any] = _CONFIG

    name: Literal["inverse_sqrt"] = "inverse_sqrt"
    """Inverse square root of the step."""
    peak: float = 1e-3
    """The highest value, finite."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0, 0 to total steps."""
    warmup_fraction: float = 0.0
    """Warm-up as a fraction of the total steps, [0, 1]; instead of warmup_steps."""
    timescale: int | None = None
    """Step at which the decay starts, >= 1; null: the end of the warm-up."""
    final_fraction: float = 0.0
    """The value never falls below this fraction of the peak, >= 0."""

    def __post_init__(self) -> None:
        _check(self)
        if self.timescale is not None and self.timescale < 1:
            raise UserError(f"inverse_sqrt: timescale is {self.timescale}; accepted: at least 1, or null.")


Schedule = Annotated[
    ConstantSchedule | LinearSchedule | CosineSchedule | WarmupStableDecaySchedule | InverseSqrtSchedule,
    Field(discriminator="name"),
]
"""Any schedule's settings, told apart by `name`."""


def _check(config: Any) -> None:
    """Range checks that all schedules share."""
    if not math.isfinite(config.peak):
        raise UserError(f"{config.name}: peak is {config.peak}; accepted: a finite number.")
    if config.warmup_steps < 0:
        raise UserError(f"{config.name}: warmup_steps is {config.warmup_steps}; accepted: 0 or more.")
    if not 0.0 <= config.warmup_fraction <= 1.0:
        raise UserError(f"{config.name}: warmup_fraction is {config.warmup_fraction}; accepted: 0 to 1.")
    if config.warmup_steps and config.warmup_fraction:
        raise UserError(
            f"{config.name}: warmup_steps is {config.warmup_steps} and warmup_fraction is {config.warmup_fraction}; "
            "accepted: one of the two."
        )
    final = getattr(config, "final_fraction", 0.0)
    if not (math.isfinite(final) and final >= 0.0):
        raise UserError(f"{config.name}: final_fraction is {final}; accepted: 0 or more.")


def warmup_length(config: Schedule, total_steps: int) -> int:
    """Steps of warm-up out of `total_steps`. Raises UserError where the warm-up is longer than that."""
    if total_steps < 1:
        raise UserError(f"{config.name}: total steps are {total_steps}; accepted: at least 1.")
    steps = config.warmup_steps or round(config.warmup_fraction * total_steps)
    if steps > total_steps:
        raise UserError(
            f"{config.name}: warmup_steps is {steps}, longer than the {total_steps} steps of training; accepted: "
            f"0 to {total_steps}, or a warmup_fraction."
        )
    return steps


def make_schedule(config: Schedule, total_steps: int) -> ScheduleFn:
    """The function step -> value of `config` over `total_steps` updates; past them the final value stays.

    The function is pure: it runs inside jit, on any integer or array of integers, in the default float type.

    Raises:
      UserError: a warm-up longer than the total, or a warm-up that runs into the decay of `wsd`.
    """
    warmup = warmup_length(config, total_steps)
    factor = _factor(config, warmup, total_steps)

    def schedule(step: ArrayLike) -> jax.Array:
        count = jnp.asarray(step).astype(float)
        return config.peak * factor(count)

    return schedule


def _factor(config: Schedule, warmup: int, total: int) -> Callable[[jax.Array], jax.Array]:
    """The schedule as a fraction of its peak, of a float step."""

    def ramp(step: jax.Array) -> jax.Array:
        return jnp.minimum(1.0, step / warmup) if warmup else jnp.ones_like(step)

    match config:
        case ConstantSchedule():
            return ramp
        case LinearSchedule() | CosineSchedule():
            shape: DecayShape = "linear" if isinstance(config, LinearSchedule) else "cosine"
            start = warmup if config.warmup == "before" else 0

            def decay(step: jax.Array) -> jax.Array:
                return _decay((step - start) / max(total - start, 1), shape, config.final_fraction)

            if config.warmup == "multiply":
                return lambda step: ramp(step) * decay(step)
            return lambda step: jnp.where(step < warmup, ramp(step), decay(step))
        case WarmupStableDecaySchedule():
            length = max(1, round(config.decay_fraction * total))
            if warmup + length > total:
                raise UserError(
                    f"wsd: {warmup} warm-up steps and decay_fraction {config.decay_fraction} ({length} steps) do not "
                    f"fit in {total} steps; accepted: a sum of at most {total}."
                )
            return lambda step: (
                ramp(step) * _decay((step - (total - length)) / length, config.decay_shape, config.final_fraction)
            )
        case InverseSqrtSchedule():
            timescale = config.timescale or max(warmup, 1)
            return lambda step: (
                ramp(step) * jnp.maximum(config.final_fraction, jnp.sqrt(timescale / jnp.maximum(step, timescale)))
            )
    raise TypeError(f"not a schedule: {config!r}")


def _decay(progress: jax.Array, shape: DecayShape, final: float) -> jax.Array:
    """From 1 at progress 0 to `final` at progress 1, flat outside."""
    x = jnp.clip(progress, 0.0, 1.0)
    match shape:
        case "linear":
            left = 1.0 - x
        case "cosine":
            left = 0.5 * (1.0 + jnp.cos(jnp.pi * x))
        case "sqrt":
            left = 1.0 - jnp.sqrt(x)
    return final + (1.0 - final) * left
