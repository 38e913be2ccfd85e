"""Layer-wise learning rates: the lower a layer, the more slowly it learns.

    rate of layer l of N (from 1) = rate * decay^(N + 1 - l)
    rate of the embeddings        = rate * decay^(N + 1)
    rate of what is above         = rate                      heads, and norms after the last layer

Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification", section 3.2; Clark et al. 2020,
"ELECTRA", appendix B, whose code has one factor more for everything but the heads. Decoupled weight decay
is part of what is scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lmobj.train._parameters import Parameter, describer

__all__ = ["decayed_by_layer"]

_BELOW = ("embeddings", "tokens", "positions", "token_types", "query_start")
"""Names of what the first layer reads."""


def decayed_by_layer(
    optimizer: optax.GradientTransformation, decay: float, logical_axes: Mapping[str, Any]
) -> optax.GradientTransformation:
    """The optimizer, with every update scaled by the depth of its parameter. Parameters are {role: nested dict}."""
    if decay == 1:
        return optimizer
    describe = describer(logical_axes)

    def scale(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten(updates)
        described = jax.tree.leaves(describe(updates), is_leaf=lambda x: isinstance(x, Parameter))
        found = list(zip(leaves, described, strict=True))
        layers = max((x.shape[0] for x, parameter in found if parameter.stacked), default=0)
        return jax.tree.unflatten(tree, [x * _factor(parameter, x, layers, decay) for x, parameter in found]), state

    return optax.chain(optimizer, optax.GradientTransformation(lambda params: optax.EmptyState(), scale))


def _factor(parameter: Parameter, x: Any, layers: int, decay: float) -> Any:
    """What the update of one parameter is multiplied by; of stacked layers an array along the first axis."""
    if parameter.stacked:
        exponents = jnp.arange(x.shape[0], 0, -1)  # counted from the top, where the lowest may be frozen apart
        return (decay**exponents).astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
    below = any(name in _BELOW for name in parameter.path[1:2])  # path: the role, then the names of modules
    return jnp.asarray(decay ** (layers + 1) if below else 1.0, x.dtype)
