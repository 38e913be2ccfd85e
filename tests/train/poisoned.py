"""An objective of two tables whose loss goes wrong at given steps: cheap to compile, for tests of what follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lmobj import losses, masks
from lmobj.batch import RowSpec
from lmobj.objectives import Example, Objective, Terms

__all__ = ["Bigram", "BigramConfig", "Poisoned"]


@dataclass(frozen=True)
class Poisoned(Objective):
    """Predicts each token from the one after it. Steps are counted from 1, as people are told them."""

    nan: tuple[int, ...] = ()
    """Steps with a loss that is not a number."""
    spike: tuple[int, ...] = ()
    """Steps with a loss ten times as large."""

    def rows(self, vocab: Any, length: int) -> RowSpec:
        return RowSpec("packed", length)

    def corrupt(self, keys: Any, batch: Any, ctx: Any) -> Example:
        tokens, segments = batch["tokens"], batch["segment_ids"]
        inside = (segments == jnp.roll(segments, 1, axis=1)) & (segments > 0)
        return Example(tokens, jnp.roll(tokens, 1, axis=1), inside.at[:, 0].set(False) * 1.0, masks.bidirectional())

    def terms(self, models: Any, example: Example, carried: Any, ctx: Any) -> Terms:
        nll = losses.token_nll(models["model"](example.inputs), example.targets)
        total = jnp.sum(nll * example.weights)
        for steps, factor in ((self.nan, jnp.nan), (self.spike, 10.0)):
            here = jnp.any(jnp.asarray(steps, jnp.int32) == ctx.step + 1) & ctx.train
            total = total * jnp.where(here, factor, 1.0)
        return Terms({"nll": total}, {})


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
