"""The encoder: its head, embeddings, shared layers, token types and initial values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CONFIGS, SEEDS, VOCAB, build, hidden, random_tokens
from flax import nnx

from lmobj import masks
from lmobj.models import EncoderConfig


def gelu(x: np.ndarray) -> np.ndarray:
    """x times the normal distribution function."""
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def layer_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12) * scale + bias


@pytest.mark.parametrize("embedding_width", [16, 8])
def test_head_written_out(embedding_width: int) -> None:
    graphdef, params = build(dataclasses.replace(CONFIGS["bert"], embedding_width=embedding_width))
    model = nnx.merge(graphdef, params)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["head"])
    states = np.random.default_rng(0).normal(size=(2, 5, 16))
    dense = gelu(states @ p["dense"]["kernel"] + p["dense"]["bias"])
    expected = layer_norm(dense, p["norm"]["scale"], p["norm"]["bias"])
    assert expected.shape == (2, 5, embedding_width)
    np.testing.assert_allclose(model.head_hidden(jnp.asarray(states, jnp.float32)), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(model.head_table().table, params["embeddings"]["tokens"]["table"])
    np.testing.assert_array_equal(model.head_table().bias, params["head"]["bias"])


@pytest.mark.parametrize("name", ["bert", "albert"])
def test_embeddings_written_out(name: str) -> None:
    graphdef, params = build(CONFIGS[name])
    tokens = random_tokens(2, 5)
    types, positions = np.array([[0, 0, 1, 1, 1], [1, 0, 1, 0, 1]]), np.array([[0, 1, 2, 0, 1], [4, 3, 2, 1, 0]])
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    e = p["embeddings"]
    summed = e["tokens"]["table"][tokens] + e["positions"]["table"][positions] + e["token_types"]["table"][types]
    expected = layer_norm(summed, e["norm"]["scale"], e["norm"]["bias"])
    if name == "albert":  # normed where it is narrow, then projected
        expected = expected @ p["projection"]["kernel"] + p["projection"]["bias"]
    model = nnx.merge(graphdef, params)
    options = {"mask": masks.bidirectional(), "positions": jnp.asarray(positions), "token_types": jnp.asarray(types)}
    np.testing.assert_allclose(model.hidden_layers(tokens, **options)[0], expected, rtol=0, atol=1e-5)


def test_token_types_default_to_zero() -> None:
    graphdef, params = build(CONFIGS["bert"])
    tokens = random_tokens(2, 5)
    absent = hidden(graphdef, params, tokens, mask=masks.bidirectional())
    zeros = hidden(graphdef, params, tokens, mask=masks.bidirectional(), token_types=jnp.zeros_like(tokens))
    ones = hidden(graphdef, params, tokens, mask=masks.bidirectional(), token_types=jnp.ones_like(tokens))
    np.testing.assert_allclose(absent, zeros, rtol=1e-6)
    assert float(jnp.abs(absent - ones).max()) > 0.1


def test_an_embedding_as_wide_as_the_model_is_not_projected() -> None:
    _, params = build(dataclasses.replace(CONFIGS["bert"], embedding_width=16))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, build(CONFIGS["bert"])[1])


def test_shared_layers_equal_a_stack_of_copies() -> None:
    """Of hidden states with dropout, so of the layers' own masks too; the gradient is the sum over the copies."""
    with jax.enable_x64(True):
        config = dataclasses.replace(CONFIGS["albert"], layers=2, dtype="float64", param_dtype="float64")
        graphdef, params = build(config)
        copies_graph = build(dataclasses.replace(config, share_layers=False))[0]
        copies = params | {"stack": jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), params["stack"])}
        tokens = random_tokens(3, 6)

        def loss(params: Any, graphdef: Any) -> Any:
            states = nnx.merge(graphdef, params).hidden(tokens, mask=masks.bidirectional(), dropout=SEEDS)
            return jnp.sum(jnp.sin(states))

        value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnames="graphdef")
        value, grads = value_and_grad(params, graphdef=graphdef)
        expected, grads_of_copies = value_and_grad(copies, graphdef=copies_graph)
        assert float(value) == pytest.approx(float(expected), rel=1e-12)
        summed = grads_of_copies | {"stack": jax.tree.map(lambda x: x.sum(0, keepdims=True), grads_of_copies["stack"])}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11), grads, summed)


def test_initial_values_are_those_of_bert() -> None:
    # Normal of 0.02 truncated at two of them: the standard deviation becomes 0.02 * 0.8796.
    model = EncoderConfig(layers=8, width=128, heads=4, vocab_multiple=8).build(VOCAB, nnx.Rngs(0))
    for param in (model.stack.blocks.attention.out.kernel, model.stack.blocks.mlp.down.kernel):
        values = np.asarray(param[...])
        assert values.size >= 2**17
        assert np.abs(values).max() <= 0.04
        assert np.std(values) == pytest.approx(0.02 * 0.8796, rel=0.01)
    assert not np.any(model.head.bias[...])
