"""Attention of a block: over its own rows, and of a decoder over what an encoder made of other rows.

    logits = scale q k^T + bias        scale = 1 / sqrt(Dh), or what the spec says; the bias is of relative positions

Vaswani et al. 2017, "Attention Is All You Need", section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from lmobj.attention import AttentionBackend, attention
from lmobj.masks import AttentionMask
from lmobj.models._layers import GATED, Activation, Init, Linear, apply_rotary, scaled
from lmobj.models._moe import MoEConfig
from lmobj.models._protocol import RowUse

__all__ = ["Attention", "BlockSpec", "Call", "Cross", "CrossAttention", "KVCache", "NormName", "Remat", "Seen"]

Remat = Literal["none", "dots", "block", "offload"]
NormName = Literal["layernorm", "rmsnorm"]

OWN_ATTENTION, CROSS_ATTENTION = 0, 5
"""Dropout sites of the probabilities of attention over a row itself and over an encoder; `_block` has the others."""


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
    head_width: int | None = None
    """Width of one head where it is not width / heads (T5)."""
    attention_scale: float | None = None
    """Scale of attention logits; None: 1 / sqrt(head_dim)."""
    query_gain: float = 1.0
    """What the initial values of queries' weights are multiplied by."""
    cross_attention: bool = False
    """Whether every block attends to an encoder's output too."""

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads if self.head_width is None else self.head_width

    @property
    def stack_weights(self) -> int:
        """Weights in products that a token meets in all layers; of experts, those that work on it and their router."""
        attention = 2 * self.width * (self.heads + self.kv_heads) * self.head_dim
        mlp = (3 if self.activation in GATED else 2) * self.width * self.mlp_width
        if self.moe is not None:
            mlp = self.moe.experts_per_token * mlp + self.width * self.moe.experts
        return self.layers * (attention + mlp)

    def stack_flops(self, use: RowUse, window: int | None = None) -> float:
        """Operations of a row's matrix products in all layers and further blocks: two for each weight, and four in
        attention for each token, key that it sees and component of the heads (logits, and the sum of values)."""
        attention = 4 * self.layers * self.heads * self.head_dim * use.keys(window)
        blocks = 1 + use.further_blocks / self.layers
        return use.length * (2 * self.stack_weights + attention) * blocks

    def cross_flops(self, length: int, encoded: int) -> float:
        """Those of attention of `length` tokens over `encoded` others in all layers."""
        inner = self.heads * self.head_dim
        weights = 2 * length * inner + 2 * encoded * self.kv_heads * self.head_dim
        return self.layers * (2 * self.width * weights + 4 * length * encoded * inner)


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


class Cross(NamedTuple):
    """What the blocks of a decoder see of an encoder: its output, or the keys and values of all layers made of it."""

    mask: AttentionMask
    encoded: Float[Array, "B S D"] | None = None
    cache: KVCache | None = None


class Call(NamedTuple):
    """What every block of one call shares."""

    mask: AttentionMask
    positions: Int[Array, "B L"]
    rotary: tuple[Array, Array] | None = None
    dropout: UInt32[Array, " B"] | None = None
    bias: Float[Array, "B_or_1 H L S"] | None = None
    """Added to the scaled logits of attention over the rows themselves (relative positions)."""
    cross: Cross | None = None


class Seen(NamedTuple):
    """What the queries of one attention call are held against."""

    keys: Float[Array, "B S G Dh"]
    values: Float[Array, "B S G Dh"]
    mask: AttentionMask
    bias: Float[Array, "B_or_1 H Q S"] | None = None


class MultiHead(nnx.Module):
    """Attention with H query heads over G key and value heads, whatever the keys are made of."""

    def __init__(self, spec: BlockSpec, *, init: Init, out_init: Init, rngs: nnx.Rngs) -> None:
        def heads_of(count: int, init: Init = init) -> Linear:
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
        self.query = heads_of(spec.heads, init if spec.query_gain == 1 else scaled(init, spec.query_gain))
        self.key = heads_of(spec.kv_heads)
        self.value = heads_of(spec.kv_heads)
        self.out = Linear(
            spec.heads * spec.head_dim,
            spec.width,
            axes=("heads", "embed"),
            init=out_init,
            bias=spec.bias,
            param_dtype=spec.param_dtype,
            rngs=rngs,
        )

    def by_heads(self, x: Float[Array, "B L I"]) -> Float[Array, "B L N Dh"]:
        """What a linear map puts out, head by head."""
        return x.reshape(*x.shape[:2], -1, self.spec.head_dim)

    def extended(self, seen: Seen) -> Seen:
        """What the queries see: no more than there is. Adapters put keys and values of their own before it."""
        return seen

    def attend(
        self, q: Float[Array, "B Q H Dh"], seen: Seen, call: Call, layer: Int[Array, ""], *, cached: bool, site: int
    ) -> Float[Array, "B Q D"]:
        """What the queries find. Kernels work on blocks of queries, and with a cache there are one or a few."""
        spec, seen = self.spec, self.extended(seen)
        y = attention(
            q,
            seen.keys,
            seen.values,
            seen.mask,
            backend="xla" if cached else spec.attention_backend,
            scale=spec.attention_scale,
            bias=seen.bias,
            soft_cap=spec.attention_soft_cap,
            dropout_rate=spec.attention_dropout,
            dropout_seeds=call.dropout,
            layer=layer,
            site=site,
        )
        return self.out(y.reshape(*q.shape[:2], -1))


class Attention(MultiHead):
    """Attention of rows over themselves."""

    def __call__(
        self, x: Float[Array, "B L D"], layer: Int[Array, ""], call: Call, cache: KVCache | None
    ) -> tuple[Float[Array, "B L D"], KVCache | None]:
        """Attention of x over itself, or over the cache with x added to it."""
        q, k, v = (self.by_heads(project(x)) for project in (self.query, self.key, self.value))
        if call.rotary is not None:
            q, k = apply_rotary(q, call.rotary), apply_rotary(k, call.rotary)
        if cache is not None:
            cache = cache.write(layer, call.positions, k, v)
            k, v = cache.read(layer)
        seen = Seen(k, v, call.mask, call.bias)
        return self.attend(q, seen, call, layer, cached=cache is not None, site=OWN_ATTENTION), cache


class CrossAttention(MultiHead):
    """Attention of a decoder's rows over an encoder's output. Positions have no part in it."""

    def keys(self, encoded: Float[Array, "B S D"]) -> tuple[Float[Array, "B S G Dh"], Float[Array, "B S G Dh"]]:
        """Keys and values, the same for every token that is decoded."""
        return self.by_heads(self.key(encoded)), self.by_heads(self.value(encoded))

    def __call__(self, x: Float[Array, "B T D"], layer: Int[Array, ""], call: Call) -> Float[Array, "B T D"]:
        """Attention of x over what `call.cross` holds."""
        cross = call.cross
        assert cross is not None
        if cross.cache is not None:
            k, v = cross.cache.read(layer)
        else:
            assert cross.encoded is not None
            k, v = self.keys(cross.encoded)
        seen, cached = Seen(k, v, cross.mask), cross.cache is not None
        return self.attend(self.by_heads(self.query(x)), seen, call, layer, cached=cached, site=CROSS_ATTENTION)
