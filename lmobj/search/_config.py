"""A search as one frozen dataclass: an experiment, which of its settings are tried, how, and by what they are judged.

A search's file is an experiment's with one more section, so `base:` and `key=value` overrides mean what they mean
there:

    base: ../quickstart.yaml               # or the experiment's sections, written here
    search:
      method: tpe
      trials: 30
      pruner: median
      space:
        train.optimizer.schedule.peak: {low: 1.0e-4, high: 1.0e-2, log: true}
        train.batch_size: {choices: [8, 16, 32]}
        model.layers: {low: 2, high: 6}    # whole numbers

`lmobj schema --search` prints the JSON schema of such files for editors.

A trial is the experiment with one value for each setting of the space.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from lmobj import _settings, _yaml, config
from lmobj.config import Experiment
from lmobj.errors import UserError
from lmobj.search._space import Parameter, Settings, nested

__all__ = ["MedianPruner", "Search", "SearchExperiment", "experiment", "load", "schema"]

_LARGEST_GRID = 100_000
_COMBINATIONS = 200
"""Of other settings' values that are tried before a value is held to fit none of them."""


@dataclasses.dataclass(frozen=True)
class MedianPruner:
    """Ends a trial early if the best of its evaluations is worse than the median of the others' at its last step.

    The others are the trials that came to their end, each by its evaluation at that step: Optuna's MedianPruner.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "use_attribute_docstrings": True}

    name: Literal["median"] = "median"
    """The rule, of which there is one."""
    startup_trials: int = 5
    """Trials that come to their end before any is ended early, at least 1."""
    warmup_evaluations: int = 1
    """Evaluations of each trial after which it is not ended yet, 0 or more."""

    def __post_init__(self) -> None:
        for name, least in {"startup_trials": 1, "warmup_evaluations": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"search.pruner.{name} is {getattr(self, name)}; accepted: {least} or more.")


@dataclasses.dataclass(frozen=True)
class Search:
    """Which settings are tried, how they are chosen, and by what they are judged."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "use_attribute_docstrings": True}

    space: dict[str, Parameter]
    """Dotted key of each setting that is tried -> its choices, or its range of numbers."""
    method: Literal["tpe", "random", "grid"] = "tpe"
    """How settings are chosen: by a model of what was good so far (tree-structured Parzen estimator, Bergstra et al.
    2011), at random, or all combinations of choices and steps, in an order drawn by the seed."""
    trials: int | None = None
    """Trials in all, at least 1, those before a resumption included; absent: as many as `seconds` allow, or with method
    grid the whole grid."""
    seconds: float | None = None
    """No trial is begun once the trials before have taken so long together; absent: any time."""
    startup_trials: int = 10
    """With method tpe, trials at random before the model is asked, at least 1."""
    pruner: Literal["median"] | MedianPruner | None = None
    """Which trials are ended early, at an evaluation (`train.evaluate_every`); null: none."""
    metric: str | None = None
    """The held-out figure that decides, as evaluation names it without eval/; absent: that of train.best."""
    mode: Literal["min", "max"] | None = None
    """Whether less of it is better, or more; absent: as train.best has it, which must then be of the same figure."""
    seed: int = 0
    """Seed of the choices, 0 or more. Trial n depends on it, on n, and on what the trials before have found."""

    def __post_init__(self) -> None:
        if self.pruner == "median":
            object.__setattr__(self, "pruner", MedianPruner())
        if not self.space:
            raise UserError("search.space is {}; accepted: one or more dotted keys, such as train.batch_size.")
        for name, least in {"trials": 1, "startup_trials": 1, "seed": 0}.items():
            value = getattr(self, name)
            if value is not None and not least <= value < 2**63:
                raise UserError(f"search.{name} is {value}; accepted: {least} or more.")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise UserError(f"search.seconds is {self.seconds}; accepted: a finite number above 0.")
        if self.metric is not None and (not self.metric or self.metric.startswith("eval/")):
            raise UserError(f"search.metric is {self.metric!r}; accepted: a name without eval/, such as loss.")
        if self.method == "grid":
            self._check_grid()
        elif self.trials is None and self.seconds is None:
            raise UserError(
                f"search.trials is null and so is search.seconds, and with method {self.method} there is no other end; "
                "accepted: a number for at least one of the two."
            )

    def _check_grid(self) -> None:
        for key, parameter in self.space.items():
            if parameter.values is None:
                raise UserError(
                    f"search.space.{key} is a range without step, which is no part of a grid; accepted with "
                    "search.method grid: choices, or low, high and step."
                )
        if self.grid_size > _LARGEST_GRID:
            raise UserError(
                f"search.space has a grid of {self.grid_size:,} combinations; accepted: {_LARGEST_GRID:,} at most."
            )

    @property
    def grid_size(self) -> int:
        """Combinations of all values, where all can be counted."""
        return math.prod(len(parameter.values or ()) for parameter in self.space.values())

    @property
    def most_trials(self) -> int | None:
        """Trials after which the search is at its end; None where only time ends it."""
        if self.method != "grid":
            return self.trials
        return self.grid_size if self.trials is None else min(self.trials, self.grid_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchExperiment(Experiment):
    """An experiment, and the search for its best settings."""

    search: Search
    """Which settings are tried, how they are chosen, and by what they are judged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        search, train = self.search, self.train
        if self.run is not None and "://" in self.run:
            raise UserError(f"run is {self.run!r}; accepted: a folder on this machine, or null for runs/<name>.")
        if search.pruner is not None and train.evaluate_every is None and "train.evaluate_every" not in search.space:
            raise UserError(
                "search.pruner is given and train.evaluate_every is null, so that there is one evaluation, at the end; "
                "accepted: a number of steps between evaluations, or search.pruner null."
            )
        if search.metric not in (None, train.best.metric) and search.mode is None:
            raise UserError(
                f"search.metric is {search.metric} and search.mode is missing; accepted: min where less is better, max "
                "where more is."
            )

    @property
    def metric(self) -> str:
        """The figure that decides, as metrics.jsonl names it."""
        return f"eval/{self.search.metric or self.train.best.metric}"

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether less of it is better, or more."""
        return self.search.mode or self.train.best.mode


def load(path: str | Path, overrides: Sequence[str] = ()) -> SearchExperiment:
    """Reads a search from a YAML file and `dotted.key=value` overrides; every value in its space is checked too.

    Raises:
      UserError: one paragraph that names the place (`file:line`), the key, its value and what is accepted.
    """
    document = config.read(path, overrides)
    search = _settings.build(SearchExperiment, document, str(path))
    _check_space(search, document.origins, str(path))
    return search


def schema() -> dict[str, Any]:
    """The JSON schema of search files."""
    return config.schema(SearchExperiment, "lmobj search")


def experiment(search: SearchExperiment, settings: Settings, *, name: str, run: str | None) -> Experiment:
    """The experiment with these settings of the space.

    Raises:
      UserError: it refuses them.
    """
    base = {key: value for key, value in _settings.plain(search).items() if key != "search"}
    document = _yaml.merge(_yaml.Document(base), _yaml.Document(nested(settings)))
    values = {**document.values, "name": name, "run": run}
    shown = ", ".join(f"{key}={_yaml.show(value)}" for key, value in settings.items())
    return _settings.build(Experiment, _yaml.Document(values), shown)


_SET_BY_SEARCH = ("name", "run", "search")


def _check_space(search: SearchExperiment, origins: Mapping[str, str], source: str) -> None:
    """Refuses keys that an experiment has not, and values that it refuses together with any values of the others."""
    for key, parameter in search.search.space.items():
        place = origins.get(f"search.space.{key}", source)
        if key.split(".")[0] in _SET_BY_SEARCH or not all(key.split(".")):
            raise UserError(
                f"{place}: search.space has the key {_yaml.show(key)}; accepted: dotted keys of an experiment other "
                f"than {', '.join(_SET_BY_SEARCH)}, such as train.batch_size."
            )
        for value in parameter.ends:
            if (error := _refusal(search, key, value)) is not None:
                reason = str(error).partition(f"{key}={_yaml.show(value)}: ")[2] or str(error)
                raise UserError(f"{place}: search.space.{key} has the value {_yaml.show(value)}: {reason}")
        if parameter.choices is None and parameter.whole and parameter.step is None:
            _check_fractions(search, key, parameter, place)


def _check_fractions(search: SearchExperiment, key: str, parameter: Parameter, place: str) -> None:
    """Refuses whole ends for a setting that takes fractions, of which they would silently leave all out."""
    assert parameter.low is not None
    if _refusal(search, key, parameter.low + 0.5) is None:
        raise UserError(
            f"{place}: search.space.{key} has low {parameter.low} and high {parameter.high}, between which only whole "
            f"numbers would be tried, and {key} takes fractions; accepted: low {float(parameter.low)} and high "
            f"{float(parameter.high or 0)} for those, or step: 1 for whole numbers."
        )


def _refusal(search: SearchExperiment, key: str, value: Any) -> UserError | None:
    """Why the experiment refuses a value, alone and with all combinations of the others' values (or the first many)."""
    others = {other: parameter.ends for other, parameter in search.search.space.items() if other != key}
    combined = (dict(zip(others, values, strict=True)) for values in itertools.product(*others.values()))
    first = None
    for settings in itertools.chain([{}], itertools.islice(combined, _COMBINATIONS)):
        try:
            experiment(search, {key: value, **settings}, name=search.name, run=None)
        except UserError as error:
            first = first or error
        else:
            return None
    return first
