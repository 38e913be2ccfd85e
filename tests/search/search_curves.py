"""What stands for training in the tests of searches: a formula of two settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lmobj import search
from lmobj.config import Experiment
from lmobj.search import SearchExperiment
from lmobj.train.loop import AfterEvaluation

Make = Callable[..., SearchExperiment]

PEAKS = (0.001, 0.01, 0.1)
SPACE: dict[str, Any] = {
    "train.optimizer.schedule.peak": {"choices": list(PEAKS)},
    "model.layers": {"low": 1, "high": 4, "step": 2},
}
"""Six combinations; the best is that of 0.01 and 1."""


class Curve(search.Trainer):
    """Trains nothing: a trial's loss falls in three evaluations to (log10(peak) + 2)^2 + layers.

    `before` is called with the experiment and the step before each evaluation, and may raise.
    """

    def __init__(self, before: Callable[[Experiment, int], None] = lambda experiment, step: None) -> None:
        self.before = before
        self.trained: list[Experiment] = []
        self.steps: list[int] = []

    def check(self, search: SearchExperiment, *, quiet: bool) -> str:
        return "data"

    def train(self, experiment: Experiment, after_evaluation: AfterEvaluation) -> Mapping[str, float]:
        self.trained.append(experiment)
        self.steps.append(0)
        metrics: dict[str, float] = {}
        for step in (10, 20, 30):
            self.before(experiment, step)
            metrics = {"eval/loss": self.loss(experiment) + (30 - step) / 10}
            self.steps[-1] = step
            if after_evaluation(step, metrics):
                break
        return metrics

    def loss(self, experiment: Experiment) -> float:
        peak, layers = experiment.train.optimizer.schedule.peak, experiment.model.layers
        return (math.log10(peak) + 2) ** 2 + layers
