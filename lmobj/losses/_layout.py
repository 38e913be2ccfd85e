"""How tokens and vocabulary are cut over devices while the blockwise losses run.

Tokens are cut over the mesh axes of `batch`; the table over those of `vocab` and `embed`. Three kinds of cut follow:

    rows (x)     axes of the tokens alone: each device has its own tokens and the whole table
    columns (t)  axes of the table alone: each device has all tokens and its own part of the vocabulary
    ring (g)     axes of both (fully sharded data parallelism): each device has its own tokens and its own part of the
                 vocabulary, and the parts travel round a ring, so that each passes by all tokens

Every array gets these cuts as dimensions of their own. Partial results then keep to their device, and are added once
after the loop, instead of once per block as the partitioner would on its own; and no device gathers the table. A table
that is stored cut over its width (`embed`) is turned into parts of the vocabulary a block at a time.

Which mesh axes they are comes from the rules in `lmobj.partition`. Without rules each cut has one part, and the
partitioner alone decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np

from lmobj import partition

__all__ = ["Layout", "active_layout"]

_Axes = tuple[tuple[str, int], ...]
A = TypeVar("A", jax.Array, np.ndarray)


@dataclass(frozen=True)
class Layout:
    """The mesh axes, with sizes, of the tokens' first axis and of the table's two axes, each major first."""

    batch: _Axes = ()
    vocab: _Axes = ()
    embed: _Axes = ()

    @property
    def table(self) -> _Axes:
        """Axes that cut the table in any way; the loop cuts its vocabulary over all of them."""
        return self.vocab + self.embed

    @property
    def ring(self) -> _Axes:
        """Axes of both tokens and table."""
        return tuple(axis for axis in self.table if axis in self.batch)

    @property
    def rows(self) -> _Axes:
        """Axes of the tokens alone."""
        return tuple(axis for axis in self.batch if axis not in self.table)

    @property
    def columns(self) -> _Axes:
        """Axes of the table alone."""
        return tuple(axis for axis in self.table if axis not in self.batch)

    @property
    def ring_size(self) -> int:
        """Number of devices round which parts of the vocabulary travel."""
        return _size(self.ring)

    @property
    def token_parts(self) -> int:
        """Number of parts into which the tokens are cut."""
        return _size(self.batch)

    @property
    def vocab_parts(self) -> int:
        """Number of parts into which the vocabulary is cut."""
        return _size(self.table)

    def part_numbers(self) -> np.ndarray:
        """[g, t]: which part of the vocabulary each device has, counted from its first class."""
        return _split(np.arange(self.vocab_parts), self.table, (self.ring, self.columns))[..., 0]

    def split_tokens(self, x: jax.Array) -> jax.Array:
        """[B, ...] -> [g, x, B/gx, ...]."""
        return self.place(_split(x, self.batch, (self.ring, self.rows)), "gx")

    def merge_tokens(self, x: jax.Array) -> jax.Array:
        """[g, x, B/gx, ...] -> [B, ...]; undoes `split_tokens`."""
        return _merge(self.place(x, "gx"), self.batch, (self.ring, self.rows))

    def split_vocab(self, x: jax.Array) -> jax.Array:
        """[V, ...] -> [g, t, V/gt, ...], still where it is stored: blocks of it are placed one by one."""
        x = _split(x, self.table, (self.ring, self.columns))
        # A table left free would be moved whole before the loop, for the sake of its blocks.
        return self.store(x, width=True) if x.ndim == 4 else x

    def merge_vocab(self, x: jax.Array) -> jax.Array:
        """[g, t, V/gt, ...] -> [V, ...]; undoes `split_vocab`."""
        return _merge(self.store(x, width=x.ndim == 4), self.table, (self.ring, self.columns))

    def place(self, x: jax.Array, dims: Sequence[str]) -> jax.Array:
        """Lay the leading dimensions of `x` over the cuts `dims`, and leave the others to the partitioner."""
        cuts = {"g": self.ring, "x": self.rows, "t": self.columns}
        return self._constrain(x, [cuts[dim] for dim in dims])

    def store(self, x: jax.Array, *, width: bool) -> jax.Array:
        """Lay x [g, t, ...] as parameters are stored: over the `vocab` axes, and over `embed` if it ends in a width."""
        cuts = [tuple(axis for axis in cut if axis in self.vocab) for cut in (self.ring, self.columns)]
        return self._constrain(x, cuts, self.embed if width else None)

    def _constrain(self, x: jax.Array, leading: Sequence[_Axes], last: _Axes | None = None) -> jax.Array:
        if not self.batch and not self.table:
            return x
        between = x.ndim - len(leading) - (last is not None)
        cuts = [*leading, *[None] * between, *([] if last is None else [last])]
        return partition.constrain_to(x, [None if cut is None else tuple(name for name, _ in cut) for cut in cuts])


def active_layout(tokens: int, table: tuple[int, ...]) -> Layout:
    """The layout under the active rules, for `tokens` rows of a batch and a table of that shape.

    Where mesh axes do not divide a dimension the arrays cannot be cut so, and all is left to the partitioner.
    """
    layout = Layout(*(tuple(partition.mesh_axes(name).items()) for name in ("batch", "vocab", "embed")))
    # As in `partition.spec`: a mesh axis cuts an array once.
    layout = Layout(layout.batch, layout.vocab, tuple(axis for axis in layout.embed if axis not in layout.vocab))
    if tokens % layout.token_parts or table[0] % layout.vocab_parts or table[1] % _size(layout.embed):
        return Layout()
    return layout


def _size(axes: _Axes) -> int:
    return math.prod(size for _, size in axes)


def _order(axes: _Axes, groups: tuple[_Axes, _Axes]) -> list[int]:
    """The permutation from `axes` to the members of `groups`, one group after the other."""
    return [axes.index(axis) for group in groups for axis in group]


def _split(x: A, axes: _Axes, groups: tuple[_Axes, _Axes]) -> A:
    # One dimension per mesh axis first: the partitioner keeps such a reshape on the device, whatever the order.
    sizes = [size for _, size in axes]
    x = x.reshape(*sizes, x.shape[0] // _size(axes), *x.shape[1:])
    order = _order(axes, groups)
    x = x.transpose(*order, *range(len(order), x.ndim))
    return x.reshape(_size(groups[0]), _size(groups[1]), *x.shape[len(order) :])


def _merge(x: jax.Array, axes: _Axes, groups: tuple[_Axes, _Axes]) -> jax.Array:
    sizes = [size for group in groups for _, size in group]
    x = x.reshape(*sizes, *x.shape[2:])
    order = _order(axes, groups)
    inverse = [order.index(i) for i in range(len(order))]
    x = x.transpose(*inverse, *range(len(order), x.ndim))
    return x.reshape(math.prod(sizes) * x.shape[len(order)], *x.shape[len(order) + 1 :])
