"""An exponential moving average of the weights, which is often a better model than the last weights themselves.

    average' = decay_t average + (1 - decay_t) weights,   decay_t = min(decay, (1 + t) / (10 + t)) with warm-up

after update t = 0, 1, ... It begins as the initial weights; the warm-up lets it forget them soon. Updates that
`train.guard` passes over leave it alone.

Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; the warm-up is that of
TensorFlow's `tf.train.ExponentialMovingAverage(decay, num_updates)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lmobj.errors import UserError

__all__ = ["EMA"]


@dataclass(frozen=True)
class EMA:
    """An exponential moving average of the weights. Evaluation, samples and generation use it in their place."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "use_attribute_docstrings": True}

    decay: float = 0.999
    """Share of the average that an update keeps, in [0, 1)."""
    warmup: bool = True
    """Keep less at first: min(decay, (1 + t) / (10 + t)) after update t, counted from 0."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserError(f"train.ema.decay is {self.decay}; accepted: 0 or more, and less than 1.")

    @property
    def note(self) -> str:
        """What a person should know who looks at the model's figures or texts."""
        return (
            "Evaluations, samples and generation use the moving average of the weights (train.ema, decay "
            f"{self.decay}), not the weights themselves."
        )

    def init(self, params: Any) -> Any:
        """The average before the first update: the weights, in float32 at least, since its changes are small."""
        return jax.tree.map(lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), params)

    def update(self, average: Any, params: Any, updates: Int[Array, ""]) -> Any:
        """The average with `params`, the weights after one more update than `updates`."""
        keep: Any = self.decay
        if self.warmup:
            t = jnp.asarray(updates, jnp.result_type(float))
            keep = jnp.minimum(self.decay, (1 + t) / (10 + t))

        def blend(a: Array, p: Array) -> Array:
            return a + jnp.asarray(1 - keep, a.dtype) * (p.astype(a.dtype) - a)

        return jax.tree.map(blend, average, params)
