"""Where every array of a run lives: the device mesh, and the sharding of parameters, optimizer state and batches.

Parameters carry logical axis names; the table of rules (`lmobj.partition`) maps the names to the `MESH_AXES`.
Everything here follows from those two, and nothing else in the trainer names a mesh axis.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lmobj import partition
from lmobj.errors import UserError
from lmobj.train._parameters import tree_key

__all__ = [
    "MESH_AXES",
    "MeshConfig",
    "ParameterShardings",
    "active",
    "batch_sharding",
    "check_batch",
    "check_experts",
    "check_length",
    "initialise",
    "logical_axes",
    "make_mesh",
    "make_rules",
    "over_replicas",
    "parameter_shardings",
    "state_shardings",
    "ways",
]

logger = logging.getLogger(__name__)

MESH_AXES = ("data", "fsdp", "expert", "sequence", "tensor")
"""Every mesh axis, outermost first: neighbours in `tensor` are the closest devices."""

T = TypeVar("T")


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged. At most one size is -1: all devices that the other axes leave."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "use_attribute_docstrings": True}

    data: int = -1
    """Replicas, each with its own rows; -1 or at least 1."""
    fsdp: int = 1
    """Devices that share the rows and the parameters of a replica between them; -1 or at least 1."""
    tensor: int = 1
    """Devices that split each layer's heads, mlp and vocabulary; -1 or at least 1."""
    sequence: int = 1
    """Devices that split the length of each row (context parallel); -1 or at least 1."""
    expert: int = 1
    """Devices that share the rows and the experts of a mixture of experts between them; -1 or at least 1."""

    def __post_init__(self) -> None:
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        for axis, size in sizes.items():
            if size != -1 and size < 1:
                raise UserError(f"mesh.{axis} is {size}; accepted: 1 or more, or -1 for the devices that are left.")
        if list(sizes.values()).count(-1) > 1:
            raise UserError(f"mesh is {sizes}; accepted: at most one axis of -1.")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (`MESH_AXES`) over `devices`, by default all of them, with automatic axis types.

    Fixed sizes may use fewer devices than there are, if they divide their number and there is one process.

    Raises:
      UserError: sizes that do not divide the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    text = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    if len(devices) % fixed:
        raise UserError(
            f"{text}: the fixed sizes multiply to {fixed}, which does not divide the {len(devices)} devices; accepted: "
            f"sizes whose product divides {len(devices)}, with -1 for what is left."
        )
    sizes = {axis: len(devices) // fixed if size == -1 else size for axis, size in sizes.items()}
    used = math.prod(sizes.values())
    if used < len(devices):
        if jax.process_count() > 1:
            raise UserError(
                f"{text}: uses {used} of {len(devices)} devices; accepted with several processes: all of them, with "
                "-1 for what is left."
            )
        logger.warning("%s: uses %d of %d devices.", text, used, len(devices))
    return jax.make_mesh(
        tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices[:used]
    )


def make_rules(overrides: Mapping[str, Sequence[str]] | None = None) -> partition.Rules:
    """The default rules with `overrides` (logical axis -> mesh axes) in their place, or added.

    Raises:
      UserError: a mesh axis that does not exist.
    """
    table = dict(partition.DEFAULT_RULES)
    for name, axes in (overrides or {}).items():
        unknown = [axis for axis in axes if axis not in MESH_AXES]
        if unknown:
            raise UserError(f"sharding.{name} names the mesh axis {unknown[0]!r}; accepted: {', '.join(MESH_AXES)}.")
        table[name] = tuple(axes)
    return table


def ways(mesh: Mesh, rules: partition.Rules, *names: str) -> int:
    """Devices over which arrays are cut along the logical axes `names`."""
    return math.prod(mesh.shape[axis] for name in names for axis in rules[name])


def check_batch(
    batch_size: int, mesh: Mesh, rules: partition.Rules, *, accumulate: int = 1, key: str = "train.batch_size"
) -> None:
    """Refuses a global batch that does not split evenly into `accumulate` microbatches and over the mesh.

    `key` is what the message calls its size.
    """
    shards = ways(mesh, rules, "batch")
    if batch_size % (accumulate * shards):
        parts = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in rules["batch"])
        fewer = "" if batch_size % shards else f", or a train.accumulate that divides {batch_size // shards}"
        raise UserError(
            f"{key} is {batch_size}, which does not split into {accumulate} microbatches over {shards} devices "
            f"({parts}); accepted: a multiple of {accumulate * shards}{fewer}."
        )


def check_length(length: int, mesh: Mesh, rules: partition.Rules) -> None:
    """Refuses rows that do not split evenly over the mesh axes of their length."""
    parts = ways(mesh, rules, "length")
    if length % parts:
        sizes = ", ".join(f"train.mesh.{a}={mesh.shape[a]}" for a in rules["length"] if mesh.shape[a] > 1)
        raise UserError(
            f"data.length is {length}, which does not split over {parts} devices ({sizes}); accepted: a multiple of "
            f"{parts}."
        )


def check_experts(experts: int, mesh: Mesh, rules: partition.Rules) -> None:
    """Refuses experts that the mesh does not divide, which every device would have to hold whole."""
    parts = ways(mesh, rules, "experts")
    if experts % parts:
        sizes = " x ".join(f"train.mesh.{axis} {mesh.shape[axis]}" for axis in rules["experts"])
        raise UserError(
            f"model.moe.experts is {experts}, which {sizes} does not divide; accepted: a multiple of {parts}, or a "
            "mesh that divides it."
        )


@contextlib.contextmanager
def active(mesh: Mesh, rules: partition.Rules) -> Iterator[None]:
    """Mesh and sharding rules, in force together: what steps are traced and run under."""
    with jax.set_mesh(mesh), partition.rules(rules):
        yield


# --- parameters ---------------------------------------------------------------------------------------------------


Models = Any
"""A model (`nnx.Module`), its possibly abstract `nnx.State`, or a dict of these by role."""


def _variables(models: Models) -> Iterator[tuple[tuple[Any, ...], nnx.Variable]]:
    """(path, parameter) of every `nnx.Param`, by the path it has in the pure dicts."""
    if isinstance(models, nnx.Module):
        models = nnx.state(models, nnx.Param)
    if isinstance(models, nnx.State):
        yield from ((path, v) for path, v in nnx.to_flat_state(models) if isinstance(v, nnx.Param))
        return
    for role, model in models.items():
        yield from (((role, *path), variable) for path, variable in _variables(model))


def _nested(flat: Mapping[tuple[Any, ...], T]) -> Any:
    """Nested dicts from a dict of paths."""
    tree: dict[Any, Any] = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def logical_axes(models: Models) -> dict[str, Any]:
    """Nested dicts like the pure dict of parameters, with each parameter's `axes` (None where it has none)."""
    return _nested({path: _axes(variable) for path, variable in _variables(models)})


def _axes(variable: nnx.Variable) -> tuple[str | None, ...] | None:
    axes = variable.get_metadata().get("axes")
    return None if axes is None else tuple(axes)


class ParameterShardings(NamedTuple):
    """Shardings like the pure dict of parameters, and what could not be sharded as the rules ask."""

    tree: dict[str, Any]
    replicated: tuple[str, ...]
    """One line for each dimension that stays whole although a rule would split it."""
    shapes: Mapping[tuple[Any, ...], tuple[int, ...]]
    """Shape of each parameter, by its path in `tree`."""


def parameter_shardings(models: Models, mesh: Mesh, rules: partition.Rules) -> ParameterShardings:
    """The sharding of every parameter, from its logical axes and the rules.

    A dimension that its mesh axes do not divide stays whole, and so does a matrix without logical axes; each such
    case is logged and returned.

    Args:
      models: a model, its abstract state (`nnx.eval_shape`), or a dict of these by role.
      mesh: the device mesh.
      rules: logical axis -> mesh axes (`make_rules`).

    Raises:
      UserError: a logical axis without a rule.
    """
    shardings, shapes, notes = {}, {}, []
    for path, variable in _variables(models):
        label, axes, shape = "/".join(map(str, path)), _axes(variable), tuple(variable.shape)
        if axes is None:
            spec = PartitionSpec(*(None,) * len(shape))
            if len(shape) >= 2 and mesh.size > mesh.shape["data"]:
                notes.append(f"{label} {shape} stays whole: it has no logical axes")
        else:
            unknown = set(axes) - set(rules) - {None}
            if unknown:
                raise UserError(
                    f"The parameter {label} has the logical axis {unknown.pop()!r}, for which there is no rule; "
                    f"accepted: {', '.join(sorted(rules))}, or a rule for it under `sharding`."
                )
            spec, whole = _divisible(partition.spec(axes, rules, rank=len(shape)), shape, mesh)
            notes += [f"{label} {shape}: {line}" for line in whole]
        shardings[path], shapes[path] = NamedSharding(mesh, spec), shape
    for note in notes:
        logger.warning("Not sharded: %s.", note)
    return ParameterShardings(_nested(shardings), tuple(notes), shapes)


def _divisible(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> tuple[PartitionSpec, list[str]]:
    """`spec` without the mesh axes that do not divide their dimension, and a line for each that was dropped."""
    entries, dropped = [], []
    for dimension, (size, entry) in enumerate(zip(shape, spec, strict=True)):
        axes = (entry,) if isinstance(entry, str) else entry or ()
        ways = math.prod(mesh.shape[axis] for axis in axes)
        if size % ways:
            dropped.append(f"dimension {dimension} stays whole, {' x '.join(axes)} = {ways} does not divide it")
        entries.append(None if size % ways else entry)
    return PartitionSpec(*entries), dropped


# --- state and batches --------------------------------------------------------------------------------------------


def batch_sharding(mesh: Mesh, rules: partition.Rules) -> NamedSharding:
    """The sharding of any array with rows first."""
    return NamedSharding(mesh, partition.spec(("batch",), rules))


def state_shardings(abstract_state: Any, parameters: ParameterShardings, mesh: Mesh, rules: partition.Rules) -> Any:
    """The sharding of every leaf of a training state: parameters, optimizer state, averages, counters.

    A leaf whose path holds a parameter's path is that parameter or belongs to it (a moment, an average): it is
    sharded like it if it has its shape, and like the dimensions that are left if it lacks one (Adafactor's rows
    and columns). Leaves under an attribute `carried` have rows first and go with the batch. All else is replicated.

    Args:
      abstract_state: the state's tree of arrays or `jax.ShapeDtypeStruct`s.
      parameters: what `parameter_shardings` returned.
      mesh: the device mesh.
      rules: logical axis -> mesh axes.
    """
    flat = jax.tree_util.tree_flatten_with_path(parameters.tree)[0]
    specs = {tuple(map(tree_key, path)): sharding.spec for path, sharding in flat}

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = tuple(map(tree_key, path))
        if "carried" in keys:
            return batch_sharding(mesh, rules)
        owner = _owner(keys, specs)
        if owner is None:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, _spec_like(tuple(leaf.shape), parameters.shapes[owner], specs[owner]))

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def _owner(keys: tuple[Any, ...], known: Mapping[tuple[Any, ...], Any]) -> tuple[Any, ...] | None:
    """The longest run of `keys` that is a parameter's path."""
    runs = (keys[i:j] for i in range(len(keys)) for j in range(i + 1, len(keys) + 1))
    return max((run for run in runs if run in known), key=len, default=None)


def _spec_like(shape: tuple[int, ...], owner: tuple[int, ...], spec: PartitionSpec) -> PartitionSpec:
    """The spec of an array that belongs to a parameter of shape `owner`."""
    if shape == owner:
        return spec
    for axis in range(len(owner)):
        if shape == (*owner[:axis], *owner[axis + 1 :]):
            return PartitionSpec(*spec[:axis], *spec[axis + 1 :])
    return PartitionSpec()


def over_replicas(shapes: T, shardings: T, mesh: Mesh) -> T:
    """`shardings` with every array cut over `data` as well, along the longest dimension that it divides.

    Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 5.1: of the
    optimizer state each replica keeps, and computes, its own part.
    """
    replicas = mesh.shape["data"]

    def cut(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> NamedSharding:
        local = sharding.shard_shape(shape.shape)
        axis = max((a for a, size in enumerate(local) if size % replicas == 0), key=lambda a: local[a], default=None)
        if axis is None:
            return sharding
        entries = [*sharding.spec, *(None,) * (len(local) - len(sharding.spec))]
        entry = entries[axis]
        entries[axis] = ("data", *((entry,) if isinstance(entry, str) else entry or ()))
        return NamedSharding(mesh, PartitionSpec(*entries))

    cut_tree: T = jax.tree.map(cut, shapes, shardings)
    return cut_tree


def initialise(build: Callable[..., T], shardings: Any, mesh: Mesh, rules: partition.Rules, *arguments: Any) -> T:
    """`build(*arguments)` under jit, laid out by `shardings`: each device computes and holds its shards alone.

    The values are those of an unsharded call: threefry draws do not depend on the layout.
    """
    with active(mesh, rules):
        return jax.jit(build, out_shardings=shardings)(*arguments)
