"""Models for decoding tests: one whose probabilities are given, and tiny ones of each causal family."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmobj import masks
from lmobj.batch import Vocabulary
from lmobj.evaluate import output_logits
from lmobj.models import DecoderConfig, GRUConfig, OutputHead

VOCAB = 7


class TableModel(nnx.Module):
    """p(next | last) from a table. The cache counts the tokens read, and positions must agree with it."""

    def __init__(self, probabilities: np.ndarray, padding: int = 3):
        size = len(probabilities)
        self.size = size
        self.logits = nnx.Param(jnp.log(jnp.asarray(probabilities)))
        # Rows that pad the table would win every draw if they were not cut off.
        self.table = nnx.Param(jnp.eye(size + padding, size).at[size:].set(100.0))

    def hidden(self, tokens: jax.Array, **_: Any) -> jax.Array:
        return self.logits[...][tokens]

    def head_hidden(self, hidden: jax.Array) -> jax.Array:
        return hidden

    def head_table(self) -> OutputHead:
        return OutputHead(self.table[...], vocab_size=self.size)

    def init_cache(self, batch_size: int, length: int) -> jax.Array:
        return jnp.zeros((batch_size,), jnp.int32)

    def step(self, tokens: jax.Array, cache: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        real = positions >= 0
        expected = cache[:, None] + jnp.arange(tokens.shape[1])
        hidden = jnp.where((real & (positions != expected))[..., None], jnp.nan, self.logits[...][tokens])
        return hidden, cache + jnp.sum(real, axis=1)


@functools.cache
def family(name: str) -> nnx.Module:
    """A tiny model with random weights, large enough that its predictions depend on the whole context."""
    config = {
        "learned": DecoderConfig(layers=2, width=16, heads=2, max_length=16, init_std=0.5, vocab_multiple=4),
        "rotary": DecoderConfig(
            layers=2, width=16, heads=4, kv_heads=2, max_length=16, positions="rotary", norm="rmsnorm",
            activation="swiglu", bias=False, window=4, soft_cap=5.0, init_std=0.5, vocab_multiple=4,
        ),
        "gru": GRUConfig(layers=2, width=16, init_range=1.0, vocab_multiple=4),
    }[name]  # fmt: skip
    return config.build(Vocabulary(VOCAB), nnx.Rngs(params=3))


def uncached_log_probs(model: nnx.Module, rows: np.ndarray) -> np.ndarray:
    """ln p(next | row up to here) at each position, by reading whole rows without a cache: [B, L, V]."""
    return np.asarray(_read(*nnx.split(model), jnp.asarray(rows)))


@jax.jit(static_argnums=0)
def _read(graphdef: nnx.GraphDef, state: nnx.State, rows: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, state)
    return jax.nn.log_softmax(output_logits(model, model.hidden(rows, mask=masks.causal())))
