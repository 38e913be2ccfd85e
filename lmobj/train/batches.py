"""Global batches: their shapes, which rows a process reads of them, and how they come to lie on the devices.

A batch is a dict of arrays with rows first (`lmobj.batch`); that of a mixture is a dict of such batches, by the names
of its members. Whatever holds for one holds for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from numpy.typing import NDArray

from lmobj.batch import RowSpec, row_arrays
from lmobj.data import HostBatch
from lmobj.data import Rows as DataRows

__all__ = ["batch_shapes", "local_rows", "members", "on_devices", "together", "unnamed"]

Local = NDArray[np.int64] | None
"""Rows of a global batch that this process reads, ascending; None: all of them."""


def members(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batches of a mixture's members by name; a plain batch as the only one, without a name."""
    return {"": batch} if "row_ids" in batch else dict(batch)


def unnamed(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `members`: what is under no name, if there is that, else the parts by their names."""
    return dict(parts.get("", parts))


def batch_shapes(rows: RowSpec, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array of a batch of such rows (see `lmobj.batch`)."""
    return {
        name: jax.ShapeDtypeStruct((batch_size, *array.shape), jnp.dtype(array.dtype))
        for name, array in row_arrays(rows).items()
    }


def local_rows(sharding: NamedSharding, size: int) -> Local:
    """The rows of a global batch that this process's devices compute on, ascending; None: all of them.

    Processes that share rows between them, as the tensor axis has it, each read those rows.
    """
    if sharding.is_fully_addressable:
        return None
    shards = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[shard] for shard in shards]))


def on_devices(batch: Mapping[str, Any], sharding: NamedSharding, size: int) -> dict[str, jax.Array]:
    """A global batch of `size` rows, of which this process gives its `local_rows`."""
    local = local_rows(sharding, size)
    if local is None:
        placed: dict[str, jax.Array] = jax.device_put(dict(batch), sharding)
        return placed

    def place(rows: NDArray) -> jax.Array:
        def shard(index: Any) -> NDArray:
            first, last = np.searchsorted(local, np.arange(size)[index[0]][[0, -1]])
            return rows[first : last + 1]

        return jax.make_array_from_callback((size, *rows.shape[1:]), sharding, shard)

    return {name: place(rows) for name, rows in batch.items()}


def together(
    rows: Mapping[str, DataRows], *, start: int, steps: int | None, local: Mapping[str, Local]
) -> Iterator[dict[str, HostBatch]]:
    """The batches of a mixture's members, step by step.

    Of a split that is read once, to the end of the longest: a member that has ended gives empty rows.
    """
    readers = {name: member.batches(start, steps, local[name]) for name, member in rows.items()}
    ends = [member.steps_per_epoch for member in rows.values() if member.once]
    stop = None if steps is None else start + steps
    if ends:
        stop = max(ends) if stop is None else min(stop, max(ends))
    step = start
    while stop is None or step < stop:
        batch = {name: next(reader, None) for name, reader in readers.items()}
        yield {name: rows[name].batch(step, local[name]) if part is None else part for name, part in batch.items()}
        step += 1
