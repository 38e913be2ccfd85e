"""From a budget to each arm's steps, with what a step costs: counted, by formula, and where it is asked for, timed."""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass
from typing import Any

import jax

from lmobj.bench._config import Budget
from lmobj.config import Experiment
from lmobj.errors import UserError
from lmobj.train import TrainConfig
from lmobj.train.assemble import Assembly
from lmobj.train.flops import model_flops
from lmobj.train.products import step_flops

__all__ = ["ArmPlan", "plan_arm", "steps_within"]

_TIMED_STEPS = 20
_TIMED_SECONDS = 10.0
"""A step is timed this often, or for this long, whichever ends first, but at least three times."""


@dataclass(frozen=True)
class ArmPlan:
    """What an arm will do on its budget, and what one step of it costs. All of it is kept in plan.json."""

    steps: int
    tokens_per_step: int
    flops_per_step: int
    """Counted in the compiled program."""
    formula_flops_per_step: float
    """By formula (`lmobj.train.flops.model_flops`)."""
    seconds_per_step: float | None
    """Measured, median of warm steps; only where the budget is in seconds."""
    parameters: int
    data: str
    """Fingerprint of the data."""
    probe: str | None = None
    """Digest of the probe's texts and labels; None without a probe."""

    def experiment(self, base: Experiment, *, name: str, run: str, seed: int) -> Experiment:
        """The arm's experiment with one seed, in a run folder of its own."""
        train: TrainConfig = dataclasses.replace(base.train, steps=self.steps, seed=seed)
        return dataclasses.replace(base, name=name, run=run, train=train)


def plan_arm(arm: str, run: Assembly, budget: Budget) -> ArmPlan:
    """Compiles an arm's training step and reckons how many of them its budget pays for.

    Raises:
      UserError: the budget does not pay for one step, or FLOPs that cannot be counted.
    """
    compiled = run.lower_train_step().compile()
    cost: dict[str, Any] = {
        "tokens_per_step": run.tokens_per_step,
        "flops_per_step": step_flops(run, compiled.as_text() or ""),
        "formula_flops_per_step": model_flops(run),
        "seconds_per_step": _time_step(run, compiled) if budget.kind == "seconds" else None,
    }
    steps = steps_within(arm, budget, cost[f"{budget.kind}_per_step"])
    return ArmPlan(steps=steps, parameters=run.parameter_count, data=run.dataset.fingerprint, **cost)


def steps_within(arm: str, budget: Budget, cost: float) -> int:
    """The most steps that the budget pays for, each at this cost.

    Raises:
      UserError: not even one.
    """
    if cost <= 0:
        raise UserError(
            f"budget.{budget.kind} is given, and a step of the arm {arm} costs none by the count; accepted: tokens or "
            "seconds."
        )
    steps = int(budget.amount / cost)
    if steps < 1:
        raise UserError(
            f"budget.{budget.kind} is {budget.amount:g}, and one step of the arm {arm} takes {cost:g}; accepted: "
            f"{cost:g} or more."
        )
    return steps


def _time_step(run: Assembly, compiled: jax.stages.Compiled) -> float:
    """Seconds of a training step, the median over warm ones; the state that they make is thrown away."""
    state, times = run.initial_state(), []
    for index, batch in enumerate(run.batches("train", steps=_TIMED_STEPS + 1)):
        placed = jax.block_until_ready(run.on_devices(batch))
        started = time.perf_counter()
        state, metrics = run.run_compiled(compiled, state, placed)
        jax.block_until_ready((state, metrics))
        if index:  # the first brings memory and caches up
            times.append(time.perf_counter() - started)
        if len(times) >= 3 and sum(times) > _TIMED_SECONDS:
            break
    return statistics.median(times)
