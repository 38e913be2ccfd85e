"""The line of results.jsonl that a run leaves.

arm, seed, objective, model, parameters   which run
steps, tokens, flops, flops_formula       what it could spend, by its plan
diverged                                  whether it came to no end: then `seconds`, `metrics` and `probe` are null
seconds                                   time of its training steps: their number times the median of a warm one,
                                          without compiling, evaluating and saving
metrics                                   the last of each, under the names of metrics.jsonl
probe                                     scores of the trained model, of the untrained one and of the majority class
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import jax

from lmobj.bench._prepare import Prepared
from lmobj.bench._probe import Scores, majority, probe_model
from lmobj.bench._reading import Reading
from lmobj.bench._results import Line
from lmobj.train import FitResult
from lmobj.train.environment import environment
from lmobj.train.step import State
from lmobj.train.tracking import read_metrics

__all__ = ["diverged_line", "finished_line"]


def finished_line(prepared: Prepared, arm: str, seed: int, result: FitResult) -> Line:
    """The line of a finished run, which is probed here.

    Raises:
      NotFinite: its hidden states are not finite.
    """
    step = _seconds_per_step(result.run_dir)
    return _line(
        prepared,
        arm,
        seed,
        diverged=False,
        seconds=None if step is None else prepared.plans[arm].steps * step,
        metrics=dict(result.metrics),
        probe=_probed(prepared, result),
    )


def diverged_line(prepared: Prepared, arm: str, seed: int) -> Line:
    """The line of a run that `train.guard` ended, or whose hidden states are not finite."""
    return _line(prepared, arm, seed, diverged=True, seconds=None, metrics=None, probe=None)


def _line(prepared: Prepared, arm: str, seed: int, **found: Any) -> Line:
    benchmark, base, plan = prepared.benchmark, prepared.bases[arm], prepared.plans[arm]
    facts = environment()
    return {
        "arm": arm,
        "seed": seed,
        "objective": getattr(base.objective, "name", type(base.objective).__name__),
        "model": getattr(base.model, "name", type(base.model).__name__),
        "parameters": plan.parameters,
        "steps": plan.steps,
        "tokens": plan.steps * plan.tokens_per_step,
        "flops": plan.steps * plan.flops_per_step,
        "flops_formula": plan.steps * plan.formula_flops_per_step,
        "seconds_per_step_planned": plan.seconds_per_step,
        "budget": {benchmark.budget.kind: benchmark.budget.amount},
        **found,
        "data": plan.data,
        "versions": {"lmobj": facts["lmobj"], "python": facts["python"], **facts["packages"], **_sklearn(prepared)},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "finished": facts["started"],
        "run": str(Path(str(prepared.experiment(arm, seed).run_dir)).relative_to(prepared.folder)),
    }


def _probed(prepared: Prepared, result: FitResult) -> dict[str, Any] | None:
    """What the probe finds in a run's model, after training and before."""
    probe, texts, run = prepared.benchmark.probe, prepared.texts, result.assembly
    if probe is None or texts is None:
        return None

    def scores(state: State) -> Scores:
        return probe_model(probe, texts, run.model(state), Reading.of(run))

    return {
        "name": probe.name,
        **scores(result.state).as_dict(),
        "train": len(texts.train),
        "test": len(texts.test),
        "untrained": scores(run.initial_state()).as_dict(),
        "majority": majority(texts).as_dict(),
    }


def _sklearn(prepared: Prepared) -> dict[str, str]:
    """The version of the package that fits the probe, if there is one."""
    if prepared.texts is None:
        return {}
    import sklearn

    return {"scikit-learn": sklearn.__version__}


def _seconds_per_step(run_dir: Path) -> float | None:
    """The median time of a training step, from what the run logged; None for one too short to have logged it."""
    name = "perf/steps_per_second"
    speeds = [line[name] for line in read_metrics(run_dir / "metrics.jsonl") if name in line]
    return 1 / statistics.median(speeds) if speeds else None
