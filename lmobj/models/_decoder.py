"""The decoder: GPT-2 with its defaults, LLaMA's kind with rotary positions, RMSNorm, SwiGLU and grouped queries; GPT
with `pre_norm: false` and `residual_init: plain`; Mixtral with `moe`.

Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training"; Radford et al. 2019, "Language
Models are Unsupervised Multitask Learners"; Touvron et al. 2023, "LLaMA".
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from lmobj import masks
from lmobj.attention import AttentionBackend
from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.masks import AttentionMask
from lmobj.models._block import (
    EMBEDDING,
    HIDDEN_AXES,
    BlockSpec,
    BlockStates,
    BlockStyle,
    Call,
    KVCache,
    NormName,
    Remat,
    drop,
    make_norm,
)
from lmobj.models._heads import HeadStyle
from lmobj.models._layers import (
    Activation,
    DTypeName,
    Embedding,
    Init,
    normal,
    output_head,
    pad_vocabulary,
    rotary_angles,
)
from lmobj.models._moe import MoEConfig
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

__all__ = ["Decoder", "DecoderConfig"]


@dataclass(frozen=True)
class DecoderConfig:
    """A transformer decoder. The defaults are GPT-2 small without dropout."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["decoder"] = "decoder"
    """Transformer decoder (GPT, GPT-2, LLaMA, Mixtral)."""
    layers: int = 12
    """Number of blocks, at least 1."""
    width: int = 768
    """Width of the hidden states, a multiple of `heads`."""
    heads: int = 12
    """Query heads per layer."""
    kv_heads: int | None = None
    """Key and value heads, a divisor of `heads` (grouped-query attention); null: as many as query heads."""
    mlp_width: int | None = None
    """Inner width of the feed-forward part; null: 4 * width, or with a gate 8/3 * width rounded up to 64s."""
    moe: MoEConfig | None = None
    """A mixture of experts in place of the feed-forward part, each expert `mlp_width` wide inside; null: none."""
    max_length: int = 1024
    """Most tokens in a row."""
    positions: Literal["learned", "rotary"] = "learned"
    """`learned`: a vector per position added to the embedding; `rotary`: queries and keys rotated by position."""
    rope_base: float = 10000.0
    """Base of the rotary wavelengths, above 1."""
    norm: NormName = "layernorm"
    """`layernorm` or `rmsnorm`."""
    norm_eps: float = 1e-5
    """Added to the variance in norms, above 0."""
    pre_norm: bool = True
    """Norms before attention and feed-forward part and after the last block (GPT-2); false: after each sum (GPT)."""
    activation: Activation = "gelu"
    """`gelu` (tanh approximation), `gelu_exact`, `relu`, or with a gate `swiglu` or `geglu` (tanh approximation)."""
    bias: bool = True
    """Whether linear layers and LayerNorm have biases."""
    tie_embeddings: bool = True
    """Whether the output table is the token embedding."""
    dropout: float = 0.0
    """Dropout rate of what attention and feed-forward part add to the residual, in [0, 1)."""
    attention_dropout: float = 0.0
    """Dropout rate of attention probabilities, in [0, 1)."""
    embedding_dropout: float = 0.0
    """Dropout rate of the embeddings, in [0, 1)."""
    window: int | None = None
    """Attention over the last `window` tokens only, the token itself included; null: over all."""
    soft_cap: float | None = None
    """Output logits become soft_cap * tanh(logits / soft_cap), above 0 (Gemma 2: 30); null: as they are."""
    attention_soft_cap: float | None = None
    """The same for attention logits (Gemma 2: 50)."""
    vocab_multiple: int = 128
    """The embedding's rows are padded up to a multiple of this, so that they divide over devices."""
    init_std: float = 0.02
    """Standard deviation of initial weights, above 0."""
    residual_init: Literal["scaled", "plain"] = "scaled"
    """Output projections of the blocks start with init_std / sqrt(2 * layers) (`scaled`, GPT-2) or init_std (`plain`,
    GPT)."""
    position_init_std: float | None = None
    """Standard deviation of initial learned positions, above 0 (GPT-2's code: 0.01); null: init_std."""
    attention_backend: AttentionBackend = "xla"
    """`xla` anywhere; without attention dropout also `cudnn`: flash attention on NVIDIA GPUs, with dtype bfloat16 and
    no cap; and `splash`: flash attention on TPUs, with rows of a multiple of 128 tokens. Decoding with a cache is
    `xla`."""
    remat: Remat = "dots"
    """What is recomputed in the backward pass: `none`; `dots`: all but products with weights; `block`: each block;
    `offload`: as `dots`, with those products kept in the host's memory meanwhile."""
    dtype: DTypeName = "float32"
    """Dtype of the computation; norms and softmax are computed in float32 at least."""
    param_dtype: DTypeName = "float32"
    """Dtype of the parameters."""

    def __post_init__(self) -> None:
        check_transformer(self)
        at_least(self, 1, "kv_heads", "window")
        if self.heads % (self.kv_heads or self.heads):
            raise UserError(f"model.kv_heads is {self.kv_heads} and model.heads is {self.heads}; it must divide them.")
        check_rotary(self)
        for name in ("soft_cap", "attention_soft_cap", "position_init_std"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"model.{name} is {value}; it must be above 0, or null.")
        if self.attention_backend == "cudnn" and self.attention_soft_cap is not None:
            raise UserError(
                f"model.attention_soft_cap is {self.attention_soft_cap} and model.attention_backend is cudnn, which "
                "cannot cap logits; set the cap to null, or the backend to xla."
            )

    def build(self, vocab: Vocabulary, rngs: nnx.Rngs) -> Decoder:
        """A decoder with fresh parameters."""
        return Decoder(self, vocab, rngs)

    def forward_flops(self, vocab_size: int, use: RowUse) -> float:
        """Operations of a forward pass over one row (`CountsProducts`)."""
        head = 2 * use.predictions * self.width * vocab_size
        return self._block_spec().stack_flops(use, self.window) + head

    def _block_style(self) -> BlockStyle:
        scale = math.sqrt(2 * self.layers) if self.residual_init == "scaled" else 1.0
        return BlockStyle(self._block_spec(), normal(self.init_std), normal(self.init_std / scale))

    def _block_spec(self) -> BlockSpec:
        return BlockSpec(
            layers=self.layers,
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            mlp_width=self.mlp_width or default_mlp_width(self.width, self.activation),
            post_norm=not self.pre_norm,
            norm=self.norm,
            norm_eps=self.norm_eps,
            activation=self.activation,
            bias=self.bias,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            attention_soft_cap=self.attention_soft_cap,
            attention_backend=self.attention_backend,
            remat=self.remat,
            dtype=resolve_dtype(self.dtype, "dtype"),
            param_dtype=resolve_dtype(self.param_dtype, "param_dtype"),
            moe=self.moe,
        )


class Decoder(Transformer):
    """A transformer decoder. The objective's mask decides who sees whom; `window` narrows it."""

    def __init__(self, config: DecoderConfig, vocab: Vocabulary, rngs: nnx.Rngs) -> None:
        blocks = config._block_style()
        spec, init = blocks.spec, blocks.init
        rows = pad_vocabulary(vocab.size, config.vocab_multiple)
        self.config = config
        self.spec = spec
        self.vocab_size = vocab.size

        def table(size: int, axes: tuple[str, str], init: Init = init) -> Embedding:
            return Embedding(size, spec.width, axes=axes, init=init, param_dtype=spec.param_dtype, rngs=rngs)

        self.tokens = table(rows, ("vocab", "embed"))
        position_init = normal(config.position_init_std or config.init_std)
        learned = config.positions == "learned"
        self.positions = table(config.max_length, ("positions", "embed"), position_init) if learned else None
        self.stack = blocks.stack(rngs)
        self.norm = make_norm(spec) if config.pre_norm else None
        self.head = None if config.tie_embeddings else table(rows, ("vocab", "embed"))

    def head_hidden(self, hidden: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """The identity: nothing stands between the trunk and the table."""
        return hidden

    def head_table(self) -> OutputHead:
        """The token embedding where it is tied, else a table of its own."""
        embedding = self.tokens if self.head is None else self.head
        return output_head(embedding, self.vocab_size, soft_cap=self.config.soft_cap)

    @property
    def routed(self) -> bool:
        """Whether its layers are mixtures of experts, whose routers need losses of their own."""
        return self.config.moe is not None

    @property
    def head_style(self) -> HeadStyle:
        """What heads on the hidden states take over."""
        config, blocks = self.config, self.config._block_style()
        return HeadStyle(config.width, config.activation, config.norm_eps, blocks.init, self.spec.param_dtype, blocks)

    def block_states(
        self,
        tokens: Int[Array, "B L"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "B L"] | None = None,
        dropout: UInt32[Array, " B"] | None = None,
    ) -> BlockStates:
        """What `hidden` returns, with what stands on the way to it (`BlockModel`)."""
        x, call = self._embed(tokens, mask, positions, None, dropout)
        before, after = self.stack.fork(x, call)
        return BlockStates(x, before, self.finish(after), call)

    def init_cache(self, batch_size: int, length: int) -> KVCache:
        """An empty cache for positions 0 .. length - 1.

        Raises:
          ValueError: `length` is above `max_length`.
        """
        check_length(length, self.config.max_length)
        spec = self.spec
        shape = (batch_size, spec.layers, length, spec.kv_heads, spec.head_dim)
        return KVCache(jnp.zeros(shape, spec.dtype), jnp.zeros(shape, spec.dtype))

    def step(
        self, tokens: Int[Array, "B T"], cache: KVCache, positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Hidden states of new tokens, causal over the cache, and the cache with them added.

        A token's slot in the cache is its position, so rows may stand at different positions. Positions in a row are
        consecutive; -1 marks padding after a row's last token, which is not cached and whose output means nothing.
        Experts have room for all tokens here, whatever `moe.capacity_factor` is.
        """
        x, call = self._embed(tokens, masks.causal().at(positions[:, 0]), positions, None, None)
        x, cache = self.stack.step(x, call, cache)
        return self.finish(x), cache

    def _embed(
        self,
        tokens: Int[Array, "B L"],
        mask: AttentionMask,
        positions: Int[Array, "B L"] | None,
        token_types: Int[Array, "B L"] | None,
        dropout: UInt32[Array, " B"] | None,
    ) -> tuple[Float[Array, "B L D"], Call]:
        if token_types is not None:
            raise UserError("model.name is decoder, which has no token types; pass none, or use the encoder.")
        config, spec = self.config, self.spec
        check_length(tokens.shape[1], config.max_length)
        positions = default_positions(tokens, positions)
        x = self.tokens(tokens, spec.dtype)
        rotary = None
        if self.positions is not None:
            x = x + self.positions(positions, spec.dtype)
        else:
            rotary = rotary_angles(positions, spec.head_dim, config.rope_base, spec.dtype)
        x = drop(constrain(x, HIDDEN_AXES), config.embedding_dropout, dropout, 0, EMBEDDING)
        return x, Call(_windowed(mask, config.window), positions, rotary, dropout)

    def finish(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """The norm after the last block, where there is one."""
        return x if self.norm is None else self.norm(x)


def _windowed(mask: AttentionMask, window: int | None) -> AttentionMask:
    """The mask, narrowed to the model's window."""
    if window is None:
        return mask
    if not mask.causal:
        raise UserError(f"model.window is {window} and the mask is bidirectional; a window needs a causal mask.")
    return dataclasses.replace(mask, window=window if mask.window is None else min(window, mask.window))
