"""Several objectives on one model.

    sum:      L = sum_m w_m L_m                          every member on a batch of its own, at every step
    sample:   L = sum_m p_m L_m,  p_m = w_m / sum w      every row of a batch belongs to one member
    with uncertainty weighting, L_m exp(-s_m) in place of L_m, and + sum_m s_m / 2, with trained s_m

where L_m is the loss of member m: all of its terms, each with its own global denominator.

Uncertainty: Kendall, Gal and Cipolla 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry
and Semantics", eq. 10, for losses that are likelihoods of classes; s is log sigma^2, which starts at 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from lmobj._shares import share_out
from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import HeadStyle, RowUse
from lmobj.objectives._objective import (
    Context,
    Example,
    Models,
    Objective,
    ObjectiveState,
    Role,
    TermKind,
    Terms,
)
from lmobj.objectives._single import SingleObjective

__all__ = ["Member", "Mixture", "member_models"]

_UNCERTAINTY = "uncertainty"


@dataclass(frozen=True)
class Member:
    """One objective of a mixture."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    objective: SingleObjective
    """The objective, told apart by `name`."""
    weight: float = 1.0
    """Weight of its loss, above 0; with `sample`, its share of the rows relative to the others. For a schedule over
    steps set train.coefficients of its terms."""
    source: str | None = None
    """Name of the source in data.source.sources that its rows come from; null: from all, as they are mixed."""


@dataclass(frozen=True)
class Mixture(Objective):
    """Several objectives on one model, each with rows, noise, heads and denominators of its own.

    The terms and metrics of member m are `m/term` and `m/metric`; `train.coefficients` sets a term's weight, or a
    schedule of it, in place of the member's. Members that read the same rows corrupt them independently.

    With `sample` a batch of B rows is divided among the members in proportion to their weights, at least one row
    each: the expectation over rows that are drawn member by member, without its variance and with static shapes.
    """

    summary: ClassVar[str] = "Several objectives on one model, summed or sampled."
    paper: ClassVar[str] = "Kendall et al. 2018, Multi-Task Learning Using Uncertainty to Weigh Losses"
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["mixture"] = "mixture"
    """Several objectives on one model."""
    members: dict[str, Member] = field(default_factory=dict)
    """The objectives by a name of your choice; at least one."""
    combine: Literal["sum", "sample"] = "sum"
    """`sum`: every member has a batch of train.batch_size rows at every step; `sample`: they share its rows."""
    weighting: Literal["fixed", "uncertainty"] = "fixed"
    """`fixed`: by `weight`; `uncertainty`: by `weight` and a trained variance of each member's loss."""

    def __post_init__(self) -> None:
        if not self.members:
            raise UserError("objective.members is empty; accepted: one or more named objectives.")
        for name, member in self.members.items():
            if not 0 < member.weight < float("inf"):
                raise UserError(
                    f"objective.members.{name}.weight is {member.weight}; it must be a finite number above 0."
                )
            if not name.replace("_", "").replace("-", "").isalnum():
                raise UserError(
                    f"objective.members has {name!r}; accepted: names of letters, digits, hyphens and underscores."
                )
            others = set(member.objective.roles) - {"model", "heads"}
            if others:
                raise UserError(
                    f"objective.members.{name} is {type(member.objective).__name__}, which needs the model "
                    f"{min(others)!r} too; accepted: objectives on one model."
                )

    def __hash__(self) -> int:
        return hash((frozenset(self.members.items()), self.combine, self.weighting))

    @property
    def objectives(self) -> dict[str, Objective]:
        """The members' objectives by name."""
        return {name: member.objective for name, member in self.members.items()}

    @property
    def roles(self) -> Mapping[str, Role]:
        """The model, and heads where any member has some."""
        headed = any("heads" in objective.roles for objective in self.objectives.values())
        return {"model": Role.TRAINABLE} | ({"heads": Role.TRAINABLE} if headed else {})

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Each member's own, times its weight; with `sample`, times its share of all weights."""
        total = sum(member.weight for member in self.members.values()) if self.combine == "sample" else 1.0
        each = {
            f"{name}/{term}": member.weight / total * coefficient
            for name, member in self.members.items()
            for term, coefficient in member.objective.coefficients.items()
        }
        return each | ({_UNCERTAINTY: 1.0} if self.weighting == "uncertainty" else {})

    @property
    def epsilon(self) -> Mapping[str, float]:
        """The members'."""
        return _prefixed({name: objective.epsilon for name, objective in self.objectives.items()})

    @property
    def term_kinds(self) -> Mapping[str, TermKind]:
        """The members'; the sum of s / 2 is one of parameters."""
        kinds = _prefixed({name: objective.term_kinds for name, objective in self.objectives.items()})
        return kinds | ({_UNCERTAINTY: TermKind.PARAMETER} if self.weighting == "uncertainty" else {})

    @property
    def causal(self) -> bool:
        """Whether all members are."""
        return all(objective.causal for objective in self.objectives.values())

    @property
    def fills_masks(self) -> bool:
        """Whether any member does."""
        return any(objective.fills_masks for objective in self.objectives.values())

    def check_classes(self, classes_of: Callable[[str | None], Sequence[str]]) -> None:
        """Each member looks at the classes of its own source."""
        for name, member in self.members.items():
            names = classes_of(member.source)
            with _keys_of(name):
                member.objective.check_classes(lambda source, names=names: names)  # type: ignore[misc]

    def check_model(self, settings: Any) -> None:
        """Each member looks at them."""
        for name, objective in self.objectives.items():
            with _keys_of(name):
                objective.check_model(settings)

    def use(self, length: int) -> dict[str, RowUse]:
        """Each member's."""
        uses = {name: objective.use(length) for name, objective in self.objectives.items()}
        return {name: use for name, use in uses.items() if isinstance(use, RowUse)}

    def rows(self, vocab: Vocabulary, length: int) -> dict[str, RowSpec]:
        """Each member's rows, from its own source."""
        specs = {}
        for name, member in self.members.items():
            with _keys_of(name):
                spec = member.objective.rows(vocab, length)
            assert isinstance(spec, RowSpec)
            specs[name] = dataclasses.replace(spec, source=member.source)
        return specs

    def member_rows(self, batch_size: int) -> dict[str, int]:
        """All rows for each, or with `sample` its share of them, at least one."""
        if self.combine == "sum":
            return dict.fromkeys(self.members, batch_size)
        if batch_size < len(self.members):
            raise UserError(
                f"train.batch_size is {batch_size}, which {len(self.members)} members share; accepted: at least "
                f"{len(self.members)}, or objective.combine: sum."
            )
        shares = share_out([member.weight for member in self.members.values()], batch_size)
        return dict(zip(self.members, shares, strict=True))

    def build_heads(self, style: HeadStyle, vocab: Vocabulary, rngs: nnx.Rngs) -> nnx.Module:
        """The heads of every member that has some."""
        return _Heads(
            {
                name: objective.build_heads(style, vocab, rngs)
                for name, objective in self.objectives.items()
                if "heads" in objective.roles
            }
        )

    def init(self, models: Models, key: Key[Array, ""], batch_size: int) -> ObjectiveState:
        """Each member's state, and with uncertainty weighting s = 0 for each."""
        states = {}
        for i, (name, objective) in enumerate(self.objectives.items()):
            with _keys_of(name):
                states[name] = objective.init(member_models(models, name), jax.random.fold_in(key, i), batch_size)
        params = {name: state.params for name, state in states.items()}
        carried = {name: state.carried for name, state in states.items()}
        if self.combine == "sample" and jax.tree.leaves(carried):
            name = next(name for name, value in carried.items() if jax.tree.leaves(value))
            raise UserError(
                f"objective.members.{name} carries a memory from batch to batch; accepted in a mixture: "
                "objective.combine: sum."
            )
        if self.weighting == "uncertainty":
            params[_UNCERTAINTY] = {name: jnp.zeros(()) for name in self.members}
        return ObjectiveState(params, carried)

    def prepare(self, models: Models, batch: Batch, ctx: Context) -> Any:
        """Each member prepares its own batch."""
        return {
            name: objective.prepare(member_models(models, name), batch[name], _context_of(ctx, name))  # type: ignore[arg-type]
            for name, objective in self.objectives.items()
        }

    def corrupt(self, keys: Any, batch: Any, ctx: Context) -> Any:
        """Each member corrupts its own batch."""
        return {
            name: objective.corrupt(keys[name], batch[name], _context_of(ctx, name))
            for name, objective in self.objectives.items()
        }

    def weights(self, example: Any) -> dict[str, Float[Array, ""]]:
        """Each member's denominators."""
        each = _prefixed({name: objective.weights(example[name]) for name, objective in self.objectives.items()})
        return each | ({_UNCERTAINTY: jnp.ones(())} if self.weighting == "uncertainty" else {})

    def statistics(self, models: Models, example: Mapping[str, Example], carried: Any, ctx: Context) -> Any:  # type: ignore[override]
        """Each member's."""
        return {
            name: objective.statistics(
                member_models(models, name), example[name], carried[name], _context_of(ctx, name)
            )
            for name, objective in self.objectives.items()
        }

    def terms(self, models: Models, example: Mapping[str, Example], carried: Any, ctx: Context) -> Terms:  # type: ignore[override]
        """Each member's terms; with uncertainty weighting times exp(-s), in metrics too, and the sum of s / 2."""
        each = {
            name: objective.terms(member_models(models, name), example[name], carried[name], _context_of(ctx, name))
            for name, objective in self.objectives.items()
        }
        sums = {name: one.sums for name, one in each.items()}
        metrics = {name: one.metrics for name, one in each.items()}
        more: dict[str, Array] = {}
        if self.weighting == "uncertainty":
            log_variance = ctx.params[_UNCERTAINTY]
            sums = {
                name: {term: _precision(log_variance[name]) * value for term, value in own.items()}
                for name, own in sums.items()
            }
            more[_UNCERTAINTY] = sum(log_variance.values()) / 2
            one = jnp.ones(())
            metrics = {name: own | {"log_variance": (log_variance[name], one)} for name, own in metrics.items()}
        return Terms(_prefixed(sums) | more, _prefixed(metrics), {name: one.carried for name, one in each.items()})


def _precision(log_variance: Float[Array, ""]) -> Float[Array, ""]:
    """What a member's loss is multiplied by: 1 / sigma^2, of s = log sigma^2."""
    return jnp.exp(-log_variance)


class _Heads(nnx.Module):
    """The heads of several members, each under its name."""

    def __init__(self, heads: Mapping[str, nnx.Module]) -> None:
        self.members = nnx.Dict(heads)


@contextlib.contextmanager
def _keys_of(name: str) -> Iterator[None]:
    """What a member refuses names its keys where they stand: objective.x as objective.members.NAME.objective.x."""
    try:
        yield
    except UserError as error:
        place, message = f"objective.members.{name}", str(error)
        raise UserError(f"{place}{'.' if message.startswith('objective.') else ': '}{message}") from error


def _prefixed(each: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """{member: {name: value}} as {member/name: value}."""
    return {f"{member}/{name}": value for member, own in each.items() for name, value in own.items()}


def member_models(models: Models, name: str) -> Models:
    """The model, and the member's own heads."""
    heads = models.get("heads")
    own = heads.members if isinstance(heads, _Heads) else {}
    return {"model": models["model"], **({"heads": own[name]} if name in own else {})}


def _context_of(ctx: Context, name: str) -> Context:
    """The context of one member: its keys, parameters and statistics."""
    params = ctx.params[name] if isinstance(ctx.params, Mapping) else ()
    statistics = None if ctx.statistics is None else ctx.statistics[name]
    return dataclasses.replace(ctx, keys=ctx.keys[name], params=params, statistics=statistics)
