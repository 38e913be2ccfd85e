"""XLNet: both streams and the memory against the formulas written out, and what may flow from where to where."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import VOCAB, build
from flax import nnx

from lmobj import masks
from lmobj.models import Memory, TwoStreamModel, XLNetConfig

B, L, K, M, D, H = 3, 6, 3, 4, 8, 2
TINY = XLNetConfig(layers=2, width=D, heads=H, mlp_width=10, memory_length=M, vocab_multiple=8, norm_eps=1e-3)
EXACT = dataclasses.replace(TINY, dtype="float64", param_dtype="float64")
RANK = np.array([[2, -1, 0, 1, 3, -1], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]], np.int32)
PREDICT = np.array(
    [[2, 0, 4], [0, 5, 1], [3, 5, 0]], np.int32
)  # in row 1 place 0 and in row 2 place 5 come first: nothing seen
TYPES = np.array([[0, 0, 0, 1, 1, 2], [1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]], np.int32)
SEGMENTS = np.array([[1] * 6, [1] * 6, [1] * 4 + [0] * 2], np.int32)
BACKWARD = np.array([False, True, True])
VALID = np.array([[True] * 4, [False, False, True, True], [False] * 4])
TOKENS = np.random.default_rng(3).integers(1, VOCAB.size, (B, L), np.int32)


def content_mask() -> Any:
    return masks.permutation(jnp.asarray(RANK), jnp.asarray(RANK), sees_self=True).packed(jnp.asarray(SEGMENTS))


def query_mask() -> Any:
    rank, segments = (np.take_along_axis(x, PREDICT, 1) for x in (RANK, SEGMENTS))
    return masks.permutation(jnp.asarray(rank), jnp.asarray(RANK)).packed(jnp.asarray(segments), jnp.asarray(SEGMENTS))


def memory(dtype: Any = jnp.float64) -> Memory:
    states = np.random.default_rng(4).normal(size=(B, TINY.layers, M, D))
    return Memory(jnp.asarray(states, dtype), jnp.asarray(VALID))


@functools.partial(jax.jit, static_argnames=("graphdef", "reuse"))
def both(graphdef: Any, params: Any, tokens: Any, past: Any, dropout: Any = None, reuse: int | None = 2) -> Any:
    return nnx.merge(graphdef, params).two_streams(
        tokens,
        jnp.asarray(PREDICT),
        content_mask=content_mask(),
        query_mask=query_mask(),
        memory=past,
        token_types=jnp.asarray(TYPES),
        backward=jnp.asarray(BACKWARD),
        reuse=reuse,
        dropout=dropout,
    )


# The formulas, one row, query, key and head at a time.


def sinusoid(distance: float) -> np.ndarray:
    angle = distance / 10000 ** (np.arange(0, D, 2) / D)
    return np.concatenate([np.sin(angle), np.cos(angle)])


def layer_norm(x: np.ndarray, p: Any) -> np.ndarray:
    variance = x.var(-1, keepdims=True)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + TINY.norm_eps) * p["scale"] + p["bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attend(p: Any, biases: Any, x: np.ndarray, place: int, context: np.ndarray, sees: Any, row: int, clamp: int) -> Any:
    """One query at `place` of a row over context = memory and row; sees(j) says whether it sees key j."""
    width = D // H
    out = np.zeros(D)
    kinds = np.concatenate([np.zeros(len(context) - L, int), TYPES[row]])
    for h in range(H):
        head = slice(h * width, (h + 1) * width)
        q = (x @ p["query"]["kernel"])[head]
        logits, values = [], []
        for j in range(len(context)):
            if not sees(j):
                continue
            distance = np.clip(place - (j - (len(context) - L)), -clamp, clamp) * (-1 if BACKWARD[row] else 1)
            of_content = (q + biases["content"][head]) @ (context[j] @ p["key"]["kernel"])[head]
            of_position = (q + biases["position"][head]) @ (sinusoid(distance) @ p["position"]["kernel"])[head]
            other = int(kinds[j] != TYPES[row, place])
            of_segment = (q + biases["segment"][head]) @ p["segments"][other, head]
            logits.append((of_content + of_position + of_segment) / math.sqrt(width))
            values.append((context[j] @ p["value"]["kernel"])[head])
        if logits:
            weights = np.exp(np.asarray(logits) - np.max(logits))
            out[head] = weights / weights.sum() @ np.asarray(values)
    return out @ p["out"]["kernel"]


def reference(params: Any, past: Memory, clamp: int = 10**6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(content states, query states, the layers' inputs)."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    states, valid = np.asarray(past.states), np.asarray(past.valid)
    h = params["tokens"]["table"][TOKENS]
    g = np.broadcast_to(params["query_start"], (B, K, D))
    inputs = []
    for n in range(TINY.layers):
        p = jax.tree.map(lambda x, n=n: x[n], params["stack"])
        biases = p["attention"].get("biases", params.get("biases"))
        inputs.append(h)
        new_h, new_g = np.zeros(h.shape), np.zeros(g.shape)
        for b in range(B):
            context = np.concatenate([states[b, n], h[b]])

            def sees(i: int, j: int, itself: bool, b: int = b) -> bool:
                if j < M:
                    return valid[b, j]
                j -= M
                return SEGMENTS[b, i] == SEGMENTS[b, j] and (RANK[b, i] > RANK[b, j] or (itself and i == j))

            for i in range(L):
                seen = functools.partial(sees, i, itself=True)
                new_h[b, i] = h[b, i] + attend(p["attention"], biases, h[b, i], i, context, seen, b, clamp)
            for k in range(K):
                i = PREDICT[b, k]
                seen = functools.partial(sees, i, itself=False)
                new_g[b, k] = g[b, k] + attend(p["attention"], biases, g[b, k], i, context, seen, b, clamp)

        def finish(x: np.ndarray, p: Any = p) -> np.ndarray:
            x = layer_norm(x, p["attention_norm"])
            inner = gelu(x @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"])
            return layer_norm(x + inner @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"], p["mlp_norm"])

        h, g = finish(new_h), finish(new_g)
    return h, g, np.stack(inputs, axis=1)


@pytest.mark.parametrize(
    "variant", [{}, {"untie_biases": False, "clamp_distance": 2}], ids=["xlnet", "shared, clamped"]
)
def test_both_streams_and_memory_written_out(variant: dict[str, Any]) -> None:
    with jax.enable_x64(True):
        config = dataclasses.replace(EXACT, **variant)
        graphdef, params = build(config)
        past = memory()
        h, g, new = both(graphdef, params, TOKENS, past)
        expected_h, expected_g, inputs = reference(params, past, config.clamp_distance or 10**6)
        np.testing.assert_allclose(h, expected_h, rtol=0, atol=1e-12)
        np.testing.assert_allclose(g, expected_g, rtol=0, atol=1e-12)
        # Two of the row's tokens push out the two oldest; the third row is padded, but only after its second token.
        np.testing.assert_array_equal(new.states[:, :, :2], past.states[:, :, 2:])
        np.testing.assert_allclose(new.states[:, :, 2:], inputs[:, :, :2], rtol=0, atol=1e-12)
        np.testing.assert_array_equal(new.valid, [[True] * 4, [True] * 4, [False, False, True, True]])


def test_padding_is_not_remembered() -> None:
    graphdef, params = build(TINY)
    _, _, new = both(graphdef, params, TOKENS, memory(jnp.float32), reuse=None)
    np.testing.assert_array_equal(new.valid, [[True] * 4, [True] * 4, [True, True, False, False]])


def test_rows_read_one_after_the_other_equal_one_long_row() -> None:
    """A causal model whose memory holds everything does not see where a row ends."""
    with jax.enable_x64(True):
        config = dataclasses.replace(EXACT, memory_length=8, direction="backward", segments=False, query_stream=False)
        graphdef, params = build(config)
        model = nnx.merge(graphdef, params)
        tokens = jnp.asarray(np.random.default_rng(5).integers(1, VOCAB.size, (2, 12)))
        whole = jax.jit(lambda tokens: model.hidden(tokens, mask=masks.causal()))(tokens)
        step = jax.jit(lambda tokens, memory: model.recurrent(tokens, mask=masks.causal(), memory=memory))
        state, parts = model.init_memory(2), []
        for start in (0, 4, 8):
            part, state = step(tokens[:, start : start + 4], state)
            parts.append(part)
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=0, atol=1e-12)
        # The same weights with distances to both sides are the same model, because nobody looks ahead.
        either = nnx.merge(build(dataclasses.replace(config, direction="both"))[0], params)
        np.testing.assert_allclose(either.hidden(tokens, mask=masks.causal()), whole, rtol=0, atol=1e-12)


def test_backward_rows_are_forward_rows_reversed() -> None:
    """Negated distances undo the reversal of a row, so states come out reversed and otherwise the same."""
    with jax.enable_x64(True):
        graphdef, params = build(EXACT)
        model, types = nnx.merge(graphdef, params), jnp.asarray(TYPES)

        @jax.jit
        def states(tokens: Any, types: Any, backward: Any) -> Any:
            options = {"mask": masks.bidirectional(), "memory": None, "token_types": types}
            return model.recurrent(tokens, **options, backward=backward)[0]

        forward = states(TOKENS, types, jnp.zeros(B, bool))
        reversed_ = states(TOKENS[:, ::-1], types[:, ::-1], jnp.ones(B, bool))
        np.testing.assert_allclose(reversed_[:, ::-1], forward, rtol=0, atol=1e-12)
        assert float(jnp.abs(states(TOKENS, types, jnp.ones(B, bool)) - forward).max()) > 1e-3


def reaches(output: int) -> np.ndarray:
    """[B, outputs, L]: whether content (0) or query states (1) depend on the token at a place, by gradient."""
    graphdef, params = build(TINY)
    tokens = jnp.arange(B * L).reshape(B, L)  # all different: a row of the table's gradient belongs to one place
    direction = jax.random.normal(jax.random.key(5), (D,))

    def outputs(table: Any) -> Any:
        return both(graphdef, params | {"tokens": {"table": table}}, tokens, memory(jnp.float32))[output] @ direction

    jacobian = np.linalg.norm(jax.jacrev(outputs)(params["tokens"]["table"]), axis=-1) > 0
    own = jacobian[..., : B * L].reshape(B, -1, B, L)
    assert not any(own[b, :, other].any() for b in range(B) for other in range(B) if b != other)
    return own[np.arange(B), :, np.arange(B)]


def test_gradients_reach_exactly_what_the_order_shows() -> None:
    """Within a permutation whoever is seen indirectly is seen directly, so depth shows nothing new."""
    before = (RANK[:, :, None] > RANK[:, None]) & (SEGMENTS[:, :, None] == SEGMENTS[:, None])
    np.testing.assert_array_equal(reaches(0), before | np.eye(L, dtype=bool))
    np.testing.assert_array_equal(reaches(1), np.take_along_axis(before, PREDICT[..., None], 1))


def test_memory_informs_and_carries_no_gradient() -> None:
    graphdef, params = build(TINY)

    def remembered(params: Any) -> Any:
        return jnp.sum(both(graphdef, params, TOKENS, memory(jnp.float32))[2].states ** 2)

    assert all(not np.any(x) for x in jax.tree.leaves(jax.grad(remembered)(params)))

    def predicted(states: Any) -> Any:
        return jnp.sum(jnp.sin(both(graphdef, params, TOKENS, Memory(states, jnp.asarray(VALID)))[1]), axis=(1, 2))

    seen = np.linalg.norm(jax.jacrev(predicted)(memory(jnp.float32).states), axis=-1) > 0  # [B, B, n, M]
    for b in range(B):
        np.testing.assert_array_equal(seen[b, b], np.broadcast_to(VALID[b], (TINY.layers, M)))
        assert not np.delete(seen[b], b, axis=0).any()


def test_dropout_differs_between_streams_and_not_with_the_batch() -> None:
    """Both streams with the same input, the same view and every place: only their dropout can tell them apart."""
    graphdef, params = build(TINY)
    tokens = jnp.full((B, L), 7)
    params = params | {"query_start": params["tokens"]["table"][7]}
    places = jnp.broadcast_to(jnp.arange(L), (B, L))

    @jax.jit
    def streams(tokens: Any, dropout: Any) -> Any:
        rows = places[: len(tokens)]
        mask = masks.bidirectional()
        return nnx.merge(graphdef, params).two_streams(
            tokens, rows, content_mask=mask, query_mask=mask, memory=None, dropout=dropout
        )[:2]

    h, g = streams(tokens, None)
    np.testing.assert_allclose(h, g, rtol=0, atol=1e-5)
    seeds = jnp.asarray([3, 4, 5], jnp.uint32)
    dropped = streams(tokens, seeds)
    assert all(
        float(jnp.abs(x - y).max()) > 0.1 for x, y in ((dropped[0], dropped[1]), (dropped[0], h), (dropped[1], g))
    )
    for whole, part in zip(dropped, streams(tokens[1:], seeds[1:]), strict=True):
        np.testing.assert_allclose(whole[1:], part, rtol=0, atol=1e-5)


def test_protocol_and_initial_values() -> None:
    config = XLNetConfig(layers=2, width=32, heads=2, vocab_multiple=8)
    model = nnx.jit(lambda: config.build(VOCAB, nnx.Rngs(0)))()
    assert isinstance(model, TwoStreamModel)
    state = nnx.to_pure_dict(nnx.state(model))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        if "norm" in name or name.endswith("['bias']") or "head_bias" in name:
            np.testing.assert_array_equal(leaf, 1.0 if name.endswith("['scale']") else 0.0)
        else:
            # Of n values the standard deviation scatters by 1 / sqrt(2 n) of it; five times that.
            assert np.std(leaf) == pytest.approx(0.02, rel=5 / math.sqrt(2 * leaf.size)), name
    style, past = model.head_style, model.init_memory(2)
    assert (style.width, style.activation, style.norm_eps) == (32, "gelu", 1e-12)
    assert past is not None
    assert (past.states.shape, past.valid.any()) == ((2, 2, 384, 32), False)
    forgetful = dataclasses.replace(TINY, memory_length=0)
    none = nnx.merge(*build(forgetful))
    assert none.init_memory(2) is None
    tokens = jnp.ones((1, 3), int)
    assert jax.eval_shape(lambda: none.recurrent(tokens, mask=masks.causal(), memory=None))[1] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 9, "heads": 3}, r"model\.width is 9; .*even"),
        ({"width": 8, "heads": 3}, r"model\.heads is 3 and model\.width is 8"),
        ({"memory_length": -1}, r"model\.memory_length is -1; it must be at least 0"),
        ({"clamp_distance": 0}, r"model\.clamp_distance is 0; it must be at least 1"),
        ({"dropout": 1.0}, r"model\.dropout is 1\.0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        XLNetConfig(**settings)


def test_what_the_model_was_not_built_for_is_refused() -> None:
    config = dataclasses.replace(TINY, layers=1, direction="backward", segments=False, query_stream=False)
    model, tokens = nnx.merge(*build(config)), jnp.ones((1, 3), int)
    looking_ahead = (masks.bidirectional(), masks.prefix(tokens > 0), masks.permutation(tokens, tokens, sees_self=True))
    for mask in looking_ahead:
        with pytest.raises(ValueError, match=r"model\.direction is backward"):
            model.hidden(tokens, mask=mask)
    with pytest.raises(ValueError, match=r"model\.segments is false"):
        model.hidden(tokens, mask=masks.causal(), token_types=tokens)
    with pytest.raises(ValueError, match=r"model\.query_stream is false"):
        model.two_streams(tokens, tokens, content_mask=masks.causal(), query_mask=masks.causal(), memory=None)
