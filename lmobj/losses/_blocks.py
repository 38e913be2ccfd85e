"""How the vocabulary is cut into blocks that are worked on one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

__all__ = ["Blocks", "choose_blocks"]


@dataclass(frozen=True)
class Blocks:
    """`count` blocks of `width` rows that cover `size` rows of a table.

    strided: block b holds rows b, b + count, b + 2 count, ...; then `size` is `count * width`. Otherwise block b holds
    rows from `b * width` on, and the last block starts early enough to be full, so that some of its rows are not fresh.
    """

    size: int
    width: int
    count: int
    strided: bool

    def view(self, x: Array) -> Array:
        """[g, t, size, ...] in the form that `take` and `put` index: a reshape, which copies nothing."""
        return x.reshape(*x.shape[:2], self.width, self.count, *x.shape[3:]) if self.strided else x

    def unview(self, x: Array) -> Array:
        """Undoes `view`."""
        return x.reshape(*x.shape[:2], self.size, *x.shape[4:]) if self.strided else x

    def take(self, x: Array, b: Int[Array, ""]) -> Array:
        """Block b of a view: [g, t, width, ...]."""
        if self.strided:
            return jax.lax.dynamic_index_in_dim(x, b, axis=3, keepdims=False)
        return jax.lax.dynamic_slice_in_dim(x, self._start(b), self.width, axis=2)

    def put(self, x: Array, b: Int[Array, ""], block: Array) -> Array:
        """The view `x` with block b replaced where its rows are fresh; XLA updates a loop's carry in place."""
        block = block.astype(x.dtype)
        if self.strided:
            return jax.lax.dynamic_update_index_in_dim(x, block, b, axis=3)
        fresh = self.fresh(b).reshape(-1, *[1] * (block.ndim - 3))
        return jax.lax.dynamic_update_slice_in_dim(x, jnp.where(fresh, block, self.take(x, b)), self._start(b), axis=2)

    def join(self, blocks: Array) -> Array:
        """Every block [count, g, t, width] put together: [g, t, size]."""
        if self.strided:
            return jnp.moveaxis(blocks, 0, -1).reshape(*blocks.shape[1:3], self.size)
        stale = self.count * self.width - self.size
        return jnp.concatenate([*blocks[:-1], blocks[-1, ..., stale:]], axis=-1)

    def rows(self, b: Int[Array, ""]) -> Int[Array, " width"]:
        """Which rows block b holds."""
        steps = jnp.arange(self.width, dtype=jnp.int32)
        return b + steps * self.count if self.strided else self._start(b) + steps

    def fresh(self, b: Int[Array, ""]) -> Bool[Array, " width"]:
        """Which rows of block b no earlier block holds."""
        return self.rows(b) >= (0 if self.strided else b * self.width)

    def _start(self, b: Int[Array, ""]) -> Int[Array, ""]:
        return jnp.minimum(b * self.width, self.size - self.width)


def choose_blocks(size: int, block_size: int) -> Blocks:
    """Blocks of at most `block_size` rows that cover `size` rows.

    The widest divisor of `size` from `block_size / 8` to `block_size` makes strided blocks; divisors that are multiples
    of 128 come first, then of 64, 32, ... 1, because a width that the devices divide keeps a table that is cut over
    the vocabulary local. Where no divisor is near (30522 = 2 * 3 * 5087), blocks are runs of rows and the last two
    overlap: still no copy of the table, but a table that is cut over the vocabulary moves.
    """
    if size <= block_size:
        return Blocks(size, width=size, count=1, strided=True)
    divisors = [width for width in range(block_size, max(block_size // 8, 1) - 1, -1) if size % width == 0]
    for multiple in (128, 64, 32, 16, 8, 4, 2, 1):
        for width in divisors:
            if width % multiple == 0:
                return Blocks(size, width, size // width, strided=True)
    count = -(-size // block_size)
    return Blocks(size, -(-size // count), count, strided=False)
