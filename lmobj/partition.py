"""Logical axis names, and the one table that maps them to the axes of a device mesh.

Parameters carry logical names (`nnx.Param(value, axes=("embed", "mlp"))`) and activations are annotated by
`constrain(x, ("batch", "length", "embed"))`. Only the table, which comes from the config, knows mesh axes.
Outside `rules(...)` both are no-ops, so models run anywhere.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence

import jax
from jax.sharding import AxisType, PartitionSpec

__all__ = ["DEFAULT_RULES", "Rules", "constrain", "constrain_to", "mesh_axes", "rules", "spec"]

Rules = Mapping[str, tuple[str, ...]]

DEFAULT_RULES: Rules = {
    "batch": ("data", "fsdp", "expert"),
    "length": (),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "experts": ("expert",),
    "head_dim": (),
    "layers": (),
    "positions": (),
    "activation_embed": (),
}
"""Names and where they go. `embed` is a parameter's model width; `activation_embed` is an activation's."""

_ACTIVE: contextvars.ContextVar[Rules | None] = contextvars.ContextVar("lmobj_partition_rules", default=None)


@contextlib.contextmanager
def rules(table: Rules) -> Iterator[None]:
    """Use `table` for every `constrain` traced inside the block (together with `jax.set_mesh`)."""
    token = _ACTIVE.set(table)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def spec(axes: Sequence[str | None], table: Rules, *, rank: int | None = None) -> PartitionSpec:
    """The `PartitionSpec` of an array whose dimensions carry the logical names `axes`.

    An array stacked over layers has one leading dimension more than its names: it is called `layers`. A mesh axis
    is used at most once; a later dimension that asks for it again stays whole.

    Raises:
      ValueError: a name that the table does not hold.
    """
    names: tuple[str | None, ...] = tuple(axes)
    if rank is not None and rank == len(names) + 1:
        names = ("layers", *names)
    used: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for name in names:
        if name is not None and name not in table:
            raise ValueError(f"No sharding rule for the logical axis {name!r}; the table has {sorted(table)}.")
        mesh_axes = tuple(axis for axis in table[name] if axis not in used) if name is not None else ()
        used.update(mesh_axes)
        entries.append(mesh_axes or None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Ask the partitioner to lay out `x` by its logical axes; the identity where no rules are active."""
    table = _ACTIVE.get()
    if table is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, table, rank=x.ndim))


def mesh_axes(name: str) -> dict[str, int]:
    """Mesh axes, with their sizes, over which the active rules lay the logical axis `name`; major axis first.

    Holds only axes longer than 1 that the partitioner handles (axis type Auto). Empty without rules or without a mesh,
    and for a name that the rules do not hold.
    """
    table, mesh = _ACTIVE.get(), jax.sharding.get_abstract_mesh()
    if table is None or mesh.empty:
        return {}
    automatic = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    return {axis: mesh.shape[axis] for axis in table.get(name, ()) if axis in automatic and mesh.shape[axis] > 1}


def constrain_to(x: jax.Array, dims: Sequence[tuple[str, ...] | None]) -> jax.Array:
    """Ask the partitioner to lay out `x` over mesh axes that came from `mesh_axes`; None leaves a dimension to it."""
    entries = (PartitionSpec.UNCONSTRAINED if axes is None else axes or None for axes in dims)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))
