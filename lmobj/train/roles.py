"""The models of a run: which an objective needs, and how they are built with fresh parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Key

from lmobj import adapt
from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.models import HeadStyle, ModelBuilder
from lmobj.objectives import Objective, Role

__all__ = ["HEADS", "build_models", "built_roles"]

HEADS = "heads"
"""The role of what an objective puts on the model's hidden states."""


def built_roles(objective: Objective) -> tuple[str, ...]:
    """The roles that `fit` builds and trains: one model, and the objective's heads where it has some."""
    roles = objective.roles
    models = [name for name in roles if name != HEADS]
    if len(models) != 1 or any(kind is not Role.TRAINABLE for kind in roles.values()):
        described = ", ".join(f"{name} ({kind.value})" for name, kind in roles.items())
        raise UserError(
            f"objective is {type(objective).__name__}, which needs the models {described}; fit trains objectives with "
            "one trainable model and heads on it. Train others with lmobj.train.Program, which takes any number."
        )
    return tuple(models + [HEADS] * (HEADS in roles))


def build_models(
    objective: Objective,
    builder: ModelBuilder,
    vocab: Vocabulary,
    roles: tuple[str, ...],
    key: Key[Array, ""],
    *,
    given: Mapping[str, Any] | None = None,
    adapter: adapt.Adapter | None = None,
) -> dict[str, nnx.Module]:
    """The models by role, with fresh parameters but where some are given, and the adapter in the first of them.

    The adapter comes last, since some begin with what the weights are (DoRA).
    """
    models = _fresh(objective, builder, vocab, roles, key)
    for role, values in (given or {}).items():
        graph, state = nnx.split(models[role])
        fresh = nnx.to_pure_dict(state)
        nnx.replace_by_pure_dict(state, jax.tree.map(lambda new, x: x.astype(new.dtype), fresh, values))
        models[role] = nnx.merge(graph, state)
    if adapter is not None:
        models[roles[0]] = adapt.apply(models[roles[0]], adapter, nnx.Rngs(params=jax.random.fold_in(key, 2)))
    return models


def _fresh(
    objective: Objective, builder: ModelBuilder, vocab: Vocabulary, roles: tuple[str, ...], key: Key[Array, ""]
) -> dict[str, nnx.Module]:
    model = builder.build(vocab, nnx.Rngs(params=key))
    if HEADS not in roles:
        return {roles[0]: model}
    style: HeadStyle | None = getattr(model, "head_style", None)
    if style is None:
        raise UserError(
            f"objective is {type(objective).__name__}, which puts heads on the model, and {type(model).__name__} does "
            "not say what they should look like; give it a property head_style that returns a lmobj.models.HeadStyle."
        )
    heads = objective.build_heads(style, vocab, nnx.Rngs(params=jax.random.fold_in(key, 1)))
    return {roles[0]: model, HEADS: heads}
