"""The transformer block, with norms before or after its parts, and the stack of blocks that decoder and encoder share.

The blocks' parameters are stacked along a leading axis and the stack is one `scan`, so the compiled program does not
grow with depth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from lmobj.attention import AttentionBackend, attention
from lmobj.errors import UserError
from lmobj.masks import AttentionMask
from lmobj.models._layers import MLP, Activation, Init, LayerNorm, Linear, Norm, RMSNorm, apply_rotary
from lmobj.models._moe import MoE, MoEConfig
from lmobj.models._protocol import RowUse
from lmobj.models._routing import RouterSums, record_routing
from lmobj.noise import dropout
from lmobj.partition import constrain

__all__ = ["Block", "BlockSpec", "Call", "KVCache", "Remat", "Stack", "drop", "make_norm", "rematerialised"]

Remat = Literal["none", "dots", "block", "offload"]
NormName = Literal["layernorm", "rmsnorm"]

ATTENTION_OUT, MLP_OUT, EMBEDDING = 1, 2, 3
"""Dropout sites; site 0 is the attention probabilities'."""

HIDDEN_AXES = ("batch", "length", "activation_embed")


@dataclass(frozen=True)
class BlockSpec:
    """What a stack of blocks needs to know, whatever the family. Families translate their settings into one."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp_width: int
    post_norm: bool
    norm: NormName
    norm_eps: float
    activation: Activation
    bias: bool
    dropout: float
    attention_dropout: float
    attention_soft_cap: float | None
    attention_backend: AttentionBackend
    remat: Remat
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    share_layers: bool = False
    """Whether all layers are one block (ALBERT)."""
    moe: MoEConfig | None = None
    """Experts in place of the feed-forward part."""

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    @property
    def stack_weights(self) -> int:
        """Weights in products that a token meets in all layers; of experts, those that work on it and their router."""
        attention = 2 * self.width * (self.heads + self.kv_heads) * self.head_dim
        mlp = (3 if self.activation == "swiglu" else 2) * self.width * self.mlp_width
        if self.moe is not None:
            mlp = self.moe.experts_per_token * mlp + self.width * self.moe.experts
        return self.layers * (attention + mlp)

    def stack_flops(self, use: RowUse, window: int | None = None) -> float:
        """Operations of a row's matrix products in all layers: two for each weight, and four in attention for each
        token, key that it sees and component of the width (logits, and the sum of values)."""
        attention = 4 * self.layers * self.width * use.keys(window)
        return use.length * (2 * self.stack_weights + attention)


class KVCache(NamedTuple):
    """Keys and values of every layer, rows first; slot s holds the token at position s."""

    keys: Float[Array, "B n S G Dh"]
    values: Float[Array, "B n S G Dh"]

    def write(
        self,
        layer: Int[Array, ""],
        positions: Int[Array, "B T"],
        k: Float[Array, "B T G Dh"],
        v: Float[Array, "B T G Dh"],
    ) -> KVCache:
        """The cache with new tokens in their slots. Positions outside the cache (-1: padding) are dropped."""
        rows = jnp.arange(positions.shape[0])[:, None]
        slots = jnp.where(positions < 0, self.keys.shape[2], positions)
        return KVCache(
            self.keys.at[rows, layer, slots].set(k, mode="drop"), self.values.at[rows, layer, slots].set(v, mode="drop")
        )

    def read(self, layer: Int[Array, ""]) -> tuple[Float[Array, "B S G Dh"], Float[Array, "B S G Dh"]]:
        """Keys and values of one layer."""
        return (
            jax.lax.dynamic_index_in_dim(self.keys, layer, axis=1, keepdims=False),
            jax.lax.dynamic_index_in_dim(self.values, layer, axis=1, keepdims=False),
        )


class Call(NamedTuple):
    """What every block of one call shares."""

    mask: AttentionMask
    positions: Int[Array, "B L"]
    rotary: tuple[Array, Array] | None = None
    dropout: UInt32[Array, " B"] | None = None


class Attention(nnx.Module):
    """Multi-head attention with H query heads over G key and value heads."""

    def __init__(self, spec: BlockSpec, *, init: Init, out_init: Init, rngs: nnx.Rngs) -> None:
        def heads_of(count: int) -> Linear:
            return Linear(
                spec.width,
                count * spec.head_dim,
                axes=("embed", "heads"),
                init=init,
                bias=spec.bias,
                param_dtype=spec.param_dtype,
                rngs=rngs,
            )

        self.spec = spec
        self.query = heads_of(spec.heads)
        self.key = heads_of(spec.kv_heads)
        self.value = heads_of(spec.kv_heads)
        self.out = Linear(
            spec.width,
            spec.width,
            axes=("heads", "embed"),
            init=out_init,
            bias=spec.bias,
            param_dtype=spec.param_dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "B L D"], layer: Int[Array, ""], call: Call, cache: KVCache | None
    ) -> tuple[Float[Array, "B L D"], KVCache | None]:
        """Attention of x over itself, or over the cache with x added to it."""
        spec = self.spec
        by_heads = (*x.shape[:2], -1, spec.head_dim)
        q, k, v = (project(x).reshape(by_heads) for project in (self.query, self.key, self.value))
        if call.rotary is not None:
            q, k = apply_rotary(q, call.rotary), apply_rotary(k, call.rotary)
        backend = spec.attention_backend
        if cache is not None:
            cache = cache.write(layer, call.positions, k, v)
            k, v = cache.read(layer)
            backend = "xla"  # kernels work on blocks of queries, and here are one or a few
        k, v, mask = self.seen(k, v, call.mask)
        y = attention(
            q,
            k,
            v,
            mask,
            backend=backend,
            soft_cap=spec.attention_soft_cap,
            dropout_rate=spec.attention_dropout,
            dropout_seeds=call.dropout,
            layer=layer,
        )
        return self.out(y.reshape(x.shape)), cache

    def seen(
        self, k: Float[Array, "B S G Dh"], v: Float[Array, "B S G Dh"], mask: AttentionMask
    ) -> tuple[Float[Array, "B K G Dh"], Float[Array, "B K G Dh"], AttentionMask]:
        """What the queries are held against: keys and values as they are. Adapters put their own before them."""
        return k, v, mask


class Block(nnx.Module):
    """Attention and feed-forward part, each with a residual; norms before them (GPT-2) or after the sums (BERT)."""

    def __init__(self, spec: BlockSpec, *, init: Init, out_init: Init, rngs: nnx.Rngs) -> None:
        self.spec = spec
        self.attention = Attention(spec, init=init, out_init=out_init, rngs=rngs)
        self.attention_norm = make_norm(spec)
        mlp = MLP if spec.moe is None else functools.partial(MoE, spec.moe)
        self.mlp = mlp(
            spec.width,
            spec.mlp_width,
            activation=spec.activation,
            bias=spec.bias,
            init=init,
            out_init=out_init,
            param_dtype=spec.param_dtype,
            rngs=rngs,
        )
        self.mlp_norm = make_norm(spec)

    def __call__(
        self, x: Float[Array, "B L D"], layer: Int[Array, ""], call: Call, cache: KVCache | None = None
    ) -> tuple[Float[Array, "B L D"], KVCache | None, RouterSums | None]:
        """One layer; `layer` is its index in the stack. The sums are of its router, where it has one."""
        rate = self.spec.dropout
        if self.spec.post_norm:
            y, cache = self.attention(x, layer, call, cache)
            x = self.attention_norm(x + drop(y, rate, call.dropout, layer, ATTENTION_OUT))
            y, sums = self._feed_forward(x, call, cached=cache is not None)
            return self.mlp_norm(x + drop(y, rate, call.dropout, layer, MLP_OUT)), cache, sums
        y, cache = self.attention(self.attention_norm(x), layer, call, cache)
        x = x + drop(y, rate, call.dropout, layer, ATTENTION_OUT)
        y, sums = self._feed_forward(self.mlp_norm(x), call, cached=cache is not None)
        return x + drop(y, rate, call.dropout, layer, MLP_OUT), cache, sums

    def _feed_forward(
        self, x: Float[Array, "B L D"], call: Call, *, cached: bool
    ) -> tuple[Float[Array, "B L D"], RouterSums | None]:
        """The feed-forward part or the experts, of which a cached call does not know how full they are: none drops."""
        if not isinstance(self.mlp, MoE):
            return self.mlp(x), None
        segments = call.mask.segment_ids
        routed = jnp.ones(x.shape[:2], bool) if segments is None else segments > 0
        return self.mlp(x, routed, dropless=cached)


class Stack(nnx.Module):
    """`spec.layers` blocks with stacked parameters, or one block in all their places; run by one scan.

    The axis along which parameters are stacked has length 1 where layers are shared.
    """

    def __init__(self, spec: BlockSpec, *, init: Init, out_init: Init, rngs: nnx.Rngs) -> None:
        def block(key: Array) -> Block:
            return Block(spec, init=init, out_init=out_init, rngs=nnx.Rngs(params=key))

        self.spec = spec
        self.first = 0
        """Index of its first layer, where a stack is the upper part of another."""
        self.blocks = nnx.vmap(block)(jax.random.split(rngs.params(), 1 if spec.share_layers else spec.layers))

    def __call__(self, x: Float[Array, "B L D"], call: Call) -> Float[Array, "B L D"]:
        """The last block's output."""
        return self._run(x, call, collect=False)[0]

    def collect(self, x: Float[Array, "B L D"], call: Call) -> Float[Array, "n B L D"]:
        """Every block's output."""
        return self._run(x, call, collect=True)[1]

    def _run(self, x: Float[Array, "B L D"], call: Call, *, collect: bool) -> tuple[Any, Any]:
        block_at, layers = self._layers()

        def body(x: Array, layer: Any) -> tuple[Array, tuple[Array | None, RouterSums | None]]:
            block, index = block_at(layer)
            x, _, sums = block(x, index, call)
            x = constrain(x, HIDDEN_AXES)
            return x, (x if collect else None, sums)

        rows = x.shape[:2]
        x, (collected, sums) = jax.lax.scan(rematerialised(body, self.spec.remat), x, layers)
        if sums is not None:
            record_routing(sums, rows, call.mask.segment_ids)
        return x, collected

    def step(self, x: Float[Array, "B T D"], call: Call, cache: KVCache) -> tuple[Float[Array, "B T D"], KVCache]:
        """The last block's output for new tokens, and the cache with them added. The cache is carried, never copied."""
        block_at, layers = self._layers()

        def body(carry: tuple[Array, KVCache], layer: Any) -> tuple[tuple[Array, KVCache], None]:
            block, index = block_at(layer)
            x, cache, _ = block(carry[0], index, call, carry[1])
            return (x, cache), None

        (x, cache), _ = jax.lax.scan(body, (x, cache), layers)
        return x, cache

    def _layers(self) -> tuple[Callable[[Any], tuple[Any, Int[Array, ""]]], Any]:
        """What a scan runs over, and the function that makes (block, its index) of one element of it."""
        graphdef, states = nnx.split(self.blocks)
        indices = self.first + jnp.arange(self.spec.layers)
        if not self.spec.share_layers:
            return lambda layer: (nnx.merge(graphdef, layer[0]), layer[1]), (states, indices)
        shared = jax.tree.map(lambda x: x[0], states)
        return lambda index: (nnx.merge(graphdef, shared), index), indices


def make_norm(spec: BlockSpec) -> Norm:
    """The norm that the spec asks for."""
    if spec.norm == "rmsnorm":
        return RMSNorm(spec.width, eps=spec.norm_eps, param_dtype=spec.param_dtype)
    return LayerNorm(spec.width, eps=spec.norm_eps, bias=spec.bias, param_dtype=spec.param_dtype)


def drop(
    x: Float[Array, "B ..."], rate: float, seeds: UInt32[Array, " B"] | None, layer: Int[Array, ""] | int, site: int
) -> Float[Array, "B ..."]:
    """Dropout where it is on."""
    if seeds is None or rate == 0:
        return x
    return dropout(x, rate, seeds, layer=layer, site=site)


def rematerialised(body: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """`body` with what its backward pass keeps.

    `none` keeps everything, `dots` the products with weights, `block` only the body's input. `offload` keeps what
    `dots` does in the host's pinned memory: written there in the forward pass, read back in the backward pass.

    Raises:
      UserError: `offload` on devices without pinned host memory.
    """
    if remat == "none":
        return body
    if remat == "offload":
        kinds = sorted(memory.kind for memory in jax.local_devices()[0].addressable_memories())
        if "pinned_host" not in kinds:
            raise UserError(
                f"model.remat is offload, which needs devices that reach pinned memory of their host, and these have "
                f"{', '.join(kinds)}; accepted here: none, dots, block."
            )
    policy = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "block": None,
        "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    }[remat]
    return jax.checkpoint(body, policy=policy, prevent_cse=False)  # a scan cannot be merged with its recomputation
