"""From a config to the parts of a run, put together: data, mesh, models, objective, compiled steps.

Training, evaluation and generation all start here, so they cannot disagree about what a config means.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
from flax import nnx
from jax.sharding import Mesh

from lmobj import partition
from lmobj._yaml import to_yaml
from lmobj.batch import RowSpec
from lmobj.data import DataConfig, Dataset, HostBatch, prepare
from lmobj.errors import UserError
from lmobj.models import ModelBuilder
from lmobj.objectives import Objective, Role
from lmobj.train.config import TrainConfig
from lmobj.train.optimizers import make_optimizer
from lmobj.train.schedules import make_schedule
from lmobj.train.sharding import (
    active,
    batch_sharding,
    check_batch,
    initialise,
    logical_axes,
    make_mesh,
    make_rules,
    parameter_shardings,
    state_shardings,
)
from lmobj.train.step import Program, State, StepMetrics

__all__ = ["Assembly", "Experiment", "assemble"]


class Experiment(Protocol):
    """What `fit` reads of a config; `lmobj.config.Experiment` is one."""

    @property
    def data(self) -> DataConfig: ...
    @property
    def model(self) -> ModelBuilder: ...
    @property
    def objective(self) -> Objective: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def sample(self) -> tuple[str, ...]: ...
    @property
    def run_dir(self) -> Path: ...


@dataclass(frozen=True)
class Assembly:
    """The parts of a run. Steps are jitted over the mesh; states are born sharded."""

    config: Experiment
    objective: Objective
    dataset: Dataset
    rows: RowSpec
    mesh: Mesh
    rules: partition.Rules
    program: Program
    learning_rate: Callable[[Any], Any]
    shardings: State
    """The sharding of every leaf of the state."""
    abstract_state: State
    """Shape, dtype and sharding of every leaf of the state."""
    replicated: tuple[str, ...]
    """Parameters that a mesh axis did not divide and that every device therefore holds whole."""
    _init: Callable[[], State]

    @property
    def config_yaml(self) -> str:
        """The resolved config as YAML."""
        return to_yaml(self.identity["config"])

    def coefficients(self, step: Any) -> dict[str, float]:
        """Each term's coefficient at a step."""
        return {name: float(schedule(int(step))) for name, schedule in self.program.coefficients.items()}

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of its run: the resolved config and the data's fingerprint."""
        return {"config": resolved(self.config, self.objective), "data": self.dataset.fingerprint}

    @property
    def parameter_count(self) -> int:
        """Trainable parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract_state.params))

    def describe(self) -> str:
        """One line: objective, parameters, data and devices."""
        train, data = self.config.train, self.dataset.summary()["splits"]["train"]
        axes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1)
        return (
            f"{type(self.objective).__name__}, {self.parameter_count:,} parameters; {data['documents']:,} documents, "
            f"{data['tokens']:,} tokens; batches of {train.batch_size} x {self.config.data.length} on "
            f"{self.mesh.size} {jax.devices()[0].device_kind} device{'s' * (self.mesh.size > 1)}"
            f"{f' ({axes})' if axes else ''}"
        )

    def initial_state(self) -> State:
        """The state at step 0, made under jit so that no device ever holds a whole large parameter."""
        return initialise(self._init, self.shardings, self.mesh, self.rules)

    @functools.cached_property
    def train_step(self) -> Callable[[State, HostBatch], tuple[State, StepMetrics]]:
        """One step over a host batch; the state given is consumed."""
        step = jax.jit(self.program.train_step, donate_argnums=0, out_shardings=(self.shardings, None))
        return lambda state, batch: self._run(step, state, batch)

    @functools.cached_property
    def eval_step(self) -> Callable[[State, HostBatch], StepMetrics]:
        """Metrics of a host batch."""
        step = jax.jit(self.program.eval_step)
        return lambda state, batch: self._run(step, state, batch)

    def _run(self, step: Callable[..., Any], state: State, batch: HostBatch) -> Any:
        with active(self.mesh, self.rules):
            return step(state, {}, jax.device_put(batch, batch_sharding(self.mesh, self.rules)))

    def batches(self, split: str, *, start: int = 0, steps: int | None = None) -> Iterator[HostBatch]:
        """Batches of a split from step `start`; on the training split in this run's order, else each row once."""
        train = self.config.train
        return self.dataset.batches(
            self.rows, split=split, seed=train.seed, batch_size=train.batch_size, start=start, steps=steps
        )

    def gathered(self, state: State) -> dict[str, Any]:
        """Parameters on the host, {role: nested dict of arrays}."""
        params: dict[str, Any] = jax.device_get(state.params)
        return params

    def model(self, state: State, role: str = "model") -> Any:
        """A model with the state's parameters, for generation and inspection."""
        return nnx.merge(self.program.graphs[role], self.gathered(state)[role])


def resolved(config: Experiment, objective: Objective) -> dict[str, Any]:
    """The config as plain mappings, lists and scalars, with the objective that is really used."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"config must be a dataclass such as lmobj.config.Experiment, not {type(config).__name__}")
    values = {**dataclasses.asdict(config), "objective": dataclasses.asdict(objective)}
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def assemble(
    config: Experiment,
    *,
    objective: Objective | None = None,
    model: ModelBuilder | None = None,
    quiet: bool = False,
) -> Assembly:
    """Puts the parts of a run together; nothing is written but the data cache.

    Args:
      config: the experiment.
      objective, model: used in place of the config's.
      quiet: no progress bars.

    Raises:
      UserError: a setting that cannot be satisfied.
    """
    settings = config.train
    objective = config.objective if objective is None else objective
    builder = config.model if model is None else model
    mesh, rules = make_mesh(settings.mesh), make_rules(settings.sharding)
    check_batch(settings.batch_size, mesh, rules, accumulate=settings.accumulate)

    dataset = prepare(config.data, quiet=quiet)
    rows = objective.rows(dataset.vocab, config.data.length)
    role = _only_role(objective)

    def build() -> nnx.Module:
        return builder.build(dataset.vocab, nnx.Rngs(params=jax.random.key(settings.seed)))

    abstract = nnx.eval_shape(build)
    schedule = make_schedule(settings.optimizer.schedule, settings.steps)
    program = Program(
        objective=objective,
        graphs={role: nnx.split(abstract)[0]},
        vocab=dataset.vocab,
        optimizer=make_optimizer(settings.optimizer, schedule, logical_axes={role: logical_axes(abstract)}),
        coefficients=_coefficients(objective, settings),
        seed=settings.seed,
        accumulate=settings.accumulate,
    )

    def init() -> State:
        return program.init({role: nnx.to_pure_dict(nnx.state(build()))}, settings.batch_size)

    with active(mesh, rules):
        shapes = jax.eval_shape(init)
    parameters = parameter_shardings({role: abstract}, mesh, rules)
    shardings = state_shardings(shapes, parameters, mesh, rules)
    return Assembly(
        config=config,
        objective=objective,
        dataset=dataset,
        rows=rows,
        mesh=mesh,
        rules=rules,
        program=program,
        learning_rate=schedule,
        shardings=shardings,
        abstract_state=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings),
        replicated=parameters.replicated,
        _init=init,
    )


def _only_role(objective: Objective) -> str:
    """The role of the one model that `fit` builds and trains."""
    if list(objective.roles.values()) != [Role.TRAINABLE]:
        roles = ", ".join(f"{name} ({kind.value})" for name, kind in objective.roles.items())
        raise UserError(
            f"objective is {type(objective).__name__}, which needs the models {roles}; fit trains objectives with one "
            "trainable model. Train others with lmobj.train.Program, which takes any number."
        )
    (role,) = objective.roles
    return role


def _coefficients(objective: Objective, settings: TrainConfig) -> dict[str, Callable[[Any], Any]]:
    """Term -> schedule: the objective's own numbers, with those that the config sets in their place."""
    unknown = sorted(set(settings.coefficients) - set(objective.coefficients))
    if unknown:
        raise UserError(
            f"train.coefficients.{unknown[0]} is {settings.coefficients[unknown[0]]}; accepted: the objective's terms, "
            f"{', '.join(objective.coefficients)}."
        )
    given = {**objective.coefficients, **settings.coefficients}

    def schedule(value: Any) -> Callable[[Any], Any]:
        return (lambda step: value) if isinstance(value, int | float) else make_schedule(value, settings.steps)

    return {name: schedule(value) for name, value in given.items()}
