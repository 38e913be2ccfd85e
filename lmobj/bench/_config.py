"""A benchmark as one frozen dataclass: an experiment that its arms share, what each arm changes, budget, seeds, probe.

A benchmark's file is an experiment's with more sections, so `base:` and `key=value` overrides mean what they mean
there:

    base: ../quickstart.yaml               # or the experiment's sections, written here
    arms:
      clm: {}
      mlm: {model: {name: encoder, width: 192}, objective: {name: masked_lm}}
    budget: {flops: 2.0e+13}
    probe: {name: swapped_words}

`lmobj schema --bench` prints the JSON schema of such files for editors.

An arm is the shared experiment with the arm's own mapping merged over it, as a file is merged over its base.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lmobj import _settings, _yaml, config
from lmobj.bench._probe_config import Probe
from lmobj.config import Experiment
from lmobj.errors import UserError

__all__ = ["Benchmark", "Budget", "BudgetKind", "experiments", "load", "schema"]

BudgetKind = Literal["tokens", "flops", "seconds"]

_MOST_SEEDS = 1000


@dataclasses.dataclass(frozen=True)
class Budget:
    """What each arm may spend per seed, in one of three currencies; its steps follow from it."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  pydantic's own name and type

    tokens: int | None = None
    """Tokens read: batch_size * length per step."""
    flops: float | None = None
    """Floating-point operations of matrix products, counted in the compiled training step."""
    seconds: float | None = None
    """Time of training steps on this machine, measured on each arm's first steps once they are compiled."""

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) != 1:
            shown = _yaml.show(given) if given else "empty"
            raise UserError(f"budget is {shown}; accepted: exactly one of tokens, flops and seconds, the others null.")
        if not 0 < self.amount < math.inf:
            raise UserError(f"budget.{self.kind} is {self.amount}; accepted: a finite number above 0.")

    def _given(self) -> dict[BudgetKind, float]:
        pairs: dict[BudgetKind, float | None] = {"tokens": self.tokens, "flops": self.flops, "seconds": self.seconds}
        return {kind: amount for kind, amount in pairs.items() if amount is not None}

    @property
    def kind(self) -> BudgetKind:
        """The currency."""
        return next(iter(self._given()))

    @property
    def amount(self) -> float:
        """How much of it."""
        return self._given()[self.kind]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark(Experiment):
    """Several ways to train a model, each on the same budget with several seeds, and what they are judged by."""

    arms: dict[str, dict[str, Any]]
    """Name of each arm -> the settings in which it differs from the shared experiment, nested as in a config."""
    budget: Budget
    """What each arm may spend per seed. It decides the arms' `train.steps`, and with them their schedules."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each arm is trained once with each of these as its `train.seed`."""
    probe: Probe | None = None
    """Labelled texts on which a logistic regression over the frozen model's hidden states is scored; null: none."""
    metrics: tuple[str, ...] = ()
    """Metrics of the runs to compare the arms by, such as eval/bits_per_byte; only those that mean the same in all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run is not None and "://" in self.run:
            raise UserError(f"run is {self.run!r}; accepted: a folder on this machine, or null for runs/<name>.")
        if not self.arms:
            raise UserError("arms is empty; accepted: one or more names, each with the settings in which it differs.")
        for name in self.arms:
            if not name or name.startswith(".") or set(name) & set("/\\|"):
                raise UserError(f'arms has the name "{name}"; accepted: text that can name a folder, without / \\ |.')
        if not 1 <= len(self.seeds) <= _MOST_SEEDS or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds is {list(self.seeds)}; accepted: 1 to {_MOST_SEEDS} different whole numbers.")
        if self.probe is None and not self.metrics:
            raise UserError("probe is null and metrics is empty; accepted: at least one of the two to compare by.")
        for name in self.metrics:
            if not name.startswith(("eval/", "train/", "perf/")):
                raise UserError(
                    f"metrics has {name!r}; accepted: names from metrics.jsonl, such as eval/bits_per_byte."
                )


def load(path: str | Path, overrides: Sequence[str] = ()) -> Benchmark:
    """Reads a benchmark from a YAML file and `dotted.key=value` overrides; every arm is checked too.

    Raises:
      UserError: one paragraph that names the place (`file:line`), the key, its value and what is accepted.
    """
    document = _yaml.merge(_yaml.read(path), _yaml.parse_overrides(overrides))
    document = dataclasses.replace(document, values={"name": Path(path).stem, **document.values})
    benchmark = _settings.build(Benchmark, document, str(path))
    experiments(benchmark, document.origins, str(path))
    return benchmark


def schema() -> dict[str, Any]:
    """The JSON schema of benchmark files. What an arm changes is described as the experiment's own sections."""
    described = config.schema(Benchmark, "lmobj benchmark")
    own = {field.name for field in dataclasses.fields(Benchmark)} - {f.name for f in dataclasses.fields(Experiment)}
    decided = {*own, "base", "name", "run"}
    sections = {key: section for key, section in described["properties"].items() if key not in decided}
    arm = {"type": "object", "properties": sections, "additionalProperties": False}
    described["properties"]["arms"]["additionalProperties"] = {"$ref": "#/$defs/Arm"}
    return {**described, "$defs": {**described["$defs"], "Arm": arm}}


_SET_BY_BENCH = ("name", "run", "train.seed", "train.steps")
"""Keys of an arm's experiment that the benchmark decides."""


def experiments(
    benchmark: Benchmark, origins: Mapping[str, str] | None = None, source: str = ""
) -> dict[str, Experiment]:
    """The experiment of each arm, before its steps, seed and folder are known.

    Args:
      benchmark: the benchmark.
      origins, source: where its keys were written, for messages.

    Raises:
      UserError: an arm whose settings cannot be those of an experiment.
    """
    own = {field.name for field in dataclasses.fields(Benchmark)} - {f.name for f in dataclasses.fields(Experiment)}
    shared = {key: value for key, value in _settings.plain(benchmark).items() if key not in own}
    found = {}
    for arm, changes in benchmark.arms.items():
        for key in _SET_BY_BENCH:
            if _has(changes, key):
                place = (origins or {}).get(f"arms.{arm}.{key}", source)
                raise UserError(f"{place}: arms.{arm}.{key} is set; accepted: settings other than {key}, which the "
                                "benchmark decides (by name, run, seeds and budget).")  # fmt: skip
        prefix = f"arms.{arm}."
        places = {key.removeprefix(prefix): at for key, at in (origins or {}).items() if key.startswith(prefix)}
        document = _yaml.merge(_yaml.Document(shared), _yaml.Document(changes, places))
        try:
            found[arm] = _settings.build(Experiment, document, f"{source}: arms.{arm}".removeprefix(": "))
        except UserError as error:
            raise UserError(f"{error} (This is in the arm {arm}.)") from None
    return found


def _has(values: Any, dotted: str) -> bool:
    for part in dotted.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return True
