"""Neither the mesh nor accumulation changes what is computed, dropout on. `tools/measure_exactness.py` has the whole
matrix, with the compiler's optimisations, which are off here because they take most of the time."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from tiny_runs import PEAK, Kind, experiment

from lmobj.train import Assembly, State, assemble
from lmobj.train.plan import shard_bytes
from lmobj.train.sharding import MeshConfig
from tools import measure_exactness as exact

pytestmark = pytest.mark.usefixtures("quick_compilation")


@contextlib.contextmanager
def _precision(dtype: exact.DType) -> Iterator[None]:
    with jax.enable_x64(dtype == "float64"):
        yield


def on_mesh(corpus: pathlib.Path, kind: Kind, dtype: exact.DType, mesh: MeshConfig) -> Assembly:
    return exact.on_mesh(experiment(corpus, "unused", kind), mesh, dtype)


def start(run: Assembly) -> State:
    """A state on the run's mesh, drawn on the host, which is quicker than to compile the run's own initialisation."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        if not name.startswith(".params"):
            return np.zeros(leaf.shape, leaf.dtype)
        return (rng.normal(scale=0.05, size=leaf.shape) + ("scale" in name)).astype(leaf.dtype)

    return jax.device_put(jax.tree_util.tree_map_with_path(draw, run.abstract_state), run.shardings)


@functools.cache
def one_device(corpus: pathlib.Path, kind: Kind, dtype: exact.DType) -> tuple[np.ndarray, list[Any]]:
    """The losses and rows of 20 steps on one device."""
    run = on_mesh(corpus, kind, dtype, exact.ONE)
    return exact.curve(run, start(run))


DATA, FSDP, THREE, FOUR = exact.FEW
CASES: list[tuple[Kind, exact.DType, MeshConfig]] = [
    *(("causal_lm", "float64", mesh) for mesh in exact.FEW),
    *(("masked_lm", "float64", mesh) for mesh in exact.FEW),
    ("causal_lm", "float32", THREE),
]
QUICK = {"causal_lm": [DATA, FOUR], "masked_lm": []}


def _label(case: tuple[Kind, exact.DType, MeshConfig]) -> str:
    axes = " ".join(f"{axis} {size}" for axis, size in vars(case[2]).items() if size > 1)
    return f"{case[0]} {case[1]} {axes}"


@pytest.mark.parametrize(
    ("kind", "dtype", "mesh"),
    [
        pytest.param(*case, id=_label(case), marks=[] if case[2] in QUICK[case[0]] else [pytest.mark.slow])
        for case in CASES
    ],
)
def test_eight_devices_compute_what_one_does(
    corpus: pathlib.Path, kind: Kind, dtype: exact.DType, mesh: MeshConfig
) -> None:
    with _precision(dtype):
        losses, rows = one_device(corpus, kind, dtype)
        run = on_mesh(corpus, kind, dtype, mesh)
        assert run.replicated == ()  # every parameter is split as the rules ask
        state = start(run)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {dtype}
        other, read = exact.curve(run, state)
    jax.tree.map(np.testing.assert_array_equal, rows, read)
    assert len(np.unique([row["row_ids"] for row in rows], axis=0)) == len(losses) == exact.STEPS
    assert PEAK <= 3e-3
    assert exact.loss_gap(losses, other) <= exact.LOSS_LIMITS[dtype]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.3  # so that the updates were compared as well


@pytest.mark.slow
def test_each_replica_keeps_and_computes_a_part_of_the_optimizer_state(corpus: pathlib.Path) -> None:
    """ZeRO: an eighth of the moments on each of eight replicas, and the same losses."""
    with _precision("float64"):
        config = exact.adjusted(experiment(corpus, "unused", "causal_lm"), dtype="float64", mesh=DATA, zero=True)
        run = assemble(config, quiet=True)
        whole = on_mesh(corpus, "causal_lm", "float64", DATA)
        losses, _ = exact.curve(run, start(run))
        same, _ = one_device(corpus, "causal_lm", "float64")
    assert exact.loss_gap(same, losses) <= exact.LOSS_LIMITS["float64"]
    assert shard_bytes(run.abstract_state.params) == shard_bytes(whole.abstract_state.params)
    shares = shard_bytes(run.abstract_state.opt_state) / shard_bytes(whole.abstract_state.opt_state)
    assert shares == pytest.approx(1 / 8, rel=0.02)  # short vectors that 8 does not divide stay whole


GRADIENTS: list[tuple[exact.DType, tuple[int, ...]]] = [("float64", (4, 8)), ("float32", (8,))]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "splits"), GRADIENTS)
def test_accumulated_gradients_are_those_of_the_batch(
    corpus: pathlib.Path, dtype: exact.DType, splits: tuple[int, ...]
) -> None:
    """Rows that predict different numbers of tokens; a mean of means would weigh the parts alike."""
    with _precision(dtype):
        run = exact.on_mesh(exact.unequal(experiment(corpus, "unused", "masked_lm")), exact.ONE, dtype)
        state = start(run)
        whole = exact.gradient(run, state, 1)
        gaps = [exact.gradient_gap(whole, exact.gradient(run, state, parts), exact.NOISE[dtype]) for parts in splits]
        counts = predictions(run)
    assert max(gaps) <= exact.GRADIENT_LIMITS[dtype]
    assert min(counts.reshape(2, 4).sum(0)) < max(counts.reshape(2, 4).sum(0))  # row r goes to part r % 4
    assert min(counts) < max(counts)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(whole))


def predictions(run: Assembly) -> np.ndarray:
    """How many tokens each row of the first batch predicts."""
    (batch,) = run.batches("train", steps=1)
    program = run.program

    @jax.jit
    def weights(batch: Any) -> Any:
        step = run.abstract_state._replace(step=0)
        keys, ctx = program._context(batch, step, update=0, train=True)
        return program.objective.corrupt(keys, batch, ctx).weights

    return np.asarray(weights(batch)).sum(axis=1)
