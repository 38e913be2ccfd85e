"""Parameters as optimizers see them: their logical rank, what is stacked in them, and rules for each of the stack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

__all__ = ["Describe", "Parameter", "decay_mask", "describer", "map_described", "per_layer", "tree_key"]


class Parameter(NamedTuple):
    """A parameter as the rules see it: its logical names and rank without the axes that stack layers and experts."""

    path: tuple[Any, ...]
    names: tuple[str | None, ...]
    rank: int
    stacked: int
    """How many axes in front stack parameters: layers, and the experts of each."""

    @property
    def is_vector(self) -> bool:
        """Biases, norm scales and scalars, which neither decay nor adapt."""
        leaf = str(self.path[-1]) if self.path else ""
        return self.rank < 2 or "bias" in leaf or leaf == "scale"

    @property
    def is_hidden_matrix(self) -> bool:
        """A matrix between layers: named, and no table over a vocabulary or positions."""
        return not (self.is_vector or None in self.names or {"vocab", "positions"} & set(self.names))


Describe = Callable[[Any], Any]
"""Tree of arrays -> the same tree with a `Parameter` in place of each array."""


def describer(logical_axes: Mapping[str, Any]) -> Describe:
    """A function that describes every parameter of a tree by its path in `logical_axes`."""
    flat = {
        tuple(tree_key(k) for k in path): names
        for path, names in jax.tree_util.tree_flatten_with_path(logical_axes, is_leaf=lambda x: isinstance(x, tuple))[0]
    }

    def describe(path: tuple[Any, ...], array: jax.Array) -> Parameter:
        keys = tuple(tree_key(k) for k in path)
        names = flat.get(keys, (None,) * array.ndim)
        stacked = len(names) == array.ndim - 1
        if not stacked and len(names) != array.ndim:
            raise ValueError(f"{keys}: logical axes {names} do not fit the shape {array.shape}.")
        depth = int(stacked)
        for axis in ("layers", "experts"):
            if names and names[0] == axis:
                names, depth = names[1:], depth + 1
        return Parameter(keys, names, array.ndim - depth, depth)

    return lambda tree: jax.tree_util.tree_map_with_path(describe, tree)


def tree_key(entry: Any) -> Any:
    """The plain key of one entry of a tree path."""
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    raise TypeError(f"unknown tree path entry {entry!r}")


def decay_mask(params: Any, logical_axes: Mapping[str, Any]) -> Any:
    """Which parameters decay: True for logical rank >= 2 and neither a `scale` nor any `...bias...` by name.

    Args:
      params: nested dicts of arrays.
      logical_axes: the same nested dicts with a tuple of logical names each; a parameter that is missing there counts
        as one that is not stacked.
    """
    return map_described(describer(logical_axes)(params), lambda p: not p.is_vector)


def map_described(described: Any, function: Callable[[Parameter], Any]) -> Any:
    """`function` of every `Parameter` of a described tree."""
    return jax.tree.map(function, described, is_leaf=lambda x: isinstance(x, Parameter))


def per_layer(transform: optax.GradientTransformation, logical_axes: Mapping[str, Any]) -> optax.GradientTransformation:
    """`transform` applied to every parameter by itself, and to a stacked one layer by layer and expert by expert.

    The state is a tree like the parameters with one state of `transform` at each, its leaves with what is stacked
    leading.
    """
    describe = describer(logical_axes)

    def init(params: Any) -> Any:
        return jax.tree.map(lambda p, d: _mapped(transform.init, d.stacked)(p), params, describe(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("per_layer needs the parameters.")
        tree: Any = jax.tree.structure(updates)
        results = [
            _mapped(transform.update, d.stacked)(u, s, p)
            for u, s, p, d in zip(
                jax.tree.leaves(updates),
                tree.flatten_up_to(state),
                tree.flatten_up_to(params),
                tree.flatten_up_to(describe(updates)),
                strict=True,
            )
        ]
        return tree.unflatten([r[0] for r in results]), tree.unflatten([r[1] for r in results])

    return optax.GradientTransformation(init, update)


def _mapped(function: Callable[..., Any], axes: int) -> Callable[..., Any]:
    """`function` for each element along the first `axes` axes."""
    for _ in range(axes):
        function = jax.vmap(function)
    return function
