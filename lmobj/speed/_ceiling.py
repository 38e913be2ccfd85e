"""What a device has to give: the fastest product of two matrices."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["matmul_ceiling"]


def matmul_ceiling(dtype: str, sizes: tuple[int, ...], repeats: int = 5) -> dict[str, Any]:
    """The most FLOP/s that products of two square matrices reach, over several sizes, and at which size."""
    best: dict[str, Any] = {"dtype": dtype, "size": 0, "flops_per_second": 0.0}
    for size in sizes:
        count = max(2, round(2e11 / (2 * size**3)) if jax.default_backend() == "cpu" else 20)
        right = jax.random.normal(jax.random.key(0), (size, size), dtype) / jnp.asarray(size**0.5, dtype)
        product = jax.jit(lambda x, right=right, count=count: jax.lax.fori_loop(0, count, lambda _, y: y @ right, x))
        x = jax.block_until_ready(product(right))
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(product(x))
            speed = 2 * size**3 * count / (time.perf_counter() - start)
            if speed > best["flops_per_second"]:
                best = {"dtype": dtype, "size": size, "flops_per_second": speed}
    return best
