"""The best checkpoint: what counts as better, when a run stops waiting, and what it leaves."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
import tiny_runs

from lmobj.errors import UserError
from lmobj.train import FitResult, TrainConfig, fit
from lmobj.train.best import Best, BestSoFar
from lmobj.train.trained import open_run


def test_what_is_better_and_how_long_is_waited_for_it() -> None:
    least = BestSoFar(Best(patience=2))
    told = [(3.0, True), (3.0, False), (2.0, True), (math.nan, False)]
    assert [least.add(value) for value, _ in told] == [better for _, better in told]
    assert (least.value, least.waited, least.exhausted) == (2.0, 1, False)
    assert not least.add(-math.inf)
    assert least.exhausted
    assert str(least) == "eval/loss was no better than 2 for 2 evaluations"
    most = BestSoFar(Best(metric="accuracy", mode="max"), earlier=[0.5, 0.75, 0.625])
    assert (most.value, most.waited) == (0.75, 1)
    assert not most.add(0.75)
    assert not most.exhausted, "without patience it never is"
    assert str(BestSoFar(Best(), earlier=[math.nan])) == "eval/loss was never finite for 1 evaluation"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "least"}, r"train\.best\.mode is 'least'; accepted: min, max"),
        ({"metric": "eval/loss"}, "a name without eval/"),
        ({"metric": ""}, "a name without eval/"),
        ({"patience": 0}, "1 or more evaluations"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Best(**settings)


def test_patience_needs_evaluations() -> None:
    with pytest.raises(UserError, match=r"train\.best\.patience is 3 and train\.evaluate_every is null"):
        TrainConfig(best=Best(patience=3))


def lines(run: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_stops_early_and_goes_back(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The greatest loss is called the best: the first evaluation has it, and two more are waited for."""
    config = tiny_runs.experiment(corpus, tmp_path / "run")
    best = Best(metric="loss", mode="max", patience=2, restore=True)
    train = dataclasses.replace(config.train, evaluate_every=2, evaluate_batches=None, checkpoint_every=None, best=best)
    config = dataclasses.replace(config, train=train)
    with tiny_runs.quick_compilation():
        result = fit(config, quiet=True)
        evaluations = {line["step"]: line["eval/loss"] for line in lines(tmp_path / "run") if "eval/loss" in line}
        assert list(evaluations) == [2, 4, 6]
        assert evaluations[2] > evaluations[4] > evaluations[6]
        assert int(result.state.step) == 2, "the state is that of the best checkpoint"
        assert result.metrics["best/loss"] == evaluations[2]
        opened = open_run(config, best=True)
        jax.tree.map(np.testing.assert_array_equal, opened.state.params, result.state.params)
        assert int(open_run(config).state.step) == 6

        # One that was killed after the second evaluation knows of both when it goes on, and stops at the same step.
        shutil.copytree(tmp_path / "run", tmp_path / "killed")
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / "6")
        killed = dataclasses.replace(config, run=str(tmp_path / "killed"))
        again = fit(killed, resume=True, quiet=True)
        assert [line["step"] for line in lines(tmp_path / "killed") if "eval/loss" in line] == [2, 4, 6]
        assert again.metrics["best/loss"] == evaluations[2]
        # And one that has stopped does not go on.
        fit(killed, resume=True, quiet=True)
        assert max(line["step"] for line in lines(tmp_path / "killed")) == 6


def test_whoever_called_may_end_a_run(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = tiny_runs.experiment(corpus, tmp_path / "run")
    train = dataclasses.replace(config.train, evaluate_every=2, evaluate_batches=None, checkpoint_every=None)
    told: list[tuple[int, dict[str, float]]] = []

    def after_evaluation(step: int, metrics: dict[str, float]) -> bool:
        told.append((step, metrics))
        return step == 4

    with tiny_runs.quick_compilation():
        result = fit(dataclasses.replace(config, train=train), quiet=True, after_evaluation=after_evaluation)
    assert int(result.state.step) == 4
    written = [line for line in lines(tmp_path / "run") if "eval/loss" in line]
    assert [{"step": step, **metrics} for step, metrics in told] == written
    assert [line["step"] for line in written] == [2, 4]
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir(), "saved"
    assert (tmp_path / "run" / "report.html").is_file(), "and summarised"


def test_a_figure_that_evaluation_does_not_give(causal: FitResult, tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(causal.assembly.config, run=str(tmp_path / "run"))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, best=Best(metric="f1")))
    with pytest.raises(UserError, match=r"train\.best\.metric is 'f1'; accepted: .*bits_per_byte, loss, nll"):
        fit(config, quiet=True)
    assert not (tmp_path / "run").exists()
