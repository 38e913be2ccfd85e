"""Layer-wise learning rates: factors by hand, on every family's parameters, and in a step."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest
import tiny_runs
from flax import nnx

from lmobj import adapt
from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.models import (
    DecoderConfig,
    ElectraConfig,
    EncoderConfig,
    EncoderDecoderConfig,
    GRUConfig,
    ModelBuilder,
    XLNetConfig,
)
from lmobj.objectives import MultiTokenPrediction
from lmobj.train import FitResult, TrainConfig
from lmobj.train.assemble import assemble
from lmobj.train.layer_decay import decayed_by_layer
from lmobj.train.sharding import logical_axes

VOCAB = Vocabulary(16, pad=0, unk=1, bos=2, eos=3, cls=4, sep=5, mask=6)
SIZES = {"layers": 3, "width": 8, "heads": 2}
FAMILIES = [
    DecoderConfig(**SIZES, tie_embeddings=False),
    EncoderConfig(**SIZES),
    XLNetConfig(**SIZES),
    ElectraConfig(**SIZES, generator_fraction=0.5, generator_heads=1, embedding_width=4),
    GRUConfig(layers=3, width=8),
    EncoderDecoderConfig(**SIZES),
    EncoderDecoderConfig(**SIZES, positions="learned", pre_norm=False, embedding_norm=True),
]
WORDS_BELOW = (
    "tokens", "positions", "relative", "embedding_norm", "embeddings", "token_types", "query_start", "projection",
)  # fmt: skip
"""In the names of what the first layer reads."""
# Three layers at a decay of 1/2: 1/8, 1/4, 1/2 from the lowest up, embeddings 1/16, and 1 for what is above.
LAYERS, BELOW, ABOVE = [0.125, 0.25, 0.5], 0.0625, 1.0


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_parameter_has_its_depths_factor(family: ModelBuilder) -> None:
    model = nnx.eval_shape(lambda: family.build(VOCAB, nnx.Rngs(0)))
    state = nnx.state(model)
    ones = {"model": jax.tree.map(lambda x: np.ones(x.shape, np.float32), nnx.to_pure_dict(state))}
    ones["heads"] = {"classifier": {"kernel": np.ones((8, 3), np.float32)}}
    optimizer = decayed_by_layer(optax.identity(), 0.5, logical_axes({"model": model}))
    scaled, _ = optimizer.update(ones, optimizer.init(ones), ones)
    seen = set()
    for path, x in jax.tree_util.tree_flatten_with_path(scaled)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "stack/" in name or "layers/" in name:
            expected, kind = np.reshape(LAYERS, (3, *(1,) * (x.ndim - 1))), "layers"
        elif any(word in name for word in WORDS_BELOW):
            expected, kind = BELOW, "below"
        else:
            expected, kind = ABOVE, "above"
        np.testing.assert_array_equal(x, np.broadcast_to(expected, x.shape), err_msg=name)
        seen.add(kind)
    assert seen == {"layers", "below", "above"}


def test_a_decoder_of_fewer_layers_is_counted_from_its_own_top() -> None:
    family = EncoderDecoderConfig(**SIZES, decoder_layers=2)
    model = nnx.eval_shape(lambda: family.build(VOCAB, nnx.Rngs(0)))
    ones = {"model": jax.tree.map(lambda x: np.ones(x.shape, np.float32), nnx.to_pure_dict(nnx.state(model)))}
    optimizer = decayed_by_layer(optax.identity(), 0.5, logical_axes({"model": model}))
    scaled = optimizer.update(ones, optimizer.init(ones), ones)[0]["model"]
    for side, factors in (("encoder", LAYERS), ("decoder", [0.25, 0.5])):
        np.testing.assert_array_equal(scaled[side]["stack"]["blocks"]["mlp"]["up"]["kernel"][:, 0, 0], factors)
        assert scaled[side]["relative"]["table"]["table"][0, 0] == BELOW


def test_blocks_of_heads_are_heads() -> None:
    """Four heads that are blocks on three layers."""
    model = nnx.eval_shape(lambda: FAMILIES[0].build(VOCAB, nnx.Rngs(0)))
    heads = nnx.eval_shape(lambda: MultiTokenPrediction(tokens=5).build_heads(model.head_style, VOCAB, nnx.Rngs(0)))
    models = {"model": model, "heads": heads}
    shapes = {role: nnx.to_pure_dict(nnx.state(module)) for role, module in models.items()}
    ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    optimizer = decayed_by_layer(optax.identity(), 0.5, logical_axes(models))
    scaled, _ = optimizer.update(ones, optimizer.init(ones))
    assert all(np.all(np.asarray(x) == ABOVE) for x in jax.tree.leaves(scaled["heads"]))
    kernel = np.asarray(scaled["model"]["stack"]["blocks"]["mlp"]["up"]["kernel"])
    np.testing.assert_array_equal(kernel[:, 0, 0], LAYERS)
    assert np.all(np.asarray(scaled["model"]["tokens"]["table"]) == BELOW)


def test_layers_that_are_frozen_apart_change_nothing_above_them() -> None:
    model = adapt.apply(FAMILIES[1].build(VOCAB, nnx.Rngs(0)), adapt.Freeze(layers=2), nnx.Rngs(0))
    params, _ = adapt.split(nnx.to_pure_dict(nnx.state(model)), adapt.trainable(model))
    ones = {"model": jax.tree.map(np.ones_like, params)}
    optimizer = decayed_by_layer(optax.identity(), 0.5, logical_axes({"model": model}))
    scaled, _ = optimizer.update(ones, optimizer.init(ones))
    kernels = [x for path, x in jax.tree_util.tree_flatten_with_path(scaled)[0] if "'up'" in str(path)]
    assert {float(x.flat[0]) for x in map(np.asarray, kernels)} == {0.5}


def test_one_step_of_a_run(causal: FitResult) -> None:
    def step(decay: float) -> dict:
        config = causal.assembly.config
        train = dataclasses.replace(config.train, layer_decay=decay)
        run = assemble(dataclasses.replace(config, train=train), quiet=True)
        state = run.initial_state()
        before = jax.device_get(state.params)
        after, _ = run.train_step(state, next(run.batches("train", steps=1)))
        return jax.tree.map(np.subtract, jax.device_get(after.params), before)

    with tiny_runs.quick_compilation():
        plain, decayed = step(1.0)["model"], step(0.5)["model"]
    layers = plain["stack"]["blocks"]["mlp"]["up"]["kernel"].shape[0]
    for layer in range(layers):
        one, other = (x["stack"]["blocks"]["mlp"]["up"]["kernel"][layer] for x in (plain, decayed))
        np.testing.assert_allclose(other, one * 0.5 ** (layers - layer), rtol=1e-3, atol=1e-8)
    np.testing.assert_allclose(
        decayed["tokens"]["table"], plain["tokens"]["table"] * 0.5 ** (layers + 1), rtol=1e-3, atol=1e-8
    )


@pytest.mark.parametrize("decay", [0.0, 1.1, float("nan")])
def test_decays_that_are_none(decay: float) -> None:
    with pytest.raises(UserError, match=r"train\.layer_decay is .*; accepted: above 0, at most 1"):
        TrainConfig(layer_decay=decay)
