"""The objective contract, over every registered objective: what holds for one holds for all.

Float64 wherever a claim is about exactness, so that a real error cannot hide in rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from lmobj import objectives, partition
from lmobj.objectives import Context, Example
from lmobj.train.sharding import MeshConfig, batch_sharding, make_mesh, parameter_shardings, state_shardings
from tests.objectives.contract import (
    BATCH,
    CASES,
    LENGTH,
    VOCAB,
    Bench,
    blank_rows,
    norm_gap,
    pad_columns,
    pad_rows,
    take_rows,
)

EXACT = 1e-10


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@functools.cache
def bench_of(name: str) -> Bench:
    return Bench(CASES[name])


FULL_CASES = [name for name, case in CASES.items() if not case.variant]
"""Without the variants, which are tested where the corruption matters."""
SYSTEMS = ["causal_lm", "masked_lm", "permutation_lm", "replaced_token_detection"]
"""One of each kind of objective and model. What takes a program of its own is slow for the others, their relatives."""


SLOW = ["causal_lm/experts", "denoising_autoencoder/decoder"]
"""Slow tests altogether; what is particular to them is in their own files."""


def _param(*values: Any, slow: bool = False) -> Any:
    """A case and perhaps a value."""
    marks = [pytest.mark.slow] if slow or values[0] in SLOW else []
    return pytest.param(*values, marks=marks, id="-".join(map(str, values)))


def cases(names: list[str], slow: bool = False) -> pytest.MarkDecorator:
    """Each of the cases; with `slow` all but the systems as slow tests."""
    params = [_param(name, slow=slow and name not in SYSTEMS) for name in names]
    return pytest.mark.parametrize("bench", params, indirect=True)


def cases_with(
    argument: str, quick: list[Any], more: list[Any], names: list[str], most: list[Any]
) -> pytest.MarkDecorator:
    """Each of the cases with each value, the systems also with the `most`; all but the systems with the `quick` ones as
    slow tests."""
    pairs = [
        _param(name, value, slow=name not in SYSTEMS or value not in quick)
        for name in names
        for value in quick + more + (most if name in SYSTEMS else [])
    ]
    return pytest.mark.parametrize(("bench", argument), pairs, indirect=["bench"])


@pytest.fixture(params=[_param(name) for name in CASES])
def bench(request: pytest.FixtureRequest) -> Bench:
    return bench_of(request.param)


full_cases = cases(FULL_CASES)
packed_cases = cases([name for name in FULL_CASES if CASES[name].packed])
systems = cases(SYSTEMS)


def test_every_registered_objective_has_a_case() -> None:
    assert {name.split("/")[0] for name in CASES} == set(objectives.REGISTRY)


@pytest.mark.slow
@systems
def test_jit_equals_eager(bench: Bench) -> None:
    with jax.disable_jit():
        eager, _ = bench.loss(bench.params, bench.batch, bench.key)
    np.testing.assert_allclose(bench.reference[0], float(eager), rtol=EXACT)


@full_cases
def test_gradients_match_finite_differences(bench: Bench) -> None:
    """Along a random direction of each parameter. Dropout is fixed by the key, so the loss is smooth."""
    leaves, tree = jax.tree.flatten(bench.params)
    step = 1e-5
    for index, (leaf, gradient) in enumerate(zip(leaves, jax.tree.leaves(bench.reference[1]), strict=True)):
        direction = np.random.default_rng(index).normal(size=leaf.shape)
        direction /= np.linalg.norm(direction)

        def at(size: float, index: int = index, direction: Any = direction) -> float:
            moved = [x + size * direction if i == index else x for i, x in enumerate(leaves)]
            return float(bench.value_and_grad(tree.unflatten(moved), bench.batch, bench.key)[0][0])

        slope = np.sum(np.asarray(gradient) * direction)
        np.testing.assert_allclose((at(step) - at(-step)) / (2 * step), slope, rtol=1e-6, atol=1e-8)


@full_cases
def test_no_parameter_is_forgotten(bench: Bench) -> None:
    """Every parameter that the objective can reach has a gradient somewhere."""
    silent = [
        jax.tree_util.keystr(path)
        for path, grad in jax.tree_util.tree_leaves_with_path(bench.reference[1])
        if not np.any(np.asarray(grad))
    ]
    assert [path for path in silent if not any(part in path for part in bench.case.unused)] == []


@systems
def test_vmap_over_keys_equals_each(bench: Bench) -> None:
    keys = jax.random.split(bench.key, 2)
    together = jax.jit(jax.vmap(lambda key: bench.loss(bench.params, bench.batch, key)[0]))(keys)
    each = [bench.value_and_grad(bench.params, bench.batch, key)[0][0] for key in keys]
    np.testing.assert_allclose(together, np.asarray(each), rtol=EXACT)


@pytest.mark.parametrize(
    ("bench", "mapped"),
    [_param(name, "shard_map", slow=name not in SYSTEMS) for name in CASES]
    + [_param(name, "pmap", slow=True) for name in SYSTEMS],
    indirect=["bench"],
)
def test_mapped_shares_add_up_to_the_whole(bench: Bench, mapped: str) -> None:
    """Each device's loss is its share under one global denominator: shares and their gradients sum to the whole."""
    axis = "rows"
    loss = objectives.loss_fn(bench.objective, bench.graphs, VOCAB, axis_name=axis)
    if mapped == "pmap":
        rows = jax.tree.map(lambda x: x.reshape(8, BATCH // 8, *x.shape[1:]), bench.batch)
        grad = jax.pmap(jax.value_and_grad(loss, has_aux=True), axis_name=axis, in_axes=(None, 0, None))
        (shares, _), grads = grad(bench.params, rows, bench.key)
        # Added up on the host: a collective for each parameter, all in flight at once, can starve the CPU backend.
        total, gradient = np.sum(shares), jax.tree.map(lambda g: np.sum(np.asarray(g), 0), grads)
    else:
        mesh = Mesh(np.asarray(jax.devices()[:8]), (axis,))

        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(axis), PartitionSpec()),
            out_specs=PartitionSpec(),
        )
        def total_of(params: Any, batch: Any, key: Any) -> Any:
            return jax.lax.psum(loss(params, batch, key)[0], axis)

        share = (lambda *given: (total_of(*given), {})) if bench.case.variant else jax.value_and_grad(total_of)
        total, gradient = jax.jit(share)(bench.params, bench.batch, bench.key)
    np.testing.assert_allclose(float(total), bench.reference[0], rtol=EXACT)
    assert norm_gap(gradient, bench.reference[1]) < EXACT


@cases_with("accumulate", [4], [], FULL_CASES, most=[2])
def test_microbatches_equal_the_batch(bench: Bench, accumulate: int) -> None:
    """Unequal weights per row, dropout on: the update is that of the whole batch."""
    whole, loss = bench.trained
    split, split_loss = bench.train(bench.program(accumulate), steps=2)
    np.testing.assert_allclose(split_loss, loss, rtol=EXACT)
    change = lambda state: jax.tree.map(jnp.subtract, state.params, bench.params)  # noqa: E731
    assert norm_gap(change(split), change(whole)) < 1e-12 * 1e2  # the difference of parameters loses two digits


def _on_mesh(bench: Bench, config: MeshConfig, steps: int) -> tuple[Any, list[float], str]:
    mesh = make_mesh(config)
    program = bench.program()
    rows = batch_sharding(mesh, partition.DEFAULT_RULES)
    with jax.set_mesh(mesh), partition.rules(partition.DEFAULT_RULES):
        shardings = parameter_shardings(nnx.eval_shape(lambda: _merged(bench)), mesh, partition.DEFAULT_RULES)
        placed = jax.tree.map(jax.device_put, bench.params, shardings.tree)
        state, losses = program.init(placed, BATCH), []
        whole = state_shardings(jax.eval_shape(lambda: state), shardings, mesh, partition.DEFAULT_RULES)
        state = jax.device_put(state, whole)
        batches = [jax.device_put(bench.case.make(first_row=i * BATCH), rows) for i in range(steps)]
        step = jax.jit(program.train_step, out_shardings=(whole, None)).lower(state, {}, batches[0]).compile()
        for batch in batches:
            state, metrics = step(state, {}, batch)
            losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return state, losses, step.as_text()


MESHES = {
    "fsdp sequence tensor": MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
    "data": MeshConfig(data=8),
    "data sequence": MeshConfig(data=2, sequence=4),
    "data fsdp tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp": MeshConfig(data=1, fsdp=8),
}


@cases_with("shape", list(MESHES)[:1], list(MESHES)[1:-1], FULL_CASES, most=list(MESHES)[-1:])
def test_layouts_equal_one_device(bench: Bench, shape: str) -> None:
    alone, losses = bench.trained
    state, sharded, text = _on_mesh(bench, MESHES[shape], steps=2)
    np.testing.assert_allclose(sharded, losses, rtol=EXACT)
    assert norm_gap(jax.device_get(state.params), alone.params) < EXACT
    if shape == "data":
        # Pure data parallelism moves gradients and scalars, by all-reduce; gathering anything would mean that the
        # partitioner lost track of the rows.
        assert "all-reduce" in text
        moved = set(re.findall(r"= \S+ (all-gather|all-to-all|collective-permute)\(", text))
        assert moved <= ({"all-gather"} if bench.case.gathers else set())


def test_padding_changes_nothing(bench: Bench) -> None:
    """Columns of padding after the row, and empty rows after the batch."""
    batch = bench.batch if bench.case.placed else pad_rows(bench.batch, 4)
    if bench.case.padded:
        batch = pad_columns(batch, 8)
    (loss, _), grads = bench.value_and_grad(bench.params, batch, bench.key)
    np.testing.assert_allclose(float(loss), bench.reference[0], rtol=EXACT)
    for role in grads:
        assert norm_gap(grads[role], bench.reference[1][role]) < EXACT


@cases([name for name, case in CASES.items() if not case.placed])
def test_masked_rows_equal_the_subset(bench: Bench) -> None:
    """Rows whose tokens are all padding weigh nothing: the loss is that of the other rows alone."""
    keep = jnp.asarray([0, 2, 5, 6])
    dropped = jnp.asarray([r for r in range(BATCH) if r not in (0, 2, 5, 6)])
    (masked, _), _ = bench.value_and_grad(bench.params, blank_rows(bench.batch, dropped), bench.key)
    subset = pad_rows(take_rows(bench.batch, keep), len(dropped))  # which changes nothing, as was shown above
    (alone, _), _ = bench.value_and_grad(bench.params, subset, bench.key)
    np.testing.assert_allclose(float(masked), float(alone), rtol=EXACT)


@cases([name for name, case in CASES.items() if not case.placed])
def test_row_order_changes_nothing(bench: Bench) -> None:
    """Noise and dropout belong to the row, not to its place in the batch."""
    (loss, _), grads = bench.value_and_grad(bench.params, take_rows(bench.batch, [3, 1, 0, 2, 7, 6, 4, 5]), bench.key)
    np.testing.assert_allclose(float(loss), bench.reference[0], rtol=EXACT)
    assert norm_gap(grads, bench.reference[1]) < EXACT


def test_empty_batch_is_finite(bench: Bench) -> None:
    empty = jax.tree.map(jnp.zeros_like, bench.batch)
    (loss, metrics), grads = bench.value_and_grad(bench.params, empty, bench.key)
    assert float(loss) == 0
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((metrics, grads)))


@cases(FULL_CASES, slow=True)
def test_bfloat16_is_finite_and_close(bench: Bench) -> None:
    loss, grads = bench.in_bfloat16()
    assert all(np.all(np.isfinite(np.asarray(x, np.float32))) for x in jax.tree.leaves(grads))
    # bfloat16 keeps 8 bits: 2 layers of rounding stay well inside 5%.
    np.testing.assert_allclose(float(loss), bench.reference[0], rtol=0.05)


def _corrupted(bench: Bench, batch: Any) -> tuple[Example, Context]:
    noise_keys, model_keys = objectives.step_keys(bench.key, batch["row_ids"], 0)
    ctx = Context(model_keys, 0, VOCAB, train=False)
    return bench.objective.corrupt(noise_keys, batch, ctx), ctx


def _fragments(example: Example) -> Example:
    """Each document of each row in a row of its own, moved to the row's start, with the noise it had when packed."""
    segments = np.asarray(example.mask.segment_ids)
    parts = [(r, s) for r in range(len(segments)) for s in range(1, segments[r].max() + 1)]
    shift = np.asarray([np.flatnonzero(segments[r] == s)[0] for r, s in parts])
    row = np.asarray([r for r, _ in parts])
    index = np.minimum(shift[:, None] + np.arange(LENGTH), LENGTH - 1)
    inside = (shift[:, None] + np.arange(LENGTH) < LENGTH) & (
        np.take_along_axis(segments[row], index, 1) == np.asarray([s for _, s in parts])[:, None]
    )

    def move(x: jax.Array) -> jax.Array:
        return jnp.where(inside, jnp.take_along_axis(x[row], jnp.asarray(index), 1), 0)

    where = (
        jnp.broadcast_to(jnp.arange(LENGTH), (len(segments), LENGTH)) if example.predict is None else example.predict
    )
    own = np.take_along_axis(segments[row], np.asarray(where)[row], 1) == np.asarray([s for _, s in parts])[:, None]
    changes: dict[str, Any] = {
        "mask": example.mask.packed(jnp.asarray(inside, jnp.int32)),
        "positions": move(example.positions),
    }
    if example.predict is None:
        changes |= {"targets": move(example.targets), "weights": move(example.weights)}
        changes["extra"] = {name: move(x) for name, x in example.extra.items() if x.shape == segments.shape}
    else:
        changes |= {
            "targets": example.targets[row],
            "weights": example.weights[row] * own,
            "predict": jnp.where(own, where[row] - shift[:, None], 0),
        }
    return dataclasses.replace(example, inputs=move(example.inputs), **changes)


@packed_cases
def test_packed_row_equals_its_documents(bench: Bench) -> None:
    """A document's loss is the same packed among others or alone in a row."""
    if not bench.case.per_document:
        pytest.skip("this objective reads more than one document at once")
    example, ctx = _corrupted(bench, bench.batch)
    models = _merged(bench)
    terms = jax.jit(lambda example: bench.objective.terms(models, example, (), ctx))
    packed, alone = terms(example), terms(_fragments(example))
    for name in packed.sums:
        assert float(packed.sums[name]) > 1
        np.testing.assert_allclose(float(alone.sums[name]), float(packed.sums[name]), rtol=EXACT)


@packed_cases
def test_predictions_see_what_they_may_and_nothing_else(bench: Bench) -> None:
    """By gradient: which input positions does the loss at each single prediction depend on?

    The position table tells input positions apart: each row of the batch gets positions of its own.
    """
    example, ctx = _corrupted(bench, take_rows(bench.batch, [0, 1, 2, 3]))
    example = dataclasses.replace(example, positions=jnp.broadcast_to(jnp.arange(LENGTH), example.inputs.shape))
    path = _position_table(bench.params["model"])

    @jax.jit
    def reach(row: Any, slot: Any) -> Any:
        """[L]: size of the gradient of one prediction's loss with respect to each position's vector."""
        weights = jnp.zeros_like(example.weights).at[row, slot].set(1.0)

        def loss(table: Any) -> Any:
            models = _merged(bench, model=_replaced(bench.params["model"], path, table))
            terms = bench.objective.terms(models, dataclasses.replace(example, weights=weights), (), ctx)
            return sum(terms.sums.values())

        return jnp.linalg.norm(jax.grad(loss)(_at(bench.params["model"], path)), axis=-1)[:LENGTH]

    segments = np.asarray(example.mask.segment_ids)
    slots = (
        np.broadcast_to(np.arange(LENGTH), segments.shape) if example.predict is None else np.asarray(example.predict)
    )
    checked = 0
    for row, slot in zip(*np.nonzero(np.asarray(example.weights)), strict=True):
        at = slots[row, slot]
        allowed = segments[row] == segments[row, at]
        if not bench.case.sees_later:
            allowed &= np.arange(LENGTH) <= at
        np.testing.assert_array_equal(np.asarray(reach(row, slot)) > 0, allowed, err_msg=f"row {row}, position {at}")
        checked += 1
    assert checked >= 8


def _merged(bench: Bench, **changed: Any) -> dict[str, nnx.Module]:
    return {role: nnx.merge(graph, {**bench.params, **changed}[role]) for role, graph in bench.graphs.items()}


def _position_table(params: Any) -> tuple[str, ...]:
    """Where a model keeps its learned positions."""
    paths = [tuple(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    (found,) = [path for path in paths if "positions" in path]
    return found


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda node, key: node[key], path, tree)


def _replaced(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    return value if not path else {**tree, path[0]: _replaced(tree[path[0]], path[1:], value)}
