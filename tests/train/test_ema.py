"""The moving average of the weights: its closed form, where it lives, and who uses it."""

from __future__ import annotations

import pathlib
import shutil
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from own_objective import BigramConfig
from poisoned import Poisoned
from tiny_runs import experiment, metric_lines, stored_bits

from lmobj.errors import UserError
from lmobj.train import FitResult, fit
from lmobj.train.ema import EMA
from lmobj.train.evaluation import Evaluation
from lmobj.train.guard import Guard
from lmobj.train.optimizers import AdamW
from lmobj.train.schedules import ConstantSchedule
from lmobj.train.sharding import MeshConfig

# --- the formula --------------------------------------------------------------------------------------------------


def averaged(ema: EMA, weights: Any, first: Any) -> Any:
    average = ema.init(first)
    for t, w in enumerate(weights):
        average = ema.update(average, w, jnp.asarray(t, jnp.int32))
    return average


def test_without_warmup_weights_fade_by_powers_of_the_decay() -> None:
    draws = np.random.default_rng(0).normal(size=(9, 3))
    with jax.enable_x64(True):
        average = averaged(EMA(decay=0.8, warmup=False), jnp.asarray(draws[1:]), jnp.asarray(draws[0]))
    # a_n = d^n w_0 + (1 - d) sum_i d^(n - i) w_i over i = 1..n, here n = 8.
    powers = 0.8 ** np.arange(8, -1, -1)
    powers[1:] *= 1 - 0.8
    np.testing.assert_allclose(average, powers @ draws, rtol=1e-13)
    assert powers.sum() == pytest.approx(1)


def test_warmup_keeps_less_at_first() -> None:
    # From 0 towards 1: what is left of the 0 is the product of the decays 1/10, 2/11, then 0.25 < 3/12 = 0.25 ...
    with jax.enable_x64(True):
        ones = jnp.ones((5, 1))
        left = [float(1 - averaged(EMA(decay=0.26), ones[:n], jnp.zeros(1))[0]) for n in range(6)]
    # (1 + t) / (10 + t) is 1/10, 2/11, 3/12 for t = 0, 1, 2; at t = 3 it is 4/13 > 0.26.
    expected = np.cumprod([1, 1 / 10, 2 / 11, 3 / 12, 0.26, 0.26])
    np.testing.assert_allclose(left, expected, atol=1e-15)


def test_small_changes_of_small_types_are_not_lost() -> None:
    ema = EMA(decay=0.999, warmup=False)
    average = averaged(ema, jnp.ones((100, 1), jnp.bfloat16) * 2, jnp.ones(1, jnp.bfloat16))
    assert average.dtype == jnp.float32
    # In bfloat16, which has 8 bits, 1 + 0.001 would be 1 for ever.
    np.testing.assert_allclose(average, 2 - 0.999**100, rtol=1e-5)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(UserError, match=rf"train\.ema\.decay is {decay}; accepted: 0 or more, and less than 1"):
        EMA(decay=decay)


# --- in a run -----------------------------------------------------------------------------------------------------

STEPS, DECAY = 8, 0.6


def settings(corpus: pathlib.Path, folder: pathlib.Path, **train: Any) -> Any:
    fast = AdamW(schedule=ConstantSchedule(peak=0.1))
    values = {"optimizer": fast, "steps": STEPS, "ema": EMA(DECAY), "checkpoint_every": 4, "keep": 9}
    return experiment(corpus, folder, train={**values, "guard": Guard("skip"), **train}, sample=())


def run(config: Any, **changes: Any) -> FitResult:
    # The batch of step 3 is passed over.
    return fit(config, objective=Poisoned(nan=(3,)), model=BigramConfig(), **{"quiet": True, **changes})


@pytest.fixture(scope="module")
def result(corpus: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    return run(settings(corpus, tmp_path_factory.mktemp("runs") / "ema", mesh=mesh))


def test_the_average_is_that_of_the_weights_after_each_update(result: FitResult) -> None:
    assembly = result.assembly
    state = assembly.initial_state()
    average = {name: np.asarray(value, np.float64) for name, value in state.params["model"].items()}
    made = 0
    for step, batch in enumerate(assembly.batches("train", steps=STEPS), 1):
        state, _ = assembly.train_step(state, batch)
        if step != 3:
            keep = min(DECAY, (1 + made) / (10 + made))
            for name, value in state.params["model"].items():
                average[name] = keep * average[name] + (1 - keep) * np.asarray(value, np.float64)
            made += 1
    for name, expected in average.items():
        np.testing.assert_allclose(state.ema["model"][name], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(state.ema["model"][name], result.state.ema["model"][name])
        assert np.max(np.abs(expected - state.params["model"][name])) > 1e-2


def test_it_is_sharded_like_the_parameters(result: FitResult) -> None:
    for name, parameter in result.state.params["model"].items():
        assert result.state.ema["model"][name].sharding == parameter.sharding
        assert len(parameter.sharding.device_set) == 8
        assert parameter.sharding.shard_shape(parameter.shape) == (parameter.shape[0] // 2, 8)


def test_evaluation_and_models_use_it(result: FitResult) -> None:
    state, evaluation = result.state, Evaluation(result.assembly)
    as_weights = state._replace(params=state.ema, ema=())
    without = state._replace(ema=())
    reached = result.metrics["eval/loss"]
    assert evaluation(state)["loss"] == reached
    assert evaluation(as_weights)["loss"] == pytest.approx(reached, rel=1e-6)
    assert abs(evaluation(without)["loss"] - reached) > 1e-3
    model = result.assembly.model(state)
    np.testing.assert_array_equal(model.embed[...], state.ema["model"]["embed"])


def test_it_is_in_the_checkpoint(result: FitResult, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(result.run_dir, folder)
    shutil.rmtree(folder / "checkpoints" / str(STEPS))
    config = replace(result.assembly.config, run=str(folder))
    resumed = run(config, resume=True, quiet=False)
    assert "use the moving average of the weights (train.ema, decay 0.6)" in capsys.readouterr().out
    assert metric_lines(folder) == metric_lines(result.run_dir)
    shapes = resumed.assembly.abstract_state
    bits = stored_bits(folder, shapes, STEPS)
    assert bits == stored_bits(result.run_dir, shapes, STEPS)
    assert sum(".ema" in path for path in bits) == 2

    with pytest.raises(UserError, match=r"train\.ema.* is .*Free to change"):
        run(replace(config, train=replace(config.train, ema=EMA(0.7))), resume=True)
