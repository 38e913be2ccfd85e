"""Stochastic rounding: parameters in bfloat16 that small updates still move.

bfloat16 has 8 bits of precision: an update below about 1/512 of a parameter is lost when the sum is rounded to nearest,
at every step anew. Here the sum p + u is taken in float32 and rounded to one of the two bfloat16 values around it, up
with probability (x - below) / (above - below), so that its expectation is x and small updates add up. Optimizer state
and all of the update's arithmetic are float32. Memory is that of bfloat16 parameters: no float32 copy is kept of them.

    round(x) = the upper 16 bits of (bits of x + r),   r uniform in [0, 2^16)

which is exact, as a bfloat16 is the upper half of a float32. r is a hash of (run's seed, step, update, parameter,
element): the same on every mesh and after a resumption.

Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", section 3; for updates in bfloat16, Zamirai et al.
2020, "Revisiting BFloat16 Training", section 3.2.
"""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32, Int, Key, UInt32

from lmobj.errors import UserError
from lmobj.noise import fold_index, fold_places

__all__ = ["apply_updates", "check_rounded", "in_float32", "stochastic_round", "update_seed"]

_DOMAIN = 0x5B0F
"""Sets the run's key for rounding apart from what else is folded into it."""
_FRACTION = 0xFFFF
"""The lower half of a float32, which a bfloat16 lacks."""


def stochastic_round(x: Float32[Array, "*shape"], bits: UInt32[Array, "*shape"]) -> BFloat16[Array, "*shape"]:
    """One of the two bfloat16 values around each x, with x as its expectation; x itself where it is one of them.

    Args:
      x: numbers; infinities and NaN stay what they are. Beyond the largest bfloat16 the next value is infinity.
      bits: random, of which the lower 16 are used.
    """
    whole = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = (whole + (bits & jnp.uint32(_FRACTION))) & ~jnp.uint32(_FRACTION)
    kept = jax.lax.bitcast_convert_type(rounded, jnp.float32).astype(jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), kept, x.astype(jnp.bfloat16))


def update_seed(key: Key[Array, ""], step: Int[Array, ""] | int, update: int) -> UInt32[Array, ""]:
    """The seed of one update's rounding: of the run's key, the step and the update's number within it."""
    seed = jax.random.bits(jax.random.fold_in(key, _DOMAIN), dtype="uint32")
    return fold_index(fold_index(seed, jnp.asarray(step)), jnp.asarray(update))


def apply_updates(params: Any, updates: Any, seed: UInt32[Array, ""]) -> Any:
    """params + updates: those in bfloat16 rounded stochastically, the others as optax adds them.

    Args:
      params: nested dicts of arrays.
      updates: of the same structure, in float32 for parameters in bfloat16.
      seed: `update_seed`; a parameter's noise depends on its path and an element's place, and on no other parameter.
    """

    def add(path: tuple[Any, ...], p: Array, u: Array) -> Array:
        if p.dtype != jnp.bfloat16:
            return jnp.asarray(p + u, p.dtype)
        address = jnp.uint32(zlib.crc32(jax.tree_util.keystr(path).encode()))
        total = p.astype(jnp.float32) + u.astype(jnp.float32)
        own = fold_index(seed, address).reshape((1,) * total.ndim)
        return stochastic_round(total, fold_places(own, total.shape))

    return jax.tree_util.tree_map_with_path(add, params, updates)


def in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer with state and arithmetic in float32 for parameters and gradients in bfloat16."""

    def init(params: Any) -> Any:
        return optimizer.init(_widened(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return optimizer.update(_widened(updates), state, _widened(params))

    return optax.GradientTransformation(init, update)


def check_rounded(params: Any) -> None:
    """Refuses parameters of which none is in bfloat16.

    Raises:
      UserError: there is nothing to round.
    """
    found = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(params)})
    if "bfloat16" not in found:
        raise UserError(
            f"train.stochastic_rounding is true and the model's parameters are in {', '.join(found)} "
            "(model.param_dtype); accepted: model.param_dtype=bfloat16, or train.stochastic_rounding=false."
        )


def _widened(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)
