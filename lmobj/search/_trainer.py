"""How the trials of a search are trained: as `lmobj train` does, each in a run folder of its own."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path

import jax

from lmobj.config import Experiment
from lmobj.errors import UserError
from lmobj.search._config import SearchExperiment
from lmobj.train import assemble, fit
from lmobj.train.evaluation import Evaluation
from lmobj.train.loop import AfterEvaluation

__all__ = ["Trainer"]


class Trainer:
    """Trains trials. Another one can be given to `run`, to search over something else than trained models."""

    def check(self, search: SearchExperiment, *, quiet: bool) -> str:
        """Looks at data and metric before anything is written, and returns the data's fingerprint.

        Raises:
          UserError: the experiment cannot be trained, or has no such figure.
        """
        run = assemble(search, quiet=quiet)
        evaluation = Evaluation(run)
        if not evaluation.has_text:
            raise UserError(
                "data.validation is 0: no text is held out, so trials cannot be judged; accepted: a share above 0, or "
                "files of its own."
            )
        given = search.search.metric is not None
        evaluation.check_metric(search.metric.removeprefix("eval/"), "search.metric" if given else "train.best.metric")
        return run.dataset.fingerprint

    def train(self, experiment: Experiment, after_evaluation: AfterEvaluation) -> Mapping[str, float]:
        """Trains a trial, or what is left of it, and returns the last value of each metric.

        Raises:
          UserError: the settings cannot be satisfied together, or `train.guard` halted the run.
          Stopped: a signal came; the run was saved.
        """
        begun = (Path(experiment.run_dir) / "config.yaml").is_file()
        try:
            return fit(experiment, resume=begun, quiet=True, after_evaluation=after_evaluation).metrics
        finally:
            jax.clear_caches()  # other settings are other programs, and the CPU's take up mappings without end
            gc.collect()
