"""Meshes, and where parameters, optimizer state and batches end up, on 8 fake devices."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from lmobj import partition
from lmobj.errors import UserError
from lmobj.train import optimizers as o
from lmobj.train import sharding as s
from lmobj.train.schedules import ConstantSchedule, make_schedule

RULES = s.make_rules()
D, F, V, LAYERS = 256, 512, 96, 3


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (D, F)), axes=("embed", "mlp"))
        self.bias = nnx.Param(jnp.zeros((F,)), axes=("mlp",))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.table = nnx.Param(jax.random.normal(rngs.params(), (V, D)), axes=("vocab", "embed"))
        self.blocks = nnx.vmap(Layer)(rngs.split(LAYERS))
        self.scale = nnx.Param(jnp.ones((D,)), axes=("embed",))
        self.count = nnx.Variable(jnp.zeros(()))


class Odd(nnx.Module):
    """A vocabulary of 95, which no even number divides, and a matrix without names."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.table = nnx.Param(jnp.ones((95, D)), axes=("vocab", "embed"))
        self.plain = nnx.Param(jnp.ones((4, 4)))


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    average: Any
    carried: Any


def abstract(model: type[nnx.Module]) -> Any:
    return nnx.eval_shape(lambda: model(nnx.Rngs(0)))


def pure(model: nnx.Module) -> dict[str, Any]:
    return {"model": nnx.to_pure_dict(nnx.state(model, nnx.Param))}


def make_state(optimizer: Any) -> State:
    params = pure(Model(nnx.Rngs(0)))
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(params), params, {"memory": jnp.zeros((8, 3))})


def mesh_of(data: int, fsdp: int, tensor: int) -> jax.sharding.Mesh:
    return s.make_mesh(s.MeshConfig(data, fsdp, tensor))


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (s.MeshConfig(), (8, 1, 1, 1, 1)),
        (s.MeshConfig(fsdp=4), (2, 4, 1, 1, 1)),
        (s.MeshConfig(data=1, fsdp=-1, tensor=2), (1, 4, 1, 1, 2)),
        (s.MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 1, 1, 2)),
        (s.MeshConfig(sequence=2, expert=2), (2, 1, 2, 2, 1)),
        (s.MeshConfig(data=1), (1, 1, 1, 1, 1)),
    ],
)
def test_mesh_sizes(config: s.MeshConfig, sizes: tuple[int, ...]) -> None:
    mesh = s.make_mesh(config)
    assert tuple(mesh.shape.values()) == sizes
    assert mesh.axis_names == s.MESH_AXES == ("data", "fsdp", "expert", "sequence", "tensor")
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert tuple(s.make_mesh(s.MeshConfig(), jax.devices()[:2]).shape.values()) == (2, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: s.make_mesh(s.MeshConfig(fsdp=3)), r"mesh\.fsdp=3.*does not divide the 8 devices"),
        (lambda: s.make_mesh(s.MeshConfig(data=4, fsdp=4)), "multiply to 16"),
        (lambda: s.MeshConfig(data=0), r"mesh\.data is 0"),
        (lambda: s.MeshConfig(fsdp=-1), "at most one axis of -1"),
        (lambda: s.make_rules({"mlp": ["tensors"]}), r"sharding\.mlp.*'tensors'"),
        (lambda: s.check_batch(12, mesh_of(2, 4, 1), RULES), r"a multiple of 8\.$"),
        (
            lambda: s.check_batch(8, mesh_of(4, 1, 2), RULES, accumulate=4),
            "of 16, or a train.accumulate that divides 2",
        ),
    ],
)
def test_refusals(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


def test_batches_that_split_are_accepted() -> None:
    s.check_batch(16, mesh_of(2, 2, 2), RULES, accumulate=4)
    mesh = mesh_of(2, 4, 1)
    placed = jax.device_put({"a": np.zeros((8, 3)), "b": np.zeros(8)}, s.batch_sharding(mesh, RULES))
    assert placed["a"].addressable_shards[0].data.shape == (1, 3)
    assert placed["b"].addressable_shards[0].data.shape == (1,)


def test_parameters_follow_the_rules() -> None:
    expected = {
        "table": P(("tensor",), ("fsdp",)),
        "blocks": {"kernel": P(None, ("fsdp",), ("tensor",)), "bias": P(None, ("tensor",))},
        "scale": P(("fsdp",)),
    }
    mesh = mesh_of(2, 2, 2)
    for models in (abstract(Model), nnx.state(abstract(Model)), Model(nnx.Rngs(0))):
        got = s.parameter_shardings({"model": models}, mesh, RULES)
        assert jax.tree.map(lambda x: x.spec, got.tree) == {"model": expected}
        assert got.replicated == ()
    assert jax.tree.structure(got.tree) == jax.tree.structure(pure(Model(nnx.Rngs(0))))
    assert s.logical_axes({"model": abstract(Model)}) == {
        "model": {
            "table": ("vocab", "embed"),
            "blocks": {"kernel": ("embed", "mlp"), "bias": ("mlp",)},
            "scale": ("embed",),
        }
    }
    other = s.parameter_shardings(abstract(Model), mesh, s.make_rules({"mlp": ("fsdp", "tensor"), "embed": ()}))
    assert other.tree["blocks"]["kernel"].spec == P(None, None, ("fsdp", "tensor"))


def test_what_cannot_be_sharded_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        got = s.parameter_shardings({"model": abstract(Odd)}, mesh_of(1, 4, 2), RULES)
    assert got.tree["model"]["table"].spec == P(None, ("fsdp",))
    assert got.tree["model"]["plain"].spec == P(None, None)
    assert len(got.replicated) == 2
    text = caplog.text
    assert "model/table (95, 256): dimension 0 stays whole, tensor = 2 does not divide it" in text
    assert "model/plain (4, 4) stays whole: it has no logical axes" in text
    assert s.parameter_shardings(abstract(Odd), mesh_of(8, 1, 1), RULES).replicated == ()
    with pytest.raises(UserError, match="'mlp'"):
        s.parameter_shardings(abstract(Model), mesh_of(8, 1, 1), {k: v for k, v in RULES.items() if k != "mlp"})


@pytest.mark.parametrize("config", [o.AdamW(), o.BertAdam(), o.Adafactor(), o.Muon(), o.Lamb()], ids=lambda c: c.name)
def test_optimizer_state_is_sharded_like_its_parameter(config: Any) -> None:
    mesh = mesh_of(1, 4, 2)
    axes = s.logical_axes({"model": abstract(Model)})
    optimizer = o.make_optimizer(config, make_schedule(ConstantSchedule(), 1), logical_axes=axes)
    shape = jax.eval_shape(lambda: make_state(optimizer))
    parameters = s.parameter_shardings({"model": abstract(Model)}, mesh, RULES)
    shardings = s.state_shardings(shape, parameters, mesh, RULES)
    assert shardings.params == parameters.tree
    assert shardings.average == parameters.tree
    assert shardings.step.spec == P()
    assert shardings.carried["memory"].spec == P(("data", "fsdp", "expert"))

    placed = dict(jax.tree_util.tree_flatten_with_path(shardings.opt_state)[0])
    kernel, factors = P(None, ("fsdp",), ("tensor",)), 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(shape.opt_state)[0]:
        spec = placed[path].spec
        if leaf.shape == (LAYERS, D, F):
            assert spec == kernel
        elif leaf.shape == (V, D):
            assert spec == P(("tensor",), ("fsdp",))
        elif leaf.shape == (LAYERS, D) and "v_row" in jax.tree_util.keystr(path):
            assert spec == P(None, ("fsdp",))
            factors += 1
        elif leaf.shape == (LAYERS, F) and "v_col" in jax.tree_util.keystr(path):
            assert spec == P(None, ("tensor",))
            factors += 1
        elif leaf.size <= LAYERS:
            assert all(entry is None for entry in spec)
    assert factors == (2 if isinstance(config, o.Adafactor) else 0)


def test_no_device_ever_holds_a_whole_large_parameter() -> None:
    mesh = mesh_of(1, 4, 2)
    models = {"model": abstract(Model)}
    optimizer = o.make_optimizer(o.AdamW(), make_schedule(ConstantSchedule(), 1), logical_axes=s.logical_axes(models))

    def build() -> State:
        return make_state(optimizer)

    shardings = s.state_shardings(jax.eval_shape(build), s.parameter_shardings(models, mesh, RULES), mesh, RULES)
    state = s.initialise(build, shardings, mesh, RULES)
    kernel = state.params["model"]["blocks"]["kernel"]
    for array in (kernel, state.opt_state[1].mu["model"]["blocks"]["kernel"]):
        assert {shard.data.shape for shard in array.addressable_shards} == {(LAYERS, D // 4, F // 2)}

    # Parameters, average and two moments: per device an eighth of the whole, and never a whole kernel on the way.
    with s.active(mesh, RULES):
        memory = jax.jit(build, out_shardings=shardings).lower().compile().memory_analysis()
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert memory.output_size_in_bytes < 1.05 * whole / 8
    assert memory.temp_size_in_bytes < kernel.nbytes / 2

    # The same values as without a mesh.
    plain = jax.jit(build)()
    np.testing.assert_array_equal(np.asarray(kernel), np.asarray(plain.params["model"]["blocks"]["kernel"]))


@pytest.mark.parametrize("config", [o.Lamb(), o.Adafactor(), o.Muon()], ids=lambda c: c.name)
def test_rules_that_look_at_whole_tensors_do_not_see_the_mesh(config: Any) -> None:
    """Two updates of a sharded state, against the same without a mesh, in float64."""
    with jax.enable_x64(True):
        mesh, models = mesh_of(1, 4, 2), {"model": abstract(Model)}
        optimizer = o.make_optimizer(
            config, make_schedule(ConstantSchedule(peak=0.1), 9), logical_axes=s.logical_axes(models)
        )

        @jax.jit
        def update(params: Any, state: Any) -> Any:
            updates, state = optimizer.update(jax.tree.map(jnp.sin, params), state, params)
            return jax.tree.map(jnp.add, params, updates), state

        rng = np.random.default_rng(0)
        start = jax.tree.map(lambda x: rng.normal(size=x.shape), pure(abstract(Model)))
        parameters = s.parameter_shardings(models, mesh, RULES)
        placed = s.state_shardings(jax.eval_shape(optimizer.init, start), parameters, mesh, RULES)
        whole, sharded = jax.tree.map(jnp.asarray, start), jax.device_put(start, parameters.tree)
        whole_state, sharded_state = optimizer.init(whole), jax.device_put(optimizer.init(whole), placed)
        for _ in range(2):
            whole, whole_state = update(whole, whole_state)
            with s.active(mesh, RULES):
                sharded, sharded_state = update(sharded, sharded_state)
        for left, right in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole), strict=True):
            assert left.dtype == jnp.float64
            np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=1e-10, atol=1e-12)


def test_rules_are_active_only_inside() -> None:
    mesh = mesh_of(1, 8, 1)
    with s.active(mesh, RULES):
        out = jax.jit(lambda x: partition.constrain(x * 2, ("batch", None)))(jnp.ones((8, 2)))
    assert {shard.data.shape for shard in out.addressable_shards} == {(1, 2)}
    assert partition.constrain(jnp.ones((3, 2)), ("batch", None)).sharding.num_devices == 1
