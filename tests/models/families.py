"""One tiny model per family and kind, for the tests in this folder."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmobj.batch import Vocabulary
from lmobj.models import DecoderConfig, ElectraConfig, EncoderConfig, GRUConfig, ModelConfig, XLNetConfig

VOCAB = Vocabulary(30)
DROPOUT = {"dropout": 0.3, "embedding_dropout": 0.2}
SIZE: dict[str, Any] = {"layers": 2, "width": 16, "heads": 4, "max_length": 16, "vocab_multiple": 8, "init_std": 0.3}

CONFIGS: dict[str, ModelConfig] = {
    "gpt2": DecoderConfig(**SIZE, **DROPOUT, attention_dropout=0.2),
    "llama": DecoderConfig(
        **SIZE,
        **DROPOUT,
        attention_dropout=0.2,
        kv_heads=2,
        positions="rotary",
        norm="rmsnorm",
        activation="swiglu",
        bias=False,
        tie_embeddings=False,
        attention_soft_cap=5.0,
    ),
    "bert": EncoderConfig(**SIZE, **(DROPOUT | {"attention_dropout": 0.2})),
    "albert": EncoderConfig(
        **SIZE, **(DROPOUT | {"attention_dropout": 0.2}), embedding_width=8, share_layers=True, activation="gelu"
    ),
    "modernbert": EncoderConfig(**SIZE, **DROPOUT, positions="rotary", pre_norm=True),
    "electra": ElectraConfig(
        **SIZE, **(DROPOUT | {"attention_dropout": 0.2}), embedding_width=8, generator_fraction=0.5
    ),
    "xlnet": XLNetConfig(
        layers=2,
        width=16,
        heads=4,
        segments=False,
        query_stream=False,
        dropout=0.3,
        attention_dropout=0.2,
        vocab_multiple=8,
        init_std=0.3,
    ),
    "gru": GRUConfig(layers=2, width=16, vocab_multiple=8, init_range=1.0, **DROPOUT),
}
CAUSAL = ["gpt2", "llama", "gru"]
HEADLESS = ["electra"]
"""Families whose `hidden` has no vocabulary head."""

SEEDS = jnp.asarray([7, 8, 9], jnp.uint32)


@functools.cache
def build(config: ModelConfig) -> tuple[Any, Any]:
    """(graphdef, parameters as a pure dict). Values are NumPy's, so that nothing is compiled; scales are around 1."""
    graphdef, shapes = nnx.split(jax.eval_shape(lambda: config.build(VOCAB, nnx.Rngs(0))))
    generator = np.random.default_rng(0)

    def values(path: Any, shape: Any) -> Any:
        mean = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(generator.normal(mean, 0.3, shape.shape), shape.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(values, nnx.to_pure_dict(shapes))


@functools.partial(jax.jit, static_argnames="graphdef")
def hidden(graphdef: Any, params: Any, tokens: Any, **options: Any) -> Any:
    """`model.hidden`, compiled once per family and shape."""
    return nnx.merge(graphdef, params).hidden(tokens, **options)


def random_tokens(rows: int, length: int) -> Any:
    """Token ids, not padded."""
    return jnp.asarray(np.random.default_rng(0).integers(1, VOCAB.size, (rows, length)))
