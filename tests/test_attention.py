"""Attention: against a slow float64 reference, with every mask, and what each backend refuses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmobj import masks
from lmobj.attention import attention
from lmobj.masks import AttentionMask
from lmobj.noise import dropout

B, L, H, G, DH = 2, 6, 4, 2, 8
SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 2]])
PREFIX = jnp.asarray([[1, 1, 0, 1, 0, 0], [1, 0, 1, 1, 1, 0]], bool)
RANK = jnp.asarray([[-1, 2, 0, 5, 1, 4], [3, 3, 1, -1, 0, 2]])
VALID = jnp.asarray([[False, True], [True, True]])
MASKS = {
    "causal": masks.causal(),
    "bidirectional": masks.bidirectional(),
    "window": masks.sliding_window(2),
    "packed": masks.causal().packed(SEGMENTS),
    "packed bidirectional": masks.bidirectional().packed(SEGMENTS),
    "packed prefix": masks.prefix(PREFIX).packed(SEGMENTS),
    "packed window": masks.sliding_window(2).packed(SEGMENTS),
    "permutation": masks.permutation(RANK, RANK, sees_self=True),
    "permutation without self": masks.permutation(RANK, RANK).packed(SEGMENTS),
    "memory": masks.bidirectional().with_memory(VALID),
}


def inputs(dtype: Any = jnp.float32, groups: int = G, queries: int = L, width: int = DH) -> tuple[Any, Any, Any]:
    """Random q, k and v."""
    shapes = [(B, queries, H, width), (B, L, groups, width), (B, L, groups, width)]
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True))


def reference(
    q: Any,
    k: Any,
    v: Any,
    allowed: Any,
    *,
    soft_cap: float | None = None,
    scale: float | None = None,
    bias: Any = 0.0,
) -> np.ndarray:
    """Attention of one row, head and query at a time, in float64. A query that sees nothing gets zeros."""
    q, k, v, allowed = (np.asarray(x, np.float64) for x in (q, k, v, allowed))
    bias = np.broadcast_to(np.asarray(bias, np.float64), (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    allowed = np.broadcast_to(allowed, (q.shape[0], 1, q.shape[1], k.shape[1]))
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(*q.shape[:3]):
        group = h // (q.shape[2] // k.shape[2])
        logits = k[b, :, group] @ q[b, i, h] * (q.shape[3] ** -0.5 if scale is None else scale) + bias[b, h, i]
        if soft_cap is not None:
            logits = soft_cap * np.tanh(logits / soft_cap)
        seen = allowed[b, 0, i] > 0
        if not seen.any():
            continue
        weights = np.exp(logits[seen] - logits[seen].max())
        out[b, i, h] = weights @ v[b, seen, group] / weights.sum()
    return out


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_mask_and_grouping(name: str, groups: int) -> None:
    with jax.enable_x64(True):
        q, k, v = inputs(jnp.float64, groups)
        y = attention(q, k, v, MASKS[name])
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, reference(q, k, v, MASKS[name].dense(L, L)), rtol=0, atol=1e-14)


def test_scale_and_soft_cap() -> None:
    with jax.enable_x64(True):
        q, k, v = inputs(jnp.float64)
        y = attention(q, k, v, masks.causal(), scale=0.7, soft_cap=1.5)
        expected = reference(q, k, v, masks.causal().dense(L, L), scale=0.7, soft_cap=1.5)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("rows", [1, B])
def test_bias_is_added_after_the_scale_and_before_cap_and_mask(rows: int) -> None:
    with jax.enable_x64(True):
        q, k, v = inputs(jnp.float64)
        bias = 3 * jax.random.normal(jax.random.key(1), (rows, H, L, L))
        for mask in (masks.causal(), MASKS["permutation without self"]):
            y = attention(q, k, v, mask, scale=0.7, soft_cap=2.5, bias=bias)
            expected = reference(q, k, v, mask.dense(L, L), scale=0.7, soft_cap=2.5, bias=bias)
            np.testing.assert_allclose(y, expected, rtol=0, atol=1e-14)


def test_first_of_a_permutation_gets_nothing_and_leaks_nothing() -> None:
    # Row 0: the token of rank -1 comes first. In row 1 it is the fourth. Neither sees anything, padding included.
    q, k, v = inputs()
    mask = masks.permutation(RANK, RANK)
    rows, first = jnp.arange(B), jnp.asarray([0, 3])
    y, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, mask)[rows, first], q, k, v)
    np.testing.assert_array_equal(y, 0)
    for gradient in pullback(jnp.ones_like(y)):
        np.testing.assert_array_equal(gradient, 0)


def test_cached_queries() -> None:
    with jax.enable_x64(True):
        q, k, v = inputs(jnp.float64)
        whole = attention(q, k, v, masks.sliding_window(3))
        last_two = attention(q[:, 4:], k, v, masks.sliding_window(3).at(4))
        np.testing.assert_allclose(last_two, whole[:, 4:], rtol=0, atol=1e-14)
        ragged = jnp.stack([q[0, 1:3], q[1, 3:5]])  # each row at its own offset
        y = attention(ragged, k, v, masks.sliding_window(3).at(jnp.asarray([1, 3])))
        np.testing.assert_allclose(y, jnp.stack([whole[0, 1:3], whole[1, 3:5]]), rtol=0, atol=1e-14)


def test_bfloat16_softmax_is_float32() -> None:
    q, k, v = inputs(jnp.bfloat16)
    equations = jax.make_jaxpr(attention)(q, k, v, masks.causal()).eqns
    by_name = {equation.primitive.name: equation.outvars[0].aval.dtype for equation in equations}
    assert by_name["exp"] == by_name["div"] == jnp.float32
    assert by_name["dot_general"] == jnp.bfloat16  # the last one, with the values
    assert attention(q, k, v, masks.causal()).dtype == jnp.bfloat16
    expected = reference(q, k, v, masks.causal().dense(L, L))
    # Rounding of the probabilities and of the output to bfloat16, 2^-9 of values up to max |v|, each.
    bound = 2 * 2**-9 * np.abs(np.asarray(v, np.float32)).max()
    np.testing.assert_allclose(np.asarray(attention(q, k, v, masks.causal()), np.float64), expected, rtol=0, atol=bound)


def test_dropout_is_on_the_probabilities() -> None:
    # With v = identity over keys, the output is the probabilities themselves.
    q, k, _ = inputs(groups=H)
    v = jnp.broadcast_to(jnp.eye(L, DH)[None, :, None], (B, L, H, DH))
    seeds = jnp.arange(B, dtype=jnp.uint32)
    plain = attention(q, k, v, masks.causal())[..., :L]
    dropped = attention(q, k, v, masks.causal(), dropout_rate=0.5, dropout_seeds=seeds, layer=3)[..., :L]
    expected = dropout(plain.swapaxes(1, 2), 0.5, seeds, layer=3, site=0).swapaxes(1, 2)
    np.testing.assert_allclose(dropped, expected, rtol=1e-6)
    assert 0.2 < float(jnp.mean(dropped[plain > 0] == 0)) < 0.8
    elsewhere = attention(q, k, v, masks.causal(), dropout_rate=0.5, dropout_seeds=seeds, layer=3, site=8)[..., :L]
    assert bool(jnp.any((elsewhere == 0) != (dropped == 0))), "two sites drop out the same"
    off = attention(q, k, v, masks.causal(), dropout_rate=0.5)[..., :L]
    np.testing.assert_array_equal(off, plain)


def test_rows_without_anything_to_see_are_finite() -> None:
    q, k, v = inputs()
    nothing = masks.bidirectional().packed(jnp.ones((B, L), int), jnp.full((B, L), 2))
    y, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, nothing), q, k, v)
    assert all(bool(jnp.isfinite(x).all()) for x in (y, *pullback(y)))


def test_gradients_in_float64() -> None:
    with jax.enable_x64(True):
        from jax.test_util import check_grads

        q, k, v = inputs(jnp.float64)
        seeds = jnp.arange(B, dtype=jnp.uint32)

        def f(q: Any, k: Any, v: Any) -> Any:
            mask = MASKS["packed prefix"]
            return attention(q, k, v, mask, soft_cap=2.0, dropout_rate=0.3, dropout_seeds=seeds)

        check_grads(f, (q, k, v), order=1, modes=["rev"], atol=1e-8, rtol=1e-8)


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match="H a multiple of G"):
        attention(q[:, :, :3], k, v, masks.causal())
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, k, v[:, :4], masks.causal())
    with pytest.raises(ValueError, match="'flash'"):
        attention(q, k, v, masks.causal(), backend="flash")  # type: ignore[arg-type]
    for shape in ((H, L, L), (B + 1, H, L, L), (B, G, L, L), (1, H, L, L + 1)):
        with pytest.raises(ValueError, match=r"expected \[2 or 1, 4, 6, 6\]"):
            attention(q, k, v, masks.causal(), bias=jnp.zeros(shape))


@pytest.mark.parametrize(
    ("why", "dtype", "width", "options"),
    [
        ("attention dropout is 0.1", "bfloat16", 8, {"dropout_rate": 0.1, "dropout_seeds": jnp.zeros((B,), "uint32")}),
        ("soft cap is 5.0", "bfloat16", 8, {"soft_cap": 5.0}),
        ("the inputs are float32", "float32", 8, {}),
        ("head width .* it is 12", "bfloat16", 12, {}),
        ("cannot give zeros to a token that sees nothing", "bfloat16", 8, {"mask": masks.permutation(RANK, RANK)}),
        ("runs on NVIDIA GPUs and jax runs on cpu", "bfloat16", 8, {}),
    ],
)
def test_cudnn_refuses_what_it_cannot_do(why: str, dtype: str, width: int, options: dict[str, Any]) -> None:
    q, k, v = inputs(dtype, width=width)
    with pytest.raises(ValueError, match=why):
        attention(q, k, v, **{"mask": masks.causal()} | options, backend="cudnn")


@pytest.mark.parametrize("name", [*(name for name in MASKS if not MASKS[name].may_be_empty), "cached", "bias"])
def test_cudnn_gets_the_whole_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed to jax for cuDNN means the same as the mask: jax's own XLA path, given it, agrees with ours."""
    handed: dict[str, Any] = {}
    ours = jax.nn.dot_product_attention

    def as_xla(*args: Any, implementation: str, **options: Any) -> Any:
        assert implementation == "cudnn"
        handed.update(options)
        return ours(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", as_xla)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q, k, v = inputs(jnp.bfloat16)
    mask: AttentionMask = MASKS.get(name, masks.causal())
    if name == "cached":
        q, mask = q[:, 2:], mask.at(2)
    bias = jax.random.normal(jax.random.key(1), (1, H, L, L)).astype(q.dtype) if name == "bias" else None
    y = attention(q, k, v, mask, backend="cudnn", bias=bias)
    expected = attention(q, k, v, mask, bias=bias)
    np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(expected, np.float32), rtol=0, atol=2**-6)
    by_flags = name in ("causal", "bidirectional", "window", "bias")
    assert (handed["mask"] is None) == by_flags
    assert handed["is_causal"] == (name in ("causal", "window", "bias"))
    assert (handed["bias"] is None) == (name != "bias")


def test_cudnn_refuses_odd_lengths_with_a_boolean_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q, k, v = (x[:, :5] for x in inputs(jnp.bfloat16))
    with pytest.raises(ValueError, match="even lengths"):
        attention(q, k, v, masks.causal().packed(SEGMENTS[:, :5]), backend="cudnn")
    with pytest.raises(ValueError, match="even lengths"):
        attention(q, k, v, masks.causal(), bias=jnp.zeros((1, H, 5, 5)), backend="cudnn")
