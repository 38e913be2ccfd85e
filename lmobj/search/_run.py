"""The search itself: ask for settings, train, tell; write down what was found; go on after a stop."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from lmobj.errors import UserError
from lmobj.search._config import SearchExperiment, experiment
from lmobj.search._folder import SearchFolder
from lmobj.search._report import write_report
from lmobj.search._results import clock, in_short, overrides, show, show_settings, table, write_results
from lmobj.search._space import short_names
from lmobj.search._study import RunningTrial, Study, Trial, TrialState, best_of, require_optuna
from lmobj.search._trainer import Trainer
from lmobj.train import Stopped

__all__ = ["SearchResult", "run"]

_SECONDS_BETWEEN_REPORTS = 30.0


@dataclass(frozen=True)
class SearchResult:
    """What a search leaves: its folder, its trials, the best of them, and the table made of them."""

    folder: Path
    trials: list[Trial]
    best: Trial
    header: list[str]
    rows: list[list[str]]


def run(search: SearchExperiment, *, quiet: bool = False, trainer: Trainer | None = None) -> SearchResult:
    """Runs a search, or what is left of it if its folder holds a part already.

    A trial that `train.guard` halts, or whose settings cannot be satisfied together, is written down as failed with the
    reason, and the search goes on.

    Args:
      search: the search; `lmobj.search.load` reads one from YAML.
      quiet: print nothing.
      trainer: what trains the trials.

    Raises:
      UserError: settings that cannot be satisfied, found before anything is written; a folder of another search; no
        trial came to its end.
      Stopped: SIGTERM or SIGINT came; the trial in progress was saved. The same call goes on from there.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"this is one of {jax.process_count()} processes, and a search trains and writes in one; accepted: 1 "
            "process, over as many devices of its machine as train.mesh asks for."
        )
    require_optuna()
    trainer = Trainer() if trainer is None else trainer
    folder = SearchFolder(Path(search.run_dir))
    folder.check(search)
    data = trainer.check(search, quiet=quiet)
    with folder.in_use(search), Study(folder.study, search) as study:
        study.check_data(data)
        _Search(search, folder, study, trainer, quiet).run()
        trials = study.trials
    best = best_of(trials, search.mode)
    if best is None:
        reasons = [trial.reason for trial in trials if trial.reason]
        raise UserError(
            f"none of the {len(trials)} trials in {folder.path} came to its end; the last failed with: "
            f"{reasons[-1] if reasons else 'no reason known'}"
        )
    if not quiet:
        print(f"Best: trial {best.number}, {search.metric} {show(best.value)}: {overrides(best.settings)}")
        print(f"Train it with: lmobj train {shlex.quote(str(folder.best))}")
        print(f"Report: {folder.report}")
    return SearchResult(folder.path, trials, best, *table(search, trials))


@dataclass
class _Search:
    """One call of `run`, once all has been checked."""

    search: SearchExperiment
    folder: SearchFolder
    study: Study
    trainer: Trainer
    quiet: bool

    def run(self) -> None:
        """Trials until the search is at its end, with results after each and the report now and then."""
        finished = _finished(self.study.trials)
        if finished:
            self.say(f"{len(finished)} trial{'s are' if len(finished) > 1 else ' is'} finished already.\n")
        reported = -math.inf
        while self.goes_on(self.study.trials):
            try:
                self.one_trial()
            except Stopped:
                write_report(self.folder, self.search, self.study)
                self.say(
                    "\nStopped, and saved what was done. Continue with: "
                    f"lmobj search {shlex.quote(str(self.folder.config))}\n"
                )
                raise
            write_results(self.folder, self.search, self.study.trials)
            if time.monotonic() - reported > _SECONDS_BETWEEN_REPORTS:
                write_report(self.folder, self.search, self.study)
                reported = time.monotonic()
        write_results(self.folder, self.search, self.study.trials)
        write_report(self.folder, self.search, self.study)

    def goes_on(self, trials: Sequence[Trial]) -> bool:
        """Whether there is a trial to train."""
        finished, most, seconds = _finished(trials), self.search.search.most_trials, self.search.search.seconds
        if most is not None and len(finished) >= most:
            return False
        under_way = len(finished) < len(trials)
        return under_way or seconds is None or sum(trial.seconds for trial in finished) < seconds

    def one_trial(self) -> None:
        """Trains one trial, or what is left of it, and tells the study."""
        trial = self.study.begin()
        number, settings, most = trial.begun.number, trial.begun.settings, self.search.search.most_trials
        of = "" if most is None else f" of {most}"
        names = short_names(list(self.search.search.space))
        self.say(f"Trial {number} ({number + 1}{of}): {show_settings(settings, names)}: ")
        with trial.timed(time.monotonic):
            state, value, reason = self.outcome(trial)
        trial.end(state, value, reason)
        self.say(self.verdict(self.study.trials, number) + "\n")

    def outcome(self, trial: RunningTrial) -> tuple[TrialState, float | None, str | None]:
        """Trains the trial, and returns its state, its value if it is complete, and the reason if it failed."""
        known = trial.begun
        if known.given_up:  # and the search was stopped before the study was told
            return "pruned", None, None
        search, pruned = self.search, False

        def after_evaluation(step: int, metrics: Mapping[str, float]) -> bool:
            nonlocal pruned
            trial.report(step, metrics[search.metric])
            pruned = step < trained.train.steps and trial.give_up()
            return pruned

        name, folder = f"{search.name}-{known.number:04}", self.folder.trial(known.number)
        try:
            trained = experiment(search, known.settings, name=name, run=str(folder))
            metrics = self.trainer.train(trained, after_evaluation)
        except UserError as error:
            if isinstance(error.__cause__, OSError):  # no room left, say: not of these settings' making
                raise
            return "failed", None, " ".join(str(error).split())
        if pruned:
            return "pruned", None, None
        value = metrics.get(search.metric.replace("eval/", "best/", 1), metrics[search.metric])
        if not math.isfinite(value):
            return "failed", None, f"{search.metric} is {value}"
        return "complete", value, None

    def verdict(self, trials: Sequence[Trial], number: int) -> str:
        """What became of a trial, and the best so far."""
        trial, best = trials[number], best_of(trials, self.search.mode)
        figure = self.search.metric.removeprefix("eval/")
        match trial.state:
            case "complete":
                found = f"{figure} {show(trial.value)}"
            case "pruned":
                found = f"pruned at step {trial.steps:,}, {figure} {show(trial.evaluations[trial.steps])}"
            case _:
                found = f"failed: {in_short(trial.reason)}"
        so_far = "" if best is None else f"; best {show(best.value)} (trial {best.number})"
        return f"{found}{so_far}; {clock(trial.seconds)}"

    def say(self, text: str) -> None:
        """Prints a line, or a part of one."""
        if not self.quiet:
            print(text, end="", flush=True)


def _finished(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.state != "running"]
