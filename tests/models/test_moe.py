"""Routing against a loop over tokens, and what may depend on what."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from lmobj import masks
from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.models import DecoderConfig, MoEConfig
from lmobj.models._layers import normal
from lmobj.models._moe import MoE

B, L, D, F, E = 3, 10, 6, 8, 4
PADDED = np.arange(L) >= np.array([L, 7, 0])[:, None]
"""The second row ends early, the third is empty."""


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def layer(**settings: Any) -> MoE:
    config = MoEConfig(**{"experts": E, "experts_per_token": 2, **settings})
    init = normal(0.7)
    sizes: dict[str, Any] = {"activation": "swiglu", "bias": True, "init": init, "out_init": init}
    return MoE(config, D, F, **sizes, param_dtype=jnp.dtype("float64"), rngs=nnx.Rngs(0))


def states(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(B, L, D))


def by_loops(moe: MoE, x: np.ndarray, padded: np.ndarray, capacity: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Token by token in reading order: the experts it prefers, as long as they have room for this row."""
    config = moe.config
    kernel = np.asarray(moe.router[...])
    weights = {name: np.asarray(getattr(moe.experts, name).kernel[...]) for name in ("gate", "up", "down")}
    y = np.zeros_like(x)
    sums: dict[str, Any] = {"counts": np.zeros(E), "probabilities": np.zeros(E), "squares": 0.0, "dropped": 0}
    for row in range(len(x)):
        room = [capacity] * E
        for t in range(x.shape[1]):
            if padded[row, t]:
                continue
            logits = x[row, t] @ kernel
            p = np.exp(logits) / np.exp(logits).sum()
            sums["probabilities"] += p
            sums["squares"] += np.log(np.exp(logits).sum()) ** 2
            best = sorted(range(E), key=lambda e: -logits[e])[: config.experts_per_token]
            whole = p[best].sum() if config.normalise else 1.0
            for e in best:
                sums["counts"][e] += 1
                if room[e] == 0:
                    sums["dropped"] += 1
                    continue
                room[e] -= 1
                gate = x[row, t] @ weights["gate"][e]
                inner = gate / (1 + np.exp(-gate)) * (x[row, t] @ weights["up"][e])
                y[row, t] += p[e] / whole * (inner @ weights["down"][e])
    return y, sums


@pytest.mark.parametrize(
    ("settings", "capacity"),
    [
        ({"capacity_factor": None}, L),
        ({"capacity_factor": 1.0}, 5),  # 2 * 10 / 4
        ({"capacity_factor": 0.5, "normalise": False}, 3),  # 2.5 rounded up
        ({"capacity_factor": 0.5, "normalise": False, "experts_per_token": 1}, 2),  # 1.25 rounded up
        ({"capacity_factor": 1.0, "experts_per_token": 3}, 8),  # 7.5 rounded up
    ],
    ids=str,
)
def test_a_layer_is_what_the_loops_say(settings: dict[str, Any], capacity: int) -> None:
    moe, x = layer(**settings), states()
    y, sums = jax.jit(lambda x: moe(x, jnp.asarray(~PADDED)))(x)
    expected, told = by_loops(moe, x, PADDED, capacity)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    for name, value in told.items():
        np.testing.assert_allclose(getattr(sums, name), value, rtol=1e-12, err_msg=name)
    assert (told["dropped"] > 0) == (settings["capacity_factor"] is not None)


def test_gradients_match_finite_differences() -> None:
    moe, x = layer(capacity_factor=0.5), states()
    graph, params = nnx.split(moe)
    weights = jnp.asarray(np.random.default_rng(5).normal(size=x.shape))

    def loss(params: Any, x: Any) -> Any:
        y, sums = nnx.merge(graph, params)(x, jnp.asarray(~PADDED))
        return jnp.sum(y * weights) + sums.squares + jnp.sum(sums.probabilities * jnp.arange(E))

    check_grads(jax.jit(loss), (params, jnp.asarray(x)), order=1, modes=["rev"], eps=1e-6, rtol=1e-6)


def test_a_token_depends_on_no_later_one_and_on_no_other_row() -> None:
    """With so little room that places run out; first choices of all before second ones would leak the future."""
    moe, x = layer(capacity_factor=0.5), states()
    routed = jnp.ones((B, L), bool)
    run = jax.jit(lambda x: moe(x, routed)[0])
    before = np.asarray(run(x))
    for t in range(1, L):
        later = x.copy()
        later[:, t:] = states(t + 10)[:, t:]
        np.testing.assert_array_equal(np.asarray(run(later))[:, :t], before[:, :t])
    other = x.copy()
    other[1:] = states(2)[1:]
    np.testing.assert_array_equal(np.asarray(run(other))[0], before[0])


VOCAB = Vocabulary(32, pad=0, unk=1, bos=2, eos=3)
DECODER = DecoderConfig(
    layers=2, width=8, heads=2, max_length=12, positions="rotary", dtype="float64", param_dtype="float64",
    init_std=0.5, moe=MoEConfig(experts=4, capacity_factor=None),
)  # fmt: skip


@pytest.mark.slow
def test_without_a_bound_packed_documents_are_worth_what_they_are_alone() -> None:
    model = DECODER.build(VOCAB, nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(4, 32, (1, 12)))
    segments = jnp.asarray([[1] * 5 + [2] * 7])
    positions = jnp.asarray([[*range(5), *range(7)]])
    packed = model.hidden(tokens, mask=masks.causal().packed(segments), positions=positions)
    alone = [model.hidden(part, mask=masks.causal()) for part in (tokens[:, :5], tokens[:, 5:])]
    np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), rtol=1e-10, atol=1e-12)

    tight = dataclasses.replace(DECODER, moe=MoEConfig(experts=4, capacity_factor=0.5)).build(VOCAB, nnx.Rngs(0))
    crowded = tight.hidden(tokens, mask=masks.causal().packed(segments), positions=positions)
    assert np.max(np.abs(crowded - packed)) > 1e-3  # documents that share room do not


@pytest.mark.slow
def test_cached_decoding_is_the_dropless_forward_pass() -> None:
    model = DECODER.build(VOCAB, nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(4, 32, (2, 9)))
    whole = model.hidden(tokens, mask=masks.causal())
    cache, parts = model.init_cache(2, 9), []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        positions = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
        y, cache = model.step(tokens[:, start:stop], cache, positions)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 1}, r"model\.moe\.experts is 1; it must be at least 2"),
        ({"experts_per_token": 5}, r"model\.moe\.experts_per_token is 5; it must be from 1 to .* 4"),
        ({"capacity_factor": 0.0}, r"model\.moe\.capacity_factor is 0\.0; it must be a finite number above 0"),
        ({"experts_per_token": 1}, r"model\.moe\.normalise is true and model\.moe\.experts_per_token is 1"),
    ],
    ids=str,
)
def test_settings_that_no_router_can_have(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MoEConfig(**{"experts": 4, **settings})
