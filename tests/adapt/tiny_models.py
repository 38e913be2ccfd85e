"""Tiny models in float64 with values from NumPy, and one compiled `hidden` for all tests of this folder."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmobj import adapt, masks
from lmobj.batch import Vocabulary
from lmobj.models import DecoderConfig, ElectraConfig, EncoderConfig, EncoderDecoderConfig, XLNetConfig
from tests.styles import BART

VOCAB = Vocabulary(20)
ROWS, LENGTH = 2, 5
SEEDS = jnp.asarray([7, 8], jnp.uint32)
_PRECISE: dict[str, Any] = {"dtype": "float64", "param_dtype": "float64", "vocab_multiple": 4}
_SIZE: dict[str, Any] = {"width": 8, "heads": 2, "mlp_width": 12, **_PRECISE}

CONFIGS: dict[str, Any] = {
    "decoder": DecoderConfig(layers=3, max_length=8, dropout=0.2, **_SIZE),
    "llama": DecoderConfig(
        layers=2, max_length=8, kv_heads=1, positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, **_SIZE
    ),
    "encoder": EncoderConfig(layers=2, max_length=8, **_SIZE),
    "albert": EncoderConfig(layers=2, max_length=8, share_layers=True, embedding_width=4, **_SIZE),
    "electra": ElectraConfig(layers=2, max_length=8, generator_fraction=0.5, **_SIZE),
    "xlnet": XLNetConfig(layers=2, segments=False, query_stream=False, **_SIZE),
    "t5": EncoderDecoderConfig(
        layers=3,
        decoder_layers=2,
        max_length=8,
        head_width=4,
        relative_buckets=4,
        relative_distance=3,
        tie_embeddings=True,
        dropout=0.2,
        **_SIZE,
    ),
    "bart": EncoderDecoderConfig(
        layers=2,
        max_length=8,
        **BART,
        **_SIZE,
    ),
}

METHODS: dict[str, adapt.AdapterConfig] = {
    "lora": adapt.LoRA(rank=3),
    "rslora": adapt.LoRA(rank=3, scaling="root_rank", targets=("query", "down", "attention/out")),
    "dora": adapt.DoRA(rank=3, targets=("value", "up")),
    "adalora": adapt.AdaLoRA(initial_rank=3, target_rank=2),
    "ia3": adapt.IA3(),
    "houlsby": adapt.Houlsby(bottleneck=3),
    "pfeiffer": adapt.Pfeiffer(bottleneck=3),
    "prefix": adapt.Prefix(length=3),
    "prompt": adapt.Prompt(length=2),
    "bitfit": adapt.BitFit(),
    "freeze": adapt.Freeze(layers=1),
}


def model_of(family: str) -> Any:
    """A model with values that nothing is zero or one of; call it in 64-bit mode."""
    model = nnx.eval_shape(lambda: CONFIGS[family].build(VOCAB, nnx.Rngs(params=0)))
    generator = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        mean = 1.0 if path[-1] == "scale" else 0.0
        variable.set_value(jnp.asarray(generator.normal(mean, 0.3, variable.shape)))
    return model


def moved(model: Any) -> Any:
    """A copy with every trained parameter away from its initial value."""
    copy = nnx.clone(model)
    generator = np.random.default_rng(1)
    for _, variable in nnx.to_flat_state(nnx.state(copy)):
        if variable.get_metadata().get("trainable"):
            variable.set_value(variable[...] + generator.normal(0, 0.3, variable.shape))
    return copy


def tokens() -> Any:
    """Rows without padding."""
    return jnp.asarray(np.random.default_rng(0).integers(1, VOCAB.size, (ROWS, LENGTH)))


def mask_of(model: Any) -> masks.AttentionMask:
    """The mask that a family is used with."""
    return masks.causal() if "decoder" in model.config.name else masks.bidirectional()


def hidden(model: Any, mask: masks.AttentionMask | None = None, dropout: Any = None, of: Any = None) -> np.ndarray:
    """`states`, compiled once for each graph."""
    mask = mask_of(model) if mask is None else mask
    return np.asarray(_hidden(*nnx.split(model), tokens() if of is None else of, mask, dropout))


@functools.partial(jax.jit, static_argnums=0)
def _hidden(graph: Any, params: Any, tokens: Any, mask: Any, dropout: Any) -> Any:
    return states(nnx.merge(graph, params), tokens, mask, dropout)


def states(model: Any, tokens: Any, mask: masks.AttentionMask, dropout: Any = None) -> Any:
    """`model.hidden`; of an encoder-decoder its decoder's states, where the encoder reads the same rows whole."""
    if hasattr(model, "hidden"):
        return model.hidden(tokens, mask=mask, dropout=dropout)
    whole = masks.bidirectional().packed(mask.segment_ids)
    encoded = model.encode(tokens, mask=whole, dropout=dropout)
    return model.decode(tokens, encoded, mask=mask, cross_mask=whole, dropout=dropout)


def forget() -> None:
    """Lets the compiled programs go, so that a mutant is in the next one."""
    _hidden.clear_cache()


def parted(model: Any) -> tuple[Any, Any, Any]:
    """(graph, trained parameters, frozen ones)."""
    graph, params = nnx.split(model)
    return graph, *adapt.split(nnx.to_pure_dict(params), adapt.trainable(model))


def paths(tree: Any) -> list[str]:
    """The leaves of nested dicts by path."""
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)]


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a program, those inside others too."""
    for equation in jaxpr.eqns:
        yield equation
        for below in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(below, "jaxpr", below)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
