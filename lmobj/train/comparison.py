"""Task runs beside one another: a figure over seeds, and whether one group of runs is better than another.

Two questions are told apart, as each has an answer of its own:

- over seeds: would the difference be there with other seeds? Welch's interval of the difference of the means.
- over examples: would it be there on other examples of the kind? The paired bootstrap. What is resampled are the N
  examples of the split, with replacement, and nothing else: the runs stay those that they are. On each resample, which
  is the same for all runs of both groups, a group's figure is the mean of its runs' figures. For a figure that is a
  mean over examples, such as accuracy, that is the mean of what the runs of the group score on each example together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmobj.errors import UserError
from lmobj.evaluate import (
    TASKS,
    ExampleScores,
    PairedBootstrap,
    SeedDifference,
    SeedSpread,
    paired_bootstrap,
    seed_difference,
    seed_spread,
)
from lmobj.objectives import Task
from lmobj.train.assemble import Experiment, resolved
from lmobj.train.checkpoint import Checkpoints
from lmobj.train.run_folder import MAY_CHANGE, RunFolder, differing_keys
from lmobj.train.split_report import EVALUATED, SplitReport
from lmobj.train.trained import on_one_device, open_run

__all__ = ["Comparison", "compare"]

_SEED = "train.seed"
_FREE = (*MAY_CHANGE, _SEED, "name")
"""Keys in which runs of a group may differ."""


@dataclass(frozen=True)
class Comparison:
    """A figure of one or two groups of runs.

    values: of each group by its name, the figure by the run's seed.
    spreads: over the seeds of each group.
    baselines: what answers without a model reach by the figure, by their names.
    over_seeds, over_examples: first group - second; None with one group.
    """

    metric: str
    split: str
    examples: int
    values: Mapping[str, Mapping[int, float]]
    spreads: Mapping[str, SeedSpread]
    baselines: Mapping[str, float]
    over_seeds: SeedDifference | None
    over_examples: PairedBootstrap | None
    samples: int

    def table(self, *, baselines: bool = False) -> tuple[list[str], list[list[str]]]:
        """Header and a row for each group: runs, mean, deviation, every seed's value, and if asked the baselines."""
        seeds = sorted({seed for values in self.values.values() for seed in values})
        others = self.baselines if baselines else {}
        header = [f"{self.metric} on {self.split}", "runs", "mean", "deviation", *(f"seed {seed}" for seed in seeds)]
        rows = []
        for name, values in self.values.items():
            spread = self.spreads[name]
            row = [name, str(spread.n), _show(spread.mean), "" if spread.deviation is None else _show(spread.deviation)]
            row += [_show(values[seed]) if seed in values else "" for seed in seeds]
            rows.append([*row, *map(_show, others.values())])
        return [*header, *others], rows

    def lines(self) -> list[str]:
        """The difference in sentences, and what was resampled; none with one group."""
        if self.over_seeds is None or self.over_examples is None:
            return []
        seeds, examples = self.over_seeds, self.over_examples
        first, second = self.values
        told = f"{first} - {second}: {self.metric} {seeds.difference:+.4f}"
        if seeds.error is None or seeds.low is None or seeds.high is None:
            over = "Over seeds: unknown; it takes two runs or more of each group."
        else:
            over = (
                f"Over seeds: standard error {_show(seeds.error)}, 95% interval {_interval(seeds.low, seeds.high)} "
                "(Welch)."
            )
        return [
            f"{told}.",
            over,
            f"Over examples: 95% interval {_interval(examples.low, examples.high)}, p = {examples.p_value:.2g} "
            f"(paired bootstrap, {self.samples:,} resamples).",
            f"Resampled were the {self.examples:,} examples of {self.split}, with replacement, the same for all runs; "
            f"on each resample a group's {self.metric} is the mean over its runs. Seeds were not resampled: p is about "
            "other examples, the line before about other seeds.",
        ]


@dataclass(frozen=True)
class _Evaluated:
    """A run, and what is told of it on the split."""

    place: str
    experiment: Experiment
    config: Mapping[str, Any]
    report: SplitReport

    @property
    def seed(self) -> int:
        return self.experiment.train.seed


def compare(
    groups: Mapping[str, Sequence[Experiment]],
    *,
    split: str = "validation",
    metric: str | None = None,
    samples: int = 10_000,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Sets task runs beside one another; see the module docstring for what is resampled.

    Args:
      groups: one or two groups by their names, each of runs that differ in `train.seed` alone.
      split: of the data.
      metric: a figure of the task; None: the one that its objective is judged by. With two groups one that is made of
        examples' scores (`lmobj.evaluate.TaskKind.scores`).
      samples: resamples of the bootstrap.
      seed: of the resamples.
      say: told of each run that has to be evaluated first.

    A run's records are those in `RUN/eval`. Where they are missing, or not of the weights that training ended with (the
    best checkpoint's with `train.best.restore`, else the newest), they are made anew.

    Raises:
      UserError: runs that cannot stand beside one another, naming the key; a figure that they do not have; a run
        without a task or checkpoint.
    """
    if not 1 <= len(groups) <= 2:
        raise UserError(f"there are {len(groups)} groups of runs; accepted: one or two, with names that differ.")
    for experiments in groups.values():
        _check_group(experiments)
    every = [experiment for experiments in groups.values() for experiment in experiments]
    task, metric = _task(every, metric, paired=len(groups) == 2)
    found = {name: [_evaluated(each, split, say) for each in group] for name, group in groups.items()}
    runs = [run for group in found.values() for run in group]
    _check_same_data(runs)
    values = {name: {run.seed: _figure(run, metric) for run in group} for name, group in found.items()}
    over_seeds = over_examples = None
    if len(found) == 2:
        over_seeds = seed_difference(*(list(each.values()) for each in values.values()))
        over_examples = _bootstrap(task, metric, *found.values(), samples=samples, seed=seed)
    return Comparison(
        metric=metric,
        split=split,
        examples=runs[0].report.examples,
        values=values,
        spreads={name: seed_spread(list(each.values())) for name, each in values.items()},
        baselines={name: each[metric] for name, each in runs[0].report.baselines.items() if metric in each},
        over_seeds=over_seeds,
        over_examples=over_examples,
        samples=samples,
    )


def _check_group(experiments: Sequence[Experiment]) -> None:
    """Refuses runs that differ in more than their seed, or not in it."""
    if not experiments:
        raise UserError("there is a group without runs; accepted: at least one run folder.")
    first = experiments[0]
    config = resolved(first, first.objective)
    for other in experiments[1:]:
        for key, one, two in differing_keys(config, resolved(other, other.objective)):
            if not any(key == free or key.startswith(free + ".") for free in _FREE):
                raise UserError(
                    f"{key} is {one!r} in {str(first.run_dir)!r} and {two!r} in {str(other.run_dir)!r}; accepted: runs "
                    f"of a group that differ in {_SEED} alone, and others after --with."
                )
    places: dict[int, str] = {}
    for each in experiments:
        if each.train.seed in places:
            raise UserError(
                f"{_SEED} is {each.train.seed} in both {places[each.train.seed]!r} and {str(each.run_dir)!r}; "
                "accepted: runs of a group with a seed each."
            )
        places[each.train.seed] = str(each.run_dir)


def _task(experiments: Sequence[Experiment], metric: str | None, *, paired: bool) -> tuple[Task, str]:
    """The runs' one task, and the figure that is asked for."""
    first = experiments[0]
    for each in experiments:
        if each.objective.task is None:
            raise UserError(
                f"objective.name is {getattr(each.objective, 'name', '')!r} in {str(each.run_dir)!r}; accepted: runs "
                f"of a task, {', '.join(TASKS)}."
            )
        if each.objective.task != first.objective.task:
            raise UserError(
                f"objective.name is {first.objective.task!r} in {str(first.run_dir)!r} and {each.objective.task!r} in "
                f"{str(each.run_dir)!r}; accepted: runs of one task."
            )
    task = first.objective.task
    assert task is not None
    metric = first.objective.judged_by if metric is None else metric
    if paired and metric not in TASKS[task].scores:
        raise UserError(
            f"--metric is {metric!r}, by which two groups of {task} cannot be paired example by example; accepted: "
            f"{', '.join(TASKS[task].scores)}."
        )
    return task, metric


def _evaluated(experiment: Experiment, split: str, say: Callable[[str], None]) -> _Evaluated:
    """A run with its report on the split, from its folder or made now."""
    place, best = str(experiment.run_dir), experiment.train.best
    folder = RunFolder(experiment.run_dir)
    with Checkpoints(folder.checkpoints, keep=experiment.train.keep, best=best.name, mode=best.mode) as checkpoints:
        _check_ended(folder, checkpoints.latest_step, experiment.train.steps)
        step = checkpoints.best_step if best.restore else None
        step = checkpoints.latest_step if step is None else step
    path = folder.fetched(f"{EVALUATED}/{split}.json")
    report = None if path is None else SplitReport.read(path)
    if report is None or report.step != step or folder.fetched(f"{EVALUATED}/{split}.jsonl") is None:
        say(f"Evaluating {place} on {split}")
        trained = open_run(on_one_device(experiment), best=best.restore, quiet=True)
        report = trained.examine(split)[1]
        assert report is not None  # the objective has a task
        report.write(folder)
    return _Evaluated(place, experiment, resolved(experiment, experiment.objective), report)


def _check_ended(folder: RunFolder, latest: int | None, steps: int) -> None:
    """Refuses a run that is under way or was stopped; one that ended early has a report."""
    if (latest or 0) < steps and folder.fetched("report.html") is None:
        raise UserError(
            f"{str(folder)!r} is at step {latest or 0} of {steps}; accepted: runs that have ended. To go on with it: "
            f"{folder.resume_command}"
        )


def _check_same_data(runs: Sequence[_Evaluated]) -> None:
    """Refuses runs that were evaluated on other examples."""
    first, *others = runs
    for other in others:
        if other.report.data != first.report.data:
            for key, one, two in differing_keys({"data": first.config["data"]}, {"data": other.config["data"]}):
                if key not in (*MAY_CHANGE, "data.length"):
                    raise UserError(
                        f"{key} is {one!r} in {first.place!r} and {two!r} in {other.place!r}; accepted: runs on the "
                        "same data."
                    )
            raise UserError(
                f"the data of {other.place!r} has the fingerprint {other.report.data}, and that of {first.place!r} "
                f"{first.report.data}: the files of data.source changed between them. Accepted: runs on the same data."
            )
        if _targets(other) != _targets(first):
            raise UserError(
                f"the targets in {other.place}/{EVALUATED}/{other.report.split}.jsonl are not those of {first.place}; "
                "accepted: the records of one split. Remove the files, and they are made anew."
            )


def _targets(run: _Evaluated) -> list[Any]:
    return [one["target"] for one in run.report.records()]


def _figure(run: _Evaluated, metric: str) -> float:
    value = run.report.figures.get(metric)
    if value is None:
        accepted = ", ".join(sorted(run.report.figures))
        raise UserError(f"--metric is {metric!r}, which {run.place!r} does not have; accepted: {accepted}.")
    if not math.isfinite(value):
        raise UserError(
            f"{metric} of {run.place!r} on {run.report.split} is not finite; accepted: runs whose figures are numbers."
        )
    return value


def _bootstrap(
    task: Task, metric: str, first: Sequence[_Evaluated], second: Sequence[_Evaluated], *, samples: int, seed: int
) -> PairedBootstrap:
    scores = [[TASKS[task].scores[metric](run.report.records()) for run in group] for group in (first, second)]
    statistic = scores[0][0].statistic
    if statistic is None:
        pair = [np.mean([one.values for one in group], axis=0) for group in scores]
        return paired_bootstrap(pair[0], pair[1], seed=seed, samples=samples)
    # A group's runs lie side by side; of both as many, each as often as it takes, which leaves their mean what it is.
    count = math.lcm(len(first), len(second))
    pair = [_side_by_side(group, count // len(group)) for group in scores]

    def mean(means: NDArray[np.float64]) -> NDArray[np.float64]:
        each: NDArray[np.float64] = np.mean([statistic(one) for one in np.split(means, count, axis=1)], axis=0)
        return each

    return paired_bootstrap(pair[0], pair[1], seed=seed, samples=samples, statistic=mean)


def _side_by_side(group: Sequence[ExampleScores], times: int) -> NDArray[np.float64]:
    """[N, runs * times * K]."""
    return np.concatenate([one.values for one in group] * times, axis=1)


def _show(value: float) -> str:
    return f"{value:.4f}"


def _interval(low: float, high: float) -> str:
    return f"{low:+.4f} to {high:+.4f}"
