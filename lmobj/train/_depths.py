"""How far below the heads a parameter lies, by which fine-tuning tells layers apart.

depth of what is above the layers   0          heads, and norms after the last layer
depth of layer l of N (from 1)      N + 1 - l
depth of the embeddings             N + 1

The two stacks of an encoder-decoder are counted side by side, each from its own top, because every layer of the decoder
reads the encoder's last; embeddings lie below the higher of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lmobj.train._parameters import Parameter, describer
from lmobj.train.roles import HEADS

__all__ = ["Depth", "by_depth", "deepest"]

Depth = int | Int[Array, "..."]
"""Of one parameter; of stacked layers an array along the first axis, its other axes of size 1."""

_BELOW = (
    "embeddings", "tokens", "positions", "relative", "embedding_norm", "token_types", "query_start", "projection",
)  # fmt: skip
"""Names of what the first layer reads, and of the positions that all layers of a stack share."""

_PAIRED = ("encoder", "decoder", "generator", "discriminator")
"""Names of the parts of a model of two stacks, in which are such names."""


def by_depth(function: Callable[[Any, Depth], Any], tree: Any, logical_axes: Mapping[str, Any]) -> Any:
    """`function` of every array of a tree like the parameters, {role: nested dict}, and its depth."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(
        structure, [function(x, d) for x, d in zip(leaves, _depths(tree, logical_axes), strict=True)]
    )


def deepest(tree: Any, logical_axes: Mapping[str, Any]) -> int:
    """The depth of the lowest parameter of a tree of shapes."""
    leaves = zip(jax.tree.leaves(tree), _depths(tree, logical_axes), strict=True)
    return max((depth if isinstance(depth, int) else x.shape[0] for x, depth in leaves), default=0)


def _depths(tree: Any, logical_axes: Mapping[str, Any]) -> list[Depth]:
    described = jax.tree.leaves(describer(logical_axes)(tree), is_leaf=lambda x: isinstance(x, Parameter))
    found = list(zip(jax.tree.leaves(tree), described, strict=True))
    layers = max((x.shape[0] for x, parameter in found if _is_layer(parameter)), default=0)
    return [_depth(parameter, x, layers) for x, parameter in found]


def _depth(parameter: Parameter, x: Any, layers: int) -> Depth:
    if _is_layer(parameter):  # counted from the top, where the lowest may be frozen apart
        return jnp.arange(x.shape[0], 0, -1).reshape(-1, *(1,) * (len(x.shape) - 1))
    names = [name for name in parameter.path[1:3] if name not in _PAIRED]  # path: the role, then names of modules
    return layers + 1 if names and names[0] in _BELOW else 0


def _is_layer(parameter: Parameter) -> bool:
    """Whether it is of the model's layers; blocks of heads are heads."""
    return bool(parameter.stacked) and parameter.path[0] != HEADS
