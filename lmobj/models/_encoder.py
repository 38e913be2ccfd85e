"""The encoder: BERT with its defaults, ALBERT's kind with narrow embeddings and one block for all layers, and the kind
with norms first and rotary positions, which learns faster.

Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding"; Lan et al. 2020,
"ALBERT: A Lite BERT for Self-supervised Learning of Language Representations"; Warner et al. 2024, "Smarter, Better,
Faster, Longer" (ModernBERT).

Its parts, the embeddings, the trunk that follows them and the masked-LM head, stand alone too: ELECTRA puts two trunks
on one embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from lmobj.attention import AttentionBackend
from lmobj.batch import Vocabulary
from lmobj.masks import AttentionMask
from lmobj.models._block import EMBEDDING, HIDDEN_AXES, BlockSpec, Call, Remat, Stack, drop, make_norm
from lmobj.models._heads import HeadStyle
from lmobj.models._layers import (
    ACTIVATIONS,
    DTypeName,
    Embedding,
    Init,
    LayerNorm,
    output_head,
    pad_vocabulary,
    rotary_angles,
    truncated_normal,
)
from lmobj.models._protocol import OutputHead, RowUse
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

__all__ = ["Embeddings", "Encoder", "EncoderConfig", "MaskedLMHead", "Trunk"]


@dataclass(frozen=True)
class EncoderConfig:
    """A transformer encoder with token types. The defaults are BERT base."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["encoder"] = "encoder"
    """Transformer encoder (BERT, RoBERTa, ALBERT)."""
    layers: int = 12
    """Number of blocks, at least 1."""
    width: int = 768
    """Width of the hidden states, a multiple of `heads`."""
    heads: int = 12
    """Attention heads per layer."""
    mlp_width: int | None = None
    """Inner width of the feed-forward part; null: 4 * width."""
    embedding_width: int | None = None
    """Width of the embeddings, projected to `width` where it differs (ALBERT: 128); null: `width`. The masked-LM head
    ends in this width, because its table is the embedding."""
    share_layers: bool = False
    """Whether all layers are one block, applied `layers` times (ALBERT)."""
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
    vocab_multiple: int = 128
    """The embedding's rows are padded up to a multiple of this, so that they divide over devices."""
    init_std: float = 0.02
    """Standard deviation of initial weights, which are redrawn beyond two of them."""
    attention_backend: AttentionBackend = "xla"
    """`xla` anywhere; without attention dropout also `cudnn`: flash attention on NVIDIA GPUs, with dtype bfloat16;
    and `splash`: flash attention on TPUs, with rows of a multiple of 128 tokens."""
    remat: Remat = "dots"
    """What is recomputed in the backward pass: `none`; `dots`: all but products with weights; `block`: each block;
    `offload`: as `dots`, with those products kept in the host's memory meanwhile."""
    dtype: DTypeName = "float32"
    """Dtype of the computation; norms and softmax are computed in float32 at least."""
    param_dtype: DTypeName = "float32"
    """Dtype of the parameters."""

    def __post_init__(self) -> None:
        check_transformer(self)
        check_rotary(self)
        at_least(self, 1, "token_types", "embedding_width")

    def build(self, vocab: Vocabulary, rngs: nnx.Rngs) -> Encoder:
        """An encoder with fresh parameters."""
        return Encoder(self, vocab, rngs)

    @property
    def head_style(self) -> HeadStyle:
        """What heads on the hidden states take over."""
        param_dtype = resolve_dtype(self.param_dtype, "param_dtype")
        return HeadStyle(self.width, self.activation, self.norm_eps, truncated_normal(self.init_std), param_dtype)

    def forward_flops(self, vocab_size: int, use: RowUse) -> float:
        """Operations of a forward pass over one row (`CountsProducts`)."""
        out = self.embedding_width or self.width
        return self.trunk_flops(use) + 2 * use.predictions * (self.width * out + out * vocab_size)

    def trunk_flops(self, use: RowUse) -> float:
        """Those of the blocks, and of the projection before them where the embeddings are narrower."""
        narrow = self.embedding_width or self.width
        projection = 0 if narrow == self.width else narrow * self.width
        return 2 * use.length * projection + self._block_spec().stack_flops(use)

    def _block_spec(self) -> BlockSpec:
        return BlockSpec(
            layers=self.layers,
            share_layers=self.share_layers,
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


class Embeddings(nnx.Module):
    """Token + position + token type, LayerNorm, dropout."""

    def __init__(self, config: EncoderConfig, vocab: Vocabulary, rngs: nnx.Rngs, *, init: Init | None = None) -> None:
        style = config.head_style
        width = config.embedding_width or config.width

        def table(size: int, axes: tuple[str | None, str]) -> Embedding:
            return Embedding(size, width, axes=axes, init=init or style.init, param_dtype=style.param_dtype, rngs=rngs)

        self.tokens = table(pad_vocabulary(vocab.size, config.vocab_multiple), ("vocab", "embed"))
        self.positions = table(config.max_length, ("positions", "embed")) if config.positions == "learned" else None
        self.token_types = table(config.token_types, (None, "embed"))
        self.norm = LayerNorm(width, eps=config.norm_eps, bias=True, param_dtype=style.param_dtype)
        self.config = config
        self.dtype = resolve_dtype(config.dtype, "dtype")

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        positions: Int[Array, "B L"] | None = None,
        token_types: Int[Array, "B L"] | None = None,
        dropout: UInt32[Array, " B"] | None = None,
        *,
        plus: Float[Array, "B L E"] | None = None,
    ) -> Float[Array, "B L E"]:
        """The first input of a trunk. `plus` is added to the sum of the tables' vectors."""
        x = self.look_up(tokens, positions, token_types)
        x = constrain(x if plus is None else x + plus, HIDDEN_AXES)
        return drop(self.norm(x), self.config.embedding_dropout, dropout, 0, EMBEDDING)

    def look_up(
        self,
        tokens: Int[Array, "B L"],
        positions: Int[Array, "B L"] | None = None,
        token_types: Int[Array, "B L"] | None = None,
    ) -> Float[Array, "B L E"]:
        """The sum of the tables' vectors alone. Positions default to 0, 1, ..., token types to 0."""
        check_length(tokens.shape[1], self.config.max_length)
        token_types = jnp.zeros_like(tokens) if token_types is None else token_types
        x = self.tokens(tokens, self.dtype) + self.token_types(token_types, self.dtype)
        return x if self.positions is None else x + self.positions(default_positions(tokens, positions), self.dtype)


class Trunk(nnx.Module):
    """What follows the embeddings: a projection where they are narrower, the blocks, and with pre-norm a last norm."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs, projection_init: Init | None = None) -> None:
        style, spec = config.head_style, config._block_spec()
        projecting = style._replace(init=projection_init or style.init)
        narrow = config.embedding_width or config.width
        self.config = config
        self.spec = spec
        self.projection = None if narrow == config.width else projecting.dense(narrow, config.width, rngs)
        self.stack = Stack(spec, init=style.init, out_init=style.init, rngs=rngs)
        self.final_norm = make_norm(spec) if config.pre_norm else None

    def run(
        self,
        embedded: Float[Array, "B L E"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "B L"] | None = None,
        dropout: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Final hidden states of embedded rows."""
        return self.finish(self.stack(*self._enter(embedded, mask, positions, dropout)))

    def _enter(
        self,
        embedded: Float[Array, "B L E"],
        mask: AttentionMask,
        positions: Int[Array, "B L"] | None,
        dropout: UInt32[Array, " B"] | None,
    ) -> tuple[Float[Array, "B L D"], Call]:
        """The first block's input, and what all blocks share."""
        positions = default_positions(embedded[:, :, 0], positions)
        rotary = None
        if self.config.positions == "rotary":
            rotary = rotary_angles(positions, self.spec.head_dim, self.config.rope_base, self.spec.dtype)
        x = embedded if self.projection is None else constrain(self.projection(embedded), HIDDEN_AXES)
        return x, Call(mask, positions, rotary, dropout)

    def finish(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """The norm after the last block, where there is one."""
        return x if self.final_norm is None else self.final_norm(x)


class MaskedLMHead(nnx.Module):
    """From hidden states to the width of the embedding, which is the output table: dense, activation, LayerNorm."""

    def __init__(self, config: EncoderConfig, vocab: Vocabulary, rngs: nnx.Rngs) -> None:
        style = config.head_style
        out = config.embedding_width or config.width
        rows = pad_vocabulary(vocab.size, config.vocab_multiple)
        self.activation = config.activation
        self.vocab_size = vocab.size
        self.dense = style.dense(config.width, out, rngs)
        self.norm = LayerNorm(out, eps=style.norm_eps, bias=True, param_dtype=style.param_dtype)
        self.bias = nnx.Param(jnp.zeros((rows,), style.param_dtype), axes=("vocab",))

    def __call__(self, hidden: Float[Array, "... D"]) -> Float[Array, "... E"]:
        """What the table is multiplied with."""
        return self.norm(ACTIVATIONS[self.activation](self.dense(hidden)))

    def table(self, tokens: Embedding) -> OutputHead:
        """The token embedding, with a bias of its own."""
        return output_head(tokens, self.vocab_size, bias=self.bias[...])


class Encoder(Trunk, Transformer):
    """A transformer encoder. The objective's mask decides who sees whom."""

    def __init__(self, config: EncoderConfig, vocab: Vocabulary, rngs: nnx.Rngs) -> None:
        self.embeddings = Embeddings(config, vocab, rngs)
        super().__init__(config, rngs)
        self.head = MaskedLMHead(config, vocab, rngs)

    @property
    def head_style(self) -> HeadStyle:
        """What heads on the hidden states take over."""
        return self.config.head_style

    def head_hidden(self, hidden: Float[Array, "... D"]) -> Float[Array, "... E"]:
        """The masked-LM transform: dense, activation, LayerNorm."""
        return self.head(hidden)

    def head_table(self) -> OutputHead:
        """The token embedding, with a bias of its own."""
        return self.head.table(self.embeddings.tokens)

    def _embed(
        self,
        tokens: Int[Array, "B L"],
        mask: AttentionMask,
        positions: Int[Array, "B L"] | None,
        token_types: Int[Array, "B L"] | None,
        dropout: UInt32[Array, " B"] | None,
    ) -> tuple[Float[Array, "B L D"], Call]:
        return self._enter(self.embeddings(tokens, positions, token_types, dropout), mask, positions, dropout)
