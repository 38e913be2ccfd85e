"""The transformer block, with norms before or after its parts, and the stack of blocks that decoder and encoder share.

The blocks' parameters are stacked along a leading axis and the stack is one `scan`, so the compiled program does not
grow with depth.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from lmobj.errors import UserError
from lmobj.models._attention import Attention, BlockSpec, Call, CrossAttention, KVCache, NormName, Remat
from lmobj.models._layers import MLP, Init, LayerNorm, Norm, RMSNorm
from lmobj.models._moe import MoE
from lmobj.models._routing import RouterSums, record_routing
from lmobj.noise import dropout
from lmobj.partition import constrain

__all__ = [
    "Block",
    "BlockSpec",
    "BlockStates",
    "BlockStyle",
    "Call",
    "KVCache",
    "NormName",
    "Remat",
    "Stack",
    "drop",
    "make_norm",
    "rematerialised",
]

ATTENTION_OUT, MLP_OUT, EMBEDDING, CROSS_OUT = 1, 2, 3, 6
"""Dropout sites. Site 0 is the attention probabilities', 5 those of attention over an encoder; 4 is XLNet's."""

HIDDEN_AXES = ("batch", "length", "activation_embed")


class Block(nnx.Module):
    """Attention, with an encoder also attention over its output, and feed-forward part. Each has a residual, with norms
    before the parts (GPT-2) or after the sums (BERT)."""

    def __init__(self, spec: BlockSpec, *, init: Init, out_init: Init, rngs: nnx.Rngs) -> None:
        self.spec = spec
        self.attention = Attention(spec, init=init, out_init=out_init, rngs=rngs)
        self.attention_norm = make_norm(spec)
        if spec.cross_attention:
            self.cross_attention = CrossAttention(spec, init=init, out_init=out_init, rngs=rngs)
            self.cross_attention_norm = make_norm(spec)
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
        before, after = (_unchanged, _norm) if self.spec.post_norm else (_norm, _unchanged)

        def added(x: Array, y: Array, site: int) -> Array:
            return x + drop(y, self.spec.dropout, call.dropout, layer, site)

        y, cache = self.attention(before(self.attention_norm, x), layer, call, cache)
        x = after(self.attention_norm, added(x, y, ATTENTION_OUT))
        if self.spec.cross_attention:
            y = self.cross_attention(before(self.cross_attention_norm, x), layer, call)
            x = after(self.cross_attention_norm, added(x, y, CROSS_OUT))
        y, sums = self._feed_forward(before(self.mlp_norm, x), call, cached=cache is not None)
        return after(self.mlp_norm, added(x, y, MLP_OUT)), cache, sums

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
        return self._run(x, call)[0][-1]

    def fork(self, x: Float[Array, "B L D"], call: Call) -> tuple[Float[Array, "B L D"], Float[Array, "B L D"]]:
        """The last block's input, and its output."""
        before, after = self._run(x, call, last=2)[0]
        return before, after

    def collect(self, x: Float[Array, "B L D"], call: Call) -> Float[Array, "n B L D"]:
        """Every block's output."""
        return self._run(x, call, collect=True)[1]

    def side_by_side(self, x: Float[Array, "B L D"], call: Call) -> Float[Array, "n B L D"]:
        """Each block's output for the same input."""
        block_at, layers = self._layers()

        def body(_: None, layer: Any) -> tuple[None, Array]:
            block, index = block_at(layer)
            return None, constrain(block(x, index, call)[0], HIDDEN_AXES)

        return jax.lax.scan(rematerialised(body, self.spec.remat), None, layers)[1]

    def _run(
        self, x: Float[Array, "B L D"], call: Call, *, collect: bool = False, last: int = 1
    ) -> tuple[tuple[Array, ...], Any]:
        """What the last blocks put out, as many as `last` (x where there are fewer), and with `collect` what all do."""
        block_at, layers = self._layers()

        def body(states: tuple[Array, ...], layer: Any) -> tuple[tuple[Array, ...], tuple[Array | None, Any]]:
            block, index = block_at(layer)
            y, _, sums = block(states[-1], index, call)
            y = constrain(y, HIDDEN_AXES)
            return (*states[1:], y), (y if collect else None, sums)

        states, (collected, sums) = jax.lax.scan(rematerialised(body, self.spec.remat), (x,) * last, layers)
        if sums is not None:
            record_routing(sums, x.shape[:2], call.mask.segment_ids)
        return states, collected

    def step(self, x: Float[Array, "B T D"], call: Call, cache: KVCache) -> tuple[Float[Array, "B T D"], KVCache]:
        """The last block's output for new tokens, and the cache with them added. The cache is carried, never copied."""
        block_at, layers = self._layers()

        def body(carry: tuple[Array, KVCache], layer: Any) -> tuple[tuple[Array, KVCache], None]:
            block, index = block_at(layer)
            x, cache, _ = block(carry[0], index, call, carry[1])
            return (x, cache), None

        (x, cache), _ = jax.lax.scan(body, (x, cache), layers)
        return x, cache

    def cross_cache(self, encoded: Float[Array, "B S D"]) -> KVCache:
        """Keys and values of an encoder's output in every layer's attention over it."""
        block_at, layers = self._layers()

        def body(_: None, layer: Any) -> tuple[None, tuple[Array, Array]]:
            return None, block_at(layer)[0].cross_attention.keys(encoded)

        _, (keys, values) = jax.lax.scan(body, None, layers)
        return KVCache(keys.swapaxes(0, 1), values.swapaxes(0, 1))

    def _layers(self) -> tuple[Callable[[Any], tuple[Any, Int[Array, ""]]], Any]:
        """What a scan runs over, and the function that makes (block, its index) of one element of it."""
        graphdef, states = nnx.split(self.blocks)
        indices = self.first + jnp.arange(self.spec.layers)
        if not self.spec.share_layers:
            return lambda layer: (nnx.merge(graphdef, layer[0]), layer[1]), (states, indices)
        shared = jax.tree.map(lambda x: x[0], states)
        return lambda index: (nnx.merge(graphdef, shared), index), indices


class BlockStyle(NamedTuple):
    """How the blocks of a model are made, by which others can be made like them."""

    spec: BlockSpec
    init: Init
    """Of weights."""
    out_init: Init
    """Of the weights of what blocks add to the residual."""

    def stack(self, rngs: nnx.Rngs) -> Stack:
        """The model's own blocks."""
        return Stack(self.spec, init=self.init, out_init=self.out_init, rngs=rngs)

    def further(self, count: int) -> BlockStyle:
        """Of `count` more blocks, none with experts: a feed-forward part is in their place, as wide as those that work
        on a token together."""
        spec, moe = self.spec, self.spec.moe
        width = spec.mlp_width * (1 if moe is None else moe.experts_per_token)
        more = dataclasses.replace(spec, layers=count, mlp_width=width, moe=None, share_layers=False)
        return self._replace(spec=more)


class BlockStates(NamedTuple):
    """What stands inside a model, for blocks that run beside its own or after them."""

    embedded: Float[Array, "B L D"]
    """The first block's input: tokens, with their positions where those are learned."""
    before_last: Float[Array, "B L D"]
    """The last block's input."""
    hidden: Float[Array, "B L D"]
    """The model's final hidden states."""
    call: Call
    """What all blocks share."""


def _norm(norm: Norm, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    return norm(x)


def _unchanged(norm: Norm, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    return x


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
