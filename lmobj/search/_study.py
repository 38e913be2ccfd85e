"""The study of a search: Optuna's record of its trials in SQLite, and what it suggests next.

Optuna is asked and told, one trial at a time. Trial n is drawn with a generator of its own, seeded by (seed, n), so
that a search that was stopped goes on as if it had not been. A trial that was under way is found in the study as such.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np

from lmobj.errors import UserError
from lmobj.search._config import MedianPruner, Search, SearchExperiment
from lmobj.search._space import Parameter, Settings

__all__ = ["RunningTrial", "Study", "Trial", "TrialState", "best_of", "require_optuna"]

TrialState = Literal["complete", "pruned", "failed", "running"]

_NAME = "search"


def require_optuna() -> Any:
    """The package, imported now. UserError if it is missing."""
    try:
        optuna = importlib.import_module("optuna")
    except ImportError as error:
        raise UserError("a search needs the package optuna, missing here: pip install 'lmobj[search]'.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is known of a trial."""

    number: int
    state: TrialState
    settings: Settings
    value: float | None
    """The figure that decides, of a trial that is complete."""
    evaluations: Mapping[int, float]
    """Step -> the figure then."""
    seconds: float
    """Time that it took, all resumptions together."""
    reason: str | None
    """Why it failed."""
    given_up: bool
    """Whether it is to be ended early, or was."""

    @property
    def steps(self) -> int:
        """The step of its last evaluation; 0 before the first."""
        return max(self.evaluations, default=0)


def best_of(trials: Sequence[Trial], mode: Literal["min", "max"]) -> Trial | None:
    """The complete trial with the best value, the first of several; None if there is no complete one."""
    complete = [trial for trial in trials if trial.value is not None and trial.state == "complete"]
    sign = 1.0 if mode == "min" else -1.0
    return min(complete, key=lambda trial: sign * (trial.value or 0.0), default=None)


class Study:
    """The study in a file, which is made if it is not there. Use it as a context manager.

    Args:
      path: of the SQLite file.
      search: what is searched; the study is of the same, which the caller has seen to.

    Raises:
      UserError: Optuna is missing, or the file is no study.
    """

    def __init__(self, path: Path, search: SearchExperiment) -> None:
        self._optuna = require_optuna()
        self._search: Search = search.search
        url = f"sqlite:///{quote(str(path.absolute()))}"
        direction = {"min": "minimize", "max": "maximize"}[search.mode]
        try:
            self._storage = self._optuna.storages.RDBStorage(url)
            self._study = self._optuna.create_study(
                storage=self._storage, study_name=_NAME, direction=direction, load_if_exists=True, pruner=self._pruner()
            )
        except Exception as error:  # of SQLAlchemy, Alembic or Optuna, each with its own
            raise UserError(
                f"{path} cannot be opened as a study ({type(error).__name__}: {error}); accepted: a file that a search "
                "made, or none. Choose another folder with run=FOLDER to begin anew."
            ) from error

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *_: object) -> None:
        self._storage.remove_session()
        self._storage.engine.dispose()

    @property
    def trials(self) -> list[Trial]:
        """All trials, by number."""
        return [self._read(frozen) for frozen in self._study.get_trials(deepcopy=False)]

    def check_data(self, fingerprint: str) -> None:
        """Refuses data that changed since the search was begun, and remembers it at the beginning."""
        before = self._study.user_attrs.get("data")
        if before is None:
            self._study.set_user_attr("data", fingerprint)
        elif before != fingerprint:
            raise UserError(
                f"the data has changed: its fingerprint is now {fingerprint}, and the search was begun with {before}. "
                "Restore the files, or choose another folder with run=FOLDER."
            )

    def begin(self) -> RunningTrial:
        """The trial that is under way, or the next one."""
        states = self._optuna.trial.TrialState
        trials = self._study.get_trials(deepcopy=False)
        running = next((trial for trial in trials if trial.state == states.RUNNING), None)
        number = len(trials) if running is None else running.number
        self._study.sampler = self._sampler(number)
        trial = self._study.ask() if running is None else self._optuna.trial.Trial(self._study, running._trial_id)
        for key, parameter in self._search.space.items():
            _suggest(trial, key, parameter)
        return RunningTrial(self, trial, self.trials[number])

    def importances(self) -> dict[str, float]:
        """Share of each setting in how much the values of complete trials differ, by fANOVA (Hutter et al. 2014).

        Empty where it cannot be computed: for fewer than four trials, or where nothing differs.
        """
        complete = [trial for trial in self.trials if trial.state == "complete"]
        if len(complete) < 4 or len({trial.value for trial in complete}) < 2:
            return {}
        evaluator = self._optuna.importance.FanovaImportanceEvaluator(seed=0)
        try:
            found = self._optuna.importance.get_param_importances(self._study, evaluator=evaluator)
        except (ValueError, RuntimeError, ImportError):
            return {}
        return {key: share for key, share in found.items() if math.isfinite(share)}

    @property
    def pruner(self) -> MedianPruner | None:
        """The settings by which trials are ended early."""
        return self._search.pruner if isinstance(self._search.pruner, MedianPruner) else None

    def _pruner(self) -> Any:
        if self.pruner is None:
            return self._optuna.pruners.NopPruner()
        return self._optuna.pruners.MedianPruner(n_startup_trials=self.pruner.startup_trials)

    def _sampler(self, number: int) -> Any:
        """The sampler of one trial."""
        search, samplers = self._search, self._optuna.samplers
        seed = int(np.random.SeedSequence([search.seed, number]).generate_state(1)[0])
        if search.method == "grid":
            # The order is one for all trials; the n-th of them is trial n.
            grid = {key: parameter.labels or parameter.values for key, parameter in search.space.items()}
            return samplers.GridSampler(grid, seed=search.seed % 2**32)
        if search.method == "tpe":
            return samplers.TPESampler(n_startup_trials=search.startup_trials, seed=seed)
        return samplers.RandomSampler(seed=seed)

    def tell(self, trial: Any, state: TrialState, value: float | None) -> None:
        states = self._optuna.trial.TrialState
        self._study.sampler = self._optuna.samplers.RandomSampler()  # a grid's would stop a loop that there is not
        told = {"complete": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}[state]
        self._study.tell(trial, value, state=told)

    def _read(self, frozen: Any) -> Trial:
        states = self._optuna.trial.TrialState
        names: dict[Any, TrialState] = {
            states.COMPLETE: "complete", states.PRUNED: "pruned", states.FAIL: "failed"
        }  # fmt: skip
        state = names.get(frozen.state, "running")
        space = self._search.space
        return Trial(
            number=frozen.number,
            state=state,
            settings={key: _value(space[key], frozen.params[key]) for key in space if key in frozen.params},
            value=frozen.value if state == "complete" else None,
            evaluations=dict(sorted(frozen.intermediate_values.items())),
            seconds=frozen.user_attrs.get("seconds", 0.0),
            reason=frozen.user_attrs.get("reason"),
            given_up=frozen.user_attrs.get("given_up", False),
        )


class RunningTrial:
    """A trial under way, which the study is told of."""

    def __init__(self, study: Study, trial: Any, begun: Trial) -> None:
        self._study, self._trial = study, trial
        self.begun = begun
        """What was known of it when it was taken up."""
        self._told = set(begun.evaluations)

    def report(self, step: int, value: float) -> None:
        """Tells an evaluation. One that was told before, of the same value, may be told again."""
        if step not in self._told:
            self._trial.report(value, step)
            self._told.add(step)

    def give_up(self) -> bool:
        """Whether the trial should be ended after the evaluation that was told last; the study remembers."""
        pruner = self._study.pruner
        if pruner is None or len(self._told) <= pruner.warmup_evaluations:
            return False
        given_up: bool = self._trial.should_prune()
        if given_up:
            self._trial.set_user_attr("given_up", True)
        return given_up

    def end(self, state: TrialState, value: float | None = None, reason: str | None = None) -> None:
        """It is complete with a value, was ended early, or failed for a reason."""
        if reason is not None:
            self._trial.set_user_attr("reason", reason)
        self._study.tell(self._trial, state, value)

    @contextlib.contextmanager
    def timed(self, clock: Callable[[], float]) -> Iterator[None]:
        """Adds the time of the block to that of the trial, however the block ends."""
        before, start = self.begun.seconds, clock()
        try:
            yield
        finally:
            self._trial.set_user_attr("seconds", before + clock() - start)


def _suggest(trial: Any, key: str, parameter: Parameter) -> None:
    if parameter.choices is not None:
        trial.suggest_categorical(key, parameter.labels)
        return
    low, high = parameter.ends
    if parameter.whole:
        trial.suggest_int(key, low, high, step=parameter.step or 1, log=parameter.log)
    else:
        trial.suggest_float(key, float(low), float(high), step=parameter.step, log=parameter.log)


def _value(parameter: Parameter, stored: Any) -> Any:
    """A setting's value from what the study holds of it."""
    return stored if parameter.choices is None else parameter.choices[parameter.labels.index(stored)]
