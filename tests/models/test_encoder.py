"""The encoder: its head, pooler, token types and initial values."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CONFIGS, VOCAB, build, hidden, random_tokens
from flax import nnx

from lmobj import masks
from lmobj.models import EncoderConfig


def gelu(x: np.ndarray) -> np.ndarray:
    """x times the normal distribution function."""
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def layer_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12) * scale + bias


def test_head_and_pooler_written_out() -> None:
    graphdef, params = build(CONFIGS["bert"])
    model = nnx.merge(graphdef, params)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    states = np.random.default_rng(0).normal(size=(2, 5, 16))
    dense = gelu(states @ p["head_dense"]["kernel"] + p["head_dense"]["bias"])
    expected = layer_norm(dense, p["head_norm"]["scale"], p["head_norm"]["bias"])
    states_32 = jnp.asarray(states, jnp.float32)
    np.testing.assert_allclose(model.head_hidden(states_32), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(model.head_table().table, params["tokens"]["table"])
    np.testing.assert_array_equal(model.head_table().bias, params["head_bias"])
    pooled = np.tanh(states[:, 0] @ p["pooler"]["kernel"] + p["pooler"]["bias"])
    np.testing.assert_allclose(model.pooled(states_32), pooled, rtol=0, atol=1e-5)


def test_embeddings_written_out() -> None:
    graphdef, params = build(CONFIGS["bert"])
    tokens = random_tokens(2, 5)
    types, positions = np.array([[0, 0, 1, 1, 1], [1, 0, 1, 0, 1]]), np.array([[0, 1, 2, 0, 1], [4, 3, 2, 1, 0]])
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    summed = p["tokens"]["table"][tokens] + p["positions"]["table"][positions] + p["token_types"]["table"][types]
    expected = layer_norm(summed, p["norm"]["scale"], p["norm"]["bias"])
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


def test_without_a_pooler_pooled_is_refused() -> None:
    model = EncoderConfig(layers=1, width=8, heads=2).build(VOCAB, nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"model\.pooler is false"):
        model.pooled(jnp.zeros((1, 2, 8)))


def test_initial_values_are_those_of_bert() -> None:
    # Normal of 0.02 truncated at two of them: the standard deviation becomes 0.02 * 0.8796.
    model = EncoderConfig(layers=8, width=128, heads=4, vocab_multiple=8).build(VOCAB, nnx.Rngs(0))
    for param in (model.stack.blocks.attention.out.kernel, model.stack.blocks.mlp.down.kernel):
        values = np.asarray(param[...])
        assert values.size >= 2**17
        assert np.abs(values).max() <= 0.04
        assert np.std(values) == pytest.approx(0.02 * 0.8796, rel=0.01)
    assert not np.any(model.head_bias[...])
