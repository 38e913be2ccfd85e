"""The training step: a pure function of (state, frozen models, batch).

The order is what makes accumulation exact. A global batch is corrupted at once (integers, cheap), its denominators are
summed over all rows, and only then are gradients taken, microbatch by microbatch, of sums divided by those
denominators. Any split into microbatches or devices therefore gives the gradient of the whole batch. Where terms need
statistics of the whole batch, a forward pass over the microbatches adds them up first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import NDArray

from lmobj import adapt
from lmobj.batch import Batch, Vocabulary
from lmobj.errors import UserError
from lmobj.objectives import (
    Context,
    Metric,
    Models,
    Objective,
    ObjectiveState,
    TermKind,
    denominators,
    row_ids_of,
    step_keys,
    total_loss,
    with_router_losses,
)
from lmobj.train import rounding
from lmobj.train.ema import EMA
from lmobj.train.guard import GUARD, Guard, GuardState, Verdict, judge, select

__all__ = ["TERM", "Program", "State", "StepMetrics"]

Params = dict[str, Any]
Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]
StepMetrics = dict[str, Metric]

_PRNG = "threefry2x32"

TERM = "term/"
"""Prefix of the metrics that hold each term on its own."""


class State(NamedTuple):
    """All that a run carries from step to step, and so all that a checkpoint holds.

    step: number of global batches consumed; with the data's fingerprint and the seed it is the position in the data.
    params: trainable parameters, {role: nested dict of arrays}.
    opt_state: the optimizer's.
    objective: the objective's own trained parameters and carried arrays.
    guard: what `train.guard` knows: updates passed over, mean and variance of the loss.
    ema: moving average of the parameters, like `params`; empty without `train.ema`.
    frozen: parameters that are not trained, where `adapter` leaves some so; they are no part of a checkpoint.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    objective: ObjectiveState
    guard: GuardState
    ema: Params | tuple[()] = ()
    frozen: Params | tuple[()] = ()

    @property
    def trained(self) -> Params:
        """All that the optimizer changes: the parameters, and the objective's own where it has any."""
        return _trained(self.params, self.objective.params)

    @property
    def weights(self) -> Params:
        """What evaluation and generation use: the moving average where there is one, else the parameters; and what is
        frozen."""
        if not self.ema:
            return self.whole(self.params)
        return self.whole(jax.tree.map(lambda average, p: average.astype(p.dtype), self.ema, self.params))

    def whole(self, params: Params) -> Params:
        """These parameters with those that are frozen."""
        return adapt.join(params, self.frozen) if self.frozen else params

    @property
    def stored(self) -> State:
        """What a checkpoint holds."""
        return self._replace(frozen=())


@dataclass(frozen=True)
class Program:
    """The static side of a run: everything that the compiled step closes over.

    graphs: role -> graph definition of every model, frozen ones included.
    coefficients: term -> schedule over steps.
    seed: a number, or its key: one that is an argument of a compiled program leaves the program the same for all seeds.
    accumulate: microbatches per global batch.
    guard: which updates are passed over; whether the run ends then is the loop's business.
    ema: how the parameters are averaged, if they are.
    stochastic_rounding: parameters in bfloat16 take their updates by `rounding.apply_updates`.
    """

    objective: Objective
    graphs: Mapping[str, nnx.GraphDef]
    vocab: Vocabulary
    optimizer: optax.GradientTransformation
    coefficients: Mapping[str, Schedule]
    seed: int | Array
    accumulate: int = 1
    guard: Guard = field(default_factory=Guard)
    ema: EMA | None = None
    stochastic_rounding: bool = False

    def __post_init__(self) -> None:
        whole = [n for n, kind in self.objective.term_kinds.items() if kind is TermKind.BATCH]
        if self.accumulate > 1 and whole:
            raise UserError(
                f"train.accumulate is {self.accumulate}, and the term {whole[0]!r} of {type(self.objective).__name__} "
                "needs the whole batch at once; set train.accumulate=1."
            )

    def init(self, params: Params, batch_size: int, frozen: Params | None = None) -> State:
        """The state at step 0 for given parameters; `frozen` are those that stay as they are."""
        models = self._merged(adapt.join(params, frozen) if frozen else params)
        own = self.objective.init(models, jax.random.fold_in(self.key, 1), batch_size)
        return State(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.init(_trained(params, own.params)),
            objective=own,
            guard=GuardState.init(),
            ema=() if self.ema is None else self.ema.init(params),
            frozen=frozen or (),
        )

    @property
    def key(self) -> Array:
        """The run's key, from which every row key is addressed."""
        if isinstance(self.seed, int):
            return jax.random.key(self.seed, impl=_PRNG)
        return self.seed

    @property
    def key_data(self) -> NDArray[np.uint32]:
        """The key as numbers on the host, to be given to a compiled program."""
        return np.asarray(jax.random.key_data(self.key))

    def with_key(self, key_data: Array | NDArray[np.uint32]) -> Program:
        """The program under another seed, which may be traced."""
        return dataclasses.replace(self, seed=jax.random.wrap_key_data(jnp.asarray(key_data), impl=_PRNG))

    def train_step(self, state: State, frozen: Params, batch: Batch) -> tuple[State, StepMetrics]:
        """One global batch: prepare, then one or more updates. Metrics are (sum, weight) pairs.

        Updates that the guard finds bad change nothing; the batch counts as consumed all the same, and what the
        objective carries goes on from it where it is finite. `skipped` is the number of such updates in the whole run,
        and the verdict on this step's first bad one is under `GUARD`, beside the number of updates that the optimizer
        had made before the step.
        """
        ctx = self._context(batch, state, update=0, train=True)[1]
        batch = self.objective.prepare(self._models(state.whole(state.params), frozen), batch, ctx)
        batch = jax.lax.stop_gradient(batch)
        before = self._updates_made(state, 0)
        state, metrics, verdict = self._update(state, frozen, batch, 0)
        for update in range(1, self.objective.updates):
            state, metrics, another = self._update(state, frozen, batch, update)
            verdict = verdict.first(another)
        metrics |= {"skipped": (state.guard.skipped, jnp.ones(())), f"{GUARD}updates": (before, jnp.ones(()))}
        return state._replace(step=state.step + 1), metrics | verdict.metrics()

    def fresh_carried(self, state: State, frozen: Params, batch_size: int) -> Any:
        """What the objective carries before the first batch: evaluation begins with it, whatever training carries."""
        return self.objective.init(self._models(state.weights, frozen), self.key, batch_size).carried

    def eval_step(
        self, state: State, frozen: Params, batch: Batch, carried: Any = ()
    ) -> tuple[StepMetrics, Any, dict[str, Array]]:
        """Metrics of one batch with fixed keys and no dropout, each term (sum, weight) as well; what is carried on; and
        of tasks the model's outputs, with `targets` beside them, and which rows are `there` and not empty.

        The weights are without a term's epsilon, which belongs to the quotient of the whole split's sums.
        """
        state = state._replace(step=jnp.zeros((), jnp.int32))
        noise_keys, ctx = self._context(batch, state, update=0, train=False)
        models = self._models(state.weights, frozen)
        example = self.objective.corrupt(noise_keys, self.objective.prepare(models, batch, ctx), ctx)
        terms = self.objective.terms(models, example, carried, ctx)
        weights = self.objective.weights(example)
        sums = {f"{TERM}{name}": (total, weights[name]) for name, total in terms.sums.items()}
        outputs = dict(terms.outputs)
        if outputs:
            there = jnp.any(batch["segment_ids"] > 0, axis=1)
            outputs |= {"targets": example.targets, "there": there}
        return sums | terms.metrics, terms.carried, outputs

    def _context(self, batch: Batch, state: State, update: int, train: bool) -> tuple[Array, Context]:
        noise_keys, model_keys = step_keys(self.key, row_ids_of(batch), state.step, update)
        return noise_keys, Context(model_keys, state.step, self.vocab, state.objective.params, train=train)

    def _models(self, params: Params, frozen: Params) -> Models:
        return self._merged({**jax.lax.stop_gradient(frozen), **params})

    def _merged(self, values: Params) -> Models:
        """Models from their parameters. Those with experts are refused to an objective that leaves routers alone."""
        models = {role: nnx.merge(self.graphs[role], value) for role, value in values.items()}
        if with_router_losses(self.objective, models) is not self.objective:
            raise ValueError(
                f"Program: the objective is {type(self.objective).__name__} and a model has experts, whose routers "
                "collapse without losses of their own; accepted: lmobj.objectives.Routed(objective)."
            )
        return models

    def _updates_made(self, state: State, update: int) -> Int[Array, ""]:
        """Updates that the optimizer has made before this one, the `update`-th of its step."""
        return state.step * self.objective.updates + update - state.guard.skipped

    def _updated(self, trained: Params, updates: Params, step: Int[Array, ""], update: int) -> Params:
        """The parameters after an update, the `update`-th of a step."""
        if self.stochastic_rounding:
            rounded: Params = rounding.apply_updates(trained, updates, rounding.update_seed(self.key, step, update))
            return rounded
        plain: Params = optax.apply_updates(trained, updates)
        return plain

    def _update(self, state: State, frozen: Params, batch: Batch, update: int) -> tuple[State, StepMetrics, Verdict]:
        objective, parts = self.objective, self.accumulate
        noise_keys, ctx = self._context(batch, state, update, train=True)
        example = jax.lax.stop_gradient(objective.corrupt(noise_keys, batch, ctx))
        weights = denominators(objective, example)
        factors = {name: schedule(state.step) for name, schedule in self.coefficients.items()}

        def statistics(rows: Any) -> Any:
            part_example, part_carried, part_keys = rows
            part_ctx = Context(part_keys, state.step, self.vocab, state.objective.params, train=True, parts=parts)
            models = self._models(state.whole(state.params), frozen)
            return objective.statistics(models, part_example, part_carried, part_ctx)

        def loss(trained: Any, rows: Any, whole: Any) -> tuple[Array, tuple[Any, StepMetrics]]:
            params, own = _untrained(trained, state.objective.params)
            part_example, part_carried, part_keys = rows
            part_ctx = Context(part_keys, state.step, self.vocab, own, whole, train=True, parts=parts)
            terms = objective.terms(self._models(state.whole(params), frozen), part_example, part_carried, part_ctx)
            once = {n for n, kind in objective.term_kinds.items() if kind is TermKind.PARAMETER}
            sums = {n: s / parts if n in once else s for n, s in terms.sums.items()}
            terms = terms._replace(sums=sums)
            total = total_loss(terms, weights, factors)
            each = {f"{TERM}{name}": (value, weights[name] / parts) for name, value in sums.items()}
            metrics = {"loss": (total, jnp.full((), 1 / parts)), **each, **terms.metrics}
            return total, (terms.carried, metrics)

        trained = state.trained
        gradient = jax.grad(loss, has_aux=True)
        rows = (example, state.objective.carried, ctx.keys)
        if parts == 1:
            grads, (carried, metrics) = gradient(trained, rows, None)
        else:
            split = jax.tree.map(lambda x: _split_rows(x, parts), rows)
            whole = jax.lax.stop_gradient(_added_up(statistics, split))

            def accumulate(total: Any, part: Any) -> tuple[Any, Any]:
                grads, aux = gradient(trained, part, whole)
                return jax.tree.map(jnp.add, total, grads), aux

            grads, (carried, stacked) = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, trained), split)
            carried = jax.tree.map(_join_rows, carried)
            metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0), stacked)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, trained)
        params, own = _untrained(self._updated(trained, updates, state.step, update), state.objective.params)
        ema = () if self.ema is None else self.ema.update(state.ema, params, self._updates_made(state, update))
        norm = optax.tree.norm(grads)
        good, guard, verdict = judge(self.guard, state.guard, metrics["loss"][0], norm)
        carried = select(_all_finite(carried), carried, state.objective.carried)
        kept = state._replace(objective=state.objective._replace(carried=carried))
        changed = State(state.step, params, opt_state, ObjectiveState(own, carried), guard, ema)
        state = select(good, changed, kept.stored)._replace(guard=guard, frozen=state.frozen)
        return state, {**metrics, "grad_norm": (norm, jnp.ones(()))}, verdict


_OWN = "objective"


def _trained(params: Params, own: Any) -> Params:
    """Everything that the optimizer changes as one dict: the roles, and the objective's own where it has any."""
    return {**params, _OWN: own} if jax.tree.leaves(own) else params


def _untrained(trained: Params, own: Any) -> tuple[Params, Any]:
    """Undoes `_trained`; `own` is what the objective has, which is not among the trained where it has no arrays."""
    return {role: value for role, value in trained.items() if role != _OWN}, trained.get(_OWN, own)


def _added_up(function: Callable[[Any], Any], parts: Any) -> Any:
    """The sum of `function` over the parts, one after another; not run where it returns no arrays."""
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    if not jax.tree.leaves(shapes):
        return shapes
    return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), parts)[0]


def _all_finite(tree: Any) -> Bool[Array, ""]:
    return functools.reduce(jnp.logical_and, (jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)), jnp.bool_(True))


def _split_rows(x: Array, parts: int) -> Array:
    """[B, ...] -> [parts, B / parts, ...], row r going to part r % parts.

    Striding keeps the rows of each part spread over the devices as the batch is, so nothing moves between them.
    """
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def _join_rows(x: Array) -> Array:
    """Undoes `_split_rows`."""
    return jnp.swapaxes(x, 0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:])
