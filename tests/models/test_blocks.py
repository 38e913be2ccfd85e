"""The block against its equations in NumPy, and where its dropouts stand."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CONFIGS, SEEDS, build, random_tokens
from flax import nnx
from plain_blocks import DH, H, block, norm

from lmobj import masks
from lmobj.noise import dropout

B, L, D = 3, 6, 16


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_layers_equal_their_equations(name: str) -> None:
    with jax.enable_x64(True):
        graphdef, params = build(dataclasses.replace(CONFIGS[name], dtype="float64", param_dtype="float64"))
        mask = masks.bidirectional() if name == "bert" else masks.causal()
        layers = np.asarray(nnx.merge(graphdef, params).hidden_layers(random_tokens(B, L), mask=mask))
        first, second = (
            jax.tree.map(lambda x, layer=layer: np.asarray(x[layer]), params["stack"]["blocks"]) for layer in (0, 1)
        )
        middle = block(name, first, layers[0])
        np.testing.assert_allclose(layers[1], middle, rtol=0, atol=1e-12)
        last = block(name, second, middle)
        if name != "bert":
            last = norm(jax.tree.map(np.asarray, params["norm"]), last, 1e-5, name == "llama")
        np.testing.assert_allclose(layers[2], last, rtol=0, atol=1e-12)


def silent(params: Any) -> Any:
    """Parameters of zeros, with norms of one."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.full_like(x, float("scale" in jax.tree_util.keystr(path))), params
    )


def test_each_dropout_has_an_address_of_its_own() -> None:
    """With all kernels zero and output biases one, every part adds one to the residual, before its dropout."""
    config = dataclasses.replace(CONFIGS["gpt2"], dropout=0.5, embedding_dropout=0.25, attention_dropout=0.0)
    graphdef, params = build(config)
    params = silent(params)
    params["tokens"]["table"] += 1.0
    blocks = params["stack"]["blocks"]
    blocks["attention"]["out"]["bias"] += 1.0
    blocks["mlp"]["down"]["bias"] += 1.0
    model = nnx.merge(graphdef, params)
    layers = model.hidden_layers(random_tokens(B, L), mask=masks.causal(), dropout=SEEDS)
    ones = jnp.ones((B, L, D))
    np.testing.assert_array_equal(layers[0], dropout(ones, 0.25, SEEDS, layer=0, site=3))
    added = sum(dropout(ones, 0.5, SEEDS, layer=0, site=site) for site in (1, 2))
    np.testing.assert_allclose(layers[1] - layers[0], added, rtol=0, atol=1e-6)
    both = added + sum(dropout(ones, 0.5, SEEDS, layer=1, site=site) for site in (1, 2))
    last = np.asarray(layers[0] + both, np.float64)
    expected = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(layers[2], expected, rtol=0, atol=1e-5)


def test_attention_dropout_is_addressed_by_layer() -> None:
    """With queries and keys zero, values one and the output kernel the identity, attention adds what it kept."""
    config = dataclasses.replace(CONFIGS["gpt2"], dropout=0.0, embedding_dropout=0.0, attention_dropout=0.5)
    graphdef, params = build(config)
    params = silent(params)
    attention = params["stack"]["blocks"]["attention"]
    attention["value"]["bias"] += 1.0
    attention["out"]["kernel"] += jnp.eye(D)
    model = nnx.merge(graphdef, params)
    layers = model.hidden_layers(random_tokens(B, L), mask=masks.bidirectional(), dropout=SEEDS)
    uniform = jnp.full((B, H, L, L), 1 / L)

    def added(layer: int) -> Any:
        kept = dropout(uniform, 0.5, SEEDS, layer=layer, site=0).sum(-1)
        return jnp.repeat(kept.swapaxes(1, 2)[..., None], DH, axis=-1).reshape(B, L, D)

    np.testing.assert_allclose(layers[1] - layers[0], added(0), rtol=0, atol=1e-5)
    last = np.asarray(layers[1] + added(1), np.float64)
    expected = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(layers[2], expected, rtol=0, atol=1e-4)
