"""From an objective to numbers: the same few functions under the trainer and under a user's own jit.

`loss_fn` is the way out of the house: a plain function of (params, batch, key) for jit, grad, vmap, pmap or shard_map.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from lmobj.batch import Batch, Vocabulary, row_keys
from lmobj.objectives._objective import Context, Example, Metric, Models, Objective, TermKind, Terms
from lmobj.objectives._routed import with_router_losses

__all__ = ["denominators", "loss_fn", "row_ids_of", "step_keys", "total_loss"]

RowIds = Any
"""[B, 2], or of a mixture these by member."""


def step_keys(
    key: Key[Array, ""], row_ids: RowIds, step: Int[Array, ""] | int, update: Int[Array, ""] | int = 0
) -> tuple[Any, Any]:
    """Keys per row for one update: (noise keys [B], model keys [B]), two domains that never meet.

    Of the row ids of a mixture, by member, they are dicts alike; members that read the same row draw differently.
    """
    if isinstance(row_ids, Mapping):
        each = {
            name: step_keys(jax.random.fold_in(key, zlib.crc32(name.encode())), ids, step, update)
            for name, ids in row_ids.items()
        }
        return {name: keys[0] for name, keys in each.items()}, {name: keys[1] for name, keys in each.items()}
    rows = row_keys(key, row_ids, step)
    noise, model = (
        jax.vmap(lambda k, d=domain: jax.random.fold_in(jax.random.fold_in(k, d), update))(rows) for domain in (0, 1)
    )
    return noise, model


def row_ids_of(batch: Any) -> RowIds:
    """The row ids of a batch; of a mixture's, which is a dict of batches, those of each member."""
    if "row_ids" in batch:
        return batch["row_ids"]
    return {name: row_ids_of(part) for name, part in batch.items()}


def denominators(objective: Objective, example: Example, axis_name: Any = None) -> dict[str, Float[Array, ""]]:
    """One global denominator per term: weights over all rows (and devices of `axis_name`), plus the term's epsilon."""
    weights = objective.weights(example)
    if axis_name is not None:
        weights = {
            name: weight if objective.term_kinds.get(name) is TermKind.PARAMETER else jax.lax.psum(weight, axis_name)
            for name, weight in weights.items()
        }
    return {name: weight + objective.epsilon.get(name, 0.0) for name, weight in weights.items()}


def total_loss(
    terms: Terms, denominator: Mapping[str, Array], coefficients: Mapping[str, Array | float]
) -> Float[Array, ""]:
    """sum over terms of coefficient * sum / denominator; a term whose denominator is zero counts zero."""
    total = jnp.zeros(())
    for name, term_sum in terms.sums.items():
        weight = denominator[name]
        mean = jnp.where(weight > 0, term_sum / jnp.where(weight > 0, weight, 1), 0)
        total = total + coefficients[name] * mean
    return total


def loss_fn(
    objective: Objective,
    graphs: Mapping[str, nnx.GraphDef],
    vocab: Vocabulary,
    *,
    coefficients: Mapping[str, float] | None = None,
    train: bool = True,
    axis_name: Any = None,
) -> Callable[[Mapping[str, Any], Batch, Key[Array, ""]], tuple[Float[Array, ""], dict[str, Metric]]]:
    """A plain `loss(params, batch, key) -> (loss, metrics)` for use outside the trainer.

    On a model with experts the terms of `Routed` are added.

    Args:
      objective: the objective.
      graphs: role -> graph definition, from `graphdef, state = nnx.split(model)`.
      vocab: the vocabulary's size and special ids.
      coefficients: of terms, in place of the objective's own.
      train: False switches dropout off.
      axis_name: the mapped axis (or axes) over which rows are split, under pmap or shard_map. Denominators are then
        summed over it, and each device's loss is its share: the shares add up to the loss of the whole batch. So are
        the statistics of an objective that has some, at the cost of a forward pass.

    Returns:
      A function of `params` ({role: nested dict of arrays}, `nnx.to_pure_dict(state)`), a batch and a threefry key;
      its metrics are (sum, weight) pairs over the rows given.
    """

    def loss(
        params: Mapping[str, Any], batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Metric]]:
        noise_keys, model_keys = step_keys(key, row_ids_of(batch), 0)
        models: Models = {role: nnx.merge(graphs[role], params[role]) for role in graphs}
        trained = with_router_losses(objective, models)
        factors = {**trained.coefficients, **(coefficients or {})}
        state = trained.init(models, key, len(jax.tree.leaves(model_keys)[0]))
        ctx = Context(model_keys, 0, vocab, state.params, train=train)
        if axis_name is not None:
            ctx = dataclasses.replace(ctx, parts=jax.lax.psum(1, axis_name), part=jax.lax.axis_index(axis_name))
        prepared = trained.prepare(models, jax.lax.stop_gradient(batch), ctx)
        example = trained.corrupt(noise_keys, jax.lax.stop_gradient(prepared), ctx)
        if axis_name is not None:
            here = jax.lax.stop_gradient(trained.statistics(models, example, state.carried, ctx))
            ctx = dataclasses.replace(ctx, statistics=jax.lax.psum(here, axis_name))
        terms = trained.terms(models, example, state.carried, ctx)
        shared = denominators(trained, example, axis_name)
        if axis_name is not None:
            # A parameter term is the same on every device: each takes an equal share, so that the shares add up.
            devices = jax.lax.psum(1, axis_name)
            once = {n for n, kind in trained.term_kinds.items() if kind is TermKind.PARAMETER}
            terms = terms._replace(sums={n: s / devices if n in once else s for n, s in terms.sums.items()})
        return total_loss(terms, shared, factors), terms.metrics

    return loss
