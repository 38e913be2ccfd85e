"""What an objective may ask of a model: small, and free of any concrete family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from lmobj.batch import Vocabulary
from lmobj.masks import AttentionMask

if TYPE_CHECKING:
    from lmobj.models._block import BlockStates
    from lmobj.models._heads import HeadStyle

__all__ = [
    "BlockModel",
    "Cache",
    "CachedModel",
    "CountsProducts",
    "EncoderDecoderModel",
    "GeneratorDiscriminator",
    "HeadedModel",
    "LanguageModel",
    "MemoryModel",
    "ModelBuilder",
    "OutputHead",
    "RowUse",
    "TwoStreamModel",
]

Cache = Any
"""A model's own pytree of decoding state (keys and values, or a recurrent state), with rows first."""


class OutputHead(NamedTuple):
    """What maps hidden states to logits: `soft_cap(head_hidden @ table.T + bias)` over the first `vocab_size` rows."""

    table: Float[Array, "V E"]
    bias: Float[Array, " V"] | None = None
    soft_cap: float | None = None
    vocab_size: int | None = None
    """Real vocabulary size where the table is padded; None if it is not."""


@runtime_checkable
class LanguageModel(Protocol):
    """A model that any token objective can train."""

    def hidden(
        self,
        tokens: Int[Array, "B L"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "B L"] | None = None,
        token_types: Int[Array, "B L"] | None = None,
        dropout: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Final hidden states. `positions` default to 0, 1, ...; `dropout` is one seed per row, None = no dropout.

        Raises ValueError where the family cannot honour `mask` or has no use for `token_types`.
        """
        ...

    def head_hidden(self, hidden: Float[Array, "... D"]) -> Float[Array, "... E"]:
        """What stands between the trunk and the table (BERT's dense, activation, norm); the identity for decoders.

        E is the width of the table. Called on just the positions that are predicted.
        """
        ...

    def head_table(self) -> OutputHead:
        """The output table; a tied one is read from the embedding here, by a function and not by a shared Param."""
        ...


@runtime_checkable
class HeadedModel(LanguageModel, Protocol):
    """A model that objectives can put heads of their own on."""

    @property
    def head_style(self) -> HeadStyle:
        """Width, activation, norm and initial values that a head on the hidden states takes over."""
        ...


@runtime_checkable
class BlockModel(HeadedModel, Protocol):
    """A model of blocks, beside or after which others can run; its `head_style` says how they are made."""

    def block_states(
        self,
        tokens: Int[Array, "B L"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "B L"] | None = None,
        dropout: UInt32[Array, " B"] | None = None,
    ) -> BlockStates:
        """What `hidden` returns, with what stands on the way to it."""
        ...

    def finish(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """What follows the last block: from its output to final hidden states."""
        ...


@runtime_checkable
class CachedModel(LanguageModel, Protocol):
    """A causal model that can generate token by token."""

    def init_cache(self, batch_size: int, length: int) -> Cache:
        """An empty cache for up to `length` tokens per row."""
        ...

    def step(
        self, tokens: Int[Array, "B T"], cache: Cache, positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Hidden states of `tokens` given everything in the cache, and the cache with them added (T >= 1: prefill).

        Positions count from 0 in each row, without gaps. -1 marks padding after a row's last token: it leaves the
        cache as it is, and its output means nothing.
        """
        ...


@runtime_checkable
class EncoderDecoderModel(Protocol):
    """A model that reads one row and writes another."""

    def encode(
        self,
        tokens: Int[Array, "B S"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "B S"] | None = None,
        dropout: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B S D"]:
        """The encoder's final hidden states. `positions` default to 0, 1, ..., and restart in each packed document,
        without gaps; `dropout` is one seed per row, None = no dropout."""
        ...

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
        """The decoder's final hidden states, of tokens that see one another by `mask` and the encoder's by
        `cross_mask`, such as `masks.bidirectional().packed(segment_ids, encoder_segment_ids)`.

        A token to which `cross_mask` shows nothing (padding) gets something finite, and undefined. `dropout` takes the
        seeds of `encode`, and draws apart from it.
        """
        ...

    def head_hidden(self, hidden: Float[Array, "... D"]) -> Float[Array, "... E"]:
        """What stands between the decoder and the table."""
        ...

    def head_table(self) -> OutputHead:
        """The output table."""
        ...

    def init_cache(self, encoded: Float[Array, "B S D"], valid: Bool[Array, "B S"], length: int) -> Cache:
        """A cache of up to `length` tokens per row for rows whose encoder's output is real where `valid`.

        What is computed of that output alone is computed here, once. Rows are first in it: the cache of row r repeated
        is that of row r decoded several times.
        """
        ...

    def step(
        self, tokens: Int[Array, "B T"], cache: Cache, positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """The decoder's hidden states of new tokens, as `CachedModel.step`."""
        ...


@runtime_checkable
class MemoryModel(LanguageModel, Protocol):
    """A model that remembers what it read in the rows before."""

    def init_memory(self, batch_size: int) -> Any:
        """The memory before any row, a pytree with rows first; None if the model is set to keep none."""
        ...

    def recurrent(
        self,
        tokens: Int[Array, "B L"],
        *,
        mask: AttentionMask,
        memory: Any,
        token_types: Int[Array, "B L"] | None = None,
        backward: Bool[Array, " B"] | None = None,
        reuse: int | None = None,
        dropout: UInt32[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B L D"], Any]:
        """Final hidden states of rows that see the memory, and the memory with them added, without gradient.

        `backward` says which rows read their text from its end; `reuse`, how many of their first tokens are remembered.
        """
        ...


@runtime_checkable
class TwoStreamModel(MemoryModel, Protocol):
    """A model that can predict tokens where it stands without reading them."""

    def two_streams(
        self,
        tokens: Int[Array, "B L"],
        predict: Int[Array, "B K"],
        *,
        content_mask: AttentionMask,
        query_mask: AttentionMask,
        memory: Any,
        token_types: Int[Array, "B L"] | None = None,
        backward: Bool[Array, " B"] | None = None,
        reuse: int | None = None,
        dropout: UInt32[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B K D"], Any]:
        """Hidden states of what was read, those that predict the places `predict`, and the new memory."""
        ...


@runtime_checkable
class GeneratorDiscriminator(Protocol):
    """Two models in one: a generator that fills in masked tokens, and a discriminator that tells what it changed.

    The arguments of both trunks are those of `LanguageModel.hidden`; dropout draws apart in them from the same seeds.
    """

    def generator_hidden(
        self,
        tokens: Int[Array, "B L"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "B L"] | None = None,
        token_types: Int[Array, "B L"] | None = None,
        dropout: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L Dg"]:
        """The generator's final hidden states, of masked tokens."""
        ...

    def generator_head_hidden(self, hidden: Float[Array, "... Dg"]) -> Float[Array, "... E"]:
        """What stands between the generator's trunk and its table."""
        ...

    def generator_head_table(self) -> OutputHead:
        """The generator's output table."""
        ...

    def discriminator_hidden(
        self,
        tokens: Int[Array, "B L"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "B L"] | None = None,
        token_types: Int[Array, "B L"] | None = None,
        dropout: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """The discriminator's final hidden states, of tokens some of which were replaced."""
        ...

    def discriminate(self, hidden: Float[Array, "*shape D"]) -> Float[Array, "*shape"]:
        """Logits that tokens were replaced."""
        ...


class RowUse(NamedTuple):
    """How an objective runs a model over a row, as far as the work of its matrix products depends on it."""

    length: int
    """Tokens in the row."""
    predictions: int
    """Positions that the vocabulary head runs on; 0: it does not run."""
    causal: bool = False
    """Whether tokens see earlier tokens of the row alone."""
    memory: bool = False
    """Whether the row is read with the model's memory of rows before it."""
    query_stream: bool = False
    """Whether the predictions are made by a second stream (XLNet)."""
    decoder_length: int = 0
    """Tokens that a decoder reads beside the `length` of its encoder, where the model has both."""
    further_blocks: int = 0
    """Blocks like the model's own that the objective's heads run over the row."""

    def keys(self, window: int | None = None) -> float:
        """Tokens of the row that one of its tokens sees, on average: all of them, or half where masks are causal.

        In a window of w tokens it is w (1 - w / 2 L), the mean of min(t, w) over t in [0, L].
        """
        if not self.causal:
            return self.length
        seen = min(self.length, window or self.length)
        return seen * (1 - seen / (2 * self.length))


@runtime_checkable
class CountsProducts(Protocol):
    """A model's settings that say what its matrix products take."""

    def forward_flops(self, vocab_size: int, use: RowUse) -> float:
        """Operations of the matrix products of a forward pass over one row; a multiplication and an addition are two.

        What is looked up in a table is no product. Every weight counts that a token meets, attention by the keys that
        its tokens see, the vocabulary head by its real size at the positions that it runs on.
        """
        ...


class ModelBuilder(Protocol):
    """A description that builds a model: each family's config dataclass is one."""

    def build(self, vocab: Vocabulary, rngs: nnx.Rngs) -> nnx.Module:
        """The model with fresh parameters; traced under jit so that no device holds a whole large parameter."""
        ...
