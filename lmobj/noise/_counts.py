"""Counts that are a share of a row's tokens, and the checks of shares.

A traced share is a float32: 0.15 times 190 is 28.500002, which would round to 29 where a Python number gives 28. So
what float32 moves off a whole number, or off a half, counts as it.
"""

from __future__ import annotations

import types
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmobj.errors import UserError

__all__ = ["ceil_share", "check_rates", "half_even"]

_TIE = 2.0**-21
"""Relative distance that still counts as none: above the rounding of float32."""


def half_even(x: Any, xp: types.ModuleType) -> Any:
    """x rounded to the nearest whole number, halves to the even one, by `numpy` or `jax.numpy`."""
    halves = xp.round(2 * x)
    return xp.round(xp.where(xp.abs(2 * x - halves) <= _TIE * halves, halves / 2, x))


def ceil_share(count: Int[Array, ""], rate: Float[Array, ""] | float) -> Int[Array, ""]:
    """ceil(count * rate)."""
    product = count.astype(jnp.float32) * jnp.asarray(rate, jnp.float32)
    whole = jnp.round(product)
    return jnp.where(jnp.abs(product - whole) <= _TIE * whole, whole, jnp.ceil(product)).astype(jnp.int32)


def check_rates(**rates: Any) -> None:
    """Raises UserError for Python numbers that are not from 0 to 1; traced ones pass."""
    for name, rate in rates.items():
        if isinstance(rate, float | int) and not 0.0 <= rate <= 1.0:
            raise UserError(f"{name} is {rate}; it must be from 0 to 1.")
