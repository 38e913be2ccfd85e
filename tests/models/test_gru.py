"""The GRU language model: against its equations written out, and what it refuses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CONFIGS, SEEDS, VOCAB, build, hidden, random_tokens
from flax import nnx

from lmobj import masks
from lmobj.models import GRUConfig
from lmobj.noise import dropout

CONFIG = GRUConfig(layers=2, width=16, vocab_multiple=8, dtype="float64", param_dtype="float64")


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def written_out(params: Any, tokens: np.ndarray, starts: np.ndarray, keep: list[np.ndarray] | None) -> np.ndarray:
    """The module docstring's equations, one row, layer and token at a time; `keep` scales embeddings and outputs."""
    x = params["tokens"]["table"][tokens]
    x = x if keep is None else x * keep[0]
    for layer in range(2):
        p = jax.tree.map(lambda value, layer=layer: value[layer], params["layers"])
        y = np.zeros_like(x)
        for b in range(x.shape[0]):
            h = np.zeros(16)
            for t in range(x.shape[1]):
                h = np.zeros(16) if starts[b, t] else h
                r_x, z_x, n_x = np.split(x[b, t] @ p["input"]["kernel"] + p["input"]["bias"], 3)
                r_h, z_h, n_h = np.split(h @ p["recurrent"]["kernel"] + p["recurrent"]["bias"], 3)
                r, z = sigmoid(r_x + r_h), sigmoid(z_x + z_h)
                h = y[b, t] = (1 - z) * np.tanh(n_x + r * n_h) + z * h
        x = y if keep is None else y * keep[layer + 1]
    return x


def test_equations_and_resets() -> None:
    with jax.enable_x64(True):
        graphdef, params = build(CONFIG)
        numpy_params = jax.tree.map(np.asarray, params)
        tokens = random_tokens(3, 7)
        segments = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 0, 0], [1, 2, 3, 4, 4, 4, 0]])
        starts = np.diff(segments, axis=1, prepend=-1) != 0
        found = hidden(graphdef, params, tokens, mask=masks.causal().packed(jnp.asarray(segments)))
        expected = written_out(numpy_params, np.asarray(tokens), starts, None)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


def test_dropout_is_on_inputs_and_outputs_and_not_on_the_recurrence() -> None:
    with jax.enable_x64(True):
        graphdef, _ = build(GRUConfig(**{**vars(CONFIG), "dropout": 0.5, "embedding_dropout": 0.25}))
        _, params = build(CONFIG)
        tokens = random_tokens(3, 7)
        ones = jnp.ones((3, 7, 16))
        keep = [
            dropout(ones, 0.25, SEEDS, layer=0, site=3),
            dropout(ones, 0.5, SEEDS, layer=0, site=1),
            dropout(ones, 0.5, SEEDS, layer=1, site=1),
        ]
        starts = np.arange(7)[None].repeat(3, axis=0) == 0
        numpy_params = jax.tree.map(np.asarray, params)
        expected = written_out(numpy_params, np.asarray(tokens), starts, [np.asarray(k) for k in keep])
        found = hidden(graphdef, params, tokens, mask=masks.causal(), dropout=SEEDS)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (masks.bidirectional(), "a bidirectional mask"),
        (masks.sliding_window(2), "a window"),
        (masks.prefix(jnp.ones((1, 4), bool)), "a visible prefix"),
        (masks.causal().at(3), "keys of another length"),
    ],
)
def test_masks_that_a_recurrence_cannot_honour_are_refused(mask: Any, message: str) -> None:
    model = CONFIGS["gru"].build(VOCAB, nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        model.hidden(random_tokens(1, 4), mask=mask)


def test_token_types_are_refused() -> None:
    model = CONFIGS["gru"].build(VOCAB, nnx.Rngs(0))
    with pytest.raises(ValueError, match="token types"):
        model.hidden(random_tokens(1, 4), mask=masks.causal(), token_types=jnp.zeros((1, 4), int))


def test_state_stays_float32_under_bfloat16() -> None:
    model = GRUConfig(layers=1, width=8, dtype="bfloat16").build(VOCAB, nnx.Rngs(0))
    cache = model.init_cache(2, 8)
    states, after = model.step(random_tokens(2, 3), cache, jnp.broadcast_to(jnp.arange(3), (2, 3)))
    assert (cache.dtype, states.dtype, after.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
