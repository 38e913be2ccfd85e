"""`linear_token_nll` on eight devices: one device's numbers, and no all-gather in the compiled text."""

from __future__ import annotations

import contextlib
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lmobj import compat, losses, partition
from lmobj.losses._layout import Layout, active_layout

AXES = ("data", "fsdp", "sequence", "tensor")
CLASSES, WIDTH = 96, 8
BY_WIDTH = dict(partition.DEFAULT_RULES, batch=("data", "fsdp"))
"""A table cut over `fsdp` by its width."""
BY_CLASS = dict(BY_WIDTH, vocab=("tensor", "fsdp"))
REVERSED = dict(BY_WIDTH, vocab=("fsdp", "tensor"), batch=("fsdp", "data"), embed=())
SHARED = dict(BY_WIDTH, embed=("fsdp", "sequence"))
"""The devices that split a row's length share the table too."""


def mesh_of(shape: tuple[int, ...]) -> Mesh:
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 4)


def make_arrays(dtype: Any) -> tuple[jax.Array, ...]:
    """hidden, table, bias, targets, weights. Every third class, and the last four, are no targets."""
    keys = jax.random.split(jax.random.key(0), 5)
    return (
        jax.random.normal(keys[0], (8, 4, WIDTH), dtype),
        jax.random.normal(keys[1], (CLASSES, WIDTH), dtype),
        jax.random.normal(keys[2], (CLASSES,), dtype),
        jax.random.randint(keys[3], (8, 4), 0, 30) * 3,
        jax.random.uniform(keys[4], (8, 4), dtype),
    )


NAMES = (("batch", "length", None), ("vocab", "embed"), ("vocab",), ("batch", "length"), ("batch", "length"))


def loss(hidden: jax.Array, table: jax.Array, bias: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    nll = losses.linear_token_nll(
        hidden,
        table,
        targets,
        bias=bias,
        vocab_mask=jnp.arange(CLASSES) % 3 != 1,
        vocab_size=CLASSES - 4,
        soft_cap=3.0,
        label_smoothing=0.1,
        z_loss=0.1,
        block_size=4,
    )
    return jnp.sum(nll * weights)


value_and_grads = jax.value_and_grad(loss, argnums=(0, 1, 2))


@functools.cache
def on_one_device() -> Any:
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(value_and_grads)(*make_arrays(jnp.float64)))


def compile_for(
    shape: tuple[int, ...], rules: partition.Rules, *, active: bool = True
) -> tuple[jax.stages.Compiled, list[jax.Array]]:
    """The compiled value and gradients with every array stored by `rules`, and its arguments."""
    mesh = mesh_of(shape)
    at = [NamedSharding(mesh, partition.spec(names, rules)) for names in NAMES]
    arrays = [jax.device_put(x, s) for x, s in zip(make_arrays(jnp.float64), at, strict=True)]
    with jax.set_mesh(mesh), partition.rules(rules) if active else contextlib.nullcontext():
        # A function of its own: what jit has traced under other rules would be taken again.
        run = jax.jit(lambda *x: value_and_grads(*x), out_shardings=(NamedSharding(mesh, P()), tuple(at[:3])))
        return run.lower(*arrays).compile(), arrays


@pytest.mark.parametrize(
    ("shape", "rules"),
    [
        pytest.param((8, 1, 1, 1), BY_WIDTH, id="data"),
        pytest.param((1, 8, 1, 1), BY_WIDTH, id="fsdp"),
        pytest.param((1, 8, 1, 1), BY_CLASS, id="fsdp by class"),
        pytest.param((2, 1, 4, 1), BY_WIDTH, id="sequence"),
        pytest.param((2, 1, 4, 1), SHARED, id="sequence, with the table"),
        pytest.param((1, 1, 1, 8), BY_WIDTH, id="tensor"),
        pytest.param((2, 2, 1, 2), BY_WIDTH, id="data, fsdp and tensor"),
        pytest.param((2, 2, 1, 2), BY_CLASS, id="data, fsdp and tensor by class"),
        pytest.param((2, 2, 1, 2), REVERSED, id="data, fsdp and tensor, axes the other way round"),
        pytest.param((1, 2, 2, 2), SHARED, id="fsdp, sequence and tensor"),
    ],
)
def test_layouts_equal_one_device_and_gather_nothing(shape: tuple[int, ...], rules: partition.Rules) -> None:
    with jax.enable_x64(True):
        compiled, arrays = compile_for(shape, rules)
        text = str(compiled.as_text())
        assert "all-gather" not in text
        # What cuts both tokens and table sends the table round a ring instead.
        ring = [axis for axis in rules["embed"] + rules["vocab"] if axis != "tensor" and shape[AXES.index(axis)] > 1]
        assert ("collective-permute" in text) == bool(ring)
        for x, y in zip(jax.tree.leaves(compiled(*arrays)), jax.tree.leaves(on_one_device()), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


def test_without_rules_the_partitioner_gathers_under_fsdp() -> None:
    # What the test above looks for is there when nothing prevents it; the numbers are the same all the same.
    with jax.enable_x64(True):
        compiled, arrays = compile_for((1, 8, 1, 1), BY_WIDTH, active=False)
        assert "all-gather" in str(compiled.as_text())
        for x, y in zip(jax.tree.leaves(compiled(*arrays)), jax.tree.leaves(on_one_device()), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


def test_a_table_cut_by_width_is_turned_block_by_block() -> None:
    # Whole, before the loops, it would take the memory of another table and of another gradient.
    with jax.enable_x64(True):
        text = str(compile_for((1, 8, 1, 1), BY_WIDTH)[0].as_text())
        entry = text[text.index("\nENTRY") :]
        assert " all-to-all(" in text
        assert " all-to-all(" not in entry


@pytest.mark.parametrize("active", [True, False])
def test_under_tensor_devices_add_up_once_and_not_for_each_block(active: bool) -> None:
    with jax.enable_x64(True):
        text = str(compile_for((1, 1, 1, 8), BY_WIDTH, active=active)[0].as_text())
        bodies = set(re.findall(r"body=(%[\w.\-]+)", text))
        assert bodies
        inside = [re.search(rf"^{re.escape(body)} \(.*?^}}", text, re.M | re.S) for body in bodies]
        found = [body is not None and "all-reduce" in body[0] for body in inside]
        # Without rules the partitioner adds within the loops, which shows that the search finds what is there.
        assert any(found) != active


@pytest.mark.parametrize("block_size", [8, CLASSES])
def test_shard_map_sums_gradients_of_what_is_replicated(block_size: int) -> None:
    with jax.enable_x64(True):
        mesh = jax.make_mesh((4, 2), ("rows", "other"), axis_types=(AxisType.Auto,) * 2)
        hidden, table, bias, targets, weights = make_arrays(jnp.float64)

        def local(hidden: jax.Array, table: jax.Array, bias: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
            nll = losses.linear_token_nll(hidden, table, targets, bias=bias, block_size=block_size)
            return jnp.sum(nll * weights)

        def sharded(*arrays: jax.Array) -> Any:
            value, grads = jax.value_and_grad(local, argnums=(0, 1, 2))(*arrays)
            # check_vma (on by default) accepts P() only for what is the same on every shard.
            return jax.lax.psum(value, "rows"), grads

        specs = (P("rows"), P(), P(), P("rows"), P("rows"))
        run = jax.jit(jax.shard_map(sharded, mesh=mesh, in_specs=specs, out_specs=(P(), (P("rows"), P(), P()))))
        expected = jax.jit(jax.value_and_grad(local, argnums=(0, 1, 2)))(hidden, table, bias, targets, weights)
        got = run(hidden, table, bias, targets, weights)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


def test_shard_map_of_tokens_over_a_varying_table() -> None:
    with jax.enable_x64(True):
        mesh = jax.make_mesh((2,), ("rows",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
        hidden, table, bias, targets, _ = make_arrays(jnp.float64)

        def local(hidden: jax.Array, tables: jax.Array) -> jax.Array:
            return jnp.sum(losses.linear_token_nll(hidden, tables[0], targets, bias=bias, block_size=16))[None]

        run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P("rows")), out_specs=P("rows")))
        tables = jnp.stack([table, 2 * table])
        grad, grads = jax.jit(jax.grad(lambda *x: run(*x).sum(), argnums=(0, 1)))(hidden, tables)

        def both(hidden: jax.Array, tables: jax.Array) -> jax.Array:
            return sum(jnp.sum(losses.linear_token_nll(hidden, x, targets, bias=bias)) for x in tables)

        expected, expected_grads = jax.jit(jax.grad(both, argnums=(0, 1)))(hidden, tables)
        np.testing.assert_allclose(grad, expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(grads, expected_grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(batch=(("data", 2), ("fsdp", 3)), vocab=(("tensor", 2),), embed=(("fsdp", 3),)),
        Layout(batch=(("fsdp", 3), ("data", 2)), vocab=(("fsdp", 3), ("tensor", 2))),
        Layout(batch=(("data", 2),), length=(("sequence", 2),), vocab=(("tensor", 3),), embed=(("sequence", 2),)),
    ],
)
def test_parts_hold_runs_of_rows(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "constrain_to", lambda x, dims: x)
    x = jnp.arange(24.0).reshape(12, 2)
    np.testing.assert_array_equal(layout.merge_tokens(layout.split_tokens(x)), x)
    parts = layout.split_vocab(x)
    np.testing.assert_array_equal(layout.merge_vocab(parts), x)
    rows = 12 // layout.vocab_parts
    for g, t in np.ndindex(parts.shape[:2]):
        first = layout.part_numbers()[g, t] * rows
        np.testing.assert_array_equal(parts[g, t], x[first : first + rows])


def test_the_active_layout() -> None:
    assert active_layout((8, 4), (96, 8)) == Layout()
    with jax.set_mesh(mesh_of((2, 2, 1, 2))):
        assert active_layout((8, 4), (96, 8)) == Layout()
        with partition.rules(BY_WIDTH):
            cut = Layout((("data", 2), ("fsdp", 2)), (("tensor", 2),), (("fsdp", 2),))
            assert active_layout((8, 4), (96, 8)) == cut
            # What the mesh does not divide cannot be cut so: 6 rows over 4, 90 classes over 4, a width of 7 over 2.
            uneven = (((6, 4), (96, 8)), ((8, 4), (90, 8)), ((8, 4), (96, 7)))
            assert all(active_layout(tokens, table) == Layout() for tokens, table in uneven)
        with partition.rules(BY_CLASS):
            assert active_layout((8, 4), (96, 8)) == Layout(cut.batch, (("tensor", 2), ("fsdp", 2)))
    with jax.set_mesh(mesh_of((8, 1, 1, 1))), partition.rules(BY_WIDTH):
        assert active_layout((8, 4), (96, 8)) == Layout((("data", 8),))
    with jax.set_mesh(mesh_of((2, 1, 4, 1))), partition.rules(BY_WIDTH):
        assert active_layout((8, 4), (96, 8)) == Layout((("data", 2),), length=(("sequence", 4),))
        # A length that is not divided stays whole.
        assert active_layout((8, 3), (96, 8)) == active_layout((8,), (96, 8)) == Layout((("data", 2),))


def test_mesh_axes_are_those_that_the_partitioner_handles() -> None:
    with jax.set_mesh(mesh_of((2, 4, 1, 1))), partition.rules(BY_WIDTH):
        assert list(partition.mesh_axes("batch").items()) == [("data", 2), ("fsdp", 4)]
        assert partition.mesh_axes("vocab") == {}  # `tensor` has one device
        assert partition.mesh_axes("no such axis") == {}

        def inside(x: jax.Array) -> jax.Array:
            assert partition.mesh_axes("batch") == {"fsdp": 4}
            return x

        jax.jit(jax.shard_map(inside, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}))(jnp.zeros(2))
    assert partition.mesh_axes("batch") == {}


def test_varying_axes() -> None:
    assert compat.varying_axes(jnp.zeros(2), {"a": jnp.zeros(2)}, None) == frozenset()
    mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4], axis_types=(AxisType.Auto,) * 2)

    def inside(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
        assert compat.varying_axes(x) == {"a"}
        assert compat.varying_axes(x, y) == {"a", "b"}
        assert compat.varying_axes(z) == frozenset()
        x, y, nothing, z = compat.vary_together(x, y, None, z)
        assert nothing is None
        for array in (x, y, z):
            assert compat.varying_axes(array) == {"a", "b"}
        return x + y + z

    run = jax.shard_map(inside, mesh=mesh, in_specs=(P("a"), P("b"), P()), out_specs=P(("a", "b")))
    np.testing.assert_array_equal(
        jax.jit(run)(jnp.arange(2.0), jnp.arange(2.0) * 10, jnp.full(1, 100.0)), [100, 110, 101, 111]
    )
