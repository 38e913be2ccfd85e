"""What every objective needs on a model with experts: two losses of its routers.

    load_balance = mean over layers of  E * sum_e f_e P_e          1 where experts are used alike, up to E / k
    router_z     = mean over layers and tokens of  logsumexp(router logits)^2

f_e is the share of all pairs (token, choice) of the global batch that went to expert e, whether or not there was room
for them, and is a constant; P_e is the mean of the router's probability of e over the tokens of the global batch.

Fedus et al. 2021, "Switch Transformers", eqs. 4 to 6, where each token has one expert; Zoph et al. 2022, "ST-MoE",
eq. 5. With f of the whole batch given, the balance is a sum over tokens, E * sum_e f_e p_e(token), and so exact
whatever the microbatches and devices. The mean of each microbatch's own balance, which is often found in its place, is
another and larger number: it asks for balance within each microbatch, the more so the smaller they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from lmobj.batch import Batch, Vocabulary
from lmobj.errors import UserError
from lmobj.models import HeadStyle, RoutedModel, RouterSums, RoutingCall, RowUse, recorded_routing
from lmobj.objectives._objective import (
    Context,
    Example,
    Judge,
    Metric,
    Models,
    Objective,
    ObjectiveState,
    Role,
    Rows,
    Task,
    TermKind,
    Terms,
)

__all__ = ["Routed", "with_router_losses"]

_BALANCE, _Z = "load_balance", "router_z"


class _Statistics(NamedTuple):
    """counts: pairs of token and choice of the batch, by expert. inner: those of the objective itself."""

    counts: Float[Array, "n E"]
    inner: Any


@dataclass(frozen=True)
class Routed(Objective):
    """An objective on a model with experts: the terms of `objective`, and `load_balance` and `router_z` beside them.

    Both have the routed tokens for denominator, which are all that are no padding; of a mixture, those of all members
    together. No config names it: it is put around the config's objective where the model has experts.

    Metrics beside the objective's: `load_balance`, `router_z`, `dropped` (share of the choices for which there was no
    room) and `expert_share_max` (the largest f_e over an even share, 1 / E; mean over layers).

    In evaluation f_e is of each batch by itself.
    """

    objective: Objective
    """The objective itself."""

    summary: ClassVar[str] = "An objective on a model with experts."
    paper: ClassVar[str] = "Fedus et al. 2021, Switch Transformers; Zoph et al. 2022, ST-MoE"

    @property
    def updates(self) -> int:  # type: ignore[override]
        """The objective's."""
        return self.objective.updates

    @property
    def roles(self) -> Mapping[str, Role]:
        """The objective's."""
        return self.objective.roles

    @property
    def coefficients(self) -> Mapping[str, float]:
        """The objective's; 0.01 for the balance (Fedus et al.) and 0.001 for the z loss (Zoph et al.)."""
        return {**self.objective.coefficients, _BALANCE: 0.01, _Z: 0.001}

    @property
    def epsilon(self) -> Mapping[str, float]:
        """The objective's."""
        return self.objective.epsilon

    @property
    def term_kinds(self) -> Mapping[str, TermKind]:
        """The objective's."""
        return self.objective.term_kinds

    @property
    def judged_by(self) -> Judge:
        """The objective's."""
        return self.objective.judged_by

    @property
    def causal(self) -> bool:
        """The objective's."""
        return self.objective.causal

    @property
    def fills_masks(self) -> bool:
        """The objective's."""
        return self.objective.fills_masks

    @property
    def task(self) -> Task | None:
        """The objective's."""
        return self.objective.task

    def use(self, length: int) -> RowUse | Mapping[str, RowUse]:
        """The objective's."""
        return self.objective.use(length)

    def rows(self, vocab: Vocabulary, length: int) -> Rows:
        """The objective's."""
        return self.objective.rows(vocab, length)

    def check_model(self, settings: Any) -> None:
        """The objective's."""
        self.objective.check_model(settings)

    def check_classes(self, classes_of: Callable[[str | None], Sequence[str]]) -> None:
        """The objective's."""
        self.objective.check_classes(classes_of)

    def member_rows(self, batch_size: int) -> Mapping[str, int]:
        """The objective's."""
        return self.objective.member_rows(batch_size)

    def build_heads(self, style: HeadStyle, vocab: Vocabulary, rngs: nnx.Rngs) -> nnx.Module:
        """The objective's."""
        return self.objective.build_heads(style, vocab, rngs)

    def init(self, models: Models, key: Key[Array, ""], batch_size: int) -> ObjectiveState:
        """The objective's."""
        return self.objective.init(models, key, batch_size)

    def prepare(self, models: Models, batch: Batch, ctx: Context) -> Batch:
        """The objective's."""
        return self.objective.prepare(models, batch, ctx)

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """The objective's."""
        return self.objective.corrupt(keys, batch, ctx)

    def weights(self, example: Example) -> dict[str, Float[Array, ""]]:
        """The objective's, and the routed tokens."""
        tokens = _routed_tokens(example)
        return {**self.objective.weights(example), _BALANCE: tokens, _Z: tokens}

    def statistics(self, models: Models, example: Example, carried: Any, ctx: Context) -> Any:
        """The load of each expert."""
        _, sums = self._run(models, example, carried, dataclasses.replace(ctx, statistics=None))
        return _Statistics(sums.counts, self.objective.statistics(models, example, carried, ctx))

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """The objective's terms, and the two of the routers.

        Raises:
          UserError: an objective that runs the model more often than once over each of its rows, or over others.
        """
        whole = ctx.statistics
        own = dataclasses.replace(ctx, statistics=None if whole is None else whole.inner)
        terms, sums = self._run(models, example, carried, own)
        counts = jax.lax.stop_gradient(sums.counts if whole is None else whole.counts)
        pairs = jnp.sum(counts, axis=-1, keepdims=True)
        share = counts / jnp.maximum(pairs, 1)  # an empty batch has no pairs
        experts = counts.shape[-1]
        balance = jnp.mean(experts * jnp.sum(share * sums.probabilities, axis=-1))
        z = jnp.mean(sums.squares)
        tokens = _routed_tokens(example)
        metrics: dict[str, Metric] = {
            _BALANCE: (balance, tokens),
            _Z: (z, tokens),
            "dropped": (jnp.sum(sums.dropped), jnp.sum(sums.counts)),
            "expert_share_max": (jnp.mean(experts * jnp.max(share, axis=-1)) * tokens, tokens),
        }
        totals = {**terms.sums, _BALANCE: balance, _Z: z}
        return terms._replace(sums=totals, metrics={**terms.metrics, **metrics})

    def _run(self, models: Models, example: Example, carried: Any, ctx: Context) -> tuple[Terms, RouterSums]:
        """The objective's terms, and the sums of the routers over its rows."""
        with recorded_routing() as calls:
            terms = self.objective.terms(models, example, carried, ctx)
        self._check(calls, example)
        return terms, jax.tree.map(lambda *each: sum(each), *(call.sums for call in calls))

    def _check(self, calls: Sequence[RoutingCall], example: Any) -> None:
        """Refuses calls of routed models that are not one for each of the example's rows: weights would not fit."""

        def same(call: RoutingCall, rows: Example) -> bool:
            return call.shape == rows.inputs.shape and call.segment_ids is rows.mask.segment_ids

        left = list(calls)
        for rows in _examples(example):
            call = next((call for call in left if same(call, rows)), None)
            if call is None:
                break
            left = [other for other in left if other is not call]
        else:
            if not left:
                return
        read = ", ".join(str(call.shape) for call in calls) or "none"
        wanted = ", ".join(str(rows.inputs.shape) for rows in _examples(example))
        raise UserError(
            f"model.moe is set, and the objective {type(self.objective).__name__} runs a model with experts over rows "
            f"of the sizes {read}, where its example has {wanted}; accepted: an objective that runs it once over each "
            "row of its example, under the example's mask, or model.moe: null."
        )


def with_router_losses(objective: Objective, models: Models) -> Objective:
    """The objective, with the losses of routers around it where a model has some."""
    routed = any(isinstance(model, RoutedModel) and model.routed for model in models.values())
    return Routed(objective) if routed and not isinstance(objective, Routed) else objective


def _examples(example: Any) -> Iterator[Example]:
    """The example, or of a mixture that of each member."""
    if isinstance(example, Example):
        yield example
        return
    for part in example.values():
        yield from _examples(part)


def _routed_tokens(example: Any) -> Float[Array, ""]:
    """Tokens that are no padding."""
    counts = (
        rows.inputs.size if rows.mask.segment_ids is None else jnp.sum(rows.mask.segment_ids > 0)
        for rows in _examples(example)
    )
    return jnp.asarray(sum(counts), jnp.result_type(float))
