"""What differs between the jax lines that lmobj supports (0.10 and 0.11), or may: all uses of jax's private names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax

__all__ = [
    "Coordination",
    "cast_varying",
    "coordination",
    "detect_cluster",
    "splash_backward",
    "vary_together",
    "varying_axes",
]

T = TypeVar("T")


def varying_axes(*trees: object) -> frozenset[str]:
    """The manual mesh axes, inside `jax.shard_map`, over which any array of `trees` differs between devices.

    Empty outside `jax.shard_map`. jax keeps the set in `jax.typeof(x).manual_axis_type.varying` since 0.10 and kept it
    in `jax.typeof(x).vma` before; either is read.
    """
    axes: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(trees):
        kind = jax.typeof(leaf)
        manual = getattr(kind, "manual_axis_type", None)
        axes |= manual.varying if manual is not None else getattr(kind, "vma", frozenset())
    return axes


def cast_varying(tree: T, axes: frozenset[str]) -> T:
    """`tree` with each array marked as differing over the manual mesh axes `axes`; its values stay the same.

    The transpose of the cast is a sum over those axes. It turns the gradient that each shard found for a replicated
    array into the whole gradient, which a custom VJP does not do on its own.
    """

    def cast(x: jax.Array) -> jax.Array:
        missing = axes - varying_axes(x)
        return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(cast, tree)


def vary_together(*trees: T) -> tuple[T, ...]:
    """`trees` with every array marked as differing over each manual axis that any one of them differs over."""
    axes = varying_axes(trees)
    return tuple(cast_varying(tree, axes) for tree in trees)


class Coordination(NamedTuple):
    """This process among those that `jax.distributed` has joined, and the service's client, a key-value store."""

    process: int
    processes: int
    client: Any


def coordination() -> Coordination | None:
    """What `jax.distributed.initialize` has set up, if it has; the key-value store has no public name."""
    if not jax.distributed.is_initialized():
        return None
    from jax._src.distributed import global_state

    return Coordination(global_state.process_id, global_state.num_processes, global_state.client)


def detect_cluster(
    coordinator: str | None, processes: int | None, process: int | None, timeout: int
) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """What is not given, as `jax.distributed.initialize` would read it from the cluster, and this process's devices.

    There is no public way to ask without starting. Raises RuntimeError where a cluster does not answer.
    """
    from jax._src.clusters import ClusterEnv

    found: Any = ClusterEnv.auto_detect_unset_distributed_params(coordinator, processes, process, None, None, timeout)
    return found


def splash_backward(
    kernel: Any, segment_ids: Any, q: jax.Array, k: jax.Array, v: jax.Array, y: jax.Array, lse: jax.Array, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v by the backward kernels of jax's splash attention, for one row.

    `y` and `lse` are what the forward kernel gave, `g` is the gradient of `y`. The kernel's public call is
    differentiated by jax, which runs the forward kernel once more to get `y` and `lse`; whoever has kept them has no
    public way to say so.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as private

    kept = (q, k, v, segment_ids, None, y, lse, kernel.dq_mask_info, kernel.dkv_mask_info)
    names = ("mask_value", "is_mqa", "block_sizes", "residual_checkpoint_name", "mask_function")
    settings = {name: kernel.kwargs[name] for name in (*names, "attn_logits_soft_cap", "interpret")}
    gradients = private._splash_attention_bwd(save_residuals=False, **settings, res=kept, do=g)
    return gradients[3:6]
