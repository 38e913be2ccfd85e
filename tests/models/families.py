"""One tiny model per family and kind, for the tests in this folder."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmobj import masks
from lmobj.batch import Vocabulary
from lmobj.masks import AttentionMask
from lmobj.models import (
    DecoderConfig,
    ElectraConfig,
    EncoderConfig,
    EncoderDecoderConfig,
    GRUConfig,
    ModelConfig,
    XLNetConfig,
)
from tests.styles import BART

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
    "t5": EncoderDecoderConfig(
        **SIZE,
        **DROPOUT,
        attention_dropout=0.2,
        head_width=8,
        mlp_width=32,
        relative_buckets=8,
        relative_distance=6,
        scale_output=True,
    ),
    "bart": EncoderDecoderConfig(
        **SIZE,
        **DROPOUT,
        attention_dropout=0.2,
        mlp_width=None,
        **BART,
    ),
}
DECODERS = ["gpt2", "llama", "gru"]
CAUSAL = [*DECODERS, "t5", "bart"]
"""Families whose tokens see those before them, of an encoder-decoder the decoder's."""
HEADLESS = ["electra"]
"""Families whose `hidden` has no vocabulary head."""

SEEDS = jnp.asarray([7, 8, 9], jnp.uint32)


@functools.cache
def build(config: ModelConfig) -> tuple[Any, Any]:
    """(graphdef, parameters as a pure dict). Values are NumPy's, so that nothing is compiled; scales are around 1.

    Where attention logits are not divided by the root of the heads' width, the maps to queries are, as at T5's start.
    """
    graphdef, shapes = nnx.split(jax.eval_shape(lambda: config.build(VOCAB, nnx.Rngs(0))))
    generator = np.random.default_rng(0)
    of_queries = 1.0 if getattr(config, "scale_attention", True) else float(config.head_width) ** -0.5

    def values(path: Any, shape: Any) -> Any:
        leaf = jax.tree_util.keystr(path)
        mean, std = 1.0 if "scale" in leaf else 0.0, 0.3 * (of_queries if "query" in leaf else 1.0)
        return jnp.asarray(generator.normal(mean, std, shape.shape), shape.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(values, nnx.to_pure_dict(shapes))


def states(model: Any, tokens: Any, *, mask: AttentionMask, **options: Any) -> Any:
    """`model.hidden`; of an encoder-decoder its decoder's states, where the encoder reads the same documents whole."""
    if hasattr(model, "hidden"):
        return model.hidden(tokens, mask=mask, **options)
    whole = masks.bidirectional().packed(mask.segment_ids)
    encoded = model.encode(tokens, mask=whole, **options)
    return model.decode(tokens, encoded, mask=mask, cross_mask=whole, **options)


@functools.partial(jax.jit, static_argnames="graphdef")
def hidden(graphdef: Any, params: Any, tokens: Any, **options: Any) -> Any:
    """`states`, compiled once per family and shape."""
    return states(nnx.merge(graphdef, params), tokens, **options)


def random_tokens(rows: int, length: int) -> Any:
    """Token ids, not padded."""
    return jnp.asarray(np.random.default_rng(0).integers(1, VOCAB.size, (rows, length)))
