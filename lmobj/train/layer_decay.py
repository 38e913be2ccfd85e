"""Layer-wise learning rates: the lower a layer, the more slowly it learns.

    rate of layer l of N (from 1) = rate * decay^(N + 1 - l)
    rate of the embeddings        = rate * decay^(N + 1)
    rate of what is above         = rate                      heads, and norms after the last layer

Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification", section 3.2; Clark et al. 2020,
"ELECTRA", appendix B, whose code has one factor more for everything but the heads. Decoupled weight decay
is part of what is scaled.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

__all__ = ["decayed_by_layer"]

_STACKS = ("stack", "layers")
"""Names under which families keep their layers, stacked along the first axis."""
_BELOW = ("embeddings", "tokens", "positions", "token_types", "query_start")
"""Names of what the first layer reads."""


def decayed_by_layer(optimizer: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """The optimizer, with every update scaled by the depth of its parameter. Parameters are {role: nested dict}."""
    if decay == 1:
        return optimizer

    def scale(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        layers = _layers(updates)
        scaled = jax.tree_util.tree_map_with_path(lambda path, x: x * _factor(_keys(path), x, layers, decay), updates)
        return scaled, state

    return optax.chain(optimizer, optax.GradientTransformation(lambda params: optax.EmptyState(), scale))


def _factor(keys: tuple[str, ...], x: Any, layers: int, decay: float) -> Any:
    """What the update of one parameter is multiplied by; of stacked layers an array along the first axis."""
    if _is_stacked(keys):
        exponents = jnp.arange(x.shape[0], 0, -1)  # counted from the top, where the lowest may be frozen apart
        return (decay**exponents).astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.asarray(decay ** (layers + 1) if keys[1] in _BELOW else 1.0, x.dtype)


def _layers(tree: Any) -> int:
    """The number of layers of the deepest stack."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return max((x.shape[0] for path, x in flat if _is_stacked(_keys(path))), default=0)


def _is_stacked(keys: tuple[str, ...]) -> bool:
    return any(key in _STACKS for key in keys)


def _keys(path: Any) -> tuple[str, ...]:
    """Role, then the names of modules and of the parameter."""
    return tuple(jax.tree_util.keystr(path, simple=True, separator="/").split("/"))
