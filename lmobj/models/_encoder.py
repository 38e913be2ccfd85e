"""The encoder: BERT with its defaults, and the kind with norms first and rotary positions, which learns faster.

Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding"; Warner et al.
2024, "Smarter, Better, Faster, Longer" (ModernBERT).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from lmobj.attention import AttentionBackend
from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.masks import AttentionMask
from lmobj.models._block import EMBEDDING, HIDDEN_AXES, BlockSpec, Call, Remat, Stack, drop, make_norm
from lmobj.models._layers import (
    ACTIVATIONS,
    DTypeName,
    Embedding,
    Linear,
    output_head,
    pad_vocabulary,
    rotary_angles,
    truncated_normal,
)
from lmobj.models._protocol import OutputHead
from lmobj.models._settings import (
    at_least,
    check_length,
    check_rotary,
    check_transformer,
    default_mlp_width,
    resolve_dtype,
)
from lmobj.models._transformer import Transformer, default_positions
from lmobj.partition import constrain

__all__ = ["Encoder", "EncoderConfig"]


@dataclass(frozen=True)
class EncoderConfig:
    """A transformer encoder with token types. The defaults are BERT base."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["encoder"] = "encoder"
    """Transformer encoder (BERT)."""
    layers: int = 12
    """Number of blocks, at least 1."""
    width: int = 768
    """Width of the hidden states, a multiple of `heads`."""
    heads: int = 12
    """Attention heads per layer."""
    mlp_width: int | None = None
    """Inner width of the feed-forward part; null: 4 * width."""
    max_length: int = 512
    """Most tokens in a row."""
    positions: Literal["learned", "rotary"] = "learned"
    """`learned`: a vector per position added to the embedding; `rotary`: queries and keys rotated by position."""
    rope_base: float = 10000.0
    """Base of the rotary wavelengths, above 1."""
    pre_norm: bool = False
    """Norms before the parts of each block and after the last one (ModernBERT); false: after their sums (BERT)."""
    token_types: int = 2
    """Number of token types (segment A, segment B), at least 1."""
    norm_eps: float = 1e-12
    """Added to the variance in LayerNorm, above 0."""
    activation: Literal["gelu", "gelu_exact"] = "gelu_exact"
    """`gelu` (tanh approximation) or `gelu_exact`."""
    dropout: float = 0.1
    """Dropout rate of what attention and feed-forward part add to the residual, in [0, 1)."""
    attention_dropout: float = 0.1
    """Dropout rate of attention probabilities, in [0, 1)."""
    embedding_dropout: float = 0.1
    """Dropout rate of the normalised embeddings, in [0, 1)."""
    pooler: bool = False
    """Whether there is a dense layer with tanh over the first token (`pooled`), which sentence tasks read."""
    vocab_multiple: int = 128
    """The embedding's rows are padded up to a multiple of this, so that they divide over devices."""
    init_std: float = 0.02
    """Standard deviation of initial weights, which are redrawn beyond two of them."""
    attention_backend: AttentionBackend = "xla"
    """`xla` anywhere; `cudnn`: flash attention on NVIDIA GPUs, with dtype bfloat16 and no attention dropout."""
    remat: Remat = "dots"
    """What is recomputed in the backward pass: `none`; `dots`: all but products with weights; `full`: each block."""
    dtype: DTypeName = "float32"
    """Dtype of the computation; norms and softmax are computed in float32 at least."""
    param_dtype: DTypeName = "float32"
    """Dtype of the parameters."""

    def __post_init__(self) -> None:
        check_transformer(self)
        check_rotary(self)
        at_least(self, 1, "token_types")

    def build(self, vocab: Vocabulary, rngs: nnx.Rngs) -> Encoder:
        """An encoder with fresh parameters."""
        return Encoder(self, vocab, rngs)

    def _block_spec(self) -> BlockSpec:
        return BlockSpec(
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            kv_heads=self.heads,
            mlp_width=self.mlp_width or default_mlp_width(self.width, self.activation),
            post_norm=not self.pre_norm,
            norm="layernorm",
            norm_eps=self.norm_eps,
            activation=self.activation,
            bias=True,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            attention_soft_cap=None,
            attention_backend=self.attention_backend,
            remat=self.remat,
            dtype=resolve_dtype(self.dtype, "dtype"),
            param_dtype=resolve_dtype(self.param_dtype, "param_dtype"),
        )


class Encoder(Transformer):
    """A transformer encoder. The objective's mask decides who sees whom."""

    def __init__(self, config: EncoderConfig, vocab: Vocabulary, rngs: nnx.Rngs) -> None:
        spec = config._block_spec()
        init = truncated_normal(config.init_std)
        rows = pad_vocabulary(vocab.size, config.vocab_multiple)
        self.config = config
        self.spec = spec
        self.vocab_size = vocab.size

        def table(size: int, axes: tuple[str | None, str]) -> Embedding:
            return Embedding(size, spec.width, axes=axes, init=init, param_dtype=spec.param_dtype, rngs=rngs)

        def dense() -> Linear:
            return Linear(
                spec.width,
                spec.width,
                axes=("embed", "embed"),
                init=init,
                bias=True,
                param_dtype=spec.param_dtype,
                rngs=rngs,
            )

        self.tokens = table(rows, ("vocab", "embed"))
        self.positions = table(config.max_length, ("positions", "embed")) if config.positions == "learned" else None
        self.token_types = table(config.token_types, (None, "embed"))
        self.norm = make_norm(spec)
        self.stack = Stack(spec, init=init, out_init=init, rngs=rngs)
        self.final_norm = make_norm(spec) if config.pre_norm else None
        self.head_dense = dense()
        self.head_norm = make_norm(spec)
        self.head_bias = nnx.Param(jnp.zeros((rows,), spec.param_dtype), axes=("vocab",))
        self.pooler = dense() if config.pooler else None

    def head_hidden(self, hidden: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """The masked-LM transform: dense, activation, LayerNorm."""
        return self.head_norm(ACTIVATIONS[self.config.activation](self.head_dense(hidden)))

    def head_table(self) -> OutputHead:
        """The token embedding, with a bias of its own."""
        return output_head(self.tokens, self.vocab_size, bias=self.head_bias[...])

    def pooled(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        """tanh(dense(hidden state of the first token)).

        Raises:
          ValueError: the model has no pooler.
        """
        if self.pooler is None:
            raise UserError("model.pooler is false, so the encoder has no pooled output; set it to true.")
        return jnp.tanh(self.pooler(hidden[:, 0]))

    def _embed(
        self,
        tokens: Int[Array, "B L"],
        mask: AttentionMask,
        positions: Int[Array, "B L"] | None,
        token_types: Int[Array, "B L"] | None,
        dropout: UInt32[Array, " B"] | None,
    ) -> tuple[Float[Array, "B L D"], Call]:
        dtype = self.spec.dtype
        check_length(tokens.shape[1], self.config.max_length)
        positions = default_positions(tokens, positions)
        token_types = jnp.zeros_like(tokens) if token_types is None else token_types
        x = self.tokens(tokens, dtype) + self.token_types(token_types, dtype)
        rotary = None
        if self.positions is not None:
            x = x + self.positions(positions, dtype)
        else:
            rotary = rotary_angles(positions, self.spec.head_dim, self.config.rope_base, dtype)
        x = drop(self.norm(constrain(x, HIDDEN_AXES)), self.config.embedding_dropout, dropout, 0, EMBEDDING)
        return x, Call(mask, positions, rotary, dropout)

    def _finish(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return x if self.final_norm is None else self.final_norm(x)
