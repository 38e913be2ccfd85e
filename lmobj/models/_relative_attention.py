"""Blocks with attention by relative position: what a query makes of a key depends on how far apart they are.

    logit_ij = ((q_i + u) . k_j  +  (q_i + v) . W_r R(i - j)  +  (q_i + w) . s_[same segment or not]) / sqrt(Dh)

with R(d) the sinusoids of a distance and u, v, w trained vectors per head. Dai et al. 2019, "Transformer-XL: Attentive
Language Models beyond a Fixed-Length Context", section 3.3 (the first two terms); Yang et al. 2019, "XLNet: Generalized
Autoregressive Pretraining for Language Understanding", section 2.5 (the third). The scale covers all three.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from lmobj.attention import attention
from lmobj.masks import AttentionMask
from lmobj.models._block import ATTENTION_OUT, MLP_OUT, BlockSpec, drop, make_norm
from lmobj.models._layers import ACTIVATIONS, MLP, Init, Linear
from lmobj.partition import mesh_axes

__all__ = ["Biases", "Queries", "RelativeBlock", "RelativeCall", "distances", "sinusoids"]

MLP_INNER = 4
"""Dropout site inside the feed-forward part, beside those of `_block`."""
_WAVELENGTHS = 10000.0


class Queries(NamedTuple):
    """How one stream looks, in every layer alike.

    mask: who sees whom, memory included.
    other_segment: True where query and key are of different segments; None: segments are not told apart.
    places: where in the row the queries stand; None: everywhere, in order.
    site: added to the dropout sites, so that two streams drop out different things.
    """

    mask: AttentionMask
    other_segment: Bool[Array, "B Q S"] | None = None
    places: Int[Array, "B Q"] | None = None
    site: int = 0


class RelativeCall(NamedTuple):
    """What every layer of one call shares.

    positions: sinusoids of the P distances of `distances`; with `backward` those and the negated ones'.
    backward: rows whose distances are negated.
    biases: u, v and w, where the layers share them.
    """

    positions: Float[Array, "P D"] | Float[Array, "2 P D"]
    backward: Bool[Array, " B"] | None
    length: int
    biases: Biases | None
    dropout: UInt32[Array, " B"] | None


class Keys(NamedTuple):
    """What the queries of a layer are held against: keys and values of memory and row, and keys of the distances."""

    k: Float[Array, "B S H Dh"]
    v: Float[Array, "B S H Dh"]
    r: Float[Array, "P H Dh"] | Float[Array, "B P H Dh"]


class Biases(nnx.Module):
    """u, v and w of the module's formula: `r_w_bias`, `r_r_bias` and `r_s_bias` in the original code."""

    def __init__(self, spec: BlockSpec, *, segments: bool, init: Init, rngs: nnx.Rngs) -> None:
        def vector() -> nnx.Param:
            return nnx.Param(init(rngs.params(), (spec.width,), spec.param_dtype), axes=("heads",))

        self.content = vector()
        self.position = vector()
        self.segment = vector() if segments else None


class RelativeAttention(nnx.Module):
    """Multi-head attention by relative position and segment; its linear maps have no biases."""

    def __init__(self, spec: BlockSpec, *, segments: bool, own_biases: bool, init: Init, rngs: nnx.Rngs) -> None:
        def project(axes: tuple[str, str]) -> Linear:
            return Linear(
                spec.width, spec.width, axes=axes, init=init, bias=False, param_dtype=spec.param_dtype, rngs=rngs
            )

        into = ("embed", "heads")
        self.spec = spec
        self.query, self.key, self.value, self.position = (project(into) for _ in range(4))
        self.out = project(("heads", "embed"))
        self.biases = Biases(spec, segments=segments, init=init, rngs=rngs) if own_biases else None
        two = init(rngs.params(), (2, spec.width), spec.param_dtype) if segments else None
        self.segments = None if two is None else nnx.Param(two, axes=(None, "heads"))
        """Of the same segment, and of another."""

    def keys(self, context: Float[Array, "B S D"], call: RelativeCall) -> Keys:
        """Keys and values of memory and row together, and keys of the distances."""
        r = self._by_heads(self.position(call.positions))
        if call.backward is not None:
            r = jnp.where(call.backward[:, None, None, None], r[1], r[0])
        return Keys(self._by_heads(self.key(context)), self._by_heads(self.value(context)), r)

    def __call__(
        self, x: Float[Array, "B Q D"], keys: Keys, queries: Queries, layer: Int[Array, ""], call: RelativeCall
    ) -> Float[Array, "B Q D"]:
        """Attention of the queries that x makes over the keys."""
        spec, scale = self.spec, 1 / math.sqrt(self.spec.head_dim)
        biases = call.biases if self.biases is None else self.biases
        assert biases is not None
        q = self._by_heads(self.query(x))
        logits = self._of_positions(q + self._vector(biases.position, q), keys, queries, call.length)
        if queries.other_segment is not None:
            logits = logits + self._of_segments(q + self._vector(biases.segment, q), queries.other_segment)
        y = attention(
            q + self._vector(biases.content, q),
            keys.k,
            keys.v,
            queries.mask,
            scale=scale,
            bias=logits * scale,
            dropout_rate=spec.attention_dropout,
            dropout_seeds=call.dropout,
            layer=layer,
            site=queries.site,
        )
        return self.out(y.reshape(x.shape))

    def _of_positions(
        self, q: Float[Array, "B Q H Dh"], keys: Keys, queries: Queries, length: int
    ) -> Float[Array, "B H Q S"]:
        """Each query against the keys of its distances, before the scale.

        `distances` are those of a row's last query with one to spare, so that key s of the query at place i has the
        distance number length - i + s: a window that moves by one from a query to the next.
        """
        S, P = keys.k.shape[1], keys.r.shape[-3]
        of_distance = "phd" if keys.r.ndim == 3 else "bphd"
        precise = jnp.promote_types(q.dtype, jnp.float32)
        every = jnp.einsum(f"bqhd,{of_distance}->bhqp", q, keys.r, preferred_element_type=precise)
        B, H, Q, _ = every.shape
        if queries.places is None and not mesh_axes("length"):
            # With its first Q entries cut off, the flat array has rows that are one shorter: the window moves.
            return every.reshape(B, H, Q * P)[..., Q:].reshape(B, H, Q, P - 1)[..., :S]
        places = jnp.arange(Q)[None] if queries.places is None else queries.places
        number = length - places[..., None] + jnp.arange(S)
        return jnp.take_along_axis(every, jnp.minimum(number, P - 1)[:, None], axis=-1)

    def _of_segments(self, q: Float[Array, "B Q H Dh"], other: Bool[Array, "B Q S"]) -> Float[Array, "B H Q S"]:
        """Each query against `same` or `other`, before the scale."""
        assert self.segments is not None
        precise = jnp.promote_types(q.dtype, jnp.float32)
        by_heads = self._by_heads(self.segments[...].astype(q.dtype))
        same, different = jnp.einsum("bqhd,shd->sbhq", q, by_heads, preferred_element_type=precise)
        return jnp.where(other[:, None], different[..., None], same[..., None])

    def _by_heads(self, x: Float[Array, "... D"]) -> Float[Array, "... H Dh"]:
        return x.reshape(*x.shape[:-1], self.spec.heads, self.spec.head_dim)

    def _vector(self, bias: nnx.Param | None, q: Float[Array, "B Q H Dh"]) -> Float[Array, "H Dh"]:
        assert bias is not None
        return self._by_heads(bias[...].astype(q.dtype))


class RelativeBlock(nnx.Module):
    """Attention and feed-forward part with norms after their sums, for both streams by the same weights."""

    def __init__(self, spec: BlockSpec, *, segments: bool, own_biases: bool, init: Init, rngs: nnx.Rngs) -> None:
        self.spec = spec
        self.attention = RelativeAttention(spec, segments=segments, own_biases=own_biases, init=init, rngs=rngs)
        self.attention_norm = make_norm(spec)
        self.mlp = MLP(
            spec.width,
            spec.mlp_width,
            activation=spec.activation,
            bias=True,
            init=init,
            out_init=init,
            param_dtype=spec.param_dtype,
            rngs=rngs,
        )
        self.mlp_norm = make_norm(spec)

    def __call__(
        self,
        h: Float[Array, "B L D"],
        g: Float[Array, "B K D"] | None,
        past: Float[Array, "B M D"] | None,
        streams: tuple[Queries, Queries | None],
        layer: Int[Array, ""],
        call: RelativeCall,
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B K D"] | None]:
        """One layer of the content stream, and of the query stream where there is one."""
        content, query = streams
        keys = self.attention.keys(h if past is None else jnp.concatenate([past, h], axis=1), call)
        new_g = None if g is None or query is None else self._stream(g, keys, query, layer, call)
        return self._stream(h, keys, content, layer, call), new_g

    def _stream(
        self, x: Float[Array, "B Q D"], keys: Keys, queries: Queries, layer: Int[Array, ""], call: RelativeCall
    ) -> Float[Array, "B Q D"]:
        def dropped(y: Array, site: int) -> Array:
            return drop(y, self.spec.dropout, call.dropout, layer, queries.site + site)

        y = self.attention(x, keys, queries, layer, call)
        x = self.attention_norm(x + dropped(y, ATTENTION_OUT))
        y = dropped(ACTIVATIONS[self.spec.activation](self.mlp.up(x)), MLP_INNER)
        return self.mlp_norm(x + dropped(self.mlp.down(y), MLP_OUT))


def distances(length: int, memory: int, *, causal: bool, clamp: int | None) -> Int[Array, " P"]:
    """Distances i - j that queries of a row can have to keys of memory and row, descending.

    They run from memory + length, one more than there is, down to -(length - 1), or to 0 where nobody looks ahead.
    `clamp` bounds them on both sides.
    """
    reach = memory + length
    values = jnp.arange(reach, -1 if causal else -length, -1)
    return values if clamp is None else jnp.clip(values, -clamp, clamp)


def sinusoids(values: Int[Array, "*shape"], width: int, dtype: jnp.dtype) -> Float[Array, "*shape D"]:
    """[sin(value * f), cos(value * f)], f = 10000^(-2 i / width): the halves side by side, not interleaved.

    Computed in `promote_types(dtype, float32)`.
    """
    precise = jnp.promote_types(dtype, jnp.float32)
    frequency = _WAVELENGTHS ** (-jnp.arange(0, width, 2, dtype=precise) / width)
    angle = values[..., None].astype(precise) * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1).astype(dtype)
