"""Who may see whom: one description of an attention mask, rendered where it is used.

A mask is a small pytree, never a `[B, Q, S]` array carried about. Every rule narrows the last, so a mask built
from several constructors allows what all of them allow:

    masks.causal()                                  a token sees itself and what came before
    masks.bidirectional()                           every token sees every token
    masks.prefix(is_prefix)                         causal, but tokens marked as prefix are seen by all
    masks.sliding_window(4096)                      causal, at most the last 4096 tokens, itself included
    masks.permutation(query_rank, key_rank, ...)    a token sees those that come before it in an order of the row's own
    masks.causal().packed(segment_ids)              ... and only tokens of its own document
    masks.causal().with_memory(valid)               ... and the keys before the row's, kept from rows before

Padding is segment 0. Padding tokens see one another and nothing else, so every row of a softmax keeps at least one
entry and no NaN arises. A permutation mask whose tokens do not see themselves is the exception: the first token of the
order may see nothing at all (`may_be_empty`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

__all__ = ["AttentionMask", "bidirectional", "causal", "permutation", "prefix", "sliding_window"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionMask:
    """Rules of visibility between queries and keys of one attention call.

    causal: query i sees keys j <= i (indices along the key axis, see `query_offset`).
    window: if set, query i sees only keys j > i - window; requires `causal`.
    is_prefix: [B, S], keys that a causal query may see although they come later (prefix LM). Combined with
      `segment_ids` it gives each packed document its own prefix.
    segment_ids: [B, Q], query and key must be of the same segment.
    key_segment_ids: [B, S], the keys' segments where they differ from the queries' (cached decoding).
    query_offset: index of query 0 along the key axis; [] or [B] (cached decoding).
    query_rank, key_rank: [B, Q] and [B, S], query i sees keys j with query_rank_i > key_rank_j; both or neither.
    sees_self: with ranks, query i also sees key i.
    memory: [B, M], the first M keys of the call are memory, visible where True; no other rule looks at them.
    """

    causal: bool = dataclasses.field(metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    is_prefix: Bool[Array, "B S"] | None = None
    segment_ids: Int[Array, "B Q"] | None = None
    key_segment_ids: Int[Array, "B S"] | None = None
    query_offset: Int[Array, ...] | None = None
    query_rank: Int[Array, "B Q"] | None = None
    key_rank: Int[Array, "B S"] | None = None
    sees_self: bool = dataclasses.field(default=False, metadata={"static": True})
    memory: Bool[Array, "B M"] | None = None

    @property
    def may_be_empty(self) -> bool:
        """Whether a query may see nothing at all; a softmax over what it sees is then undefined."""
        return self.query_rank is not None and not self.sees_self

    def packed(self, segment_ids: Int[Array, "B L"], key_segment_ids: Int[Array, "B S"] | None = None) -> AttentionMask:
        """This mask, with attention kept inside each segment. Segment 0 is padding."""
        return dataclasses.replace(self, segment_ids=segment_ids, key_segment_ids=key_segment_ids)

    def at(self, query_offset: Int[Array, ...] | int) -> AttentionMask:
        """This mask for queries that start at `query_offset` along the key axis, as in cached decoding."""
        return dataclasses.replace(self, query_offset=jnp.asarray(query_offset, jnp.int32))

    def with_memory(self, valid: Bool[Array, "B M"]) -> AttentionMask:
        """This mask for keys that begin with M of memory: seen by every query where `valid`, by none elsewhere.

        The mask's own rules, and every index in them, hold for the keys after the memory.
        """
        return dataclasses.replace(self, memory=valid)

    def dense(self, query_length: int, key_length: int) -> Bool[Array, "B_or_1 1 Q S"]:
        """The mask as booleans, True where attention is allowed; the axes are batch, head, query, key.

        `key_length` counts the memory, if there is one.
        """
        if self.memory is None:
            return self._among_tokens(query_length, key_length)[:, None]
        B, M = self.memory.shape
        tokens = self._among_tokens(query_length, key_length - M)
        memory = jnp.broadcast_to(self.memory[:, None, :], (B, query_length, M))
        return jnp.concatenate([memory, jnp.broadcast_to(tokens, (B, *tokens.shape[1:]))], axis=2)[:, None]

    def _among_tokens(self, query_length: int, key_length: int) -> Bool[Array, "B_or_1 Q S"]:
        """The rules between queries and the keys that are not memory."""
        offset = jnp.zeros((1,), jnp.int32) if self.query_offset is None else jnp.atleast_1d(self.query_offset)
        query = offset[:, None, None] + jnp.arange(query_length)[None, :, None]
        key = jnp.arange(key_length)[None, None, :]
        allowed = jnp.ones((1, query_length, key_length), bool)
        if self.causal:
            seen = key <= query
            if self.window is not None:
                seen &= key > query - self.window
            if self.is_prefix is not None:
                seen |= self.is_prefix[:, None, :]
            allowed &= seen
        if self.query_rank is not None and self.key_rank is not None:
            seen = self.query_rank[:, :, None] > self.key_rank[:, None, :]
            allowed = allowed & (seen | (key == query) if self.sees_self else seen)
        if self.segment_ids is not None:
            keys = self.segment_ids if self.key_segment_ids is None else self.key_segment_ids
            allowed = allowed & (self.segment_ids[:, :, None] == keys[:, None, :])
        return allowed


def causal() -> AttentionMask:
    """Each token sees itself and the tokens before it."""
    return AttentionMask(causal=True)


def bidirectional() -> AttentionMask:
    """Every token sees every token."""
    return AttentionMask(causal=False)


def permutation(
    query_rank: Int[Array, "B Q"], key_rank: Int[Array, "B S"], *, sees_self: bool = False
) -> AttentionMask:
    """Each token sees those that come before it in a factorisation order of its row (Yang et al. 2019, eq. 3).

    Query i sees key j where query_rank_i > key_rank_j (`noise.permute_tokens` gives both), and with `sees_self` key i.
    The content stream of XLNet sees itself, the query stream does not: it would see the token that it predicts. For
    queries at K chosen positions gather their ranks; they are not where keys of their index are, so `sees_self` must
    be False.
    """
    return AttentionMask(causal=False, query_rank=query_rank, key_rank=key_rank, sees_self=sees_self)


def prefix(is_prefix: Bool[Array, "B S"]) -> AttentionMask:
    """Causal, except that tokens marked in `is_prefix` are visible to all (prefix LM; Raffel et al. 2020, fig. 4).

    Mark whole prefixes: a token at or after its document's first unmarked token must not be marked.
    """
    return AttentionMask(causal=True, is_prefix=is_prefix)


def sliding_window(window: int) -> AttentionMask:
    """Causal, over the last `window` tokens, the token itself included (Beltagy et al. 2020; Mistral).

    Raises:
      ValueError: `window` is below 1.
    """
    if window < 1:
        raise ValueError(f"sliding_window: window is {window}; it counts the token itself, so it must be at least 1.")
    return AttentionMask(causal=True, window=window)
