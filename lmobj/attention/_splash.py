"""Flash attention on TPUs: jax's Pallas kernel "splash", which skips the blocks that a mask leaves empty.

The kernel (`jax.experimental.pallas.ops.tpu.splash_attention`, after Dao 2023, "FlashAttention-2") comes with jax, the
same in 0.10 and 0.11; tokamax keeps its successor under a private name still.

The partitioner cannot look into a kernel, so on a mesh each device runs it on its own rows (mesh axes of `batch`) and
heads (mesh axes of `heads`), under `jax.shard_map`. Forward and backward pass are one such call each, inside a custom
VJP: see `_on_mesh`. (`custom_partitioning`, by which jax cuts cuDNN's calls, is not in the TPU's compiler.)

The kernel has no scale, so queries are scaled before it: one rounding to their dtype more than `xla`, none where the
scale is a power of two, as for heads of 16, 64 or 256.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lmobj.attention._flash import platform, refuse_for_flash
from lmobj.compat import splash_backward, varying_axes
from lmobj.errors import UserError
from lmobj.masks import AttentionMask
from lmobj.partition import mesh_axes

__all__ = ["refuse_for_splash", "splash_attention"]

_LANES = 128
"""Blocks are multiples of a vector register's lanes."""

_BLOCKS = (512, 256, 128)
"""Sizes of a block of queries or keys, best first; the first that divides the length is taken."""

_INTERPRET = False
"""Whether kernels are interpreted, as tests without a TPU do."""


def refuse_for_splash(
    q: Float[Array, "B Q H Dh"],
    k: Float[Array, "B S G Dh"],
    mask: AttentionMask,
    bias: Float[Array, "B_or_1 H Q S"] | None,
    dropout_rate: float,
) -> None:
    """Raises UserError for what the kernel cannot do."""
    arrays = {
        "a prefix": mask.is_prefix,
        "a permutation": mask.query_rank,
        "a memory": mask.memory,
        "an offset of queries (a cache)": mask.query_offset,
    }
    given = [name for name, array in arrays.items() if array is not None]
    if given:
        raise UserError(
            f"model.attention_backend: 'splash' knows causal, windowed and bidirectional masks, packed or not, and "
            f"this one has {given[0]}; use 'xla'."
        )
    if bias is not None:
        raise UserError("model.attention_backend: 'splash' takes no bias and the model has one; use 'xla'.")
    refuse_for_flash("splash", dropout_rate)
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise UserError(
            f"model.attention_backend: 'splash' computes in bfloat16 or float32 and the inputs are {q.dtype}; set "
            "model.dtype to bfloat16, or use 'xla'."
        )
    for length in (q.shape[1], k.shape[1]):
        if length % _LANES:
            raise UserError(
                f"model.attention_backend: 'splash' needs rows of a multiple of {_LANES} tokens and these have "
                f"{length}; change the length, or use 'xla'."
            )
    if varying_axes(q, k):
        raise UserError("model.attention_backend: 'splash' cannot run inside jax.shard_map; use 'xla'.")
    if platform() != "tpu":
        raise UserError(f"model.attention_backend: 'splash' runs on TPUs and jax runs on {platform()}; use 'xla'.")


@dataclass(frozen=True)
class _Call:
    """What is static in one call; `batch` and `heads` are the mesh axes that rows and heads are cut over."""

    causal: bool
    window: int | None
    soft_cap: float | None
    batch: tuple[str, ...]
    heads: tuple[str, ...]
    interpret: bool


def splash_attention(
    q: Float[Array, "B Q H Dh"],
    k: Float[Array, "B S G Dh"],
    v: Float[Array, "B S G Dh"],
    mask: AttentionMask,
    scale: float,
    soft_cap: float | None,
) -> Float[Array, "B Q H Dh"]:
    """Attention by the kernel, on each device's own rows and heads. Key heads fewer than devices are repeated."""
    B, _, H, _ = q.shape
    G = k.shape[2]
    over_batch, over_heads = mesh_axes("batch"), mesh_axes("heads")
    ways = math.prod(over_heads.values())
    heads = tuple(over_heads) if H % ways == 0 else ()
    if heads and G % ways:
        if ways % G:
            raise UserError(
                f"model.attention_backend: 'splash' cuts heads over {ways} devices and there are {G} key heads; one "
                "number must divide the other: change model.kv_heads or the mesh, or use 'xla'."
            )
        k, v = (jnp.repeat(x, ways // G, axis=2) for x in (k, v))
    call = _Call(
        causal=mask.causal,
        window=mask.window,
        soft_cap=soft_cap,
        batch=tuple(over_batch) if B % math.prod(over_batch.values()) == 0 else (),
        heads=heads,
        interpret=_INTERPRET,
    )
    segments: tuple[Int[Array, "B L"], ...] = ()
    if mask.segment_ids is not None:
        segments = (mask.segment_ids, mask.segment_ids if mask.key_segment_ids is None else mask.key_segment_ids)
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    y = _attend(call, *(x.swapaxes(1, 2) for x in (q, k, v)), segments)
    return y.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, q: Array, k: Array, v: Array, segments: tuple[Array, ...]) -> Array:
    """q is [B, H, Q, Dh] and scaled, k and v are [B, G, S, Dh]."""
    return _attend_forward(call, q, k, v, segments)[0]


def _attend_forward(call: _Call, q: Array, k: Array, v: Array, segments: tuple[Array, ...]) -> tuple[Array, Any]:
    y, logsumexp = _on_mesh(call, _forward, (q, k, v), segments)
    return y, (q, k, v, y, logsumexp, segments)


def _attend_backward(call: _Call, kept: Any, gradient: Array) -> tuple[Any, ...]:
    *arrays, segments = kept
    return (*_on_mesh(call, _backward, (*arrays, gradient), segments), tuple(None for _ in segments))


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(kernel: Any, arrays: tuple[Array, ...], segments: tuple[Array, ...]) -> tuple[Array, Array]:
    """The output [B, H, Q, Dh], and the logarithm of each softmax's denominator [B, H, Q], from q, k and v."""

    def of_row(arrays: tuple[Array, ...], segments: tuple[Array, ...]) -> tuple[Array, Array]:
        y, (logsumexp,) = kernel(*arrays, _segment_ids(segments))
        return y, logsumexp

    return jax.vmap(of_row)(arrays, segments)


def _backward(kernel: Any, arrays: tuple[Array, ...], segments: tuple[Array, ...]) -> tuple[Array, Array, Array]:
    """Gradients of q, k and v, from these, what the forward pass gave and the output's gradient."""

    def of_row(arrays: tuple[Array, ...], segments: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        return splash_backward(kernel, _segment_ids(segments), *arrays)

    return jax.vmap(of_row)(arrays, segments)


def _on_mesh(call: _Call, run: Callable[..., Any], arrays: tuple[Array, ...], segments: tuple[Array, ...]) -> Any:
    """`run(kernel, arrays, segments)`, on a mesh on each device's rows and heads.

    The kernels do not say over which mesh axes their results vary, so `shard_map` cannot check it. What goes wrong
    without the check are derivatives: one shard's gradient for the whole. No derivative is taken of this `shard_map`;
    it lies inside the custom VJP, and every array in it is cut over rows and heads alike, gradients included.
    """
    kernel = _kernel(call, arrays[0].shape[2], arrays[1].shape[2])
    if not mesh_axes("batch") and not mesh_axes("heads"):
        return run(kernel, arrays, segments)
    by_heads, by_rows = PartitionSpec(call.batch or None, call.heads or None), PartitionSpec(call.batch or None)
    on_each = jax.shard_map(run, in_specs=(PartitionSpec(), by_heads, by_rows), out_specs=by_heads, check_vma=False)
    return on_each(kernel, arrays, segments)


def _segment_ids(segments: tuple[Array, ...]) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    return SegmentIds(*segments) if segments else None


def _kernel(call: _Call, queries: int, keys: int) -> Any:
    """The kernel for one row of any number of heads; its arrays are tables of the blocks to visit."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    shape = (queries, keys)
    if call.window is not None:
        mask: Any = library.LocalMask(shape, (call.window - 1, 0), 0)
    else:
        mask = library.CausalMask(shape) if call.causal else library.FullMask(shape)
    block_q, block_kv = (next(size for size in _BLOCKS if length % size == 0) for length in shape)
    blocks = library.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    return library.make_splash_mha(
        library.MultiHeadMask([mask]),  # one for all heads
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=call.soft_cap,
        save_residuals=True,
        interpret=call.interpret,
    )
