"""What an objective may ask of a model: small, and free of any concrete family."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from lmobj.batch import Vocabulary
from lmobj.masks import AttentionMask

__all__ = ["Cache", "LanguageModel", "ModelBuilder", "OutputHead"]

Cache = Any
"""A model's own pytree of decoding state (keys and values, or a recurrent state), with rows first."""


class OutputHead(NamedTuple):
    """What maps hidden states to logits: `soft_cap(hidden @ table.T + bias)` over the first `vocab_size` rows."""

    table: Float[Array, "V D"]
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

    def head_hidden(self, hidden: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """What stands between the trunk and the table (BERT's dense, activation, norm); the identity for decoders.

        Called on just the positions that are predicted.
        """
        ...

    def head_table(self) -> OutputHead:
        """The output table; a tied one is read from the embedding here, by a function and not by a shared Param."""
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


class ModelBuilder(Protocol):
    """A description that builds a model: each family's config dataclass is one."""

    def build(self, vocab: Vocabulary, rngs: nnx.Rngs) -> nnx.Module:
        """The model with fresh parameters; traced under jit so that no device holds a whole large parameter."""
        ...
