"""Out of memory: what a device holds, the cheapest change, and the message, for a real refusal of the CPU's too."""

from __future__ import annotations

import pathlib
import re
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from own_objective import BigramConfig
from poisoned import Poisoned
from tiny_runs import experiment

from lmobj.errors import UserError
from lmobj.objectives import Example, ObjectiveState, Terms
from lmobj.train import FitResult, fit, memory
from lmobj.train.assemble import assemble
from lmobj.train.guard import GuardState
from lmobj.train.memory import Situation, cheapest_change, check_state, contributors, explained, situation
from lmobj.train.plan import shard_bytes
from lmobj.train.sharding import MESH_AXES, MeshConfig
from lmobj.train.step import State

# --- who takes how much -------------------------------------------------------------------------------------------


def test_bytes_of_one_device_largest_first() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def array(shape: tuple[int, ...], *spec: Any, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    weights = {"model": {"w": array((1000, 8), None, "fsdp"), "b": array((8,))}}
    state = State(
        step=array((), dtype=jnp.int32),
        params=weights,
        opt_state=(array((), dtype=jnp.int32), weights, weights),
        objective=ObjectiveState({"scale": array(())}, {"memory": array((16, 5), "data")}),
        guard=GuardState(*(array(()),) * 4),
        ema=weights,
    )
    batch = {"tokens": array((16, 128), ("data", "fsdp"), dtype=jnp.int32)}
    # w is shared by 4 devices: 1000 x 2 x 4 bytes; b is whole: 32 bytes.
    w = 8000 + 32
    parts = contributors(state, batch, temporary=3 * w)
    assert list(parts.items()) == [
        ("optimizer state", 2 * w + 4),
        ("activations and temporaries", 2 * w),  # the gradients are in the compiler's figure
        ("parameters", w + 4),
        ("gradients", w),
        ("moving average", w),
        ("batch", 2 * 128 * 4),
        ("carried memory", 8 * 5 * 4),
    ]
    assert contributors(state, batch, temporary=None)["activations and temporaries"] is None
    assert "moving average" not in contributors(state._replace(ema=()), batch, None)


# --- what to change -----------------------------------------------------------------------------------------------

HERE = Situation(
    batch_size=64, accumulate=2, rows_per_device=6, divisible=True, remat="dots", data=6, fsdp=2, zero=True, devices=12
)
ACCUMULATE = "train.accumulate=4, which takes each batch in smaller parts and changes no result"
REMAT = "model.remat=block, which computes"
DIVIDE = "train.zero=true, which divides the optimizer state"
SHARE = "train.mesh.fsdp=4 (with train.mesh.data=3), which shares"


@pytest.mark.parametrize(
    ("changes", "activations", "expected"),
    [
        ({}, 100, ACCUMULATE),
        ({}, None, ACCUMULATE),
        ({"rows_per_device": 9, "accumulate": 1}, 100, "train.accumulate=3,"),
        ({"rows_per_device": 1}, 100, REMAT),
        ({"divisible": False}, 100, REMAT),
        ({"rows_per_device": 1, "remat": "block"}, 100, SHARE),
        ({"rows_per_device": 1, "remat": None}, 100, SHARE),
        ({"rows_per_device": 1, "remat": None, "data": 1}, 100, "train.batch_size below 64, which changes"),
        ({"rows_per_device": 1, "remat": None, "data": 1, "batch_size": 12}, 100, "a smaller model"),
        # Where parameters and optimizer state are the larger part, smaller microbatches would not help much.
        ({}, 9, SHARE),
        ({"zero": False}, 9, DIVIDE),
        ({"zero": False, "rows_per_device": 1, "remat": None}, 100, DIVIDE),
        ({"zero": False}, 100, ACCUMULATE),
        ({"zero": False, "data": 1}, 9, ACCUMULATE),
        ({"data": 9}, 9, "train.mesh.fsdp=6 (with train.mesh.data=3)"),
        ({}, 0, SHARE),
        ({"data": 1}, 0, "a smaller model"),
    ],
)
def test_the_cheapest_change(changes: dict[str, Any], activations: int | None, expected: str) -> None:
    assert cheapest_change(replace(HERE, **changes), activations=activations, held=10).startswith(expected)


def test_the_situation_of_a_run(causal: FitResult) -> None:
    assert situation(causal.assembly) == Situation(8, 1, 1, True, "dots", data=8, fsdp=1, zero=False, devices=8)


# --- a state that cannot fit --------------------------------------------------------------------------------------


def test_a_state_as_large_as_the_machine_is_not_refused(causal: FitResult, monkeypatch: pytest.MonkeyPatch) -> None:
    run = causal.assembly
    needed = 8 * shard_bytes(run.abstract_state)
    for room in (needed, None):
        monkeypatch.setattr(memory, "_machine_memory", lambda room=room: room)
        check_state(run)
    monkeypatch.setattr(memory, "_machine_memory", lambda: needed - 1)
    # 13,248 parameters of 4 bytes, and two moments, on each of 8 devices.
    with pytest.raises(
        UserError,
        match=r"^The state of training takes 1\.21 MiB on this machine, which has 1\.21 MiB\. .*"
        r"optimizer state 0\.10 MiB, parameters 51\.75 KiB, .* The cheapest change is train\.zero=true, ",
    ):
        check_state(run)


@pytest.mark.parametrize("limits", [(3, 3), (3, None)])
def test_accelerators_have_their_own_memory(
    causal: FitResult, monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int | None]
) -> None:
    devices = [SimpleNamespace(platform="gpu", memory_stats=lambda n=n: n and {"bytes_limit": n << 30}) for n in limits]
    mesh = SimpleNamespace(local_devices=devices, shape=dict.fromkeys(MESH_AXES, 1) | {"data": 2})
    run = SimpleNamespace(**{**vars(causal.assembly), "mesh": mesh, "abstract_batch": causal.assembly.abstract_batch})
    monkeypatch.setattr(memory, "shard_bytes", lambda tree: 3 << 30)
    check_state(run)  # type: ignore[arg-type]
    monkeypatch.setattr(memory, "shard_bytes", lambda tree: (3 << 30) + 1)
    if None in limits:
        check_state(run)  # type: ignore[arg-type]
    else:
        with pytest.raises(UserError, match=r"takes 6\.00 GiB on 2 devices, which have 6\.00 GiB"):
            check_state(run)  # type: ignore[arg-type]


def test_a_machine_tells_its_memory() -> None:
    assert 1 << 28 < (memory._machine_memory() or 1 << 30) < 1 << 50


def test_a_model_beyond_any_machine_is_refused_before_anything_is_written(
    corpus: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = experiment(corpus, tmp_path / "run", model={"width": 1 << 24}, train={"mesh": MeshConfig(data=1)})
    with pytest.raises(UserError, match=r"^The state of training takes .* The cheapest change is a smaller model"):
        fit(config, quiet=True)
    assert not (tmp_path / "run").exists()
    # Where the system does not tell its memory, the refusal of the backend must come through, and once it is asked for.
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        assemble(config, quiet=True).initial_state()


# --- the message --------------------------------------------------------------------------------------------------


def test_other_errors_pass(causal: FitResult) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), explained(causal.assembly):
        raise jax.errors.JaxRuntimeError("INTERNAL: the device has gone")


def test_what_the_compiler_knows_is_told(causal: FitResult, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plan:
        temporary = 5 << 30

    monkeypatch.setattr(memory, "make_plan", lambda run: Plan)
    with pytest.raises(UserError) as caught, explained(causal.assembly):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3221225472 bytes.")
    # 13,248 parameters of 4 bytes on each of 8 replicas, and two moments.
    assert re.fullmatch(
        r"Out of memory on a cpu device\. The run needs, on each device: activations and temporaries 5\.00 GiB, "
        r"optimizer state 0\.10 MiB, parameters 51\.75 KiB, gradients 51\.75 KiB\. XLA asked for 3\.00 GiB at once\. "
        r"The cheapest change is model\.remat=block, which .*; start a new run with it\.",
        str(caught.value),
    )


@dataclass(frozen=True)
class Absurd(Poisoned):
    """Sorts more numbers than any machine's memory holds, in training alone."""

    def terms(self, models: Any, example: Example, carried: Any, ctx: Any) -> Terms:
        terms = super().terms(models, example, carried, ctx)
        if not ctx.train:
            return terms
        total = jax.lax.stop_gradient(terms.sums["nll"])
        many = jax.lax.sort(total + jax.lax.broadcasted_iota(jnp.float32, (1 << 23, 1 << 23), 0), dimension=0)
        return terms._replace(sums={"nll": terms.sums["nll"] + 0 * many[0, 0]})


def test_a_real_refusal(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = experiment(corpus, tmp_path / "run", train={"mesh": MeshConfig(data=1)}, sample=())
    with pytest.raises(UserError) as caught:
        fit(config, objective=Absurd(), model=BigramConfig(), quiet=True)
    # 2^46 numbers of 4 bytes are 2^18 GiB; the CPU's compiler keeps one or two such arrays.
    size = re.match(
        r"Out of memory on a cpu device\. The run needs, on each device: activations and temporaries (\S+) GiB, "
        r"optimizer state .* XLA asked for .* at once\. The cheapest change is train\.accumulate=2, which",
        str(caught.value),
    )
    assert size is not None, caught.value
    assert float(size[1].replace(",", "")) in (2.0**18, 2.0**19)
