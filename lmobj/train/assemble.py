"""From a config to the parts of a run, put together: data, mesh, models, objective, compiled steps.

Training, evaluation and generation all start here, so they cannot disagree about what a config means. What can be
known before there is any data, the compiled program and its memory included, is a `Design`; an `Assembly` is a design
with its data.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from numpy.typing import NDArray

from lmobj import partition
from lmobj._yaml import to_yaml
from lmobj.batch import LABEL_FIELDS, RowSpec, Vocabulary
from lmobj.data import DataConfig, Dataset, HostBatch, prepare
from lmobj.errors import UserError
from lmobj.models import ModelBuilder
from lmobj.objectives import Objective, Role
from lmobj.train import distributed
from lmobj.train.config import TrainConfig
from lmobj.train.guard import GUARD
from lmobj.train.optimizers import make_optimizer
from lmobj.train.run_folder import differing_keys
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

__all__ = ["Assembly", "Design", "Experiment", "assemble", "design"]


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
    def run_dir(self) -> Path | str: ...


@dataclass(frozen=True)
class Design:
    """What a run computes, whatever the text: shapes only, nothing is allocated until `initial_state` is called.

    Steps are jitted over the mesh; states are born sharded.
    """

    config: Experiment
    objective: Objective
    vocab: Vocabulary
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

    def coefficients(self, step: Any) -> dict[str, float]:
        """Each term's coefficient at a step."""
        return {name: float(schedule(int(step))) for name, schedule in self.program.coefficients.items()}

    @property
    def parameter_count(self) -> int:
        """Trainable parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract_state.params))

    def initial_state(self) -> State:
        """The state at step 0, made under jit so that no device ever holds a whole large parameter.

        It is waited for: where there is no room for an array, the CPU's backend tells whoever waits for all of them,
        and leaves waiting forever who reads a single number.
        """
        state: State = jax.block_until_ready(initialise(self._init, self.shardings, self.mesh, self.rules))
        return state

    @functools.cached_property
    def train_step(self) -> Callable[[State, Mapping[str, Any]], tuple[State, StepMetrics]]:
        """One step over a batch, on the host or on the devices already; the state given is consumed.

        The learning rate of the step's first update is among the metrics. The host could reckon it too, but on the
        device's own queue, and so would wait for the step after.
        """
        return lambda state, batch: self._run(self._jitted_train_step, state, batch)

    @functools.cached_property
    def _jitted_train_step(self) -> Any:
        def step(state: State, frozen: dict[str, Any], batch: dict[str, jax.Array]) -> tuple[State, StepMetrics]:
            state, metrics = self.program.train_step(state, frozen, batch)
            rate = self.learning_rate(metrics[f"{GUARD}updates"][0])
            return state, {**metrics, "learning_rate": (rate, jnp.ones(()))}

        return jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, None))

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape, dtype and sharding of every array of a global batch."""
        sharding = batch_sharding(self.mesh, self.rules)
        shapes = batch_shapes(self.rows, self.config.train.batch_size)
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in shapes.items()}

    def lower_train_step(self) -> jax.stages.Lowered:
        """The training step, traced from shapes: `.compile()` it for its memory and text."""
        with active(self.mesh, self.rules):
            return self._jitted_train_step.lower(self.abstract_state, {}, self.abstract_batch)

    @functools.cached_property
    def eval_step(self) -> Callable[[State, HostBatch], StepMetrics]:
        """Metrics of a host batch."""
        step = jax.jit(self.program.eval_step)
        return lambda state, batch: self._run(step, state, batch)

    def _run(self, step: Callable[..., Any], state: State, batch: Mapping[str, Any]) -> Any:
        with active(self.mesh, self.rules):
            placed = batch if isinstance(batch["row_ids"], jax.Array) else self.on_devices(batch)
            return step(state, {}, placed)

    @functools.cached_property
    def local_rows(self) -> NDArray[np.int64] | None:
        """The rows of a global batch that this process's devices compute on, ascending; None: all of them.

        Processes that share rows between them, as the tensor axis has it, each read those rows.
        """
        sharding, size = batch_sharding(self.mesh, self.rules), self.config.train.batch_size
        if sharding.is_fully_addressable:
            return None
        shards = sharding.addressable_devices_indices_map((size,)).values()
        return np.unique(np.concatenate([np.arange(size)[shard] for shard in shards]))

    def on_devices(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The global batch, of which this process gives its `local_rows`."""
        sharding, local = batch_sharding(self.mesh, self.rules), self.local_rows
        if local is None:
            placed: dict[str, jax.Array] = jax.device_put(batch, sharding)
            return placed
        size = self.config.train.batch_size

        def place(rows: NDArray) -> jax.Array:
            def shard(index: Any) -> NDArray:
                first, last = np.searchsorted(local, np.arange(size)[index[0]][[0, -1]])
                return rows[first : last + 1]

            return jax.make_array_from_callback((size, *rows.shape[1:]), sharding, shard)

        return {name: place(rows) for name, rows in batch.items()}

    def gathered(self, state: State) -> dict[str, Any]:
        """The state's weights on the host, {role: nested dict of arrays}. Every process calls it and has all of them.

        They are the moving average where `train.ema` keeps one.
        """
        params: dict[str, Any] = jax.tree.map(distributed.on_host, state.weights)
        return params

    def model(self, state: State, role: str = "model") -> Any:
        """A model with the state's weights, for generation and inspection. Every process calls it."""
        return nnx.merge(self.program.graphs[role], self.gathered(state)[role])


@dataclass(frozen=True)
class Assembly(Design):
    """The parts of a run: its design, and the data."""

    dataset: Dataset

    @property
    def config_yaml(self) -> str:
        """The resolved config as YAML."""
        return to_yaml(self.identity["config"])

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of its run: the resolved config and the data's fingerprint."""
        return {"config": resolved(self.config, self.objective), "data": self.dataset.fingerprint}

    def describe(self) -> str:
        """One line: objective, parameters, data and devices."""
        train, data = self.config.train, self.dataset.summary()["splits"]["train"]
        axes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1)
        return (
            f"{type(self.objective).__name__}, {self.parameter_count:,} parameters; {data['documents']:,} documents, "
            f"{data['tokens']:,} tokens; batches of {train.batch_size} x {self.config.data.length} on "
            f"{self.mesh.size} {jax.devices()[0].device_kind} device{'s' * (self.mesh.size > 1)}"
            f"{f' ({axes})' if axes else ''}{f' of {jax.process_count()} processes' if jax.process_count() > 1 else ''}"
        )

    def batches(
        self, split: str, *, start: int = 0, steps: int | None = None, whole: bool = False
    ) -> Iterator[HostBatch]:
        """Batches of a split from step `start`; on the training split in this run's order, else each row once.

        With several processes each reads its `local_rows` of every batch, or with `whole` all rows.
        """
        train = self.config.train
        return self.dataset.batches(
            self.rows,
            split=split,
            seed=train.seed,
            batch_size=train.batch_size,
            start=start,
            steps=steps,
            local=None if whole else self.local_rows,
        )


def batch_shapes(rows: RowSpec, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array of a batch of such rows (see `lmobj.batch`)."""
    per_token = dict.fromkeys(("tokens", "segment_ids", "positions"), jnp.int32)
    shapes = {"row_ids": jax.ShapeDtypeStruct((batch_size, 2), jnp.int32)}
    for name in rows.fields:
        if name in LABEL_FIELDS:
            shapes[name] = jax.ShapeDtypeStruct((batch_size,), jnp.dtype(LABEL_FIELDS[name]))
        else:
            per_token[name] = jnp.bool_ if name == "word_starts" else jnp.int32
    if rows.layout in ("pairs", "examples"):
        per_token["token_types"] = jnp.int32
    if rows.layout == "pairs":
        shapes["pair_labels"] = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return shapes | {name: jax.ShapeDtypeStruct((batch_size, rows.length), x) for name, x in per_token.items()}


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

    Every process calls it; the first prepares the data, and the others after it.

    Raises:
      UserError: a setting that cannot be satisfied, or one that is not the same in all processes.
    """
    distributed.same("config", resolved(config, objective or config.objective), _differing_setting)
    with distributed.agreed("parts of the run"):
        mesh = _checked_mesh(config.train)  # before the data, which takes longer
        quiet = quiet or not distributed.is_first()
        dataset = distributed.first_alone("data", lambda: prepare(config.data, quiet=quiet))
        parts = design(config, dataset.vocab, mesh=mesh, objective=objective, model=model)
    distributed.same("data", dataset.fingerprint, _differing_data)
    return Assembly(**vars(parts), dataset=dataset)


def _differing_setting(first: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The first setting that is not that of process 0; where data is kept may be each machine's own matter."""
    for key, there, value in differing_keys(first, here):
        if key not in ("data.cache", "data.workers"):
            return f"{key} is {value!r} here and {there!r} in process 0"
    return None


def _differing_data(first: str, here: str) -> str | None:
    if first == here:
        return None
    return f"data.source and data.tokenizer have the fingerprint {here} here and {first} in process 0"


def design(
    config: Experiment,
    vocab: Vocabulary,
    *,
    mesh: Mesh | None = None,
    objective: Objective | None = None,
    model: ModelBuilder | None = None,
) -> Design:
    """What `assemble` makes, without the data: nothing is read, written or allocated.

    Args:
      config: the experiment.
      vocab: size and special ids of the vocabulary that the data would have.
      mesh: the devices, by default `config.train.mesh` over all there are; they may be fake.
      objective, model: used in place of the config's.

    Raises:
      UserError: a setting that cannot be satisfied.
    """
    settings = config.train
    objective = config.objective if objective is None else objective
    builder = config.model if model is None else model
    mesh = _checked_mesh(settings, mesh)
    rules = make_rules(settings.sharding)
    rows = objective.rows(vocab, config.data.length)
    role = _only_role(objective)

    def build() -> nnx.Module:
        return builder.build(vocab, nnx.Rngs(params=jax.random.key(settings.seed)))

    abstract = nnx.eval_shape(build)
    schedule = make_schedule(settings.optimizer.schedule, settings.steps)
    program = Program(
        objective=objective,
        graphs={role: nnx.split(abstract)[0]},
        vocab=vocab,
        optimizer=make_optimizer(settings.optimizer, schedule, logical_axes={role: logical_axes(abstract)}),
        coefficients=_coefficients(objective, settings),
        seed=settings.seed,
        accumulate=settings.accumulate,
        guard=settings.guard,
        ema=settings.ema,
    )

    def init() -> State:
        return program.init({role: nnx.to_pure_dict(nnx.state(build()))}, settings.batch_size)

    with active(mesh, rules):
        shapes = jax.eval_shape(init)
    parameters = parameter_shardings({role: abstract}, mesh, rules)
    shardings = state_shardings(shapes, parameters, mesh, rules)
    return Design(
        config=config,
        objective=objective,
        vocab=vocab,
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


def _checked_mesh(settings: TrainConfig, mesh: Mesh | None = None) -> Mesh:
    """The mesh, by default over all devices, once the global batch is known to split over it."""
    mesh = make_mesh(settings.mesh) if mesh is None else mesh
    check_batch(settings.batch_size, mesh, make_rules(settings.sharding), accumulate=settings.accumulate)
    return mesh


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
