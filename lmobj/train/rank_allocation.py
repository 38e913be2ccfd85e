"""AdaLoRA in a run: the regulariser joins the gradient, and every update is followed by an allocation of ranks.

The regulariser is a function of the parameters alone, so its gradient is added once per step, whatever the
microbatches; the loss that is logged is without it. Importance is told from the gradient before any clipping, where
PEFT's is clipped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from lmobj import adapt

__all__ = ["allocating"]


class _State(NamedTuple):
    step: Int[Array, ""]
    inner: Any
    allocation: adapt.Allocation


def allocating(optimizer: optax.GradientTransformation, config: adapt.AdaLoRA) -> optax.GradientTransformationExtraArgs:
    """The optimizer, whose updates leave the singular values at zero that the budget has no room for."""

    def init(params: Any) -> _State:
        return _State(jnp.zeros((), jnp.int32), optimizer.init(params), adapt.init_allocation(params))

    def update(grads: Any, state: _State, params: Any = None, **more: Any) -> tuple[Any, _State]:
        regulariser = jax.grad(lambda p: config.orthogonality * adapt.orthogonality(p))(params)
        grads = jax.tree.map(jnp.add, grads, regulariser)
        updates, inner = optimizer.update(grads, state.inner, params)
        step = state.step + 1
        updated = optax.apply_updates(params, updates)
        masked, allocation = adapt.allocate(config, updated, grads, state.allocation, step)
        # What is masked must become zero, and what is not be the same to the bit: a + (b - a) may not be b.
        updates = jax.tree.map(lambda u, p, new, m: jnp.where(m == new, u, m - p), updates, params, updated, masked)
        return updates, _State(step, inner, allocation)

    return optax.GradientTransformationExtraArgs(init, update)
