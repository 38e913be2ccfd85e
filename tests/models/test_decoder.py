"""The decoder: cached decoding, rotary positions, grouped queries, initial values."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CONFIGS, DECODERS, SEEDS, VOCAB, build, hidden, random_tokens
from flax import nnx

from lmobj import masks
from lmobj.errors import UserError
from lmobj.models import BlockModel, CachedModel, DecoderConfig, MoEConfig
from lmobj.models._layers import apply_rotary, rotary_angles

WINDOWED = dataclasses.replace(CONFIGS["llama"], window=3)
GPT = dataclasses.replace(CONFIGS["gpt2"], pre_norm=False, residual_init="plain")
CACHED = {**{name: CONFIGS[name] for name in DECODERS}, "windowed": WINDOWED, "gpt": GPT}


@functools.partial(jax.jit, static_argnames="graphdef")
def step(graphdef: Any, params: Any, tokens: Any, cache: Any, positions: Any) -> Any:
    return nnx.merge(graphdef, params).step(tokens, cache, positions)


@pytest.mark.parametrize("name", CACHED)
def test_cached_steps_equal_the_full_forward(name: str) -> None:
    """Rows of 3 and 5 prompt tokens, padded to 5 for the prefill, then one token at a time to 9 and 11."""
    with jax.enable_x64(True):
        graphdef, params = build(dataclasses.replace(CACHED[name], dtype="float64", param_dtype="float64"))
        model, tokens = nnx.merge(graphdef, params), random_tokens(2, 11)
        assert isinstance(model, CachedModel)
        full = hidden(graphdef, params, tokens, mask=masks.causal())
        prompts = np.array([3, 5])
        positions = np.where(np.arange(5) < prompts[:, None], np.arange(5), -1)
        out, cache = step(graphdef, params, tokens[:, :5], model.init_cache(2, 12), positions)
        for row, length in enumerate(prompts):
            np.testing.assert_allclose(out[row, :length], full[row, :length], rtol=0, atol=1e-12)
        for t in range(6):
            at = (prompts + t)[:, None]
            out, cache = step(graphdef, params, jnp.take_along_axis(tokens, at, axis=1), cache, at)
            for row in range(2):
                np.testing.assert_allclose(out[row, 0], full[row, prompts[row] + t], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", DECODERS)
def test_padding_is_not_cached(name: str) -> None:
    """A prompt that fills the cache, in a prefill padded beyond it: written padding would take the last slot."""
    graphdef, params = build(CONFIGS[name])
    model, tokens = nnx.merge(graphdef, params), random_tokens(2, 7)
    prompts = np.array([3, 5])
    positions = np.where(np.arange(7) < prompts[:, None], np.arange(7), -1)
    out, cache = step(graphdef, params, tokens, model.init_cache(2, 5), positions)
    full = hidden(graphdef, params, tokens, mask=masks.causal())
    for row, length in enumerate(prompts):
        np.testing.assert_allclose(out[row, :length], full[row, :length], rtol=0, atol=1e-5)
    if name != "gru":
        assert not np.any(cache.keys[0, :, 3:])


@pytest.mark.parametrize("name", DECODERS)
def test_cache_has_rows_first(name: str) -> None:
    model = CONFIGS[name].build(VOCAB, nnx.Rngs(0))
    assert all(x.shape[:2] == (5, 2) for x in jax.tree.leaves(model.init_cache(5, 8)))
    if name == "llama":  # two key heads of width 4, for four query heads
        assert model.init_cache(5, 8).keys.shape == (5, 2, 8, 2, 4)


def test_cache_beyond_max_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.max_length is 16"):
        CONFIGS["gpt2"].build(VOCAB, nnx.Rngs(0)).init_cache(1, 17)


def test_grouped_queries_equal_repeated_key_heads() -> None:
    with jax.enable_x64(True):
        grouped = dataclasses.replace(CONFIGS["llama"], dtype="float64", param_dtype="float64")
        graphdef, params = build(grouped)
        tokens = random_tokens(2, 9)
        expected = hidden(graphdef, params, tokens, mask=masks.causal())
        attention = params["stack"]["blocks"]["attention"]
        repeated = {
            name: {"kernel": np.repeat(attention[name]["kernel"].reshape(2, 16, 2, 4), 2, axis=2).reshape(2, 16, 16)}
            for name in ("key", "value")
        }
        blocks = params["stack"]["blocks"] | {"attention": attention | repeated}
        whole, _ = build(dataclasses.replace(grouped, kv_heads=None))
        found = hidden(whole, params | {"stack": {"blocks": blocks}}, tokens, mask=masks.causal())
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_rotary_equals_the_complex_product() -> None:
    # Su et al. 2021, section 3.2.1: the pair (x_i, x_{i + d/2}) as a complex number, times exp(j m theta_i).
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(1, 5, 2, 6))
        positions = np.array([[0, 1, 5, 70, 1000]])
        theta = 10000.0 ** (-2 * np.arange(3) / 6)
        turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * positions[0][:, None] * theta)[None, :, None]
        angles = rotary_angles(jnp.asarray(positions), 6, 10000.0, jnp.dtype("float64"))
        found = apply_rotary(jnp.asarray(x), angles)
        np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], axis=-1), rtol=0, atol=1e-13)


def test_rotary_decoder_knows_relative_positions_only() -> None:
    with jax.enable_x64(True):
        graphdef, params = build(dataclasses.replace(CONFIGS["llama"], dtype="float64", param_dtype="float64"))
        tokens = random_tokens(2, 9)
        positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
        here = hidden(graphdef, params, tokens, mask=masks.causal(), positions=positions)
        there = hidden(graphdef, params, tokens, mask=masks.causal(), positions=positions + 100)
        np.testing.assert_allclose(here, there, rtol=0, atol=1e-11)
        apart = hidden(graphdef, params, tokens, mask=masks.causal(), positions=2 * positions)
        assert float(jnp.abs(here - apart).max()) > 0.1


def test_window_of_the_model_narrows_the_mask() -> None:
    graphdef, params = build(WINDOWED)
    plain, _ = build(CONFIGS["llama"])
    tokens = random_tokens(2, 9)
    expected = hidden(plain, params, tokens, mask=masks.sliding_window(3))
    for mask in (masks.causal(), masks.sliding_window(7)):
        np.testing.assert_allclose(hidden(graphdef, params, tokens, mask=mask), expected, rtol=1e-6)
    narrower = hidden(graphdef, params, tokens, mask=masks.sliding_window(2))
    np.testing.assert_allclose(narrower, hidden(plain, params, tokens, mask=masks.sliding_window(2)), rtol=1e-6)
    with pytest.raises(ValueError, match="a window needs a causal mask"):
        hidden(graphdef, params, tokens, mask=masks.bidirectional())


@pytest.mark.parametrize("layers", [1, 2])
def test_block_states_are_those_of_the_layers(layers: int) -> None:
    """With one layer, what comes into the last is the embedding."""
    graphdef, params = build(dataclasses.replace(CONFIGS["llama"], layers=layers))
    assert isinstance(nnx.merge(graphdef, params), BlockModel)

    @jax.jit
    def both(params: Any) -> Any:
        model, given = nnx.merge(graphdef, params), {"mask": masks.causal(), "dropout": SEEDS[:2]}
        states = model.block_states(random_tokens(2, 5), **given)
        return (states.embedded, states.before_last, states.hidden), model.hidden_layers(random_tokens(2, 5), **given)

    states, each = both(params)
    for state, expected in zip(states, (each[0], each[-2], each[-1]), strict=True):
        np.testing.assert_allclose(state, expected, rtol=1e-6, atol=1e-6)


def test_further_blocks_are_like_the_models_but_for_experts() -> None:
    config = dataclasses.replace(CONFIGS["llama"], mlp_width=24, moe=MoEConfig(experts=4, experts_per_token=2))
    blocks = nnx.eval_shape(lambda: config.build(VOCAB, nnx.Rngs(0))).head_style.blocks
    assert blocks is not None
    stack = nnx.eval_shape(lambda: blocks.further(3).stack(nnx.Rngs(0)))
    assert stack.blocks.attention.key.kernel.shape == (3, 16, 8)
    assert stack.blocks.mlp.up.kernel.shape == (3, 16, 48), "as wide as the two experts of a token"


def test_token_types_are_refused() -> None:
    graphdef, params = build(CONFIGS["gpt2"])
    with pytest.raises(ValueError, match="no token types"):
        hidden(graphdef, params, random_tokens(1, 4), mask=masks.causal(), token_types=jnp.zeros((1, 4), int))


def test_initial_values_are_those_of_gpt2() -> None:
    # Radford et al. 2019, section 2.3: 0.02, and residual projections over sqrt(number of residual layers = 2 n).
    model = DecoderConfig(layers=8, width=128, heads=4, vocab_multiple=8).build(VOCAB, nnx.Rngs(0))
    blocks = model.stack.blocks
    samples = {
        0.02: [blocks.attention.query.kernel, blocks.mlp.up.kernel, model.positions.table],
        0.02 / 16**0.5: [blocks.attention.out.kernel, blocks.mlp.down.kernel],
    }
    for std, params in samples.items():
        for param in params:
            values = np.asarray(param[...])
            # At least 2^17 values: the sample's standard deviation is within 1% at five sigmas of 1 / sqrt(2 N) = 0.2%.
            assert values.size >= 2**17
            assert np.std(values) == pytest.approx(std, rel=0.01)
    assert not np.any(blocks.mlp.up.bias[...])
    assert np.all(np.asarray(model.norm.scale[...]) == 1)


def test_initial_values_are_those_of_gpt() -> None:
    # Radford et al. 2018, section 4.1: N(0, 0.02) throughout. GPT-2's code gives positions 0.01 instead.
    size: dict[str, Any] = {"layers": 8, "width": 128, "heads": 4, "vocab_multiple": 8}
    config = DecoderConfig(**size, pre_norm=False, residual_init="plain", position_init_std=0.01)
    model = config.build(VOCAB, nnx.Rngs(0))
    for param in (model.stack.blocks.attention.out.kernel, model.stack.blocks.mlp.down.kernel):
        assert np.std(np.asarray(param[...])) == pytest.approx(0.02, rel=0.01)
    assert np.std(np.asarray(model.positions.table[...])) == pytest.approx(0.01, rel=0.01)
    with pytest.raises(UserError, match=r"position_init_std is 0\.0"):
        DecoderConfig(position_init_std=0.0)


def test_norms_after_the_sums_leave_normalised_states() -> None:
    """The last thing that GPT does is a norm, whose scale and shift are 1 and 0 at first; GPT-2 has one more."""
    model = dataclasses.replace(GPT, init_std=0.5).build(VOCAB, nnx.Rngs(0))
    assert model.norm is None
    states = np.asarray(model.hidden_layers(random_tokens(2, 9), mask=masks.causal()))
    for layer in states[1:]:
        np.testing.assert_allclose(layer.mean(-1), 0, atol=1e-5)
        np.testing.assert_allclose(layer.std(-1), 1, rtol=1e-3)
    assert abs(states[0].std(-1) - 1).max() > 0.1


def test_default_widths_of_the_feed_forward_part() -> None:
    def up(**options: Any) -> Any:
        config = DecoderConfig(layers=1, width=48, heads=4, **options)
        return jax.eval_shape(lambda: config.build(VOCAB, nnx.Rngs(0))).stack.blocks.mlp.up.kernel.get_value().shape

    assert up() == (1, 48, 192)  # 4 * 48
    assert up(activation="swiglu") == (1, 48, 128)  # 8/3 * 48 = 128
    assert up(activation="swiglu", mlp_width=100) == (1, 48, 100)
