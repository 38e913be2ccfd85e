"""An objective and a model of one's own, as a user would write them: two tables, which are cheap to compile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lmobj import losses, masks
from lmobj.batch import RowSpec
from lmobj.objectives import Example, Objective, Terms

__all__ = ["Bigram", "BigramConfig", "PredictPrevious"]


@dataclass(frozen=True)
class PredictPrevious(Objective):
    """Predicts each token from the one after it."""

    def rows(self, vocab: Any, length: int) -> RowSpec:
        return RowSpec("packed", length)

    def corrupt(self, keys: Any, batch: Any, ctx: Any) -> Example:
        tokens, segments = batch["tokens"], batch["segment_ids"]
        inside = (segments == jnp.roll(segments, 1, axis=1)) & (segments > 0)
        return Example(tokens, jnp.roll(tokens, 1, axis=1), inside.at[:, 0].set(False) * 1.0, masks.bidirectional())

    def terms(self, models: Any, example: Example, carried: Any, ctx: Any) -> Terms:
        nll = losses.token_nll(models["model"](example.inputs), example.targets)
        return Terms({"nll": jnp.sum(nll * example.weights)}, {})


class Bigram(nnx.Module):
    """The logits of a token's neighbour, as a product of two tables."""

    def __init__(self, size: int, rngs: nnx.Rngs) -> None:
        first, second = jax.random.split(rngs.params())
        self.embed = nnx.Param(0.1 * jax.random.normal(first, (size, 16)), axes=("vocab", "embed"))
        self.out = nnx.Param(0.1 * jax.random.normal(second, (size, 16)), axes=("vocab", "embed"))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embed[...][tokens] @ self.out[...].T


@dataclass(frozen=True)
class BigramConfig:
    def build(self, vocab: Any, rngs: nnx.Rngs) -> Bigram:
        return Bigram(vocab.size, rngs)
