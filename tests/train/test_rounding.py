"""Stochastic rounding: exact in expectation, between neighbours only, addressed by place, and it lets small updates add
up."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from lmobj.batch import Vocabulary
from lmobj.config import Experiment
from lmobj.data import DataConfig
from lmobj.errors import UserError
from lmobj.models import DecoderConfig
from lmobj.objectives import CausalLM
from lmobj.speed import synthetic_batch
from lmobj.train import TrainConfig
from lmobj.train.assemble import Design, design
from lmobj.train.optimizers import AdamW
from lmobj.train.rounding import apply_updates, stochastic_round, update_seed
from lmobj.train.schedules import ConstantSchedule
from lmobj.train.sharding import MeshConfig

_EVERY = jnp.arange(2**16, dtype=jnp.uint32)
"""All lower halves that random bits can have, each once."""


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("part", [1, 3 * 2**13, 2**15, 2**16 - 1])
def test_over_all_bits_the_mean_is_the_number(sign: float, part: int) -> None:
    # From 1.5 the next bfloat16 is 2^-7 away; the number lies part / 2^16 of the way there.
    below, gap = 1.5, 2.0**-7
    x = sign * (below + gap * part / 2**16)
    rounded = np.asarray(stochastic_round(jnp.full(2**16, x, jnp.float32), _EVERY), np.float64)
    assert set(rounded) == {sign * below, sign * (below + gap)}
    assert rounded.mean() == x
    assert (rounded == sign * (below + gap)).sum() == part


def test_what_is_a_bfloat16_stays() -> None:
    numbers = jnp.asarray([0.0, -0.0, 1.0, -1.5, 2.0**-133, 3.0e38, np.inf, -np.inf], jnp.float32)
    exact = numbers.astype(jnp.bfloat16)
    for bits in (0, 1, 2**16 - 1, 2**32 - 1):
        rounded = stochastic_round(exact.astype(jnp.float32), jnp.full(exact.shape, bits, jnp.uint32))
        np.testing.assert_array_equal(np.asarray(rounded).view(np.uint16), np.asarray(exact).view(np.uint16))
    # A NaN whose lower half is all ones would carry into the sign.
    nan = jax.lax.bitcast_convert_type(jnp.uint32(0x7FFFFFFF), jnp.float32)
    assert jnp.isnan(stochastic_round(nan[None], jnp.full(1, 2**16 - 1, jnp.uint32))).all()


def test_the_noise_has_no_bias() -> None:
    n, seed = 1 << 16, update_seed(jax.random.key(0), 3, 0)
    given = {"w": jnp.ones(n, jnp.bfloat16)}, {"w": jnp.full(n, 2.0**-7 * 0.3)}
    rounded = np.asarray(apply_updates(*given, seed)["w"], np.float64)
    ups = (rounded > 1).mean()
    assert abs(ups - 0.3) < 4 * np.sqrt(0.3 * 0.7 / n)
    # Neighbours are independent: the product of their deviations has the mean 0.
    away = (rounded > 1) - 0.3
    assert abs((away[1:] * away[:-1]).mean()) < 4 * 0.3 * 0.7 / np.sqrt(n)


def test_small_updates_add_up_where_rounding_to_nearest_stands_still() -> None:
    start, step, times = jnp.ones(1024, jnp.bfloat16), 2.0**-12, 512
    key = jax.random.key(1)

    def move(p: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
        return apply_updates({"w": p}, {"w": jnp.full(p.shape, step)}, update_seed(key, t, 0))["w"], None

    moved = np.asarray(jax.lax.scan(move, start, jnp.arange(times))[0], np.float64)
    nearest = start
    for _ in range(3):
        nearest = (nearest.astype(jnp.float32) + step).astype(jnp.bfloat16)
    assert (nearest == start).all()
    # A step is 1/32 of the distance to the next value, 2^-7: the sum of 512 Bernoulli draws for each of 1,024 numbers.
    deviation = 2.0**-7 * np.sqrt(times / 32 * 31 / 32 / 1024)
    assert abs(moved.mean() - (1 + times * step)) < 4 * deviation


def test_noise_is_addressed_by_run_step_update_parameter_and_place() -> None:
    params = {name: jnp.ones((16, 8), jnp.bfloat16) for name in ("a", "b")}
    updates = {name: jnp.full((16, 8), 2.0**-8) for name in params}

    def drawn(params: Any = params, seed: int = 0, step: int = 5, update: int = 0) -> dict[str, NDArray[np.bool_]]:
        given = {name: updates[name] for name in params}
        new = apply_updates(params, given, update_seed(jax.random.key(seed), step, update))
        return {name: np.asarray(value > 1) for name, value in new.items()}

    first = drawn()
    np.testing.assert_array_equal(first["a"], drawn({"a": params["a"]})["a"])
    for other in (drawn(seed=1)["a"], drawn(step=6)["a"], drawn(update=1)["a"], first["b"]):
        assert 0.3 < (first["a"] != other).mean() < 0.7, "half of 128 fair draws differ"
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    cut = jax.device_put(params, NamedSharding(mesh, PartitionSpec("x", "y")))
    sharded = jax.jit(apply_updates)(cut, updates, update_seed(jax.random.key(0), 5, 0))
    for name, value in sharded.items():
        np.testing.assert_array_equal(first[name], np.asarray(value > 1))


# --- in training --------------------------------------------------------------------------------------------------

_VOCAB = Vocabulary(64, pad=0, unk=1, bos=2, eos=3)


def made(*, rounded: bool, param_dtype: Any = "bfloat16", peak: float = 1e-5) -> Design:
    model = DecoderConfig(layers=1, width=16, heads=2, max_length=8, param_dtype=param_dtype, init_std=1.0)
    optimizer = AdamW(schedule=ConstantSchedule(peak=peak), weight_decay=0.0)
    train = TrainConfig(batch_size=2, mesh=MeshConfig(data=1), optimizer=optimizer, stochastic_rounding=rounded)
    return design(Experiment(data=DataConfig(length=8), model=model, objective=CausalLM(), train=train), _VOCAB)


def test_a_step_keeps_parameters_in_bfloat16_and_the_rest_in_float32() -> None:
    moved = {}
    for rounded in (False, True):
        run = made(rounded=rounded)
        before = run.initial_state()
        # The state is consumed.
        kernel = np.asarray(before.params["model"]["stack"]["blocks"]["mlp"]["up"]["kernel"], np.float32)
        batch = synthetic_batch(run.spec, 2, run.vocab, 0)
        state, _ = run.train_step(before, batch)
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
        moments = {leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
        assert moments == {jnp.dtype("float32" if rounded else "bfloat16")}
        after = np.asarray(state.params["model"]["stack"]["blocks"]["mlp"]["up"]["kernel"], np.float32)
        moved[rounded] = np.mean(after != kernel)
    # Adam's first step is the rate, 1e-5: from a weight of 1 it is 1/391 or 1/781 of the way to the next value, and
    # only weights near 0 move when rounded to nearest.
    assert moved[True] > moved[False] + 0.001


def test_parameters_that_are_not_in_bfloat16_are_refused() -> None:
    with pytest.raises(UserError, match=r"train\.stochastic_rounding is true .* float32 \(model\.param_dtype\)"):
        made(rounded=True, param_dtype="float32")
