"""What decoder and encoder have in common: embed, run the stack, finish."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from lmobj.masks import AttentionMask
from lmobj.models._block import Call, Stack

__all__ = ["Transformer", "default_positions"]


class Transformer(nnx.Module):
    """Base of the transformer families, which set `stack` and implement `_embed`, and `finish` if need be."""

    stack: Stack

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

        Raises:
          ValueError: rows are longer than `max_length`, the mask cannot be honoured, or a decoder gets `token_types`.
        """
        x, call = self._embed(tokens, mask, positions, token_types, dropout)
        return self.finish(self.stack(x, call))

    def hidden_layers(
        self,
        tokens: Int[Array, "B L"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "B L"] | None = None,
        token_types: Int[Array, "B L"] | None = None,
        dropout: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "n_plus_1 B L D"]:
        """The embeddings and every block's output; the last entry is what `hidden` returns."""
        embedded, call = self._embed(tokens, mask, positions, token_types, dropout)
        layers = self.stack.collect(embedded, call)
        return jnp.concatenate([embedded[None], layers[:-1], self.finish(layers[-1:])])

    def _embed(
        self,
        tokens: Int[Array, "B L"],
        mask: AttentionMask,
        positions: Int[Array, "B L"] | None,
        token_types: Int[Array, "B L"] | None,
        dropout: UInt32[Array, " B"] | None,
    ) -> tuple[Float[Array, "B L D"], Call]:
        """The first block's input, and what all blocks share."""
        raise NotImplementedError

    def finish(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """What follows the last block."""
        return x


def default_positions(tokens: Int[Array, "B L"], positions: Int[Array, "B L"] | None) -> Int[Array, "B L"]:
    """The positions given, or 0, 1, ... in every row."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
