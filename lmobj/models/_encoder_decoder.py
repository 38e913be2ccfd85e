"""The encoder-decoder: T5 1.1 with its defaults; T5, BART and the Transformer of the paper by other settings.

Vaswani et al. 2017, "Attention Is All You Need"; Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a
Unified Text-to-Text Transformer"; Lewis et al. 2020, "BART: Denoising Sequence-to-Sequence Pre-training". T5 1.1 is of
Shazeer 2020, "GLU Variants Improve Transformer", and the released checkpoints' notes.

    Transformer  positions: sinusoidal, norm: layernorm, pre_norm: false, activation: relu, bias: true, tie_embeddings:
                 true, scale_attention: true, scale_embeddings: true
    T5           activation: relu, tie_embeddings: true, scale_output: true
    BART         positions: learned, norm: layernorm, pre_norm: false, embedding_norm: true, activation: gelu_exact,
                 bias: true, tie_embeddings: true, output_bias: true, scale_attention: true, init_std: 0.02

Deviations: T5 also drops out inside the feed-forward part and after the last norm, and BART by a rate of its own inside
the feed-forward part; here neither does. Sinusoids are sines and cosines side by side, those of section 3.5 of the
paper in another order of the width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from lmobj import masks
from lmobj.attention import AttentionBackend
from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.masks import AttentionMask
from lmobj.models._attention import BlockSpec, Call, Cross, KVCache, NormName, Remat
from lmobj.models._block import EMBEDDING, HIDDEN_AXES, Stack, drop, make_norm
from lmobj.models._heads import HeadStyle
from lmobj.models._layers import (
    GATED,
    Activation,
    DTypeName,
    Embedding,
    Init,
    fan_in,
    normal,
    output_head,
    pad_vocabulary,
)
from lmobj.models._protocol import OutputHead, RowUse
from lmobj.models._relative_attention import sinusoids
from lmobj.models._relative_bias import RelativeBias
from lmobj.models._settings import at_least, check_length, check_transformer, default_mlp_width, resolve_dtype
from lmobj.models._transformer import default_positions
from lmobj.partition import constrain

__all__ = ["EncoderDecoder", "EncoderDecoderCache", "EncoderDecoderConfig"]

DECODER = 0x2C1B3C6D
"""Turns a row's dropout seed into that of the decoder, so that the two stacks draw apart."""


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """An encoder and a decoder that attends to its output. The defaults are T5 1.1 small."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["encoder_decoder"] = "encoder_decoder"
    """Transformer encoder and decoder (T5, BART, the Transformer)."""
    layers: int = 8
    """Blocks of the encoder, at least 1."""
    decoder_layers: int | None = None
    """Blocks of the decoder, at least 1; null: `layers`."""
    width: int = 512
    """Width of the hidden states."""
    heads: int = 6
    """Attention heads per layer."""
    head_width: int | None = 64
    """Width of one head; null: width / heads, which must be whole."""
    mlp_width: int | None = 1024
    """Inner width of the feed-forward part; null: 4 * width, or with a gate 8/3 * width rounded up to 64s."""
    max_length: int = 512
    """Most tokens in a row of the encoder, and in one of the decoder."""
    positions: Literal["relative", "learned", "sinusoidal"] = "relative"
    """`relative`: a bias of attention by distance (T5); `learned`: vectors added to the embedding, others in the
    decoder (BART); `sinusoidal`: sines and cosines added to it."""
    relative_buckets: int = 32
    """Buckets of distances with relative positions, a multiple of 4."""
    relative_distance: int = 128
    """Distance from which on all share a bucket, above half of the buckets."""
    norm: NormName = "rmsnorm"
    """`layernorm` or `rmsnorm`."""
    norm_eps: float = 1e-6
    """Added to the variance in norms, above 0."""
    pre_norm: bool = True
    """Norms before the parts of each block and after each stack (T5); false: after their sums (BART)."""
    embedding_norm: bool = False
    """Whether the embeddings are normalised (BART)."""
    activation: Activation = "geglu"
    """`gelu` (tanh approximation), `gelu_exact`, `relu`, or with a gate `swiglu` or `geglu` (tanh approximation)."""
    bias: bool = False
    """Whether linear layers and LayerNorm have biases."""
    tie_embeddings: bool = False
    """Whether the output table is the token embedding, which encoder and decoder share in any case."""
    output_bias: bool = False
    """Whether the output has a bias for each word (BART)."""
    scale_attention: bool = False
    """Whether attention logits are divided by the root of the heads' width (all but T5)."""
    scale_embeddings: bool = False
    """Whether embeddings are multiplied by the root of the width (the Transformer)."""
    scale_output: bool = False
    """Whether hidden states are divided by the root of the width before the output table (T5)."""
    dropout: float = 0.0
    """Dropout rate of what attention and feed-forward part add to the residual, in [0, 1)."""
    attention_dropout: float = 0.0
    """Dropout rate of attention probabilities, in [0, 1)."""
    embedding_dropout: float = 0.0
    """Dropout rate of the embeddings, in [0, 1)."""
    vocab_multiple: int = 128
    """The embedding's rows are padded up to a multiple of this, so that they divide over devices."""
    init_std: float | None = None
    """Standard deviation of initial weights, above 0 (BART: 0.02). Null, as T5: 1 / sqrt(inputs) for linear maps, for
    queries 1 / sqrt(inputs * head width) where attention is not scaled; 1 for embeddings that are not scaled;
    1 / sqrt(width) for all other tables."""
    attention_backend: AttentionBackend = "xla"
    """`xla` anywhere; without attention dropout also `cudnn`: flash attention on NVIDIA GPUs, with dtype bfloat16; and,
    but for relative positions, `splash`: flash attention on TPUs, with rows of a multiple of 128 tokens. Decoding with
    a cache is `xla`."""
    remat: Remat = "dots"
    """What is recomputed in the backward pass: `none`; `dots`: all but products with weights; `block`: each block;
    `offload`: as `dots`, with those products kept in the host's memory meanwhile."""
    dtype: DTypeName = "float32"
    """Dtype of the computation; norms and softmax are computed in float32 at least."""
    param_dtype: DTypeName = "float32"
    """Dtype of the parameters."""

    def __post_init__(self) -> None:
        check_transformer(self)
        at_least(self, 1, "decoder_layers", "head_width", "relative_buckets", "relative_distance")
        if self.positions == "sinusoidal" and self.width % 2:
            raise UserError(f"model.positions is sinusoidal and model.width is {self.width}; it must be even.")
        if self.positions != "relative":
            return
        if self.relative_buckets % 4:
            raise UserError(f"model.relative_buckets is {self.relative_buckets}; it must be a multiple of 4.")
        if 2 * self.relative_distance <= self.relative_buckets:
            raise UserError(
                f"model.relative_distance is {self.relative_distance} and model.relative_buckets is "
                f"{self.relative_buckets}; it must be above half of them."
            )
        if self.attention_backend == "splash":
            raise UserError(
                "model.positions is relative and model.attention_backend is splash, which takes no bias; set the "
                "backend to xla, or the positions to learned or sinusoidal."
            )

    def build(self, vocab: Vocabulary, rngs: nnx.Rngs) -> EncoderDecoder:
        """An encoder-decoder with fresh parameters."""
        return EncoderDecoder(self, vocab, rngs)

    @property
    def head_style(self) -> HeadStyle:
        """What heads on the decoder's hidden states take over."""
        activation: Activation = "gelu" if self.activation in GATED else self.activation
        param_dtype = resolve_dtype(self.param_dtype, "param_dtype")
        return HeadStyle(self.width, activation, self.norm_eps, self._init(fan_in()), param_dtype)

    def forward_flops(self, vocab_size: int, use: RowUse) -> float:
        """Operations of a forward pass over one row and its target of `use.decoder_length` (`CountsProducts`)."""
        decoder, target = self._block_spec(decoder=True), use.decoder_length
        own = decoder.stack_flops(RowUse(target, 0, causal=True))
        across = decoder.cross_flops(target, use.length)
        encoder = self._block_spec(decoder=False).stack_flops(RowUse(use.length, 0))
        return encoder + own + across + 2 * use.predictions * self.width * vocab_size

    def _init(self, otherwise: Init) -> Init:
        return otherwise if self.init_std is None else normal(self.init_std)

    def _block_spec(self, *, decoder: bool) -> BlockSpec:
        head_width = self.head_width or self.width // self.heads
        own_init = self.init_std is None and not self.scale_attention
        return BlockSpec(
            layers=(self.decoder_layers or self.layers) if decoder else self.layers,
            width=self.width,
            heads=self.heads,
            kv_heads=self.heads,
            head_width=head_width,
            mlp_width=self.mlp_width or default_mlp_width(self.width, self.activation),
            post_norm=not self.pre_norm,
            norm=self.norm,
            norm_eps=self.norm_eps,
            activation=self.activation,
            bias=self.bias,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            attention_soft_cap=None,
            attention_scale=None if self.scale_attention else 1.0,
            query_gain=1 / math.sqrt(head_width) if own_init else 1.0,
            cross_attention=decoder,
            attention_backend=self.attention_backend,
            remat=self.remat,
            dtype=resolve_dtype(self.dtype, "dtype"),
            param_dtype=resolve_dtype(self.param_dtype, "param_dtype"),
        )


class EncoderDecoderCache(NamedTuple):
    """Keys and values of the decoder's tokens and of the encoder's, and which of the latter are real; rows first."""

    own: KVCache
    encoded: KVCache
    valid: Bool[Array, "B S"]


class Side(nnx.Module):
    """Encoder or decoder: positions, blocks, and with pre-norm a last norm. The token embedding is not its own."""

    def __init__(self, config: EncoderDecoderConfig, rngs: nnx.Rngs, *, decoder: bool) -> None:
        spec = config._block_spec(decoder=decoder)
        init, by_width = config._init(fan_in()), config._init(normal(config.width**-0.5))
        shared: dict[str, Any] = {"param_dtype": spec.param_dtype, "rngs": rngs}
        self.config, self.spec = config, spec
        buckets, distance = config.relative_buckets, config.relative_distance
        self.positions = (
            Embedding(config.max_length, spec.width, axes=("positions", "embed"), init=by_width, **shared)
            if config.positions == "learned"
            else None
        )
        self.relative = (
            RelativeBias(
                spec.heads, buckets=buckets, distance=distance, bidirectional=not decoder, init=by_width, **shared
            )
            if config.positions == "relative"
            else None
        )
        self.embedding_norm = make_norm(spec) if config.embedding_norm else None
        self.stack = Stack(spec, init=init, out_init=init, rngs=rngs)
        self.norm = make_norm(spec) if config.pre_norm else None

    def enter(
        self, x: Float[Array, "B L D"], positions: Int[Array, "B L"], dropout: UInt32[Array, " B"] | None = None
    ) -> Float[Array, "B L D"]:
        """The first block's input, from vectors of tokens."""
        if self.positions is not None:
            x = x + self.positions(positions, x.dtype)
        if self.config.positions == "sinusoidal":
            x = x + sinusoids(positions, x.shape[-1], x.dtype)
        x = constrain(x, HIDDEN_AXES)
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        return drop(x, self.config.embedding_dropout, dropout, 0, EMBEDDING)

    def run(
        self,
        x: Float[Array, "B L D"],
        mask: AttentionMask,
        positions: Int[Array, "B L"] | None,
        dropout: UInt32[Array, " B"] | None,
        cross: Cross | None = None,
    ) -> Float[Array, "B L D"]:
        """Final hidden states of vectors of tokens."""
        positions = default_positions(x[:, :, 0], positions)
        bias = None if self.relative is None else self.relative.row(x.shape[1], x.dtype)
        call = Call(mask, positions, dropout=dropout, bias=bias, cross=cross)
        return self.finish(self.stack(self.enter(x, positions, dropout), call))

    def finish(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """What follows the last block."""
        return x if self.norm is None else self.norm(x)


class EncoderDecoder(nnx.Module):
    """An encoder-decoder (`EncoderDecoderModel`). The objective's masks decide who sees whom."""

    def __init__(self, config: EncoderDecoderConfig, vocab: Vocabulary, rngs: nnx.Rngs) -> None:
        rows = pad_vocabulary(vocab.size, config.vocab_multiple)
        dtype = resolve_dtype(config.param_dtype, "param_dtype")

        def table(std: float) -> Embedding:
            init, axes = config._init(normal(std)), ("vocab", "embed")
            return Embedding(rows, config.width, axes=axes, init=init, param_dtype=dtype, rngs=rngs)

        small = config.width**-0.5
        self.config = config
        self.dtype = resolve_dtype(config.dtype, "dtype")
        self.vocab_size = vocab.size
        self.tokens = table(small if config.scale_embeddings else 1.0)
        self.encoder = Side(config, rngs, decoder=False)
        self.decoder = Side(config, rngs, decoder=True)
        self.head = None if config.tie_embeddings else table(small)
        self.output_bias = nnx.Param(jnp.zeros((rows,), dtype), axes=("vocab",)) if config.output_bias else None

    def encode(
        self,
        tokens: Int[Array, "B S"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "B S"] | None = None,
        dropout: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B S D"]:
        """The encoder's final hidden states, as `EncoderDecoderModel.encode`."""
        return self.encoder.run(self._look_up(tokens), mask, positions, dropout)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        encoded: Float[Array, "B S D"],
        *,
        mask: AttentionMask,
        cross_mask: AttentionMask,
        positions: Int[Array, "B T"] | None = None,
        dropout: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The decoder's final hidden states, as `EncoderDecoderModel.decode`."""
        dropout = None if dropout is None else dropout ^ jnp.uint32(DECODER)
        return self.decoder.run(self._look_up(tokens), mask, positions, dropout, Cross(cross_mask, encoded))

    def head_hidden(self, hidden: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """The hidden states, with `scale_output` divided by the root of the width."""
        return hidden * self.config.width**-0.5 if self.config.scale_output else hidden

    def head_table(self) -> OutputHead:
        """The token embedding where it is tied, else a table of its own."""
        bias = None if self.output_bias is None else self.output_bias[...]
        return output_head(self.tokens if self.head is None else self.head, self.vocab_size, bias=bias)

    @property
    def head_style(self) -> HeadStyle:
        """What heads on the decoder's hidden states take over."""
        return self.config.head_style

    def init_cache(self, encoded: Float[Array, "B S D"], valid: Bool[Array, "B S"], length: int) -> EncoderDecoderCache:
        """A cache for positions 0 .. length - 1 of the decoder, with the encoder's keys and values.

        Raises:
          ValueError: `length` is above `max_length`.
        """
        check_length(length, self.config.max_length)
        spec = self.decoder.spec
        shape = (encoded.shape[0], spec.layers, length, spec.kv_heads, spec.head_dim)
        own = KVCache(jnp.zeros(shape, spec.dtype), jnp.zeros(shape, spec.dtype))
        return EncoderDecoderCache(own, self.decoder.stack.cross_cache(encoded), valid)

    def step(
        self, tokens: Int[Array, "B T"], cache: EncoderDecoderCache, positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], EncoderDecoderCache]:
        """The decoder's hidden states of new tokens, and the cache with them added; as `CachedModel.step`."""
        decoder = self.decoder
        x = decoder.enter(self._look_up(tokens), positions)
        bias = None
        if decoder.relative is not None:
            bias = decoder.relative.cached(positions, cache.own.keys.shape[2], x.dtype)
        across = masks.bidirectional().packed(jnp.ones_like(tokens), cache.valid.astype(tokens.dtype))
        call = Call(masks.causal().at(positions[:, 0]), positions, bias=bias, cross=Cross(across, cache=cache.encoded))
        x, own = decoder.stack.step(x, call, cache.own)
        return decoder.finish(x), cache._replace(own=own)

    def _look_up(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        check_length(tokens.shape[1], self.config.max_length)
        x = self.tokens(tokens, self.dtype)
        return x * math.sqrt(self.config.width) if self.config.scale_embeddings else x
