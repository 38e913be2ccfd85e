"""How tokens and vocabulary are cut over devices while the blockwise losses run.

Tokens are cut over the mesh axes of `batch` and `length`; the table over those of `vocab` and `embed`. Three kinds of
cut follow:

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
    """The mesh axes, with sizes, of the tokens' first two axes and of the table's two axes, each major first."""

    batch: _Axes = ()
    vocab: _Axes = ()
    embed: _Axes = ()
    length: _Axes = ()

    @property
    def tokens(self) -> _Axes:
        """Axes that cut the tokens in any way."""
        return self.batch + self.length

    @property
    def table(self) -> _Axes:
        """Axes that cut the table in any way; the loop cuts its vocabulary over all of them."""
        return self.vocab + self.embed

    @property
    def ring(self) -> _Axes:
        """Axes of both tokens and table."""
        return tuple(axis for axis in self.table if axis in self.tokens)

    @property
    def rows(self) -> _Axes:
        """Axes of the tokens alone."""
        return tuple(axis for axis in self.tokens if axis not in self.table)

    @property
    def columns(self) -> _Axes:
        """Axes of the table alone."""
        return tuple(axis for axis in self.table if axis not in self.tokens)

    @property
    def ring_size(self) -> int:
        """Number of devices round which parts of the vocabulary travel."""
        return _size(self.ring)

    @property
    def token_parts(self) -> int:
        """Number of parts into which the tokens are cut."""
        return _size(self.tokens)

    @property
    def vocab_parts(self) -> int:
        """Number of parts into which the vocabulary is cut."""
        return _size(self.table)

    def part_numbers(self) -> np.ndarray:
        """[g, t]: which part of the vocabulary each device has, counted from its first class."""
        return _split(np.arange(self.vocab_parts), (self.table,), (self.ring, self.columns))[..., 0]

    def split_tokens(self, x: jax.Array) -> jax.Array:
        """[B, ...] -> [g, x, B/gx, ...], or where the length is cut [B, L, ...] -> [g, x, B/.., L/.., ...]."""
        return self.place(_split(x, self._token_cuts, (self.ring, self.rows)), "gx")

    def merge_tokens(self, x: jax.Array) -> jax.Array:
        """[g, x, B/gx, ...] -> [B, ...]; undoes `split_tokens`."""
        return _merge(self.place(x, "gx"), self._token_cuts, (self.ring, self.rows))

    @property
    def _token_cuts(self) -> tuple[_Axes, ...]:
        return (self.batch, self.length) if self.length else (self.batch,)

    def split_vocab(self, x: jax.Array) -> jax.Array:
        """[V, ...] -> [g, t, V/gt, ...], still where it is stored: blocks of it are placed one by one."""
        x = _split(x, (self.table,), (self.ring, self.columns))
        # A table left free would be moved whole before the loop, for the sake of its blocks.
        return self.store(x, width=True) if x.ndim == 4 else x

    def merge_vocab(self, x: jax.Array) -> jax.Array:
        """[g, t, V/gt, ...] -> [V, ...]; undoes `split_vocab`."""
        return _merge(self.store(x, width=x.ndim == 4), (self.table,), (self.ring, self.columns))

    def place(self, x: jax.Array, dims: Sequence[str]) -> jax.Array:
        """Lay the leading dimensions of `x` over the cuts `dims`, and leave the others to the partitioner."""
        cuts = {"g": self.ring, "x": self.rows, "t": self.columns}
        return self._constrain(x, [cuts[dim] for dim in dims])

    def store(self, x: jax.Array, *, width: bool) -> jax.Array:
        """Lay x [g, t, ...] as parameters are stored: over the `vocab` axes, and over `embed` if it ends in a width."""
        cuts = [tuple(axis for axis in cut if axis in self.vocab) for cut in (self.ring, self.columns)]
        return self._constrain(x, cuts, self.embed if width else None)

    def _constrain(self, x: jax.Array, leading: Sequence[_Axes], last: _Axes | None = None) -> jax.Array:
        if not self.tokens and not self.table:
            return x
        between = x.ndim - len(leading) - (last is not None)
        cuts = [*leading, *[None] * between, *([] if last is None else [last])]
        return partition.constrain_to(x, [None if cut is None else tuple(name for name, _ in cut) for cut in cuts])


def active_layout(tokens: tuple[int, ...], table: tuple[int, ...]) -> Layout:
    """The layout under the active rules, for tokens [B, ...] and a table of that shape.

    Where mesh axes do not divide a dimension the arrays cannot be cut so, and all is left to the partitioner; but a
    length that is not divided (the predictions of a row, say) is left whole.
    """
    batch, length, vocab, embed = (
        tuple(partition.mesh_axes(name).items()) for name in ("batch", "length", "vocab", "embed")
    )
    # As in `partition.spec`: a mesh axis cuts an array once.
    embed = tuple(axis for axis in embed if axis not in vocab)
    length = tuple(axis for axis in length if axis not in batch)
    if len(tokens) < 2 or tokens[1] % _size(length):
        length = ()
    layout = Layout(batch, vocab, embed, length)
    if tokens[0] % _size(batch) or table[0] % layout.vocab_parts or table[1] % _size(embed):
        return Layout()
    return layout


def _size(axes: _Axes) -> int:
    return math.prod(size for _, size in axes)


def _split(x: A, cuts: tuple[_Axes, ...], groups: tuple[_Axes, _Axes]) -> A:
    """[N_1, N_2, ...] -> [groups, N_1/.., N_2/.., ...], where `cuts` are the mesh axes of each leading dimension."""
    # One dimension per mesh axis first: the partitioner keeps such a reshape on the device, whatever the order.
    x = x.reshape(*_parts(x.shape, cuts), *x.shape[len(cuts) :])
    order = _order(cuts, groups)
    x = x.transpose(*order, *range(len(order), x.ndim))
    rest = sum(map(len, groups))
    return x.reshape(_size(groups[0]), _size(groups[1]), *x.shape[rest:])


def _merge(x: jax.Array, cuts: tuple[_Axes, ...], groups: tuple[_Axes, _Axes]) -> jax.Array:
    """Undoes `_split`."""
    local = x.shape[2 : 2 + len(cuts)]
    x = x.reshape(*(size for group in groups for size in _sizes(group)), *x.shape[2:])
    order = _order(cuts, groups)
    inverse = [order.index(i) for i in range(len(order))]
    x = x.transpose(*inverse, *range(len(order), x.ndim))
    whole = [_size(axes) * size for axes, size in zip(cuts, local, strict=True)]
    return x.reshape(*whole, *x.shape[len(order) :])


def _parts(shape: tuple[int, ...], cuts: tuple[_Axes, ...]) -> list[int]:
    """[the sizes of the mesh axes of a dimension, and what is left of it; the next dimension ...]."""
    return [size for axes, whole in zip(cuts, shape, strict=False) for size in (*_sizes(axes), whole // _size(axes))]


def _sizes(axes: _Axes) -> list[int]:
    return [size for _, size in axes]


def _order(cuts: tuple[_Axes, ...], groups: tuple[_Axes, _Axes]) -> list[int]:
    """The permutation that brings the mesh axes of every dimension to the front, by groups, before what is left."""
    places: dict[tuple[str, int], int] = {}
    left = []
    at = 0
    for axes in cuts:
        places.update((axis, at + i) for i, axis in enumerate(axes))
        at += len(axes) + 1
        left.append(at - 1)
    return [places[axis] for group in groups for axis in group] + left
