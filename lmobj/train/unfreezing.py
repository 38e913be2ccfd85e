"""Gradual unfreezing: heads learn first, and every so many updates the next layer below joins them.

    what is above the layers learns from the first update on
    layer l of N (from 1)    from update (N + 1 - l) * every, counted from 0
    the embeddings           from update (N + 1) * every

Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification", section 3.3, who go by epochs.

What is frozen has updates of exactly 0, weight decay included. The optimizer's moments follow its gradients all the
same: with moments that began at 0 when a layer thaws, Adam, whose bias correction counts from the first update, would
make steps of up to six times the learning rate. Clipping looks at the gradient of all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from lmobj.errors import UserError
from lmobj.train._depths import Depth, by_depth, deepest

__all__ = ["check_unfreezing", "unfrozen_by_layer"]


class _State(NamedTuple):
    """Updates made."""

    step: Int[Array, ""]


def unfrozen_by_layer(
    optimizer: optax.GradientTransformation, every: int | None, logical_axes: Mapping[str, Any]
) -> optax.GradientTransformation:
    """The optimizer, with no update for layers that are frozen yet. Parameters are {role: nested dict}."""
    if every is None:
        return optimizer

    def mask(updates: Any, state: _State, params: Any = None) -> tuple[Any, _State]:
        def thawed(x: Any, depth: Depth) -> Any:
            return jnp.where(state.step >= depth * every, x, jnp.zeros((), x.dtype))

        return by_depth(thawed, updates, logical_axes), _State(optax.safe_increment(state.step))

    counted = optax.GradientTransformation(lambda params: _State(jnp.zeros((), jnp.int32)), mask)
    return optax.chain(optimizer, counted)


def check_unfreezing(every: int | None, steps: int, params: Any, logical_axes: Mapping[str, Any]) -> None:
    """Refuses a run that ends before the lowest of its trained parameters has learnt anything."""
    if every is None:
        return
    depth = deepest(params, logical_axes)
    if depth * every >= steps:
        most = (steps - 1) // depth
        accepted = f"at most {most}, more steps, or null" if most else "more steps, or null"
        raise UserError(
            f"train.unfreeze_every is {every} and train.steps is {steps}, and the lowest of {depth} groups of layers "
            f"below the heads would learn from step {depth * every} on; accepted: {accepted}."
        )
