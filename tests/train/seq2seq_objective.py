"""The smallest objective over an encoder-decoder: it writes the row that it reads. The real ones have their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from lmobj import losses, masks
from lmobj.batch import RowSpec
from lmobj.models import RowUse
from lmobj.objectives import Example, Objective, Terms

__all__ = ["Reconstruction"]


@dataclass(frozen=True)
class Reconstruction(Objective):
    """Each token of a row from those before it, and from the whole row through the encoder."""

    name: str = "reconstruction"

    def rows(self, vocab: Any, length: int) -> RowSpec:
        return RowSpec("packed", length)

    def use(self, length: int) -> RowUse:
        return RowUse(length, length, decoder_length=length)

    def corrupt(self, keys: Any, batch: Any, ctx: Any) -> Example:
        tokens, segments = batch["tokens"], batch["segment_ids"]
        return Example(
            inputs=tokens,
            targets=tokens,
            weights=(segments > 0) * 1.0,
            mask=masks.bidirectional().packed(segments),
            positions=batch["positions"],
            decoder_inputs=jnp.where(batch["positions"] == 0, ctx.vocab.pad, jnp.roll(tokens, 1, axis=1)),
            decoder_mask=masks.causal().packed(segments),
            decoder_positions=batch["positions"],
        )

    def terms(self, models: Any, example: Example, carried: Any, ctx: Any) -> Terms:
        model = models["model"]
        encoded = model.encode(example.inputs, mask=example.mask, positions=example.positions, dropout=ctx.dropout)
        hidden = model.decode(
            example.decoder_inputs, encoded, mask=example.decoder_mask, cross_mask=example.mask,
            positions=example.decoder_positions, dropout=ctx.dropout,
        )  # fmt: skip
        head = model.head_table()
        stats = losses.linear_logit_stats(
            model.head_hidden(hidden), head.table, example.targets, bias=head.bias, vocab_size=head.vocab_size
        )
        nll = jnp.sum(losses.nll(stats) * example.weights)
        return Terms({"nll": nll}, {"nll": (nll, jnp.sum(example.weights))})
