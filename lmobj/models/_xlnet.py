"""XLNet: a transformer with relative positions, a memory of what it read before, and two streams.

The content stream h reads tokens. The query stream g predicts them: it knows where it stands, begins with one trained
vector in place of a token, and reads keys and values of h alone, with h's weights. Without segments and query stream
the model is Transformer-XL.

Yang et al. 2019, "XLNet: Generalized Autoregressive Pretraining for Language Understanding", sections 2.3 to 2.5; Dai
et al. 2019, "Transformer-XL: Attentive Language Models beyond a Fixed-Length Context".

Deviations from the original code: the sinusoids of distances are not dropped out (a mask per row would ask for a
projection of them per row); memory that was never written is invisible, where the original shows its zeros; the query
stream's first vector is normal of `init_std`, where the original leaves it to TensorFlow's default (Glorot).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.masks import AttentionMask
from lmobj.models._block import (
    EMBEDDING,
    HIDDEN_AXES,
    BlockSpec,
    Remat,
    drop,
    rematerialised,
)
from lmobj.models._heads import HeadStyle
from lmobj.models._layers import DTypeName, Embedding, normal, output_head, pad_vocabulary
from lmobj.models._protocol import OutputHead, RowUse
from lmobj.models._relative_attention import (
    Biases,
    Queries,
    RelativeBlock,
    RelativeCall,
    distances,
    sinusoids,
)
from lmobj.models._settings import at_least, check_blocks, default_mlp_width, resolve_dtype
from lmobj.partition import constrain

__all__ = ["Memory", "XLNet", "XLNetConfig"]

FINAL = 5
"""Dropout site of what the model returns, beside those of its blocks."""
QUERY_STREAM = 8
"""Added to the query stream's sites."""


@dataclass(frozen=True)
class XLNetConfig:
    """XLNet, or Transformer-XL. The defaults are XLNet base; rows may be of any length."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["xlnet"] = "xlnet"
    """Relative positions, memory and two streams (XLNet, Transformer-XL)."""
    layers: int = 12
    """Number of blocks, at least 1."""
    width: int = 768
    """Width of the hidden states, even and a multiple of `heads`."""
    heads: int = 12
    """Attention heads per layer."""
    mlp_width: int | None = None
    """Inner width of the feed-forward part; null: 4 * width."""
    memory_length: int = 384
    """Positions of earlier rows, in every layer, that a row sees where the objective carries a memory; 0: none."""
    direction: Literal["both", "backward"] = "both"
    """`both`: distances to either side (XLNet); `backward`: only to what came before, for causal masks alone."""
    segments: bool = True
    """Whether attention tells tokens of the same segment from those of another (relative segment encoding)."""
    query_stream: bool = True
    """Whether there is a query stream, which permutation_lm needs."""
    untie_biases: bool = True
    """Whether every layer has its own biases of attention; false: all layers share them (Transformer-XL)."""
    clamp_distance: int | None = None
    """Distances beyond it count as it, at least 1; null: no bound."""
    norm_eps: float = 1e-12
    """Added to the variance in LayerNorm, above 0."""
    activation: Literal["gelu", "gelu_exact"] = "gelu"
    """`gelu` (tanh approximation, as in the original code) or `gelu_exact`."""
    dropout: float = 0.1
    """Dropout rate of embeddings, of what attention and feed-forward part add, inside the latter, and of the output."""
    attention_dropout: float = 0.1
    """Dropout rate of attention probabilities, in [0, 1)."""
    vocab_multiple: int = 128
    """The embedding's rows are padded up to a multiple of this, so that they divide over devices."""
    init_std: float = 0.02
    """Standard deviation of initial weights."""
    remat: Remat = "dots"
    """What is recomputed in the backward pass: `none`; `dots`: all but products with weights; `block`: each block;
    `offload`: as `dots`, with those products kept in the host's memory meanwhile."""
    dtype: DTypeName = "float32"
    """Dtype of the computation and of the memory; norms and softmax are computed in float32 at least."""
    param_dtype: DTypeName = "float32"
    """Dtype of the parameters."""

    def __post_init__(self) -> None:
        check_blocks(self, "dropout", "attention_dropout")
        at_least(self, 0, "memory_length")
        at_least(self, 1, "clamp_distance")
        if self.width % 2:
            raise UserError(f"model.width is {self.width}; sines and cosines take half of it each, so it must be even.")

    def build(self, vocab: Vocabulary, rngs: nnx.Rngs) -> XLNet:
        """A model with fresh parameters."""
        return XLNet(self, vocab, rngs)

    def forward_flops(self, vocab_size: int, use: RowUse) -> float:
        """Operations of a forward pass over one row (`CountsProducts`).

        Keys and values are made of the memory too, and a query has a third product in attention, with the keys of its
        distances. Left out, being small: the projection of the distances, which rows share, and the products with two
        segments. Of the distances those to visible keys count, though all are computed.
        """
        spec, remembered = self._block_spec(), self.memory_length if use.memory else 0
        queries = use.length + (use.predictions if use.query_stream else 0)
        met_by_queries = 2 * self.width**2 + 2 * self.width * spec.mlp_width
        weights = queries * met_by_queries + (use.length + remembered) * 2 * self.width**2
        attention = 6 * queries * self.width * (remembered + use.keys())
        return self.layers * (2 * weights + attention) + 2 * use.predictions * self.width * vocab_size

    def _block_spec(self) -> BlockSpec:
        return BlockSpec(
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            kv_heads=self.heads,
            mlp_width=self.mlp_width or default_mlp_width(self.width, self.activation),
            post_norm=True,
            norm="layernorm",
            norm_eps=self.norm_eps,
            activation=self.activation,
            bias=True,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            attention_soft_cap=None,
            attention_backend="xla",
            remat=self.remat,
            dtype=resolve_dtype(self.dtype, "dtype"),
            param_dtype=resolve_dtype(self.param_dtype, "param_dtype"),
        )


class Memory(NamedTuple):
    """What each layer read at the last M positions before a row: the layers' inputs, without gradient. Rows first."""

    states: Float[Array, "B n M D"]
    valid: Bool[Array, "B M"]
    """False where nothing was read yet, or padding."""


class XLNet(nnx.Module):
    """XLNet. The objective's mask decides who sees whom; memory is visible to every query."""

    def __init__(self, config: XLNetConfig, vocab: Vocabulary, rngs: nnx.Rngs) -> None:
        spec, init = config._block_spec(), normal(config.init_std)
        rows = pad_vocabulary(vocab.size, config.vocab_multiple)
        self.config = config
        self.spec = spec
        self.vocab_size = vocab.size

        def block(key: Array) -> RelativeBlock:
            kind = {"segments": config.segments, "own_biases": config.untie_biases}
            return RelativeBlock(spec, **kind, init=init, rngs=nnx.Rngs(params=key))

        self.tokens = Embedding(
            rows, spec.width, axes=("vocab", "embed"), init=init, param_dtype=spec.param_dtype, rngs=rngs
        )
        start = init(rngs.params(), (spec.width,), spec.param_dtype) if config.query_stream else None
        self.query_start = None if start is None else nnx.Param(start, axes=(None,))
        own = config.untie_biases
        self.biases = None if own else Biases(spec, segments=config.segments, init=init, rngs=rngs)
        self.stack = nnx.vmap(block)(jax.random.split(rngs.params(), spec.layers))
        self.head_bias = nnx.Param(jnp.zeros((rows,), spec.param_dtype), axes=("vocab",))

    def hidden(
        self,
        tokens: Int[Array, "B L"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "B L"] | None = None,
        token_types: Int[Array, "B L"] | None = None,
        dropout: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Final states of the content stream, without memory.

        `positions` are not read: distances are those in the row, which within a packed document are the same.

        Raises:
          ValueError: the model cannot honour the mask, or has no segments and gets `token_types`.
        """
        return self.recurrent(tokens, mask=mask, memory=None, token_types=token_types, dropout=dropout)[0]

    def recurrent(
        self,
        tokens: Int[Array, "B L"],
        *,
        mask: AttentionMask,
        memory: Memory | None,
        token_types: Int[Array, "B L"] | None = None,
        backward: Bool[Array, " B"] | None = None,
        reuse: int | None = None,
        dropout: UInt32[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B L D"], Memory | None]:
        """Final states of the content stream, and the memory for the next row.

        Args:
          tokens: the rows.
          mask: who sees whom in the row; every query sees all of the memory that is valid. Tokens whose segment in it
            is 0 are padding and not remembered.
          memory: what was read before, or None: nothing, and nothing is kept.
          token_types: segments; None: all one. Memory has segment 0.
          backward: rows that read their text from its end: their distances are negated.
          reuse: how many of the row's tokens, from its start, go into the memory; None: all.
          dropout: one seed per row, None = no dropout.

        Raises:
          ValueError: as `hidden`.
        """
        h, _, memory = self._run(tokens, None, (mask, None), memory, token_types, backward, reuse, dropout)
        return h, memory

    def two_streams(
        self,
        tokens: Int[Array, "B L"],
        predict: Int[Array, "B K"],
        *,
        content_mask: AttentionMask,
        query_mask: AttentionMask,
        memory: Memory | None,
        token_types: Int[Array, "B L"] | None = None,
        backward: Bool[Array, " B"] | None = None,
        reuse: int | None = None,
        dropout: UInt32[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B K D"], Memory | None]:
        """Final states of the content stream, those of the query stream at the places `predict`, and the new memory.

        `query_mask` is that of the K queries; the rest is as in `recurrent`.

        Raises:
          ValueError: as `hidden`, or the model has no query stream.
        """
        if self.query_start is None:
            raise UserError("model.query_stream is false and the objective needs a query stream; set it to true.")
        h, g, memory = self._run(
            tokens, predict, (content_mask, query_mask), memory, token_types, backward, reuse, dropout
        )
        assert g is not None
        return h, g, memory

    def init_memory(self, batch_size: int) -> Memory | None:
        """The memory of `batch_size` rows before anything was read; None if `memory_length` is 0."""
        length = self.config.memory_length
        if length == 0:
            return None
        states = jnp.zeros((batch_size, self.spec.layers, length, self.spec.width), self.spec.dtype)
        return Memory(states, jnp.zeros((batch_size, length), bool))

    def head_hidden(self, hidden: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """The identity: nothing stands between the trunk and the table."""
        return hidden

    def head_table(self) -> OutputHead:
        """The token embedding, with a bias of its own."""
        return output_head(self.tokens, self.vocab_size, bias=self.head_bias[...])

    @property
    def head_style(self) -> HeadStyle:
        """What heads on the hidden states take over."""
        init = normal(self.config.init_std)
        return HeadStyle(self.spec.width, self.spec.activation, self.spec.norm_eps, init, self.spec.param_dtype)

    def _run(
        self,
        tokens: Int[Array, "B L"],
        predict: Int[Array, "B K"] | None,
        masks: tuple[AttentionMask, AttentionMask | None],
        memory: Memory | None,
        token_types: Int[Array, "B L"] | None,
        backward: Bool[Array, " B"] | None,
        reuse: int | None,
        dropout: UInt32[Array, " B"] | None,
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B K D"] | None, Memory | None]:
        """Both streams through the stack, and the memory after it."""
        self._check(masks[0], token_types)
        spec, rate = self.spec, self.spec.dropout
        past = None if memory is None else jnp.moveaxis(memory.states, 1, 0)
        call = self._call(tokens.shape[1], 0 if memory is None else memory.valid.shape[1], backward, dropout)
        streams = _streams(masks, predict, memory, token_types)
        h = drop(constrain(self.tokens(tokens, spec.dtype), HIDDEN_AXES), rate, dropout, 0, EMBEDDING)
        g = None
        if predict is not None and self.query_start is not None:
            start = jnp.broadcast_to(self.query_start[...].astype(spec.dtype), (*predict.shape, spec.width))
            g = drop(constrain(start, HIDDEN_AXES), rate, dropout, 0, QUERY_STREAM + EMBEDDING)
        graphdef, states = nnx.split(self.stack)

        def body(carry: tuple[Array, Array | None], layer: Any) -> tuple[tuple[Array, Array | None], Array | None]:
            (h, g), (state, index, past) = carry, layer
            kept = None if past is None else _remember(past, h[:, :reuse])
            h, g = nnx.merge(graphdef, state)(h, g, past, streams, index, call)
            return (constrain(h, HIDDEN_AXES), None if g is None else constrain(g, HIDDEN_AXES)), kept

        layers = (states, jnp.arange(spec.layers), past)
        (h, g), kept = jax.lax.scan(rematerialised(body, spec.remat), (h, g), layers)
        if memory is not None:
            segments = masks[0].segment_ids
            real = jnp.ones(tokens.shape, bool) if segments is None else segments > 0
            memory = Memory(jnp.moveaxis(kept, 0, 1), _remember(memory.valid, real[:, :reuse]))
        h = drop(h, rate, dropout, 0, FINAL)
        return h, None if g is None else drop(g, rate, dropout, 0, QUERY_STREAM + FINAL), memory

    def _call(
        self, length: int, memory: int, backward: Bool[Array, " B"] | None, dropout: UInt32[Array, " B"] | None
    ) -> RelativeCall:
        config = self.config
        away = distances(length, memory, causal=config.direction == "backward", clamp=config.clamp_distance)
        if backward is not None:
            away = jnp.stack([away, -away])
        return RelativeCall(sinusoids(away, self.spec.width, self.spec.dtype), backward, length, self.biases, dropout)

    def _check(self, mask: AttentionMask, token_types: Int[Array, "B L"] | None) -> None:
        if token_types is not None and not self.config.segments:
            raise UserError("model.segments is false and rows have token types; set it to true, or pass none.")
        if self.config.direction == "backward" and (not mask.causal or mask.is_prefix is not None):
            raise UserError(
                "model.direction is backward and the mask lets tokens look ahead; set it to both, or use an objective "
                "with causal masks."
            )


def _streams(
    masks: tuple[AttentionMask, AttentionMask | None],
    predict: Int[Array, "B K"] | None,
    memory: Memory | None,
    token_types: Int[Array, "B L"] | None,
) -> tuple[Queries, Queries | None]:
    """How the content stream looks, and the query stream at its places."""
    content, query = (m if m is None or memory is None else m.with_memory(memory.valid) for m in masks)
    assert content is not None
    other = at_places = None
    if token_types is not None:
        key_types = token_types
        if memory is not None:
            key_types = jnp.pad(token_types, ((0, 0), (memory.valid.shape[1], 0)))  # memory has segment 0
        other = token_types[:, :, None] != key_types[:, None, :]
    if predict is None or query is None:
        return Queries(content, other), None
    if other is not None:
        at_places = jnp.take_along_axis(other, predict[..., None], axis=1)
    return Queries(content, other), Queries(query, at_places, predict, QUERY_STREAM)


def _remember(past: Array, new: Array) -> Array:
    """The last positions, as many as the past has, of past and new together, without gradient; rows first."""
    return jax.lax.stop_gradient(jnp.concatenate([past, new], axis=1)[:, -past.shape[1] :])
