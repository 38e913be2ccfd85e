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
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from numpy.typing import NDArray

from lmobj import adapt, partition
from lmobj._yaml import to_yaml
from lmobj.batch import RowSpec, Vocabulary
from lmobj.data import DataConfig
from lmobj.data import Rows as DataRows
from lmobj.errors import UserError
from lmobj.models import ModelBuilder, MoEConfig
from lmobj.objectives import Objective, Rows, with_router_losses
from lmobj.tasks import AnyDataset, prepare_any
from lmobj.train import distributed, rounding
from lmobj.train.batches import batch_shapes, local_rows, members, on_devices, together, unnamed
from lmobj.train.config import TrainConfig
from lmobj.train.guard import GUARD
from lmobj.train.infilling import check_infilling
from lmobj.train.layer_decay import decayed_by_layer
from lmobj.train.optimizers import laid_out, make_optimizer
from lmobj.train.rank_allocation import allocating
from lmobj.train.roles import build_models, built_roles
from lmobj.train.run_folder import differing_keys
from lmobj.train.schedules import make_schedule
from lmobj.train.sharding import (
    active,
    batch_sharding,
    check_batch,
    check_experts,
    check_length,
    initialise,
    logical_axes,
    make_mesh,
    make_rules,
    over_replicas,
    parameter_shardings,
    state_shardings,
)
from lmobj.train.step import Program, State, StepMetrics
from lmobj.train.unfreezing import check_unfreezing, unfrozen_by_layer

if TYPE_CHECKING:
    from lmobj.evaluate import GenerationConfig, WritingConfig
    from lmobj.train.initial import Init

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
    def init(self) -> Init | None: ...
    @property
    def adapter(self) -> adapt.AdapterConfig | None: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def sample(self) -> tuple[str, ...]: ...
    @property
    def generation(self) -> GenerationConfig | None: ...
    @property
    def writing(self) -> WritingConfig | None: ...
    @property
    def run_dir(self) -> Path | str: ...


@dataclass(frozen=True)
class Design:
    """What a run computes, whatever the text: shapes only, nothing is allocated until `initial_state` is called.

    Steps are jitted over the mesh; states are born sharded.
    """

    config: Experiment
    objective: Objective
    """As configured; `program` has the losses of routers around it where the model has experts."""
    builder: ModelBuilder
    """The model's settings."""
    vocab: Vocabulary
    rows: Rows
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
    abstract_base: Mapping[str, Any]
    """Shape, dtype and sharding of the parameters by role as they are before adapters are put in."""
    _init: Callable[[Any, Mapping[str, Any]], State]
    """Of the data of a key, and of parameters that are given."""
    _key: NDArray[np.uint32]
    """The run's key, an argument of all programs, so that runs with other seeds need no compilation."""

    @property
    def abstract_params(self) -> dict[str, Any]:
        """Shape, dtype and sharding of every parameter by role, trained or frozen."""
        return self.abstract_state.whole(self.abstract_state.params)

    def coefficients(self, step: Any) -> dict[str, float]:
        """Each term's coefficient at a step."""
        return {name: float(schedule(int(step))) for name, schedule in self.program.coefficients.items()}

    @property
    def parameter_count(self) -> int:
        """Trainable parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract_state.params))

    def initial_state(self, given: Mapping[str, Any] | None = None) -> State:
        """The state at step 0, made under jit so that no device ever holds a whole large parameter.

        `given` are the parameters of some roles, to begin with in place of fresh ones.

        It is waited for: where there is no room for an array, the CPU's backend tells whoever waits for all of them,
        and leaves waiting forever who reads a single number.
        """
        state: State = jax.block_until_ready(
            initialise(self._init, self.shardings, self.mesh, self.rules, self._key, given or {})
        )
        return state

    @functools.cached_property
    def train_step(self) -> Callable[[State, Mapping[str, Any]], tuple[State, StepMetrics]]:
        """One step over a batch, on the host or on the devices already; the state given is consumed.

        The learning rate of the step's first update is among the metrics. The host could reckon it too, but on the
        device's own queue, and so would wait for the step after.
        """
        return lambda state, batch: self._run(self._jitted_train_step, state, batch, self._key)

    @functools.cached_property
    def _jitted_train_step(self) -> Any:
        def step(state: State, frozen: Any, batch: dict[str, Any], key: jax.Array) -> tuple[State, StepMetrics]:
            state, metrics = self.program.with_key(key).train_step(state, frozen, batch)
            rate = self.learning_rate(metrics[f"{GUARD}updates"][0])
            return state, {**metrics, "learning_rate": (rate, jnp.ones(()))}

        return jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, None))

    @property
    def abstract_batch(self) -> dict[str, Any]:
        """Shape, dtype and sharding of every array of a global batch."""
        shapes = {name: batch_shapes(spec, self.batch_sizes[name]) for name, spec in self._members.items()}
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._batch_sharding), shapes)
        return unnamed(placed)

    @property
    def batch_sizes(self) -> dict[str, int]:
        """Rows of a global batch: of each member of a mixture by its name, else under no name."""
        size = self.config.train.batch_size
        return {"": size} if isinstance(self.rows, RowSpec) else dict(self.objective.member_rows(size))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch, padding included; of all members of a mixture together."""
        return sum(self.batch_sizes.values()) * self.config.data.length

    @property
    def _members(self) -> dict[str, RowSpec]:
        """The rows of each member of a mixture, else those of the one batch under no name."""
        return {"": self.rows} if isinstance(self.rows, RowSpec) else dict(self.rows)

    @property
    def spec(self) -> RowSpec:
        """The rows that the objective reads; of a mixture, those of its first member."""
        return next(iter(self._members.values()))

    @property
    def _batch_sharding(self) -> NamedSharding:
        return batch_sharding(self.mesh, self.rules)

    def lower_train_step(self) -> jax.stages.Lowered:
        """The training step, traced from shapes: `.compile()` it for its memory and text, and `run_compiled` it."""
        with active(self.mesh, self.rules):
            return self._jitted_train_step.lower(self.abstract_state, {}, self.abstract_batch, self._key)

    def run_compiled(
        self, compiled: jax.stages.Compiled, state: State, batch: Mapping[str, Any]
    ) -> tuple[State, StepMetrics]:
        """One step of what `lower_train_step().compile()` made, over a batch on the devices; the state is consumed."""
        with active(self.mesh, self.rules):
            stepped: tuple[State, StepMetrics] = compiled(state, {}, batch, self._key)
        return stepped

    @functools.cached_property
    def eval_step(self) -> Callable[..., tuple[StepMetrics, Any, dict[str, Any]]]:
        """Of (state, batch, carried): the metrics of the batch, what is carried to the next one of the split, and of
        tasks the model's outputs.

        Before the first, `fresh_carried` gives it.
        """

        @jax.jit
        def step(state: State, frozen: Any, batch: dict[str, Any], key: jax.Array, carried: Any) -> Any:
            return self.program.with_key(key).eval_step(state, frozen, batch, carried)

        return lambda state, batch, carried=(): self._run(step, state, batch, self._key, carried)

    def fresh_carried(self, state: State) -> Any:
        """What an objective with a memory carries before any text was read."""
        with active(self.mesh, self.rules):
            return self._jitted_fresh_carried(state, self._key)

    @functools.cached_property
    def _jitted_fresh_carried(self) -> Any:
        size = self.config.train.batch_size
        return jax.jit(
            lambda state, key: self.program.with_key(key).fresh_carried(state, {}, size),
            out_shardings=self.shardings.objective.carried,
        )

    def _run(self, step: Callable[..., Any], state: State, batch: Mapping[str, Any], *more: Any) -> Any:
        with active(self.mesh, self.rules):
            placed = batch if isinstance(jax.tree.leaves(batch)[0], jax.Array) else self.on_devices(batch)
            return step(state, {}, placed, *more)

    @functools.cached_property
    def local_rows(self) -> dict[str, NDArray[np.int64] | None]:
        """The rows that this process reads of each of `batch_sizes`, ascending; None: all of them."""
        return {name: local_rows(self._batch_sharding, size) for name, size in self.batch_sizes.items()}

    def on_devices(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The global batch, of which this process gives its `local_rows`."""
        placed = {
            name: on_devices(part, self._batch_sharding, self.batch_sizes[name])
            for name, part in members(batch).items()
        }
        return unnamed(placed)

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

    dataset: AnyDataset

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
        data = self.dataset.summary()["splits"]["train"]
        sizes = " + ".join(map(str, self.batch_sizes.values()))
        axes = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1)
        return (
            f"{type(self.objective).__name__}, {self._parameters}; {data['documents']:,} documents, "
            f"{data['tokens']:,} tokens; batches of {sizes} x {self.config.data.length} on "
            f"{self.mesh.size} {jax.devices()[0].device_kind} device{'s' * (self.mesh.size > 1)}"
            f"{f' ({axes})' if axes else ''}{f' of {jax.process_count()} processes' if jax.process_count() > 1 else ''}"
        )

    @property
    def _parameters(self) -> str:
        """How many parameters there are, and of how many how many are trained."""
        every = sum(leaf.size for leaf in jax.tree.leaves(self.abstract_params))
        if every == self.parameter_count:
            return f"{every:,} parameters"
        return f"{self.parameter_count:,} of {every:,} parameters trained"

    def notes(self, split: str) -> tuple[str, ...]:
        """What the person should know of the rows of a split: what did not fit."""
        return self.dataset.notes(self.spec, split)

    def batches(
        self, split: str, *, start: int = 0, steps: int | None = None, whole: bool = False, source: str | None = None
    ) -> Iterator[Any]:
        """Batches of a split from step `start`; on the training split in this run's order, else each row once.

        With `source` they are of that source alone, where the data is a mixture of some and the objective is of none.

        With several processes each reads its `local_rows` of every batch, or with `whole` all rows. A mixture's batches
        are dicts of batches by member.
        """
        local = dict.fromkeys(self.batch_sizes) if whole else self.local_rows
        rows = {name: self.read_rows(name, split, source) for name in self._members}
        if "" in rows:
            return rows[""].batches(start, steps, local[""])
        return together(rows, start=start, steps=steps, local=local)

    def read_rows(self, name: str, split: str, source: str | None = None) -> DataRows:
        """The rows of a split that a member of a mixture reads, or under no name those of the one batch."""
        spec, size = self._members[name], self.batch_sizes[name]
        if source is not None:
            spec = dataclasses.replace(spec, source=source)
        try:
            return self.dataset.rows(spec, split=split, seed=self.config.train.seed, batch_size=size)
        except UserError as error:
            if not name:
                raise
            raise UserError(f"objective.members.{name}: {error}") from error


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
        dataset = distributed.first_alone("data", lambda: prepare_any(config.data, quiet=quiet))
        parts = design(config, dataset.vocab, mesh=mesh, objective=objective, model=model)
        parts.objective.check_classes(dataset.classes_of)
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
    moe: MoEConfig | None = getattr(builder, "moe", None)
    if moe is not None:
        check_experts(moe.experts, mesh, rules)
    objective.check_model(builder)
    rows = objective.rows(vocab, config.data.length)
    check_infilling(objective, rows, config.data)
    check_length(config.data.length, mesh, rules)
    if not isinstance(rows, RowSpec):
        for name, size in objective.member_rows(settings.batch_size).items():
            share = f"objective.members.{name}'s share of train.batch_size"
            check_batch(size, mesh, rules, accumulate=settings.accumulate, key=share)
    roles = built_roles(objective)
    build = functools.partial(build_models, objective, builder, vocab, roles)
    abstract = nnx.eval_shape(functools.partial(build, adapter=config.adapter), jax.random.key(0))
    marks = {role: adapt.trainable(model) for role, model in abstract.items()}
    trained = with_router_losses(objective, abstract)
    schedule = make_schedule(settings.optimizer.schedule, settings.steps)
    axes = adapt.split(logical_axes(abstract), marks)[0]
    optimizer = make_optimizer(settings.optimizer, schedule, logical_axes=axes)
    optimizer = decayed_by_layer(optimizer, settings.layer_decay, axes)
    optimizer = unfrozen_by_layer(optimizer, settings.unfreeze_every, axes)
    if isinstance(config.adapter, adapt.AdaLoRA):
        optimizer = allocating(optimizer, config.adapter)
    if settings.stochastic_rounding:
        optimizer = rounding.in_float32(optimizer)
    program = Program(
        objective=trained,
        graphs={role: nnx.split(model)[0] for role, model in abstract.items()},
        vocab=vocab,
        optimizer=optimizer,
        coefficients=_coefficients(trained, settings),
        seed=settings.seed,
        accumulate=settings.accumulate,
        guard=settings.guard,
        ema=settings.ema,
        stochastic_rounding=settings.stochastic_rounding,
    )

    def init(key: Any, given: Mapping[str, Any]) -> State:
        seeded = program.with_key(key)
        models = build(seeded.key, given=given, adapter=config.adapter)
        params = {role: nnx.to_pure_dict(nnx.state(model)) for role, model in models.items()}
        trained, frozen = adapt.split(params, marks)
        return seeded.init(trained, settings.batch_size, frozen)

    key_data = program.key_data  # before the mesh is in force, whose devices may not be there
    with active(mesh, rules):
        shapes = jax.eval_shape(init, key_data, {})
    check_unfreezing(settings.unfreeze_every, settings.steps, shapes.params, axes)
    if settings.stochastic_rounding:
        rounding.check_rounded(shapes.params)
    parameters = parameter_shardings(abstract, mesh, rules)
    shardings = state_shardings(shapes, parameters, mesh, rules)
    if settings.zero:
        shared = over_replicas(shapes, shardings, mesh)
        program = dataclasses.replace(program, optimizer=laid_out(program.optimizer, shared.trained))
        shardings = shardings._replace(opt_state=shared.opt_state, ema=shared.ema)
    abstract_state = jax.tree.map(_shape, shapes, shardings)
    return Design(
        config=config,
        objective=objective,
        builder=builder,
        vocab=vocab,
        rows=rows,
        mesh=mesh,
        rules=rules,
        program=program,
        learning_rate=schedule,
        shardings=shardings,
        abstract_state=abstract_state,
        replicated=parameters.replicated,
        abstract_base=_shapes(build, mesh, rules) if config.adapter else abstract_state.params,
        _init=init,
        _key=key_data,
    )


def _shape(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _shapes(build: Callable[..., dict[str, nnx.Module]], mesh: Mesh, rules: partition.Rules) -> dict[str, Any]:
    """Shape, dtype and sharding of every parameter of the models, by role."""
    models = nnx.eval_shape(build, jax.random.key(0))
    shapes = {role: nnx.to_pure_dict(nnx.state(model)) for role, model in models.items()}
    placed: dict[str, Any] = jax.tree.map(_shape, shapes, parameter_shardings(models, mesh, rules).tree)
    return placed


def _checked_mesh(settings: TrainConfig, mesh: Mesh | None = None) -> Mesh:
    """The mesh, by default over all devices, once the global batch is known to split over it."""
    mesh = make_mesh(settings.mesh) if mesh is None else mesh
    check_batch(settings.batch_size, mesh, make_rules(settings.sharding), accumulate=settings.accumulate)
    return mesh


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
