"""Flash attention on TPUs, its kernel interpreted: against the plain attention, on meshes, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lmobj import masks, partition
from lmobj.attention import _splash, attention
from lmobj.masks import AttentionMask

B, L, H, G, DH = 2, 256, 4, 2, 16
SEGMENTS = jnp.asarray([[1] * 100 + [2] * 100 + [0] * 56, [1] * 30 + [2] * 226])
OTHERS = jnp.asarray([[2] * 120 + [1] * 136, [2] * 10 + [1] * 200 + [0] * 46])
SOME = jnp.ones((B, L), bool)
CASES: dict[str, tuple[AttentionMask, dict[str, Any]]] = {
    "causal": (masks.causal(), {}),
    "window": (masks.sliding_window(130), {"soft_cap": 2.0}),
    "bidirectional": (masks.bidirectional(), {"scale": 0.3}),
    "packed": (masks.causal().packed(SEGMENTS), {"soft_cap": 2.0}),
    "packed window": (masks.sliding_window(40).packed(SEGMENTS), {}),
    "packed bidirectional": (masks.bidirectional().packed(SEGMENTS), {}),
    "segments of keys": (masks.bidirectional().packed(SEGMENTS % 2 + 1, OTHERS), {}),
}
REFUSED = {
    "a prefix": masks.prefix(SOME),
    "a permutation": masks.permutation(SEGMENTS, SEGMENTS),
    "a memory": masks.causal().with_memory(SOME[:, :128]),
    "an offset of queries": masks.causal().at(3),
}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_splash, "_INTERPRET", True)
    monkeypatch.setattr(_splash, "platform", lambda: "tpu")


def inputs(heads: int = H, groups: int = G, rows: int = B, dtype: Any = jnp.float32) -> tuple[Any, Any, Any, Any]:
    """Random q, k and v, and weights of the outputs."""
    shapes = [(rows, L, heads, DH), (rows, L, groups, DH), (rows, L, groups, DH), (rows, L, heads, DH)]
    keys = jax.random.split(jax.random.key(0), 4)
    return tuple(jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True))


def run(backend: Any, mask: AttentionMask, arrays: Any, **options: Any) -> tuple[Any, Any]:
    """The output and the gradients of q, k and v."""
    q, k, v, weights = arrays

    def loss(q: Any, k: Any, v: Any, mask: AttentionMask) -> tuple[Any, Any]:
        y = attention(q, k, v, mask, backend=backend, **options)
        return jnp.sum(y * weights), y

    gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v, mask)
    return y, gradients


@pytest.mark.parametrize(
    ("name", "groups"), [*((name, G) for name in CASES), ("packed", 1), ("packed", H)], ids=lambda part: str(part)
)
def test_equals_the_plain_attention(name: str, groups: int, interpreted: None) -> None:
    # Both compute in float32, in another order: sums of at most 256 products, each with a rounding of 2^-24. Rows of
    # padding (segment 0) are among those compared, gradients included.
    mask, options = CASES[name]
    ours, plain = (run(backend, mask, inputs(groups=groups), **options) for backend in ("splash", "xla"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=256 * 2**-24 * float(jnp.abs(b).max()))


def test_bfloat16_stays_bfloat16(interpreted: None) -> None:
    q, k, v, _ = inputs(dtype=jnp.bfloat16)
    y = attention(q, k, v, masks.causal(), backend="splash")
    assert y.dtype == jnp.bfloat16
    plain = attention(*(x.astype(jnp.float32) for x in (q, k, v)), masks.causal())
    np.testing.assert_allclose(np.asarray(y, np.float32), plain, rtol=2**-8, atol=2**-8)  # the output's own rounding


@pytest.mark.parametrize(("groups", "mesh"), [(2, (2, 2, 2)), (1, (4, 1, 2))])
def test_on_a_mesh_each_device_does_its_own_rows_and_heads(
    groups: int, mesh: tuple[int, int, int], interpreted: None
) -> None:
    devices = jax.make_mesh(mesh, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    arrays = inputs(groups=groups, rows=4)
    mask = masks.causal().packed(jnp.tile(SEGMENTS, (2, 1)))
    alone = run("splash", mask, arrays)
    rows = ("data", "fsdp")

    def lay(x: Any) -> Any:
        heads = "tensor" if x.ndim == 4 and x.shape[2] % mesh[2] == 0 else None
        return jax.device_put(x, NamedSharding(devices, PartitionSpec(rows, *((None, heads) if x.ndim == 4 else ()))))

    with jax.set_mesh(devices), partition.rules(partition.DEFAULT_RULES):
        given = jax.tree.map(lay, (arrays[:3], mask))

        def loss(qkv: Any, mask: AttentionMask) -> tuple[Any, Any]:
            y = attention(*qkv, mask, backend="splash")
            return jnp.sum(y * arrays[3]), y

        compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(*given).compile()
        gradients, y = compiled(*given)
    for a, b in zip(jax.tree.leaves((y, gradients)), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)  # with one key head its gradient is a sum over two devices
    moved = set(
        re.findall(r"(all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce)[\w-]*\(", compiled.as_text())
    )
    assert moved <= ({"all-reduce"} if groups == 1 else set())


@pytest.mark.parametrize("what", REFUSED)
def test_masks_that_the_kernel_does_not_know_are_refused(what: str) -> None:
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=f"this one has {what}"):
        attention(q, k, v, REFUSED[what], backend="splash")


@pytest.mark.parametrize(
    ("why", "dtype", "length", "options"),
    [
        ("takes no bias", "float32", L, {"bias": jnp.zeros((1, H, L, L))}),
        ("attention dropout is 0.1", "float32", L, {"dropout_rate": 0.1, "dropout_seeds": jnp.zeros((B,), "uint32")}),
        ("the inputs are float16", "float16", L, {}),
        ("a multiple of 128 tokens and these have 200", "float32", 200, {}),
        ("runs on TPUs and jax runs on cpu", "float32", L, {}),
    ],
)
def test_refuses_what_it_cannot_do(why: str, dtype: str, length: int, options: dict[str, Any]) -> None:
    q, k, v = (x[:, :length].astype(dtype) for x in inputs()[:3])
    with pytest.raises(ValueError, match=why):
        attention(q, k, v, masks.causal(), backend="splash", **options)


@pytest.mark.parametrize("backend", ["splash", "cudnn"])
def test_rows_cut_over_length_are_refused(backend: Any) -> None:
    devices = jax.make_mesh((2,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs()[:3])
    rules = {**partition.DEFAULT_RULES, "length": ("sequence",)}
    with (
        jax.set_mesh(devices),
        partition.rules(rules),
        pytest.raises(ValueError, match="cut rows over length and the mesh axis 'sequence'"),
    ):
        attention(q, k, v, masks.causal(), backend=backend)


def test_head_counts_that_do_not_fit_the_mesh_are_refused(interpreted: None) -> None:
    devices = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    q, k, v, _ = inputs(heads=12, groups=6)
    with (
        jax.set_mesh(devices),
        partition.rules({"batch": (), "length": (), "heads": ("tensor",)}),
        pytest.raises(ValueError, match="cuts heads over 4 devices and there are 6 key heads"),
    ):
        attention(q, k, v, masks.causal(), backend="splash")
